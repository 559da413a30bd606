//! Who may do what: API keys, their roles, adapters and limits; and which adapter paths a client may name.
//!
//! Keys are kept as SHA-256 only (they are random strings, not passwords, so no slow hash is needed), compared in constant time and
//! never logged: a key's `name` stands for it everywhere. With no key configured the server is open and everyone is an admin.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use polylora_engine::FileSource;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::hub::{Hub, HubError, HubId};

/// What a key's holder may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Generate.
    #[default]
    User,
    /// Generate, and load, unload, pin, flush and abort.
    Admin,
}

/// OpenAI's headers that tell how a key's limits stand (limit, remaining, reset): of requests, then of tokens.
pub const RATE_LIMIT_HEADERS: [[&str; 3]; 2] = [
    [
        "x-ratelimit-limit-requests",
        "x-ratelimit-remaining-requests",
        "x-ratelimit-reset-requests",
    ],
    ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"],
];

/// One `[[keys]]` entry of the keys file.
#[derive(Clone, Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyEntry {
    /// Stands for the key in logs, metrics and fairness.
    pub name: String,
    /// SHA-256 of the key, 64 hex digits (`printf %s "$KEY" | sha256sum`).
    pub sha256: String,
    /// `user` (the default) or `admin`.
    #[serde(default)]
    pub role: Role,
    /// Globs (`*`, `?`) of the adapters that may be used and seen; absent: all.
    pub adapters: Option<Vec<String>>,
    /// Whether the base model may be used; the default is yes.
    #[serde(default = "yes")]
    pub base_model: bool,
    /// Requests a minute; absent: unlimited.
    pub requests_per_minute: Option<u32>,
    /// Prompt and output tokens a minute; absent: unlimited.
    pub tokens_per_minute: Option<u32>,
    /// Requests at once; absent: unlimited.
    pub concurrent_requests: Option<u32>,
}

fn yes() -> bool {
    true
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct KeysFile {
    keys: Vec<KeyEntry>,
}

/// Reads a keys file.
///
/// # Errors
/// A sentence that names the file and what is wrong in it; a key's hash is not repeated.
pub fn read_keys_file(path: &Path) -> Result<Vec<KeyEntry>, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    parse_keys(&text).map_err(|error| format!("{}: {error}", path.display()))
}

/// The keys of a keys file's text.
///
/// # Errors
/// As [`read_keys_file`], without the file's name.
pub fn parse_keys(text: &str) -> Result<Vec<KeyEntry>, String> {
    let file: KeysFile = toml::from_str(text).map_err(|error| error.message().to_owned())?;
    let mut names = std::collections::BTreeSet::new();
    for key in &file.keys {
        if !names.insert(&key.name) {
            return Err(format!("two keys are named {:?}", key.name));
        }
        parse_sha256(&key.sha256).ok_or_else(|| format!("key {:?}: sha256 must be 64 hex digits", key.name))?;
        for (field, limit) in [
            ("requests_per_minute", key.requests_per_minute),
            ("tokens_per_minute", key.tokens_per_minute),
            ("concurrent_requests", key.concurrent_requests),
        ] {
            if limit == Some(0) {
                return Err(format!("key {:?}: {field} must be at least 1", key.name));
            }
        }
    }
    Ok(file.keys)
}

fn parse_sha256(hex: &str) -> Option<[u8; 32]> {
    let mut hash = [0; 32];
    if hex.len() != 64 || !hex.is_ascii() {
        return None;
    }
    for (byte, digits) in hash.iter_mut().zip(hex.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(hash)
}

/// A refusal. `error.rs` turns it into a status and a body.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum AuthError {
    /// No key, or not one of ours: 401.
    #[error("{}", if *.given { "Incorrect API key provided." } else { "You didn't provide an API key. Send it as `Authorization: Bearer YOUR_KEY`." })]
    Unauthorized {
        /// Whether one was given.
        given: bool,
    },
    /// The key's role does not allow this route: 403.
    #[error("This route needs a key with the admin role.")]
    AdminOnly,
    /// The key may not use the base model: 403. (An adapter that it may not use does not exist for it: 404 by the router.)
    #[error("This key may not use the base model; name one of its adapters.")]
    BaseModelForbidden,
    /// A limit of the key is reached: 429 with `Retry-After`.
    #[error("Rate limit reached for {what}: limit {limit}{}. Please try again in {:.1}s.", if *.what == "concurrent requests" { "" } else { " per minute" }, .retry_after.as_secs_f64())]
    RateLimited {
        /// `requests`, `tokens` or `concurrent requests`.
        what: &'static str,
        /// The limit.
        limit: u32,
        /// When it is worth another try.
        retry_after: Duration,
    },
    /// One request asks for more tokens than the key has in a minute: 429 that no retry mends.
    #[error("The request needs up to {needed} tokens, the key's limit is {limit} tokens per minute. Shorten the prompt or max_tokens.")]
    RequestTooLarge {
        /// Prompt and output tokens.
        needed: u64,
        /// Tokens a minute.
        limit: u32,
    },
}

/// Every key of a server.
pub struct Auth {
    keys: Vec<Arc<Key>>,
}

struct Key {
    name: Arc<str>,
    sha256: [u8; 32],
    role: Role,
    adapters: Option<Vec<String>>,
    base_model: bool,
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    concurrent: Option<Concurrent>,
}

struct Concurrent {
    limit: u32,
    running: Mutex<u32>,
}

impl Auth {
    /// No keys: everyone is an admin.
    pub fn open() -> Self {
        Self { keys: Vec::new() }
    }

    /// Keys from the flags and from the keys file.
    ///
    /// `api_key` alone is an admin's, as in SGLang; beside an admin key or a keys file it is a user's.
    pub fn new(api_key: Option<&str>, admin_api_key: Option<&str>, entries: Vec<KeyEntry>) -> Self {
        let simple = |name: &str, key: &str, role| KeyEntry {
            name: name.to_owned(),
            sha256: sha256_hex(key),
            role,
            adapters: None,
            base_model: true,
            requests_per_minute: None,
            tokens_per_minute: None,
            concurrent_requests: None,
        };
        let api_key_role = if admin_api_key.is_none() && entries.is_empty() {
            Role::Admin
        } else {
            Role::User
        };
        let now = Instant::now();
        let keys = [
            admin_api_key.map(|key| simple("admin-api-key", key, Role::Admin)),
            api_key.map(|key| simple("api-key", key, api_key_role)),
        ]
        .into_iter()
        .flatten()
        .chain(entries)
        .map(|entry| Arc::new(Key::new(entry, now)))
        .collect();
        Self { keys }
    }

    /// Whether any key is set.
    pub fn is_enabled(&self) -> bool {
        !self.keys.is_empty()
    }

    /// The identity behind the value of an `Authorization` header.
    ///
    /// # Errors
    /// `Unauthorized`.
    pub fn authenticate(&self, authorization: Option<&str>) -> Result<Identity, AuthError> {
        if self.keys.is_empty() {
            return Ok(Identity { key: None });
        }
        let Some(authorization) = authorization else {
            return Err(AuthError::Unauthorized { given: false });
        };
        let presented = match authorization.split_once(' ') {
            Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => key.trim(),
            _ => return Err(AuthError::Unauthorized { given: true }),
        };
        let presented: [u8; 32] = Sha256::digest(presented.as_bytes()).into();
        // Every key is compared, found or not, so that time tells nothing about where or whether one matched.
        let mut found = None;
        for key in &self.keys {
            if bool::from(key.sha256.ct_eq(&presented)) {
                found = found.or(Some(key));
            }
        }
        found
            .map(|key| Identity { key: Some(key.clone()) })
            .ok_or(AuthError::Unauthorized { given: true })
    }
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.keys.iter().map(|key| &key.name)).finish()
    }
}

/// The SHA-256 of a key, in hex, as the keys file has it.
pub fn sha256_hex(key: &str) -> String {
    Sha256::digest(key.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Key {
    fn new(entry: KeyEntry, now: Instant) -> Self {
        Self {
            name: entry.name.into(),
            sha256: parse_sha256(&entry.sha256).expect("checked by parse_keys, or made by sha256_hex"),
            role: entry.role,
            adapters: entry.adapters,
            base_model: entry.base_model,
            requests: entry.requests_per_minute.map(|limit| Bucket::new(limit, now)),
            tokens: entry.tokens_per_minute.map(|limit| Bucket::new(limit, now)),
            concurrent: entry.concurrent_requests.map(|limit| Concurrent {
                limit,
                running: Mutex::new(0),
            }),
        }
    }
}

/// Who makes a request. Cheap to clone; put into the request's extensions by the layer.
#[derive(Clone)]
pub struct Identity {
    /// `None`: the server has no keys.
    key: Option<Arc<Key>>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Identity").field(&self.name()).finish()
    }
}

impl Identity {
    /// Of a server without keys: may do everything.
    pub fn anonymous() -> Self {
        Self { key: None }
    }

    /// The key's name, for logs and fairness; empty without keys.
    pub fn name(&self) -> Arc<str> {
        self.key.as_ref().map_or_else(|| Arc::from(""), |key| key.name.clone())
    }

    /// Whether admin routes are allowed.
    pub fn is_admin(&self) -> bool {
        self.key.as_ref().is_none_or(|key| key.role == Role::Admin)
    }

    /// Checks that admin routes are allowed.
    ///
    /// # Errors
    /// `AdminOnly`.
    pub fn require_admin(&self) -> Result<(), AuthError> {
        if self.is_admin() { Ok(()) } else { Err(AuthError::AdminOnly) }
    }

    /// Whether an adapter exists for this key: others are answered as unknown names are, and not listed.
    pub fn sees_adapter(&self, name: &str) -> bool {
        self.key
            .as_ref()
            .and_then(|key| key.adapters.as_ref())
            .is_none_or(|globs| globs.iter().any(|glob| glob_matches(glob, name)))
    }

    /// Checks that the base model may be used.
    ///
    /// # Errors
    /// `BaseModelForbidden`.
    pub fn require_base_model(&self) -> Result<(), AuthError> {
        if self.key.as_ref().is_none_or(|key| key.base_model) {
            Ok(())
        } else {
            Err(AuthError::BaseModelForbidden)
        }
    }

    /// Counts a request against the limits and holds a place among the concurrent ones until the permit is dropped.
    ///
    /// # Errors
    /// `RateLimited`; nothing was counted.
    pub fn admit(&self, now: Instant) -> Result<RequestPermit, AuthError> {
        let Some(key) = &self.key else {
            return Ok(RequestPermit { key: None });
        };
        if let Some(concurrent) = &key.concurrent {
            let mut running = concurrent.running.lock();
            if *running >= concurrent.limit {
                return Err(AuthError::RateLimited {
                    what: "concurrent requests",
                    limit: concurrent.limit,
                    // Nobody knows when one of them ends; a second is what SDKs start their back-off with.
                    retry_after: Duration::from_secs(1),
                });
            }
            *running += 1;
        }
        // From here on the permit gives the place back, also on the error below.
        let permit = RequestPermit { key: Some(key.clone()) };
        if let Some(requests) = &key.requests {
            requests.take(1.0, now).map_err(|retry_after| AuthError::RateLimited {
                what: "requests",
                limit: requests.limit,
                retry_after,
            })?;
        }
        Ok(permit)
    }

    /// Reserves tokens for a request: its prompt and the most that it may generate. What it did not use comes back when the
    /// reservation is dropped.
    ///
    /// # Errors
    /// `RateLimited`, or `RequestTooLarge` when no waiting would help.
    pub fn reserve_tokens(&self, prompt_tokens: u64, max_output_tokens: u64, now: Instant) -> Result<TokenReservation, AuthError> {
        let needed = prompt_tokens.saturating_add(max_output_tokens);
        let reservation = TokenReservation {
            key: self.key.clone().filter(|key| key.tokens.is_some()),
            reserved: needed,
            used: prompt_tokens.into(),
        };
        if let Some(tokens) = reservation.key.as_ref().and_then(|key| key.tokens.as_ref()) {
            if needed > u64::from(tokens.limit) {
                let limit = tokens.limit;
                reservation.forget();
                return Err(AuthError::RequestTooLarge { needed, limit });
            }
            if let Err(retry_after) = tokens.take(needed as f64, now) {
                let limit = tokens.limit;
                reservation.forget();
                return Err(AuthError::RateLimited {
                    what: "tokens",
                    limit,
                    retry_after,
                });
            }
        }
        Ok(reservation)
    }

    /// OpenAI's `x-ratelimit-*` headers for this key, as they stand.
    pub fn rate_limit_headers(&self, now: Instant) -> Vec<(&'static str, String)> {
        let Some(key) = &self.key else { return Vec::new() };
        let mut headers = Vec::new();
        for (bucket, [limit, remaining, reset]) in [&key.requests, &key.tokens].into_iter().zip(RATE_LIMIT_HEADERS) {
            if let Some(bucket) = bucket {
                let (left, until_full) = bucket.state(now);
                headers.push((limit, bucket.limit.to_string()));
                headers.push((remaining, (left.floor() as u64).to_string()));
                headers.push((reset, openai_duration(until_full)));
            }
        }
        headers
    }
}

/// One request's place among its key's concurrent ones; given back on drop.
pub struct RequestPermit {
    key: Option<Arc<Key>>,
}

impl Drop for RequestPermit {
    fn drop(&mut self) {
        if let Some(concurrent) = self.key.as_ref().and_then(|key| key.concurrent.as_ref()) {
            *concurrent.running.lock() -= 1;
        }
    }
}

/// Tokens taken from a key's minute in advance; what was not used goes back on drop.
pub struct TokenReservation {
    key: Option<Arc<Key>>,
    reserved: u64,
    used: std::sync::atomic::AtomicU64,
}

impl TokenReservation {
    /// Counts output tokens as used.
    pub fn use_tokens(&self, tokens: u64) {
        self.used.fetch_add(tokens, std::sync::atomic::Ordering::Relaxed);
    }

    fn forget(mut self) {
        self.key = None;
    }
}

impl Drop for TokenReservation {
    fn drop(&mut self) {
        if let Some(tokens) = self.key.as_ref().and_then(|key| key.tokens.as_ref()) {
            tokens.give_back(self.reserved.saturating_sub(*self.used.get_mut()) as f64);
        }
    }
}

/// A token bucket: holds a minute's worth, refills steadily.
struct Bucket {
    limit: u32,
    state: Mutex<(f64, Instant)>,
}

impl Bucket {
    fn new(limit: u32, now: Instant) -> Self {
        Self {
            limit,
            state: Mutex::new((f64::from(limit), now)),
        }
    }

    fn refill(&self, state: &mut (f64, Instant), now: Instant) {
        let elapsed = now.saturating_duration_since(state.1).as_secs_f64();
        state.0 = (state.0 + elapsed * f64::from(self.limit) / 60.0).min(f64::from(self.limit));
        state.1 = state.1.max(now);
    }

    /// `Err`: how long until it can be had.
    fn take(&self, amount: f64, now: Instant) -> Result<(), Duration> {
        let mut state = self.state.lock();
        self.refill(&mut state, now);
        if state.0 + 1e-9 >= amount {
            state.0 -= amount;
            Ok(())
        } else {
            Err(Duration::from_secs_f64((amount - state.0) * 60.0 / f64::from(self.limit)))
        }
    }

    fn give_back(&self, amount: f64) {
        let mut state = self.state.lock();
        state.0 = (state.0 + amount).min(f64::from(self.limit));
    }

    /// What is left, and how long until it is full.
    fn state(&self, now: Instant) -> (f64, Duration) {
        let mut state = self.state.lock();
        self.refill(&mut state, now);
        let missing = f64::from(self.limit) - state.0;
        (state.0, Duration::from_secs_f64(missing * 60.0 / f64::from(self.limit)))
    }
}

/// `1s`, `6m0s`, `17ms`, as OpenAI writes durations.
fn openai_duration(duration: Duration) -> String {
    let millis = duration.as_millis();
    match millis {
        0..1000 => format!("{millis}ms"),
        1000..60_000 => format!("{}s", millis.div_ceil(1000)),
        _ => format!("{}m{}s", millis / 60_000, millis % 60_000 / 1000),
    }
}

/// `*` stands for any characters, `?` for one; the whole name must match.
fn glob_matches(glob: &str, name: &str) -> bool {
    let (glob, name): (Vec<char>, Vec<char>) = (glob.chars().collect(), name.chars().collect());
    let (mut g, mut n) = (0, 0);
    // Where to go back to: the last star, and the first character that it has not swallowed yet.
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match glob.get(g) {
            Some('*') => {
                star = Some((g, n));
                g += 1;
            }
            Some(&c) if c == '?' || c == name[n] => {
                g += 1;
                n += 1;
            }
            _ => match &mut star {
                Some((star_g, star_n)) => {
                    *star_n += 1;
                    (g, n) = (*star_g + 1, *star_n);
                }
                None => return false,
            },
        }
    }
    glob[g..].iter().all(|&c| c == '*')
}

/// Why an adapter's path from a client is refused. `NotFound`, `Forbidden` and the Hub's own reasons are a client's mistakes (400, 403, 404).
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Outside what is allowed.
    #[error("lora_path {path:?} is not under an allowed root; the server's --lora-root and --lora-hub-org say what is")]
    Forbidden {
        /// As given.
        path: String,
    },
    /// A file of the folder is a link that leaves the allowed roots.
    #[error("lora_path {path:?}: {file} is a link out of the allowed roots")]
    LinkOut {
        /// As given.
        path: String,
        /// The file.
        file: String,
    },
    /// No such folder, and not the form of a Hub id.
    #[error("lora_path {path:?} is neither a folder nor org/name on the Hub")]
    NotFound {
        /// As given.
        path: String,
    },
    /// No adapter of this name is in the binary.
    #[error("{path:?}: the embedded adapters are {}", .known.join(", "))]
    UnknownEmbedded {
        /// As given.
        path: String,
        /// What there is.
        known: Vec<String>,
    },
    /// The Hub refused or could not be reached.
    #[error(transparent)]
    Hub(#[from] HubError),
}

/// Where adapters may come from, and how a `lora_path` becomes files.
pub struct AdapterSources {
    hub: Hub,
    policy: SourcePolicy,
}

/// Which paths clients may name. Paths given at start by the operator are not limited.
#[derive(Clone, Debug)]
pub enum SourcePolicy {
    /// Any folder and any repository.
    Any,
    /// Folders under these roots (canonical) and repositories of these organisations (`*` is all).
    Only {
        /// Canonical folders.
        roots: Vec<PathBuf>,
        /// Organisations of the Hub.
        hub_orgs: Vec<String>,
    },
}

impl SourcePolicy {
    /// The policy that the flags ask for. With neither roots nor organisations given, clients may name any path only if they
    /// can be trusted with it: the server listens on the loopback interface, or asks for keys (loading is then the admin's).
    ///
    /// # Errors
    /// A root that is no folder.
    pub fn new(roots: &[PathBuf], hub_orgs: &[String], clients_are_trusted: bool) -> Result<Self, String> {
        if roots.is_empty() && hub_orgs.is_empty() && clients_are_trusted {
            return Ok(Self::Any);
        }
        let roots = roots
            .iter()
            .map(|root| {
                let canonical = root.canonicalize().map_err(|error| format!("--lora-root {}: {error}", root.display()))?;
                if canonical.is_dir() {
                    Ok(canonical)
                } else {
                    Err(format!("--lora-root {}: not a folder", root.display()))
                }
            })
            .collect::<Result<_, String>>()?;
        Ok(Self::Only {
            roots,
            hub_orgs: hub_orgs.to_vec(),
        })
    }
}

/// The prefix of adapters that the binary carries.
pub const EMBEDDED_PREFIX: &str = "demo:";

impl AdapterSources {
    /// Sources with a Hub client and a policy for clients.
    pub fn new(hub: Hub, policy: SourcePolicy) -> Self {
        Self { hub, policy }
    }

    /// The files of a `lora_path` that a client sent: a folder under an allowed root, `org/name[@revision]` of an allowed
    /// organisation, or `demo:NAME`. Downloads if need be: blocks; call it on a thread that may.
    ///
    /// # Errors
    /// See [`SourceError`]. What lies outside the roots is refused alike whether it exists or not.
    pub fn resolve_from_client(&self, path: &str) -> Result<FileSource, SourceError> {
        match &self.policy {
            SourcePolicy::Any => self.resolve_trusted(path),
            SourcePolicy::Only { roots, hub_orgs } => self.resolve_limited(path, roots, hub_orgs),
        }
    }

    /// The same without limits, for paths from the command line.
    ///
    /// # Errors
    /// `NotFound`, `UnknownEmbedded`, `Hub`.
    pub fn resolve_trusted(&self, path: &str) -> Result<FileSource, SourceError> {
        if let Some(embedded) = resolve_embedded(path) {
            return embedded;
        }
        // Local folders first: a folder named like a repository is what was meant by someone who has it.
        if Path::new(path).is_dir() {
            return Ok(FileSource::Directory(path.into()));
        }
        let id = hub_id(path).ok_or_else(|| SourceError::NotFound { path: path.to_owned() })?;
        Ok(FileSource::Directory(self.hub.fetch_adapter(&id)?))
    }

    fn resolve_limited(&self, path: &str, roots: &[PathBuf], hub_orgs: &[String]) -> Result<FileSource, SourceError> {
        if let Some(embedded) = resolve_embedded(path) {
            return embedded;
        }
        if path.is_empty() {
            return Err(SourceError::Forbidden { path: path.to_owned() });
        }
        let allowed = |canonical: &Path| roots.iter().any(|root| canonical.starts_with(root));
        // A relative path is looked up under each root, then from where the server runs.
        let candidates = roots.iter().map(|root| root.join(path)).chain([PathBuf::from(path)]);
        let found = candidates
            .filter_map(|candidate| candidate.canonicalize().ok())
            .find(|canonical| allowed(canonical) && canonical.is_dir());
        if let Some(directory) = found {
            check_links(path, &directory, allowed)?;
            return Ok(FileSource::Directory(directory));
        }
        match hub_id(path) {
            Some(id) if hub_orgs.iter().any(|org| org == "*" || org == id.org()) => Ok(FileSource::Directory(self.hub.fetch_adapter(&id)?)),
            _ => Err(SourceError::Forbidden { path: path.to_owned() }),
        }
    }
}

/// The Hub id that a path stands for; AIBrix's `huggingface://` prefix is taken off.
fn hub_id(path: &str) -> Option<HubId> {
    path.strip_prefix("huggingface://").unwrap_or(path).parse().ok()
}

fn resolve_embedded(path: &str) -> Option<Result<FileSource, SourceError>> {
    let name = path.strip_prefix(EMBEDDED_PREFIX)?;
    let adapters = crate::demo::ADAPTERS;
    Some(
        adapters
            .iter()
            .find(|adapter| adapter.name == name)
            .map(|adapter| FileSource::Embedded(adapter.files))
            .ok_or_else(|| SourceError::UnknownEmbedded {
                path: path.to_owned(),
                known: adapters.iter().map(|adapter| format!("{EMBEDDED_PREFIX}{}", adapter.name)).collect(),
            }),
    )
}

/// Refuses a folder of which a file is a link out of what is allowed.
fn check_links(path: &str, directory: &Path, allowed: impl Fn(&Path) -> bool) -> Result<(), SourceError> {
    let not_found = || SourceError::NotFound { path: path.to_owned() };
    for entry in std::fs::read_dir(directory).map_err(|_| not_found())? {
        let entry = entry.map_err(|_| not_found())?;
        let is_link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
        if is_link && !entry.path().canonicalize().is_ok_and(|target| allowed(&target)) {
            return Err(SourceError::LinkOut {
                path: path.to_owned(),
                file: entry.file_name().to_string_lossy().into_owned(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn keys_file(fields: &str) -> Auth {
        let text = format!("[[keys]]\nname = \"team\"\nsha256 = \"{}\"\n{fields}", sha256_hex("sk-team"));
        Auth::new(None, None, parse_keys(&text).unwrap())
    }

    fn team(fields: &str) -> Identity {
        keys_file(fields).authenticate(Some("Bearer sk-team")).unwrap()
    }

    #[test]
    fn without_keys_everyone_is_admin() {
        let identity = Auth::open().authenticate(None).unwrap();
        assert!(identity.is_admin() && identity.sees_adapter("any"));
        assert_eq!(&*identity.name(), "");
        identity.require_base_model().unwrap();
    }

    #[test]
    fn a_missing_or_wrong_key_is_refused() {
        let auth = Auth::new(Some("sk-1"), None, Vec::new());
        let refused = |header| auth.authenticate(header).unwrap_err();
        assert_eq!(refused(None), AuthError::Unauthorized { given: false });
        for header in ["Bearer sk-2", "Bearer sk-11", "Bearer ", "Basic sk-1", "sk-1"] {
            assert_eq!(refused(Some(header)), AuthError::Unauthorized { given: true }, "{header}");
        }
        for header in ["Bearer sk-1", "bearer  sk-1 "] {
            assert_eq!(&*auth.authenticate(Some(header)).unwrap().name(), "api-key", "{header}");
        }
    }

    #[test]
    fn the_api_key_is_an_admin_only_where_no_other_admin_can_be() {
        let is_admin = |auth: Auth, key: &str| auth.authenticate(Some(&format!("Bearer {key}"))).unwrap().is_admin();
        assert!(is_admin(Auth::new(Some("u"), None, Vec::new()), "u"));
        assert!(!is_admin(Auth::new(Some("u"), Some("a"), Vec::new()), "u"));
        assert!(is_admin(Auth::new(Some("u"), Some("a"), Vec::new()), "a"));
        assert_eq!(team("").require_admin(), Err(AuthError::AdminOnly));
        assert!(team("role = \"admin\"").is_admin());
    }

    #[test]
    fn a_key_sees_only_its_adapters() {
        let identity = team("adapters = [\"team-?-*\", \"shared\"]\nbase_model = false");
        for (name, seen) in [
            ("team-a-sql", true),
            ("team-a-", true),
            ("team-ab-sql", false),
            ("shared", true),
            ("shared2", false),
            ("", false),
        ] {
            assert_eq!(identity.sees_adapter(name), seen, "{name}");
        }
        assert_eq!(identity.require_base_model(), Err(AuthError::BaseModelForbidden));
    }

    #[test]
    fn globs() {
        for (glob, name, matches) in [
            ("*", "", true),
            ("a*b*c", "aXbYbZc", true),
            ("a*b*c", "aXbYbZ", false),
            ("*.v1", "x.v1", true),
            ("?", "é", true),
            ("?", "", false),
            ("a**", "a", true),
        ] {
            assert_eq!(glob_matches(glob, name), matches, "{glob} {name}");
        }
    }

    #[test]
    fn requests_a_minute_are_limited_and_come_back_steadily() {
        let identity = team("requests_per_minute = 2");
        let start = Instant::now() + SECOND;
        drop(identity.admit(start).unwrap());
        drop(identity.admit(start).unwrap());
        let Err(AuthError::RateLimited { what, limit, retry_after }) = identity.admit(start) else {
            panic!("a third request within the minute is refused")
        };
        assert_eq!((what, limit), ("requests", 2));
        assert!((retry_after.as_secs_f64() - 30.0).abs() < 0.01, "{retry_after:?}");
        assert!(identity.admit(start + retry_after - SECOND).is_err());
        assert!(identity.admit(start + retry_after).is_ok());
    }

    #[test]
    fn a_place_among_the_concurrent_requests_is_given_back() {
        let identity = team("concurrent_requests = 1\nrequests_per_minute = 1");
        let start = Instant::now() + SECOND;
        let first = identity.admit(start).unwrap();
        assert!(matches!(
            identity.admit(start),
            Err(AuthError::RateLimited {
                what: "concurrent requests",
                ..
            })
        ));
        drop(first);
        // The place is free again, but the minute's request is spent; that refusal gives its place back, too.
        for _ in 0..2 {
            assert!(matches!(identity.admit(start), Err(AuthError::RateLimited { what: "requests", .. })));
        }
        assert!(identity.admit(start + 60 * SECOND).is_ok());
    }

    #[test]
    fn unused_tokens_go_back() {
        let identity = team("tokens_per_minute = 100");
        let start = Instant::now() + SECOND;
        let reservation = identity.reserve_tokens(20, 70, start).unwrap();
        assert!(matches!(
            identity.reserve_tokens(5, 6, start),
            Err(AuthError::RateLimited { what: "tokens", .. })
        ));
        reservation.use_tokens(10);
        drop(reservation);
        let headers = identity.rate_limit_headers(start);
        let header = |name| headers.iter().find(|header| header.0 == name).map(|header| header.1.as_str());
        assert_eq!(header("x-ratelimit-limit-tokens"), Some("100"));
        assert_eq!(header("x-ratelimit-remaining-tokens"), Some("70"));
        assert_eq!(header("x-ratelimit-reset-tokens"), Some("18s"));
        assert_eq!(header("x-ratelimit-limit-requests"), None);
        assert_eq!(
            identity.reserve_tokens(50, 51, start).err(),
            Some(AuthError::RequestTooLarge { needed: 101, limit: 100 })
        );
        assert!(identity.reserve_tokens(50, 20, start).is_ok());
    }

    #[test]
    fn durations_are_written_as_openai_does() {
        for (millis, text) in [(0, "0ms"), (17, "17ms"), (1001, "2s"), (59_999, "60s"), (360_000, "6m0s")] {
            assert_eq!(openai_duration(Duration::from_millis(millis)), text);
        }
    }

    #[test]
    fn a_bad_keys_file_is_refused_with_the_reason() {
        let entry = |fields: &str| format!("[[keys]]\nname = \"a\"\n{fields}");
        let hash = format!("sha256 = \"{}\"\n", sha256_hex("k"));
        for (text, reason) in [
            (entry("sha256 = \"abc\""), "64 hex digits"),
            (entry(&format!("{hash}rolle = \"admin\"")), "unknown field `rolle`"),
            (entry(&format!("{hash}role = \"root\"")), "unknown variant `root`"),
            (entry(&format!("{hash}tokens_per_minute = 0")), "tokens_per_minute must be at least 1"),
            (format!("{0}{0}", entry(&hash)), "two keys are named"),
        ] {
            let error = parse_keys(&text).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn no_key_is_ever_shown() {
        let auth = keys_file("");
        let identity = auth.authenticate(Some("Bearer sk-team")).unwrap();
        assert_eq!(format!("{auth:?} {identity:?}"), "[\"team\"] Identity(\"team\")");
    }

    mod sources {
        use std::{fs, os::unix::fs::symlink};

        use super::super::*;
        use crate::hub::HubConfig;

        /// Sources that allow `root/` (and the organisation `good-org`, offline), with `root/adapter`, `outside/adapter`.
        fn limited() -> (tempfile::TempDir, AdapterSources) {
            let folder = tempfile::tempdir().unwrap();
            for adapter in ["root/adapter", "outside/adapter"] {
                fs::create_dir_all(folder.path().join(adapter)).unwrap();
                fs::write(folder.path().join(adapter).join("adapter_config.json"), "{}").unwrap();
            }
            let hub = Hub::new(HubConfig {
                endpoint: Some("http://127.0.0.1:9".into()),
                cache_dir: folder.path().join("cache"),
                token: None,
                offline: true,
                progress: false,
            });
            let policy = SourcePolicy::new(&[folder.path().join("root")], &["good-org".into()], true).unwrap();
            (folder, AdapterSources::new(hub, policy))
        }

        fn path_in(folder: &tempfile::TempDir, path: &str) -> String {
            folder.path().join(path).to_str().unwrap().to_owned()
        }

        #[test]
        fn a_folder_under_a_root_is_found_absolute_and_relative() {
            let (folder, sources) = limited();
            let expected = folder.path().join("root/adapter").canonicalize().unwrap();
            for path in ["adapter", "./adapter", &path_in(&folder, "root/adapter")] {
                let found = sources.resolve_from_client(path).unwrap();
                assert_eq!(found.directory(), Some(expected.as_path()), "{path}");
            }
        }

        #[test]
        fn what_lies_outside_is_refused_alike_whether_it_exists() {
            let (folder, sources) = limited();
            for path in [
                "../outside/adapter",
                "adapter/../../outside/adapter",
                &path_in(&folder, "outside/adapter"),
                &path_in(&folder, "outside/missing"),
                "/etc",
                "/does/not/exist",
                "",
                "evil-org/adapter",
            ] {
                let error = sources.resolve_from_client(path).unwrap_err();
                assert!(matches!(error, SourceError::Forbidden { .. }), "{path}: {error}");
            }
        }

        #[test]
        fn links_out_of_the_root_are_refused() {
            let (folder, sources) = limited();
            symlink(folder.path().join("outside/adapter"), folder.path().join("root/linked")).unwrap();
            let error = sources.resolve_from_client("linked").unwrap_err();
            assert!(matches!(error, SourceError::Forbidden { .. }), "{error}");

            let secret = folder.path().join("outside/secret");
            fs::write(&secret, "secret").unwrap();
            symlink(&secret, folder.path().join("root/adapter/adapter_model.safetensors")).unwrap();
            let error = sources.resolve_from_client("adapter").unwrap_err();
            assert!(error.to_string().contains("adapter_model.safetensors is a link out"), "{error}");
        }

        #[test]
        fn only_allowed_organisations_reach_the_hub() {
            let (_folder, sources) = limited();
            for path in ["good-org/adapter", "huggingface://good-org/adapter"] {
                let error = sources.resolve_from_client(path).unwrap_err();
                assert!(matches!(error, SourceError::Hub(HubError::NotCached { .. })), "{path}: {error}");
            }
        }

        #[test]
        fn clients_may_name_any_path_only_where_they_are_trusted() {
            assert!(matches!(SourcePolicy::new(&[], &[], true), Ok(SourcePolicy::Any)));
            assert!(matches!(SourcePolicy::new(&[], &[], false), Ok(SourcePolicy::Only { roots, .. }) if roots.is_empty()));
            let error = SourcePolicy::new(&["/does/not/exist".into()], &[], true).unwrap_err();
            assert!(error.starts_with("--lora-root /does/not/exist: "), "{error}");
        }
    }
}
