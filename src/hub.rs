//! Models and adapters by `org/name[@revision]` from the Hugging Face Hub.
//!
//! Files land in the Hub's own cache layout (`HF_HOME`), shared with every other tool on the machine. Only what is needed is
//! fetched, and never a pickle. All files of one fetch belong to one commit. Calls block: run them on a thread that may.

use std::{fmt, path::PathBuf, str::FromStr};

#[cfg(feature = "hub")]
mod transfer;

/// A repository of the Hub, and which of its revisions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubId {
    org: String,
    name: String,
    revision: Option<String>,
}

impl HubId {
    /// The part before the slash.
    pub fn org(&self) -> &str {
        &self.org
    }

    /// `org/name`.
    pub fn repo(&self) -> String {
        format!("{}/{}", self.org, self.name)
    }

    /// A branch, a tag or a commit; `main` unless given.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.org, self.name)?;
        self.revision.as_ref().map_or(Ok(()), |revision| write!(f, "@{revision}"))
    }
}

impl FromStr for HubId {
    type Err = String;

    /// Accepts what the Hub accepts as names, so that nothing which could leave the cache folder gets through.
    fn from_str(text: &str) -> Result<Self, String> {
        let (repo, revision) = match text.split_once('@') {
            Some((repo, revision)) => (repo, Some(revision)),
            None => (text, None),
        };
        let (org, name) = repo.split_once('/').ok_or_else(|| format!("{text:?} is not org/name[@revision]"))?;
        let is_name = |part: &str| {
            !part.is_empty()
                && part.len() <= 96
                && !part.starts_with(['.', '-'])
                && !part.ends_with(['.', '-'])
                && !part.contains("..")
                && !part.contains("--")
                && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
        };
        let is_revision = |revision: &str| {
            revision.len() <= 255
                && revision.split('/').all(|part| !part.is_empty() && !part.starts_with('.'))
                && !revision.contains("..")
                && revision
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/' | '+'))
        };
        if !is_name(org) || !is_name(name) || !revision.is_none_or(is_revision) {
            return Err(format!("{text:?} is not org/name[@revision]"));
        }
        Ok(Self {
            org: org.to_owned(),
            name: name.to_owned(),
            revision: revision.map(str::to_owned),
        })
    }
}

/// Where the Hub is and how to speak to it; `config.rs` reads it from the usual variables.
#[derive(Clone)]
pub struct HubConfig {
    /// `HF_ENDPOINT`; `None` is the Hub itself.
    pub endpoint: Option<String>,
    /// `HF_HUB_CACHE`, or `hub` under `HF_HOME`.
    pub cache_dir: PathBuf,
    /// `HF_TOKEN`, or the `token` file of `HF_HOME`.
    pub token: Option<String>,
    /// `HF_HUB_OFFLINE`: only what is in the cache.
    pub offline: bool,
    /// Show progress bars.
    pub progress: bool,
}

impl fmt::Debug for HubConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubConfig")
            .field("endpoint", &self.endpoint)
            .field("cache_dir", &self.cache_dir)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("offline", &self.offline)
            .finish_non_exhaustive()
    }
}

/// Why files could not be had.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// 404.
    #[error("{id}: no such repository or revision on {endpoint}")]
    NotFound {
        /// What was asked for.
        id: String,
        /// Where.
        endpoint: String,
    },
    /// 401 or 403. The Hub answers so for private, gated and missing repositories alike.
    #[error("{id}: {endpoint} denies access ({status}): the repository is private, gated or does not exist; {hint}")]
    Denied {
        /// What was asked for.
        id: String,
        /// Where.
        endpoint: String,
        /// 401 or 403.
        status: u16,
        /// What to do.
        hint: &'static str,
    },
    /// A file that is needed is not in the repository.
    #[error("{id} has no {file}{hint}")]
    MissingFile {
        /// What was asked for.
        id: String,
        /// The file.
        file: &'static str,
        /// Why, if it can be told.
        hint: &'static str,
    },
    /// Not in the cache, and the Hub may not be asked.
    #[error("{id} is not in the cache at {cache} (looked for {file}), and HF_HUB_OFFLINE is set")]
    NotCached {
        /// What was asked for.
        id: String,
        /// The cache.
        cache: String,
        /// The first file that is missing.
        file: String,
    },
    /// The network, the disk, a damaged answer.
    #[error("{id} from {endpoint}: {reason}")]
    Failed {
        /// What was asked for.
        id: String,
        /// Where.
        endpoint: String,
        /// What went wrong.
        reason: String,
    },
    /// Built without the client.
    #[error("{id}: this binary was built without the `hub` feature; give a folder")]
    NotBuilt {
        /// What was asked for.
        id: String,
    },
}

/// What is fetched of a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Model,
    Adapter,
}

impl Wanted {
    fn wants(self, file: &str) -> bool {
        match self {
            Self::Model => match file {
                "config.json"
                | "generation_config.json"
                | "tokenizer.json"
                | "tokenizer_config.json"
                | "special_tokens_map.json"
                | "chat_template.jinja"
                | "chat_template.json"
                | "model.safetensors.index.json" => true,
                // Not `consolidated.safetensors` and the like: the same weights again under another naming.
                other => other.starts_with("model") && other.ends_with(".safetensors"),
            },
            // Its tokenizer, too: an adapter may have tokens and a chat template of its own.
            Self::Adapter => matches!(
                file,
                "adapter_config.json"
                    | "adapter_model.safetensors"
                    | "tokenizer.json"
                    | "tokenizer_config.json"
                    | "special_tokens_map.json"
                    | "added_tokens.json"
                    | "chat_template.jinja"
                    | "chat_template.json"
            ),
        }
    }

    /// Files without which the rest is of no use: any one of each group.
    fn needs(self) -> &'static [&'static [&'static str]] {
        match self {
            Self::Model => &[
                &["config.json"],
                &["tokenizer.json"],
                &["model.safetensors", "model.safetensors.index.json"],
            ],
            Self::Adapter => &[&["adapter_config.json"], &["adapter_model.safetensors"]],
        }
    }

    /// The first group of which `has` knows no file.
    fn missing(self, has: impl Fn(&str) -> bool) -> Option<&'static str> {
        self.needs()
            .iter()
            .find(|group| !group.iter().any(|file| has(file)))
            .map(|group| group[0])
    }
}

/// A client of the Hub.
#[derive(Clone, Debug)]
pub struct Hub {
    config: HubConfig,
}

impl Hub {
    /// A client; nothing is contacted yet.
    pub fn new(config: HubConfig) -> Self {
        Self { config }
    }

    /// Fetches a model's configuration, tokenizer and safetensors; the folder that holds them.
    ///
    /// # Errors
    /// See [`HubError`].
    pub fn fetch_model(&self, id: &HubId) -> Result<PathBuf, HubError> {
        self.fetch(id, Wanted::Model)
    }

    /// Fetches an adapter's configuration, safetensors and tokenizer files, if it has any; the folder that holds them.
    ///
    /// # Errors
    /// See [`HubError`].
    pub fn fetch_adapter(&self, id: &HubId) -> Result<PathBuf, HubError> {
        self.fetch(id, Wanted::Adapter)
    }

    #[cfg(not(feature = "hub"))]
    fn fetch(&self, id: &HubId, _wanted: Wanted) -> Result<PathBuf, HubError> {
        Err(HubError::NotBuilt { id: id.to_string() })
    }
}

#[cfg(feature = "hub")]
mod client {
    use std::{collections::BTreeSet, io::IsTerminal, path::Path};

    use hf_hub::{
        Cache, CacheRepo, Repo, RepoType,
        api::sync::{Api, ApiBuilder, ApiError},
    };
    use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

    use super::{
        Hub, HubError, HubId, PathBuf, Wanted,
        transfer::{Progress, Transfer, TransferError},
    };

    impl Hub {
        pub(super) fn fetch(&self, id: &HubId, wanted: Wanted) -> Result<PathBuf, HubError> {
            if self.config.offline {
                return self.cached(id, wanted).map_err(|file| HubError::NotCached {
                    id: id.to_string(),
                    cache: self.config.cache_dir.display().to_string(),
                    file,
                });
            }
            match self.download(id, wanted) {
                // A Hub that can't be reached is no reason to stand still with the files at hand.
                Err(HubError::Failed { reason, .. }) if self.cached(id, wanted).is_ok() => {
                    tracing::info!(%id, reason, "the Hub could not be reached; serving the cached copy");
                    self.cached(id, wanted)
                        .map_err(|file| self.failed(id, format!("{file} vanished from the cache")))
                }
                other => other,
            }
        }

        fn download(&self, id: &HubId, wanted: Wanted) -> Result<PathBuf, HubError> {
            let api = self.api().map_err(|error| self.error(id, error))?;
            let named = Repo::with_revision(id.repo(), RepoType::Model, id.revision().to_owned());
            let info = api.repo(named.clone()).info().map_err(|error| self.error(id, error))?;
            if info.sha.is_empty() || !info.sha.chars().all(|c| c.is_ascii_hexdigit()) {
                return Err(self.failed(id, format!("the commit {:?} is no hash", info.sha)));
            }
            let files: BTreeSet<&str> = info
                .siblings
                .iter()
                .map(|sibling| sibling.rfilename.as_str())
                .filter(|file| wanted.wants(file))
                .collect();
            if let Some(file) = wanted.missing(|file| files.contains(file)) {
                let has_pickle = info
                    .siblings
                    .iter()
                    .any(|s| [".bin", ".pt", ".pth"].iter().any(|end| s.rfilename.ends_with(end)));
                return Err(HubError::MissingFile {
                    id: id.to_string(),
                    file,
                    hint: if has_pickle && file.ends_with(".safetensors") {
                        "; it has pickle files only, which are never read: convert it to safetensors"
                    } else {
                        ""
                    },
                });
            }
            // By commit, not by branch: a branch may move between two files.
            let commit = api.repo(Repo::with_revision(id.repo(), RepoType::Model, info.sha.clone()));
            let cache = Cache::new(self.config.cache_dir.clone()).repo(named);
            let snapshot = cache.pointer_path(&info.sha);
            for file in files {
                if !snapshot.join(file).exists() {
                    self.transfer(&commit.url(file), file, &cache, &snapshot)
                        .map_err(|error| self.transfer_error(id, error))?;
                }
            }
            // What offline mode will look for. Written last: it stands for a complete snapshot.
            cache.create_ref(&info.sha).map_err(|error| self.failed(id, error.to_string()))?;
            Ok(snapshot)
        }

        /// One file into the cache, as other tools lay it out: its bytes under `blobs`, a link in the snapshot.
        fn transfer(&self, url: &str, file: &str, cache: &CacheRepo, snapshot: &Path) -> Result<(), TransferError> {
            let transfer = Transfer::new(url, self.config.token.as_deref())?;
            let blob = transfer.fetch(file, &cache.blob_path(""), &self.progress_bar())?;
            std::fs::create_dir_all(snapshot)?;
            let name = blob.file_name().expect("a blob has a name");
            match std::os::unix::fs::symlink(Path::new("../../blobs").join(name), snapshot.join(file)) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
                other => Ok(other?),
            }
        }

        /// The cached snapshot, or the first file that it lacks.
        fn cached(&self, id: &HubId, wanted: Wanted) -> Result<PathBuf, String> {
            let repo = self.config.cache_dir.join(format!("models--{}", id.repo().replace('/', "--")));
            let commit = std::fs::read_to_string(repo.join("refs").join(id.revision())).unwrap_or_else(|_| id.revision().to_owned());
            let snapshot = repo.join("snapshots").join(commit.trim());
            match wanted.missing(|file| snapshot.join(file).exists()) {
                Some(file) => Err(file.to_owned()),
                None => self.first_missing_shard(&snapshot).map_or(Ok(snapshot), Err),
            }
        }

        fn first_missing_shard(&self, snapshot: &Path) -> Option<String> {
            let index = std::fs::read(snapshot.join("model.safetensors.index.json")).ok()?;
            let index: serde_json::Value = serde_json::from_slice(&index).ok()?;
            let shards = index.get("weight_map")?.as_object()?.values().filter_map(|file| file.as_str());
            shards.map(str::to_owned).find(|file| !snapshot.join(file).exists())
        }

        fn api(&self) -> Result<Api, ApiError> {
            let builder = ApiBuilder::from_cache(Cache::new(self.config.cache_dir.clone()))
                .with_token(self.config.token.clone())
                .with_user_agent("polylora", env!("CARGO_PKG_VERSION"))
                .with_retries(2);
            match &self.config.endpoint {
                Some(endpoint) => builder.with_endpoint(endpoint.clone()).build(),
                None => builder.build(),
            }
        }

        /// The endpoint as errors show it.
        fn endpoint(&self) -> String {
            self.config.endpoint.clone().unwrap_or_else(|| "the Hub".to_owned())
        }

        fn progress_bar(&self) -> DownloadBar {
            let visible = self.config.progress && std::io::stderr().is_terminal();
            DownloadBar(if visible {
                ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr())
            } else {
                ProgressBar::hidden()
            })
        }

        fn error(&self, id: &HubId, error: ApiError) -> HubError {
            let status = match &error {
                ApiError::RequestError(request) => match **request {
                    ureq::Error::StatusCode(status) => Some(status),
                    _ => None,
                },
                _ => None,
            };
            self.failed_with(id, status, &error)
        }

        fn transfer_error(&self, id: &HubId, error: TransferError) -> HubError {
            let status = match error {
                TransferError::Status(status) => Some(status),
                _ => None,
            };
            self.failed_with(id, status, &error)
        }

        fn failed_with(&self, id: &HubId, status: Option<u16>, error: &dyn std::fmt::Display) -> HubError {
            let endpoint = self.endpoint();
            match status {
                Some(404) => HubError::NotFound {
                    id: id.to_string(),
                    endpoint,
                },
                Some(status @ (401 | 403)) => HubError::Denied {
                    id: id.to_string(),
                    endpoint,
                    status,
                    hint: if self.config.token.is_some() {
                        "the token in use has no access to it"
                    } else {
                        "set HF_TOKEN to a token with access"
                    },
                },
                _ => self.failed(id, error.to_string()),
            }
        }

        fn failed(&self, id: &HubId, reason: String) -> HubError {
            HubError::Failed {
                id: id.to_string(),
                endpoint: self.endpoint(),
                reason,
            }
        }
    }

    /// One file's download on the terminal.
    struct DownloadBar(ProgressBar);

    impl Progress for DownloadBar {
        fn begin(&self, file: &str, total: u64, here: u64) {
            let style =
                ProgressStyle::with_template("{msg:32} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}").expect("the template is constant");
            self.0.set_style(style);
            self.0.set_length(total);
            self.0.set_position(here);
            self.0.set_message(file.to_owned());
        }

        fn advance(&self, bytes: u64) {
            self.0.inc(bytes);
        }
    }

    impl Drop for DownloadBar {
        fn drop(&mut self) {
            self.0.finish();
        }
    }
}
