//! `--lora-dir`: folders whose subfolders are adapters, registered by name and read at first use; new ones are noticed while serving.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use polylora_engine::{AdapterError, FileSource, LoadRequest, adapter::registry::AdapterRegistry};

use crate::aliases::Aliases;

/// How often the folders are looked at.
const PERIOD: Duration = Duration::from_secs(5);

/// The folders, and the subfolders that have been seen in them.
///
/// A subfolder is registered once, when it is seen first: a name that was unloaded stays unloaded, until its folder has gone and comes
/// again.
pub(super) struct LoraDirs {
    registry: Arc<AdapterRegistry>,
    aliases: Arc<Aliases>,
    directories: Vec<PathBuf>,
    seen: BTreeSet<PathBuf>,
}

impl LoraDirs {
    pub fn new(registry: Arc<AdapterRegistry>, aliases: Arc<Aliases>, directories: Vec<PathBuf>) -> Self {
        Self {
            registry,
            aliases,
            directories,
            seen: BTreeSet::new(),
        }
    }

    /// Registers what is new; the names. Reads folders: not to be called in async code.
    pub fn scan(&mut self) -> Vec<String> {
        let found: BTreeSet<PathBuf> = self.directories.iter().flat_map(|directory| adapter_folders(directory)).collect();
        let added = found.difference(&self.seen).filter_map(|folder| self.register(folder)).collect();
        self.seen = found;
        added
    }

    fn register(&self, folder: &Path) -> Option<String> {
        let name = folder.file_name()?.to_str()?.to_owned();
        // An alias of that name keeps it: its callers would otherwise get another adapter unasked.
        let arriving = self.aliases.arrive(&name);
        let registered = arriving.and_then(|_arriving| {
            self.registry.register(LoadRequest {
                name: name.clone(),
                files: FileSource::Directory(folder.to_owned()),
                source: folder.display().to_string(),
                pinned: false,
                replace: false,
                expected_version: None,
            })
        });
        match registered {
            Ok(()) => Some(name),
            // A name given by --lora-paths, or in two folders: the first counts.
            Err(AdapterError::AlreadyLoaded { .. }) => None,
            Err(error) => {
                tracing::info!(folder = %folder.display(), %error, "a folder of --lora-dir is left out");
                None
            }
        }
    }

    /// Looks at the folders from time to time, for ever.
    pub async fn watch(mut self) {
        if self.directories.is_empty() {
            return std::future::pending().await;
        }
        loop {
            tokio::time::sleep(PERIOD).await;
            let scanned = tokio::task::spawn_blocking(move || {
                let added = self.scan();
                (self, added)
            });
            let Ok((dirs, added)) = scanned.await else {
                // Only a panic or the runtime's end comes here; serving goes on with what is known.
                return std::future::pending().await;
            };
            self = dirs;
            if !added.is_empty() {
                tracing::info!(?added, "new adapters in --lora-dir");
            }
        }
    }
}

/// Subfolders that hold an adapter, in order; none of a folder that can't be read just now.
fn adapter_folders(directory: &Path) -> Vec<PathBuf> {
    let children = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let folders = children
        .map(|child| child.path())
        .filter(|path| path.join("adapter_config.json").is_file());
    folders.collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use polylora_engine::{
        adapter::{LoraLimits, PackedDtype, UnloadMode, registry::RegistryConfig},
        decoder::DecoderConfig,
    };

    use super::*;

    fn add(folder: &Path, name: &str) {
        fs::create_dir_all(folder.join(name)).unwrap();
        fs::write(folder.join(name).join("adapter_config.json"), "{}").unwrap();
    }

    fn dirs(directories: &[&Path]) -> LoraDirs {
        let config = fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/demo/base/config.json")).unwrap();
        let decoder = Arc::new(DecoderConfig::from_json(&config, None).unwrap());
        let config = RegistryConfig {
            base_names: vec!["base".to_owned()],
            ..RegistryConfig::new(LoraLimits::new(PackedDtype::F32))
        };
        let registry = Arc::new(AdapterRegistry::new(config, decoder));
        LoraDirs::new(
            registry,
            Arc::default(),
            directories.iter().map(|directory| directory.to_path_buf()).collect(),
        )
    }

    #[test]
    fn new_folders_are_registered_once_and_unloaded_ones_stay_away() {
        let folder = tempfile::tempdir().unwrap();
        add(folder.path(), "a");
        fs::create_dir(folder.path().join("no-adapter")).unwrap();
        let mut dirs = dirs(&[folder.path()]);
        assert_eq!(dirs.scan(), ["a"]);
        assert!(dirs.scan().is_empty());
        add(folder.path(), "b");
        assert_eq!(dirs.scan(), ["b"]);
        assert!(dirs.registry.info("a").is_some());

        dirs.registry.unload("a", UnloadMode::Drain).unwrap();
        assert!(dirs.scan().is_empty());
        assert!(dirs.registry.info("a").is_none());
        fs::remove_dir_all(folder.path().join("a")).unwrap();
        assert!(dirs.scan().is_empty());
        add(folder.path(), "a");
        assert_eq!(dirs.scan(), ["a"]);
    }

    #[test]
    fn an_alias_keeps_its_name() {
        use crate::aliases::{AliasDefinition, Names, TargetDefinition};
        struct Any;
        impl Names for Any {
            fn base_names(&self) -> &[String] {
                &[]
            }
            fn is_adapter(&self, name: &str) -> bool {
                name == "a"
            }
        }
        let folder = tempfile::tempdir().unwrap();
        add(folder.path(), "a");
        let mut dirs = dirs(&[folder.path()]);
        dirs.scan();
        let target = TargetDefinition {
            adapter: "a".into(),
            weight: 1.0,
        };
        let definition = AliasDefinition {
            name: "b".into(),
            targets: vec![target],
        };
        dirs.aliases.set(&definition, &Any).unwrap();
        add(folder.path(), "b");
        assert!(dirs.scan().is_empty());
        assert!(dirs.registry.info("b").is_none());
    }

    #[test]
    fn names_that_may_not_be_and_names_that_are_taken_are_left_out() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in ["base", "a:b", "a,b", "fine"] {
            add(one.path(), name);
        }
        add(two.path(), "fine");
        add(two.path(), "other");
        let mut dirs = dirs(&[one.path(), two.path(), Path::new("/does/not/exist")]);
        let mut added = dirs.scan();
        added.sort();
        assert_eq!(added, ["fine", "other"]);
    }
}
