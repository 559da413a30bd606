//! Names, versions, leases and the host tier.
//!
//! The registry knows every adapter by name, brings those that are asked for into host memory on a pool of loader threads, and hands
//! out leases. Nothing here blocks the caller: waiting is a future, woken by a loader or by the last lease's `Drop`, and needs no
//! async runtime. What lies on the device is the worker's business; it tells by [`ResidentSet`].
//!
//! Invariants, tested below: a lease counts once, however it is cloned and wherever it is dropped; the sum of leases is zero when all
//! are gone; no more than `max_loaded_loras` adapters have weights here, leased and pinned ones included; a name is registered
//! completely or not at all.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex, RwLock};
use tokio::sync::oneshot;

use super::{
    AdapterError, HostAdapter, ResolvedAdapter, VersionId,
    config::CONFIG_FILE,
    load::{CoverageReport, LoraLimits, load_adapter},
};
use crate::{BoxFuture, decoder::DecoderConfig, files::FileSource, llm::EvictionPolicy};

/// Longest name, in bytes.
const MAX_NAME_BYTES: usize = 256;
/// Names listed in an `Unknown` error; a server may have thousands.
const NAMES_IN_ERROR: usize = 32;
/// A failed load is not tried again for this long; doubled with each failure in a row.
const FIRST_BACK_OFF: Duration = Duration::from_secs(1);
/// The longest such time.
const LONGEST_BACK_OFF: Duration = Duration::from_secs(60);

/// What `load` is asked to do.
#[derive(Clone, Debug)]
pub struct LoadRequest {
    /// The name to register.
    pub name: String,
    /// A folder with `adapter_config.json` and `adapter_model.safetensors`.
    pub files: FileSource,
    /// What to show as its path (the directory, the Hub id, `demo:NAME`).
    pub source: String,
    /// Loaded to the device at once, never evicted.
    pub pinned: bool,
    /// Swap atomically if the name is taken.
    pub replace: bool,
}

/// Where an adapter's weights are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AdapterState {
    /// Known by name; its files are read at first use.
    Registered,
    /// Packed in host memory.
    Host,
    /// Usable by a batch.
    Device,
}

/// What is known of a registered adapter.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct AdapterInfo {
    /// Its name.
    pub name: Arc<str>,
    /// Where it came from.
    pub source: String,
    /// Where its weights are.
    pub state: AdapterState,
    /// Content hash, hex; `None` before the first read.
    pub version: Option<String>,
    /// Largest rank.
    pub max_lora_rank: u32,
    /// Modules it changes (`q_proj`, …), sorted.
    pub target_modules: Vec<String>,
    /// Bytes of its weights.
    pub bytes: usize,
    /// Whether it is pinned.
    pub pinned: bool,
    /// Requests that hold it.
    pub leases: usize,
    /// Requests that asked for it since it was registered.
    pub requests_total: u64,
    /// Coverage, keys without effect, and the like: what `inspect` shows.
    pub report: Option<Arc<CoverageReport>>,
}

/// What unloading found.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct UnloadReport {
    /// The name.
    pub name: String,
    /// Requests that were in flight when the name was forgotten.
    pub waited_for: usize,
    /// How long until the last ended.
    pub waited: Duration,
}

/// One request's hold on an adapter version, from admission to its end. Dropping the last clone of it releases it, exactly once.
/// While it lives the version's weights stay in host memory, whatever happens to the name.
#[derive(Clone)]
pub struct AdapterLease {
    name: Arc<str>,
    weights: Arc<HostAdapter>,
    // Dropped with the lease: counts it down and wakes who waits for zero.
    _hold: Option<Arc<dyn Send + Sync>>,
}

impl std::fmt::Debug for AdapterLease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AdapterLease")
            .field("name", &self.name)
            .field("version", &self.weights.version)
            .finish()
    }
}

impl AdapterLease {
    /// A lease on weights that no registry counts: for tests and benches. `hold` is dropped with the last clone.
    pub fn detached(name: Arc<str>, weights: Arc<HostAdapter>, hold: Option<Arc<dyn Send + Sync>>) -> Self {
        Self { name, weights, _hold: hold }
    }

    /// The name that was asked for.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Content identity: what prefix caching and residency are keyed by.
    pub fn version(&self) -> VersionId {
        self.weights.version
    }

    /// The packed weights.
    pub fn weights(&self) -> &Arc<HostAdapter> {
        &self.weights
    }
}

/// Limits and policies of a registry.
#[derive(Clone, Debug)]
pub struct RegistryConfig {
    /// What an adapter must keep to.
    pub limits: LoraLimits,
    /// Names that the base model is served under: no adapter may have them.
    pub base_names: Vec<String>,
    /// Adapters in host memory; `None` is unbounded.
    pub max_loaded_loras: Option<usize>,
    /// Pinned adapters: `max_loras_per_batch - 1`.
    pub max_pinned: usize,
    /// Which adapter leaves host memory first.
    pub eviction: EvictionPolicy,
    /// Threads that read, check and pack.
    pub loader_threads: usize,
    /// Loads that may wait for a thread.
    pub max_queued_loads: usize,
    /// Folders whose subfolders are adapters, found by name at first use.
    pub adapter_dirs: Vec<PathBuf>,
}

impl RegistryConfig {
    /// A loader thread for each four cores, two to eight of them; LRU, no bound on host memory, seven pins.
    pub fn new(limits: LoraLimits) -> Self {
        Self {
            limits,
            base_names: Vec::new(),
            max_loaded_loras: None,
            max_pinned: 7,
            eviction: EvictionPolicy::Lru,
            loader_threads: std::thread::available_parallelism().map_or(2, |cores| (cores.get() / 4).clamp(2, 8)),
            max_queued_loads: 1024,
            adapter_dirs: Vec::new(),
        }
    }
}

/// A snapshot of the registry's counters and gauges. Counters only grow.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct RegistryStats {
    /// Names.
    pub registered: usize,
    /// Names whose weights are in host memory.
    pub loaded: usize,
    /// Names that are pinned.
    pub pinned: usize,
    /// Leases, those on forgotten names included.
    pub leases: usize,
    /// Bytes of weights in host memory; what several names share counts once, what only leases hold counts too.
    pub host_bytes: usize,
    /// Loads that wait for a thread or run.
    pub loading: usize,
    /// Loads that succeeded.
    pub loads_total: u64,
    /// Loads that failed.
    pub load_failures_total: u64,
    /// Time spent in loads.
    pub load_seconds_total: f64,
    /// Adapters that left host memory for others.
    pub evictions_total: u64,
    /// Acquisitions that found the weights in host memory.
    pub hits_total: u64,
    /// Acquisitions that had to wait for a load.
    pub misses_total: u64,
}

/// Which versions are usable on the device. The worker writes, the registry reads.
#[derive(Debug, Default)]
pub struct ResidentSet {
    versions: RwLock<HashSet<VersionId>>,
}

impl ResidentSet {
    /// A version became usable.
    pub fn insert(&self, version: VersionId) {
        self.versions.write().insert(version);
    }

    /// A version left.
    pub fn remove(&self, version: &VersionId) {
        self.versions.write().remove(version);
    }

    /// Whether a version is usable.
    pub fn contains(&self, version: &VersionId) -> bool {
        self.versions.read().contains(version)
    }

    /// How many are usable.
    pub fn len(&self) -> usize {
        self.versions.read().len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.versions.read().is_empty()
    }
}

/// Counts the leases on one name's one version and wakes who waits for the last to end.
#[derive(Default)]
struct Hold {
    leases: AtomicUsize,
    waiters: Mutex<Vec<oneshot::Sender<()>>>,
}

impl Hold {
    fn count(&self) -> usize {
        self.leases.load(Ordering::Acquire)
    }

    /// Resolves when no lease is left.
    async fn released(&self) {
        loop {
            let receiver = {
                let mut waiters = self.waiters.lock();
                // Checked under the lock that the last lease takes to wake: no wake-up is lost.
                if self.count() == 0 {
                    return;
                }
                let (sender, receiver) = oneshot::channel();
                waiters.push(sender);
                receiver
            };
            // An error means that the sender was dropped after its message, or with the hold: look again.
            let _ = receiver.await;
        }
    }
}

/// One lease's part in a [`Hold`].
struct HoldGuard {
    hold: Arc<Hold>,
    total: Arc<AtomicUsize>,
}

impl HoldGuard {
    fn new(hold: &Arc<Hold>, total: &Arc<AtomicUsize>) -> Self {
        hold.leases.fetch_add(1, Ordering::AcqRel);
        total.fetch_add(1, Ordering::AcqRel);
        Self {
            hold: hold.clone(),
            total: total.clone(),
        }
    }
}

impl Drop for HoldGuard {
    fn drop(&mut self) {
        self.total.fetch_sub(1, Ordering::AcqRel);
        if self.hold.leases.fetch_sub(1, Ordering::AcqRel) == 1 {
            for waiter in self.hold.waiters.lock().drain(..) {
                // Whoever waited may have gone.
                let _ = waiter.send(());
            }
        }
    }
}

/// What is known of a version once it was read; stays when its weights leave.
#[derive(Clone)]
struct Facts {
    version: VersionId,
    report: Arc<CoverageReport>,
    max_lora_rank: u32,
    target_modules: Vec<String>,
    bytes: usize,
}

/// A failure and when the next attempt is due.
struct Failure {
    error: AdapterError,
    retry_at: Instant,
    back_off: Duration,
}

type LeaseSender = oneshot::Sender<Result<AdapterLease, AdapterError>>;

/// Weights of a registered name.
enum Tier {
    Registered,
    Loading(Vec<LeaseSender>),
    Host(Arc<HostAdapter>),
}

struct Entry {
    name: Arc<str>,
    files: FileSource,
    source: String,
    pinned: bool,
    tier: Tier,
    facts: Option<Facts>,
    hold: Arc<Hold>,
    /// Holds of versions that this name had before and that requests still run on.
    previous: Vec<Arc<Hold>>,
    /// Tells this registration from an earlier one of the same name.
    registration: u64,
    /// Ticks of the registry's clock.
    last_used: u64,
    loaded_at: u64,
    requests_total: u64,
    failure: Option<Failure>,
}

#[derive(Default)]
struct State {
    entries: HashMap<Arc<str>, Entry>,
    /// Weights by content, as long as anything holds them.
    versions: HashMap<VersionId, Weak<HostAdapter>>,
    /// Names that a `load` is working on, and who waits for it.
    claimed: HashMap<String, Vec<oneshot::Sender<()>>>,
    clock: u64,
    /// Names whose weights are on the host.
    loaded: HashSet<Arc<str>>,
    loads_total: u64,
    load_failures_total: u64,
    load_time: Duration,
    evictions_total: u64,
    hits_total: u64,
    misses_total: u64,
}

/// What a loader thread is to do.
enum Job {
    /// Bring a registered adapter to the host.
    Fetch { name: Arc<str>, registration: u64, files: FileSource },
    /// Read and register.
    Load {
        request: LoadRequest,
        expected_version: Option<String>,
        done: oneshot::Sender<Result<AdapterInfo, AdapterError>>,
        _claim: Claim,
    },
    /// Look for a name in the adapter folders.
    Discover { name: String, done: oneshot::Sender<bool> },
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    running: usize,
    closed: bool,
}

struct Shared {
    config: RegistryConfig,
    decoder: Arc<DecoderConfig>,
    state: Mutex<State>,
    queue: Mutex<Queue>,
    wake: Condvar,
    residents: Arc<ResidentSet>,
    leases: Arc<AtomicUsize>,
    pins_changed: AtomicUsize,
}

/// Every adapter by name; see the module's description. Dropping it ends the loader threads; leases stay good.
pub struct AdapterRegistry {
    shared: Arc<Shared>,
    loaders: Vec<std::thread::JoinHandle<()>>,
}

/// The right to register a name; given back on drop, which wakes the next in line.
struct Claim {
    shared: Arc<Shared>,
    name: String,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let waiters = self.shared.state.lock().claimed.remove(&self.name).unwrap_or_default();
        for waiter in waiters {
            let _ = waiter.send(());
        }
    }
}

impl AdapterRegistry {
    /// An empty registry with its loader threads.
    pub fn new(config: RegistryConfig, decoder: Arc<DecoderConfig>) -> Self {
        let shared = Arc::new(Shared {
            decoder,
            state: Mutex::default(),
            queue: Mutex::default(),
            wake: Condvar::new(),
            residents: Arc::default(),
            leases: Arc::default(),
            pins_changed: AtomicUsize::new(0),
            config,
        });
        let loaders = (0..shared.config.loader_threads.max(1))
            .map(|index| {
                let shared = shared.clone();
                std::thread::Builder::new()
                    .name(format!("adapter-loader-{index}"))
                    .spawn(move || shared.run_loader())
                    .expect("the system gives a thread at start")
            })
            .collect();
        Self { shared, loaders }
    }

    /// The limits that it was made with.
    pub fn config(&self) -> &RegistryConfig {
        &self.shared.config
    }

    /// Where the worker tells which versions are on the device.
    pub fn residents(&self) -> &Arc<ResidentSet> {
        &self.shared.residents
    }

    /// Registers a name without reading its files: they are read at first use. A pinned one is read at once, in the background.
    ///
    /// # Errors
    /// `BadName`, `AlreadyLoaded`, `TooManyPinned`, `TooManyLoads`.
    pub fn register(&self, request: LoadRequest) -> Result<(), AdapterError> {
        let shared = &self.shared;
        shared.check_name(&request.name)?;
        let mut state = shared.state.lock();
        if state.entries.contains_key(request.name.as_str()) || state.claimed.contains_key(&request.name) {
            return Err(AdapterError::AlreadyLoaded { name: request.name });
        }
        let pinned = request.pinned;
        shared.check_pins(&state, &request.name, pinned)?;
        let name: Arc<str> = request.name.as_str().into();
        state.insert(request, None);
        if pinned {
            shared.pins_changed.fetch_add(1, Ordering::Release);
            shared.fetch(&mut state, &name, None)?;
        }
        Ok(())
    }

    /// Reads, checks, packs and registers an adapter. With `replace`, a name that is taken gets the new version atomically: requests
    /// in flight end on the old one. Once a loader has the request it is carried out, even if the future is dropped.
    ///
    /// # Errors
    /// Any of [`AdapterError`] but `Unknown`; nothing was registered, and a version that was to be replaced is as before.
    pub fn load(&self, request: LoadRequest) -> BoxFuture<'_, Result<AdapterInfo, AdapterError>> {
        self.load_expecting(request, None)
    }

    /// As `load`; a name that is replaced must have the version `expected` (hex), as of the moment of the swap.
    ///
    /// # Errors
    /// As `load`; `VersionConflict`.
    pub fn load_expecting(&self, request: LoadRequest, expected: Option<String>) -> BoxFuture<'_, Result<AdapterInfo, AdapterError>> {
        Box::pin(async move {
            self.shared.check_name(&request.name)?;
            let claim = self.claim(&request.name).await;
            {
                // Refused before its files are read, where that is possible already; checked again at the end.
                let state = self.shared.state.lock();
                self.shared.check_load(&state, &request, expected.as_deref())?;
            }
            let (done, result) = oneshot::channel();
            self.shared.enqueue(Job::Load {
                request,
                expected_version: expected,
                done,
                _claim: claim,
            })?;
            result.await.unwrap_or_else(|_| Err(loader_gone()))
        })
    }

    /// Loads of one name come one after the other, so that of two at once the second sees what the first did.
    async fn claim(&self, name: &str) -> Claim {
        loop {
            let wait = {
                let mut state = self.shared.state.lock();
                match state.claimed.get_mut(name) {
                    None => {
                        state.claimed.insert(name.to_owned(), Vec::new());
                        return Claim {
                            shared: self.shared.clone(),
                            name: name.to_owned(),
                        };
                    }
                    Some(waiters) => {
                        let (sender, receiver) = oneshot::channel();
                        waiters.push(sender);
                        receiver
                    }
                }
            };
            let _ = wait.await;
        }
    }

    /// Gives a lease on an adapter, bringing it to the host first if it is only registered: one load, however many wait for it.
    ///
    /// # Errors
    /// `Unknown`; what the load gave; `NothingToEvict`.
    pub fn acquire<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<AdapterLease, AdapterError>> {
        Box::pin(async move {
            loop {
                let wait = match self.shared.acquire(name)? {
                    Acquired::Lease(lease) => return Ok(lease),
                    Acquired::Loading(receiver) => receiver,
                    Acquired::Unknown => {
                        if self.discover(name).await? {
                            continue;
                        }
                        return Err(self.shared.unknown(&self.shared.state.lock(), name));
                    }
                };
                return wait.await.unwrap_or_else(|_| Err(loader_gone()));
            }
        })
    }

    /// A lease if the adapter is in host memory now.
    pub fn try_acquire(&self, name: &str) -> Option<AdapterLease> {
        let mut state = self.shared.state.lock();
        self.shared.lease(&mut state, name, true)
    }

    /// Looks for an unknown name in the adapter folders and registers it if it is there.
    async fn discover(&self, name: &str) -> Result<bool, AdapterError> {
        if self.shared.config.adapter_dirs.is_empty() || self.shared.check_name(name).is_err() || !is_folder_name(name) {
            return Ok(false);
        }
        let (done, found) = oneshot::channel();
        self.shared.enqueue(Job::Discover { name: name.to_owned(), done })?;
        Ok(found.await.unwrap_or(false))
    }

    /// Registers every subfolder of the adapter folders that has an `adapter_config.json` and isn't known yet; gives their names.
    /// Reads folders: not to be called in async code.
    pub fn scan_adapter_dirs(&self) -> Vec<String> {
        let mut added = Vec::new();
        for directory in &self.shared.config.adapter_dirs {
            let Ok(children) = std::fs::read_dir(directory) else { continue };
            let mut names: Vec<String> = children
                .filter_map(|child| child.ok()?.file_name().into_string().ok())
                .filter(|name| is_folder_name(name))
                .collect();
            names.sort();
            added.extend(names.into_iter().filter(|name| self.shared.register_folder(directory, name)));
        }
        added
    }

    /// Forgets a name at once; requests that hold a lease finish on it. Resolves when the last has ended.
    ///
    /// # Errors
    /// `Unknown`.
    pub fn unload<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<UnloadReport, AdapterError>> {
        Box::pin(async move {
            let start = Instant::now();
            let holds = self.shared.forget(name)?;
            let waited_for = holds.iter().map(|hold| hold.count()).sum();
            for hold in &holds {
                hold.released().await;
            }
            Ok(UnloadReport {
                name: name.to_owned(),
                waited_for,
                waited: start.elapsed(),
            })
        })
    }

    /// Pins or unpins. A pinned adapter that is only registered is read in the background at once.
    ///
    /// # Errors
    /// `Unknown`, `TooManyPinned`, `TooManyLoads`.
    pub fn pin(&self, name: &str, pinned: bool) -> Result<(), AdapterError> {
        let shared = &self.shared;
        let mut state = shared.state.lock();
        let Some((key, entry)) = state.entries.get_key_value(name) else {
            return Err(shared.unknown(&state, name));
        };
        let key = key.clone();
        if entry.pinned == pinned {
            return Ok(());
        }
        shared.check_pins(&state, name, pinned)?;
        if pinned {
            shared.fetch(&mut state, &key, None)?;
        }
        if let Some(entry) = state.entries.get_mut(name) {
            entry.pinned = pinned;
        }
        drop(state);
        shared.pins_changed.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// Pinned adapters whose weights are here: the worker keeps them on the device.
    pub fn pinned(&self) -> Vec<ResolvedAdapter> {
        let state = self.shared.state.lock();
        let mut pinned: Vec<_> = state
            .entries
            .values()
            .filter(|entry| entry.pinned)
            .filter_map(|entry| match &entry.tier {
                Tier::Host(weights) => Some(ResolvedAdapter {
                    name: entry.name.clone(),
                    weights: weights.clone(),
                }),
                _ => None,
            })
            .collect();
        pinned.sort_by(|a, b| a.name.cmp(&b.name));
        pinned
    }

    /// Grows whenever what `pinned` gives may have changed: cheap to ask at every step.
    pub fn pins_generation(&self) -> usize {
        self.shared.pins_changed.load(Ordering::Acquire)
    }

    /// Every registered adapter, least recently used first; those never used come first, in order of registration.
    pub fn list(&self) -> Vec<AdapterInfo> {
        let state = self.shared.state.lock();
        let mut entries: Vec<&Entry> = state.entries.values().collect();
        entries.sort_by_key(|entry| (entry.last_used, entry.registration));
        entries.into_iter().map(|entry| self.shared.info(entry)).collect()
    }

    /// One registered adapter.
    pub fn info(&self, name: &str) -> Option<AdapterInfo> {
        let state = self.shared.state.lock();
        state.entries.get(name).map(|entry| self.shared.info(entry))
    }

    /// Counters and gauges.
    pub fn stats(&self) -> RegistryStats {
        let (waiting, running) = {
            let queue = self.shared.queue.lock();
            (queue.jobs.len(), queue.running)
        };
        let state = self.shared.state.lock();
        let versions: Vec<Arc<HostAdapter>> = state.versions.values().filter_map(Weak::upgrade).collect();
        RegistryStats {
            registered: state.entries.len(),
            loaded: state.loaded.len(),
            pinned: state.entries.values().filter(|entry| entry.pinned).count(),
            leases: self.shared.leases.load(Ordering::Acquire),
            host_bytes: versions.iter().map(|weights| weights.bytes()).sum(),
            loading: waiting + running,
            loads_total: state.loads_total,
            load_failures_total: state.load_failures_total,
            load_seconds_total: state.load_time.as_secs_f64(),
            evictions_total: state.evictions_total,
            hits_total: state.hits_total,
            misses_total: state.misses_total,
        }
    }
}

impl Drop for AdapterRegistry {
    fn drop(&mut self) {
        let jobs = {
            let mut queue = self.shared.queue.lock();
            queue.closed = true;
            std::mem::take(&mut queue.jobs)
        };
        // Outside the queue's lock: a job's claim takes the state's.
        drop(jobs);
        self.shared.wake.notify_all();
        for loader in self.loaders.drain(..) {
            // A loader catches its jobs' panics; one that died anyway has nothing left to give.
            let _ = loader.join();
        }
    }
}

enum Acquired {
    Lease(AdapterLease),
    Loading(oneshot::Receiver<Result<AdapterLease, AdapterError>>),
    Unknown,
}

impl State {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Adds an entry under a free name.
    fn insert(&mut self, request: LoadRequest, content: Option<(Arc<HostAdapter>, Facts)>) {
        let tick = self.tick();
        let name: Arc<str> = request.name.as_str().into();
        let (tier, facts) = match content {
            None => (Tier::Registered, None),
            Some((weights, facts)) => {
                self.loaded.insert(name.clone());
                (Tier::Host(weights), Some(facts))
            }
        };
        let entry = Entry {
            name: name.clone(),
            files: request.files,
            source: request.source,
            pinned: request.pinned,
            tier,
            facts,
            hold: Arc::default(),
            previous: Vec::new(),
            registration: tick,
            last_used: 0,
            loaded_at: tick,
            requests_total: 0,
            failure: None,
        };
        self.entries.insert(name, entry);
    }

    /// One copy for equal content, whoever holds the other.
    fn share(&mut self, weights: HostAdapter) -> Arc<HostAdapter> {
        if let Some(same) = self.versions.get(&weights.version).and_then(Weak::upgrade) {
            return same;
        }
        if self.versions.len() > 2 * self.loaded.len() + 64 {
            self.versions.retain(|_, weights| weights.strong_count() > 0);
        }
        let weights = Arc::new(weights);
        self.versions.insert(weights.version, Arc::downgrade(&weights));
        weights
    }
}

impl Shared {
    fn check_name(&self, name: &str) -> Result<(), AdapterError> {
        check_adapter_name(name, &self.config.base_names)
    }

    fn check_pins(&self, state: &State, name: &str, pinned: bool) -> Result<(), AdapterError> {
        if !pinned {
            return Ok(());
        }
        let others = state.entries.values().filter(|entry| entry.pinned && entry.name.as_ref() != name).count();
        if others < self.config.max_pinned {
            return Ok(());
        }
        Err(AdapterError::TooManyPinned {
            name: name.to_owned(),
            pinned: others,
            limit: self.config.max_pinned,
        })
    }

    fn check_load(&self, state: &State, request: &LoadRequest, expected: Option<&str>) -> Result<(), AdapterError> {
        let name = || request.name.clone();
        let existing = state.entries.get(request.name.as_str());
        if existing.is_some() && !request.replace {
            return Err(AdapterError::AlreadyLoaded { name: name() });
        }
        if let Some(expected) = expected {
            let got = existing.and_then(|entry| entry.facts.as_ref()).map(|facts| facts.version.to_string());
            if got.as_deref() != Some(expected) {
                return Err(AdapterError::VersionConflict {
                    name: name(),
                    expected: expected.to_owned(),
                    got: got.unwrap_or_else(|| "none".into()),
                });
            }
        }
        self.check_pins(state, &request.name, request.pinned)
    }

    fn unknown(&self, state: &State, name: &str) -> AdapterError {
        let mut names: Vec<&Arc<str>> = state.entries.keys().collect();
        let more = names.len().saturating_sub(NAMES_IN_ERROR);
        if more > 0 {
            names.select_nth_unstable(NAMES_IN_ERROR);
            names.truncate(NAMES_IN_ERROR);
        }
        names.sort();
        let mut loaded: Vec<String> = names.into_iter().map(|name| name.to_string()).collect();
        if more > 0 {
            loaded.push(format!("and {more} more"));
        }
        AdapterError::Unknown {
            name: name.to_owned(),
            loaded,
        }
    }

    fn info(&self, entry: &Entry) -> AdapterInfo {
        let facts = entry.facts.as_ref();
        let on_device = facts.is_some_and(|facts| self.residents.contains(&facts.version));
        let state = match entry.tier {
            _ if on_device => AdapterState::Device,
            Tier::Host(_) => AdapterState::Host,
            Tier::Registered | Tier::Loading(_) => AdapterState::Registered,
        };
        AdapterInfo {
            name: entry.name.clone(),
            source: entry.source.clone(),
            state,
            version: facts.map(|facts| facts.version.to_string()),
            max_lora_rank: facts.map_or(0, |facts| facts.max_lora_rank),
            target_modules: facts.map_or_else(Vec::new, |facts| facts.target_modules.clone()),
            bytes: facts.map_or(0, |facts| facts.bytes),
            pinned: entry.pinned,
            leases: entry.hold.count() + entry.previous.iter().map(|hold| hold.count()).sum::<usize>(),
            requests_total: entry.requests_total,
            report: facts.map(|facts| facts.report.clone()),
        }
    }

    /// A lease on an entry that is on the host; `counts` if it is a request's own, and not one that waited for a load.
    fn lease(&self, state: &mut State, name: &str, counts: bool) -> Option<AdapterLease> {
        let tick = state.tick();
        let entry = state.entries.get_mut(name)?;
        let Tier::Host(weights) = &entry.tier else { return None };
        entry.last_used = tick;
        let lease = AdapterLease {
            name: entry.name.clone(),
            weights: weights.clone(),
            _hold: Some(Arc::new(HoldGuard::new(&entry.hold, &self.leases))),
        };
        if counts {
            entry.requests_total += 1;
            state.hits_total += 1;
        }
        Some(lease)
    }

    fn acquire(&self, name: &str) -> Result<Acquired, AdapterError> {
        let mut state = self.state.lock();
        if let Some(lease) = self.lease(&mut state, name, true) {
            return Ok(Acquired::Lease(lease));
        }
        let Some((key, _)) = state.entries.get_key_value(name) else {
            return Ok(Acquired::Unknown);
        };
        let key = key.clone();
        let (sender, receiver) = oneshot::channel();
        self.fetch(&mut state, &key, Some(sender))?;
        state.misses_total += 1;
        if let Some(entry) = state.entries.get_mut(name) {
            entry.requests_total += 1;
        }
        Ok(Acquired::Loading(receiver))
    }

    /// Sees to it that a registered adapter is being loaded. Does nothing for one on the host.
    fn fetch(&self, state: &mut State, name: &Arc<str>, waiter: Option<LeaseSender>) -> Result<(), AdapterError> {
        let Some(entry) = state.entries.get_mut(name) else { return Ok(()) };
        match &mut entry.tier {
            Tier::Host(_) => return Ok(()),
            Tier::Loading(waiters) => {
                waiters.extend(waiter);
                return Ok(());
            }
            Tier::Registered => {}
        }
        if let Some(failure) = &entry.failure
            && Instant::now() < failure.retry_at
        {
            return Err(failure.error.clone());
        }
        self.enqueue(Job::Fetch {
            name: name.clone(),
            registration: entry.registration,
            files: entry.files.clone(),
        })?;
        entry.tier = Tier::Loading(waiter.into_iter().collect());
        Ok(())
    }

    fn enqueue(&self, job: Job) -> Result<(), AdapterError> {
        let refused = {
            let mut queue = self.queue.lock();
            if queue.closed {
                Some((job, loader_gone()))
            } else if queue.jobs.len() >= self.config.max_queued_loads {
                let waiting = queue.jobs.len();
                let limit = self.config.max_queued_loads;
                Some((job, AdapterError::TooManyLoads { waiting, limit }))
            } else {
                queue.jobs.push_back(job);
                None
            }
        };
        match refused {
            None => {
                self.wake.notify_one();
                Ok(())
            }
            // The job is dropped outside the queue's lock: its claim takes the state's.
            Some((_, error)) => Err(error),
        }
    }

    fn forget(&self, name: &str) -> Result<Vec<Arc<Hold>>, AdapterError> {
        let (entry, error) = {
            let mut state = self.state.lock();
            let Some(entry) = state.entries.remove(name) else {
                return Err(self.unknown(&state, name));
            };
            state.loaded.remove(name);
            let error = matches!(entry.tier, Tier::Loading(_)).then(|| self.unknown(&state, name));
            (entry, error)
        };
        if entry.pinned {
            self.pins_changed.fetch_add(1, Ordering::Release);
        }
        if let (Tier::Loading(waiters), Some(error)) = (entry.tier, error) {
            for waiter in waiters {
                let _ = waiter.send(Err(error.clone()));
            }
        }
        let mut holds = entry.previous;
        holds.push(entry.hold);
        Ok(holds)
    }

    fn register_folder(&self, directory: &Path, name: &str) -> bool {
        let folder = directory.join(name);
        if self.check_name(name).is_err() || !folder.join(CONFIG_FILE).is_file() {
            return false;
        }
        let mut state = self.state.lock();
        if state.entries.contains_key(name) {
            return false;
        }
        let request = LoadRequest {
            name: name.to_owned(),
            source: folder.display().to_string(),
            files: FileSource::Directory(folder),
            pinned: false,
            replace: false,
        };
        state.insert(request, None);
        true
    }

    // The loader threads.

    fn run_loader(&self) {
        loop {
            let job = {
                let mut queue = self.queue.lock();
                loop {
                    if let Some(job) = queue.jobs.pop_front() {
                        queue.running += 1;
                        break job;
                    }
                    if queue.closed {
                        return;
                    }
                    self.wake.wait(&mut queue);
                }
            };
            self.run_job(job);
            self.queue.lock().running -= 1;
        }
    }

    fn run_job(&self, job: Job) {
        match job {
            Job::Fetch { name, registration, files } => {
                let loaded = self.read(&files);
                self.finish_fetch(&name, registration, loaded);
            }
            Job::Load {
                request,
                expected_version,
                done,
                _claim,
            } => {
                let loaded = self.read(&request.files);
                let result = loaded.and_then(|loaded| self.finish_load(request, expected_version.as_deref(), loaded));
                if result.is_err() {
                    self.state.lock().load_failures_total += 1;
                }
                // The claim first: who hears the answer may load the same name at once.
                drop(_claim);
                let _ = done.send(result);
            }
            Job::Discover { name, done } => {
                let directories = &self.config.adapter_dirs;
                let found = directories.iter().any(|directory| self.register_folder(directory, &name));
                // Another request may have found it first.
                let known = found || self.state.lock().entries.contains_key(name.as_str());
                let _ = done.send(known);
            }
        }
    }

    /// Reads and packs; a panic is an error like another.
    fn read(&self, files: &FileSource) -> Result<(HostAdapter, Facts), AdapterError> {
        let start = Instant::now();
        let load = || load_adapter(files, &self.decoder, &self.config.limits);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(load)).unwrap_or_else(|panic| {
            let text = panic
                .downcast_ref::<&str>()
                .map(|text| (*text).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "a panic without a message".into());
            tracing::error!(panic = %text, "a loader panicked");
            Err(AdapterError::Internal { reason: text })
        });
        self.state.lock().load_time += start.elapsed();
        result.map(|(weights, report)| {
            let facts = Facts {
                version: weights.version,
                max_lora_rank: weights.max_lora_rank,
                target_modules: target_modules(&report),
                bytes: weights.bytes(),
                report: Arc::new(report),
            };
            (weights, facts)
        })
    }

    fn finish_fetch(&self, name: &Arc<str>, registration: u64, loaded: Result<(HostAdapter, Facts), AdapterError>) {
        let mut state = self.state.lock();
        // Forgotten or replaced meanwhile: whoever waited has had an answer.
        let is_current = |entry: &Entry| entry.registration == registration && matches!(entry.tier, Tier::Loading(_));
        if !state.entries.get(name).is_some_and(is_current) {
            return;
        }
        let loaded = loaded.and_then(|loaded| self.make_room(&mut state).map(|()| loaded));
        let tick = state.tick();
        let content = match loaded {
            Ok((weights, facts)) => Ok((state.share(weights), facts)),
            Err(error) => Err(error),
        };
        let Some(entry) = state.entries.get_mut(name) else { return };
        let Tier::Loading(waiters) = std::mem::replace(&mut entry.tier, Tier::Registered) else {
            return;
        };
        match content {
            Ok((weights, facts)) => {
                // The files may have changed since they were last read: requests of the old version count on the old hold.
                if entry.facts.as_ref().is_some_and(|old| old.version != facts.version) && entry.hold.count() > 0 {
                    let old = std::mem::take(&mut entry.hold);
                    entry.previous.push(old);
                }
                entry.tier = Tier::Host(weights);
                entry.facts = Some(facts);
                entry.loaded_at = tick;
                entry.failure = None;
                let pinned = entry.pinned;
                state.loaded.insert(name.clone());
                state.loads_total += 1;
                if pinned {
                    self.pins_changed.fetch_add(1, Ordering::Release);
                }
                // Leases are made before anyone else can evict what was just loaded.
                for waiter in waiters {
                    if let Some(lease) = self.lease(&mut state, name, false) {
                        // A waiter that has gone drops the lease here.
                        let _ = waiter.send(Ok(lease));
                    }
                }
            }
            Err(error) => {
                // A full tier is no fault of the adapter's: the next request may try at once.
                if !matches!(error, AdapterError::NothingToEvict { .. }) {
                    let back_off = entry
                        .failure
                        .take()
                        .map_or(FIRST_BACK_OFF, |failure| (2 * failure.back_off).min(LONGEST_BACK_OFF));
                    entry.failure = Some(Failure {
                        error: error.clone(),
                        retry_at: Instant::now() + back_off,
                        back_off,
                    });
                }
                state.load_failures_total += 1;
                drop(state);
                for waiter in waiters {
                    let _ = waiter.send(Err(error.clone()));
                }
            }
        }
    }

    fn finish_load(&self, request: LoadRequest, expected: Option<&str>, loaded: (HostAdapter, Facts)) -> Result<AdapterInfo, AdapterError> {
        let mut state = self.state.lock();
        self.check_load(&state, &request, expected)?;
        let takes_room = !state
            .entries
            .get(request.name.as_str())
            .is_some_and(|entry| matches!(entry.tier, Tier::Host(_)));
        if takes_room {
            self.make_room(&mut state)?;
        }
        let (weights, facts) = loaded;
        let weights = state.share(weights);
        let name = request.name.clone();
        let pins_change = request.pinned || state.entries.get(name.as_str()).is_some_and(|entry| entry.pinned);
        let waiters = self.put(&mut state, request, weights, facts);
        state.loads_total += 1;
        if pins_change {
            self.pins_changed.fetch_add(1, Ordering::Release);
        }
        for waiter in waiters {
            if let Some(lease) = self.lease(&mut state, &name, false) {
                let _ = waiter.send(Ok(lease));
            }
        }
        state.entries.get(name.as_str()).map(|entry| self.info(entry)).ok_or_else(loader_gone)
    }

    /// Registers new content under a name, free or taken. Gives those who waited for the old content's load.
    fn put(&self, state: &mut State, request: LoadRequest, weights: Arc<HostAdapter>, facts: Facts) -> Vec<LeaseSender> {
        let Some(mut old) = state.entries.remove(request.name.as_str()) else {
            state.insert(request, Some((weights, facts)));
            return Vec::new();
        };
        let tick = state.tick();
        let waiters = match std::mem::replace(&mut old.tier, Tier::Registered) {
            Tier::Loading(waiters) => waiters,
            Tier::Host(_) | Tier::Registered => Vec::new(),
        };
        old.previous.retain(|hold| hold.count() > 0);
        if old.hold.count() > 0 {
            old.previous.push(std::mem::take(&mut old.hold));
        }
        state.loaded.insert(old.name.clone());
        let entry = Entry {
            files: request.files,
            source: request.source,
            // A replacement stays pinned: unpinning is asked for by name.
            pinned: request.pinned || old.pinned,
            tier: Tier::Host(weights),
            facts: Some(facts),
            registration: tick,
            loaded_at: tick,
            failure: None,
            ..old
        };
        state.entries.insert(entry.name.clone(), entry);
        waiters
    }

    /// Evicts until one more adapter may have its weights on the host.
    fn make_room(&self, state: &mut State) -> Result<(), AdapterError> {
        let Some(limit) = self.config.max_loaded_loras else { return Ok(()) };
        while state.loaded.len() >= limit {
            let candidates = state
                .loaded
                .iter()
                .filter_map(|name| state.entries.get(name))
                .filter(|entry| !entry.pinned && entry.hold.count() == 0);
            let victim = match self.config.eviction {
                EvictionPolicy::Lru => candidates.min_by_key(|entry| (entry.last_used, entry.loaded_at)),
                EvictionPolicy::Fifo => candidates.min_by_key(|entry| entry.loaded_at),
            };
            let Some(name) = victim.map(|entry| entry.name.clone()) else {
                return Err(AdapterError::NothingToEvict {
                    loaded: state.loaded.len(),
                    limit,
                });
            };
            if let Some(entry) = state.entries.get_mut(&name) {
                entry.tier = Tier::Registered;
            }
            state.loaded.remove(&name);
            state.evictions_total += 1;
        }
        Ok(())
    }
}

/// Whether an adapter may have a name.
///
/// A comma separates names in SGLang's wire format, a colon the base from the adapter in `model`; whitespace at the ends, control
/// characters, backslashes and `..` only serve to deceive. Slashes are fine (a path or a Hub id may be a name), empty parts aren't,
/// except for the first.
///
/// # Errors
/// `BadName`.
pub fn check_adapter_name(name: &str, base_names: &[String]) -> Result<(), AdapterError> {
    let reason = if name.is_empty() {
        "is empty".to_owned()
    } else if name.len() > MAX_NAME_BYTES {
        format!("has {} bytes, at most {MAX_NAME_BYTES} are allowed", name.len())
    } else if let Some(character) = name
        .chars()
        .find(|character| matches!(character, ',' | ':' | '\\') || character.is_control())
    {
        format!("contains {character:?}")
    } else if name.trim() != name {
        "begins or ends with whitespace".to_owned()
    } else if name.split('/').skip(1).any(str::is_empty) || name.split('/').any(|part| part == "..") {
        "has an empty part or `..` between slashes".to_owned()
    } else if base_names.iter().any(|base| base == name) {
        "is the base model's".to_owned()
    } else {
        return Ok(());
    };
    let shown: String = name.chars().take(MAX_NAME_BYTES).collect();
    Err(AdapterError::BadName { name: shown, reason })
}

/// A name that can only be a direct subfolder.
fn is_folder_name(name: &str) -> bool {
    !name.starts_with('.') && !name.contains(['/', '\\'])
}

fn target_modules(report: &CoverageReport) -> Vec<String> {
    let paths = report.modules.iter().map(|module| &module.module).chain(&report.replaced_modules);
    let mut names: Vec<String> = paths.filter_map(|path| path.rsplit('.').next()).map(str::to_owned).collect();
    names.sort();
    names.dedup();
    names
}

fn loader_gone() -> AdapterError {
    AdapterError::Internal {
        reason: "the adapter registry is shutting down".into(),
    }
}

#[cfg(test)]
mod tests {
    use futures::executor::block_on;

    use super::*;
    use crate::adapter::testing::{AdapterFiles, limits, source, tiny_decoder};

    fn registry(change: impl FnOnce(&mut RegistryConfig)) -> AdapterRegistry {
        let mut config = RegistryConfig::new(limits());
        config.base_names = vec!["base".into()];
        change(&mut config);
        AdapterRegistry::new(config, Arc::new(tiny_decoder()))
    }

    fn request(name: &str, directory: &tempfile::TempDir) -> LoadRequest {
        LoadRequest {
            name: name.into(),
            files: source(directory),
            source: directory.path().display().to_string(),
            pinned: false,
            replace: false,
        }
    }

    #[test]
    fn loads_leases_and_unloads() {
        let directory = AdapterFiles::simple(&tiny_decoder(), 1).write();
        let registry = registry(|_| {});
        let info = block_on(registry.load(request("a", &directory))).unwrap();
        assert_eq!((info.state, info.leases, info.target_modules.len()), (AdapterState::Host, 0, 2));
        let lease = block_on(registry.acquire("a")).unwrap();
        let clone = lease.clone();
        assert_eq!(registry.info("a").unwrap().leases, 1);
        let again = block_on(registry.load(request("a", &directory))).unwrap_err();
        assert!(again.to_string().contains("already loaded"), "{again}");
        let waiter = std::thread::scope(|scope| {
            let waiter = scope.spawn(|| block_on(registry.unload("a")));
            while registry.info("a").is_some() {
                std::thread::yield_now();
            }
            assert!(matches!(block_on(registry.acquire("a")), Err(AdapterError::Unknown { .. })));
            drop(lease);
            assert_eq!(registry.stats().leases, 1);
            drop(clone);
            waiter.join().unwrap()
        });
        assert_eq!(waiter.unwrap().waited_for, 1);
        assert_eq!(registry.stats().leases, 0);
    }

    /// A folder of adapters under `names`, each with its own weights.
    fn folder(names: &[&str]) -> tempfile::TempDir {
        let directory = tempfile::TempDir::new().unwrap();
        for (seed, name) in names.iter().enumerate() {
            let folder = directory.path().join(name);
            std::fs::create_dir(&folder).unwrap();
            AdapterFiles::simple(&tiny_decoder(), seed as u32 + 1).write_to(&folder);
        }
        directory
    }

    fn request_in(directory: &tempfile::TempDir, name: &str) -> LoadRequest {
        LoadRequest {
            name: name.into(),
            files: FileSource::Directory(directory.path().join(name)),
            source: name.into(),
            pinned: false,
            replace: false,
        }
    }

    fn names(registry: &AdapterRegistry) -> Vec<String> {
        registry.list().iter().map(|info| info.name.to_string()).collect()
    }

    fn acquire(registry: &AdapterRegistry, name: &str) -> Result<AdapterLease, AdapterError> {
        block_on(registry.acquire(name))
    }

    #[test]
    fn names_are_checked() {
        let base = ["base".to_owned()];
        for good in [
            "a",
            "org/name",
            "/data/adapters/x",
            "./x",
            "a b",
            "ü",
            "x@main",
            "Base",
            "a+b",
            &"n".repeat(MAX_NAME_BYTES),
        ] {
            assert_eq!(check_adapter_name(good, &base), Ok(()), "{good:?}");
        }
        let long = "n".repeat(MAX_NAME_BYTES + 1);
        for bad in [
            "", "a,b", "a:b", ":", "a\\b", "a\nb", "\u{0}", "a\u{7f}", " a", "a ", "a//b", "a/", "../a", "a/../b", "..", "base", &long,
        ] {
            let error = check_adapter_name(bad, &base).expect_err(bad);
            assert!(matches!(error, AdapterError::BadName { .. }), "{error}");
        }
    }

    #[test]
    fn nothing_is_registered_on_an_error() {
        let directory = tempfile::TempDir::new().unwrap();
        let registry = registry(|_| {});
        let error = block_on(registry.load(request("a", &directory))).unwrap_err();
        assert_eq!(error.to_string(), "adapter_config.json: no such file");
        assert!(registry.list().is_empty());
        // The same name can be loaded once the files are good.
        AdapterFiles::simple(&tiny_decoder(), 1).write_to(directory.path());
        block_on(registry.load(request("a", &directory))).unwrap();
        let bad = block_on(registry.load(request("b,c", &directory))).unwrap_err();
        assert!(matches!(bad, AdapterError::BadName { .. }));
        let base = block_on(registry.load(request("base", &directory))).unwrap_err();
        assert!(matches!(base, AdapterError::BadName { .. }));
        assert_eq!(names(&registry), ["a"]);
        assert_eq!(registry.stats().load_failures_total, 1);
    }

    #[test]
    fn registered_adapters_are_read_at_first_use() {
        let directory = folder(&["a"]);
        let registry = registry(|_| {});
        registry.register(request_in(&directory, "a")).unwrap();
        let info = registry.info("a").unwrap();
        assert_eq!((info.state, info.version, info.bytes), (AdapterState::Registered, None, 0));
        assert!(registry.try_acquire("a").is_none());
        let lease = acquire(&registry, "a").unwrap();
        let info = registry.info("a").unwrap();
        assert_eq!((info.state, info.leases, info.requests_total), (AdapterState::Host, 1, 1));
        assert_eq!(info.version, Some(lease.version().to_string()));
        assert_eq!(info.bytes, lease.weights().bytes());
        registry.residents().insert(lease.version());
        assert_eq!(registry.info("a").unwrap().state, AdapterState::Device);
        registry.residents().remove(&lease.version());
        assert_eq!(registry.info("a").unwrap().state, AdapterState::Host);
        let stats = registry.stats();
        assert_eq!((stats.hits_total, stats.misses_total, stats.loads_total), (0, 1, 1));
    }

    #[test]
    fn one_load_serves_all_who_wait() {
        let directory = folder(&["a"]);
        let registry = registry(|_| {});
        registry.register(request_in(&directory, "a")).unwrap();
        let waiters: Vec<_> = (0..16).map(|_| registry.acquire("a")).collect();
        let leases: Vec<AdapterLease> = block_on(futures::future::try_join_all(waiters)).unwrap();
        assert_eq!(registry.stats().loads_total, 1);
        assert_eq!(registry.info("a").unwrap().leases, 16);
        assert!(leases.iter().all(|lease| Arc::ptr_eq(lease.weights(), leases[0].weights())));
        drop(leases);
        assert_eq!(registry.stats().leases, 0);
    }

    #[test]
    fn whoever_stops_waiting_for_a_load_holds_nothing() {
        let directory = folder(&["a"]);
        let registry = registry(|_| {});
        registry.register(request_in(&directory, "a")).unwrap();
        let mut gone = registry.acquire("a");
        // Polled once, so that it waits; then dropped.
        assert!(futures::FutureExt::now_or_never(&mut gone).is_none());
        drop(gone);
        drop(acquire(&registry, "a").unwrap());
        assert_eq!(registry.stats().leases, 0);
        assert_eq!(block_on(registry.unload("a")).unwrap().waited_for, 0);
    }

    #[test]
    fn a_failed_load_tells_all_who_wait_and_backs_off() {
        let directory = folder(&["a"]);
        let weights = directory.path().join("a/adapter_model.safetensors");
        std::fs::write(&weights, b"bad").unwrap();
        let registry = registry(|_| {});
        registry.register(request_in(&directory, "a")).unwrap();
        let waiters: Vec<_> = (0..4).map(|_| registry.acquire("a")).collect();
        for result in block_on(futures::future::join_all(waiters)) {
            let error = result.unwrap_err();
            assert!(error.to_string().contains("adapter_model.safetensors: damaged"), "{error}");
        }
        assert_eq!(registry.stats().load_failures_total, 1);
        // Within the back-off the files are not read again: the same error at once, though they are good now.
        AdapterFiles::simple(&tiny_decoder(), 1).write_to(&directory.path().join("a"));
        assert!(acquire(&registry, "a").unwrap_err().to_string().contains("damaged"));
        assert_eq!(registry.stats().load_failures_total, 1);
        registry
            .shared
            .state
            .lock()
            .entries
            .get_mut("a")
            .unwrap()
            .failure
            .as_mut()
            .unwrap()
            .retry_at = Instant::now();
        acquire(&registry, "a").unwrap();
        // The name is registered all the time: it was registered, not loaded.
        assert_eq!(names(&registry), ["a"]);
    }

    #[test]
    fn repeated_failures_double_the_back_off() {
        let directory = folder(&["a"]);
        std::fs::remove_file(directory.path().join("a/adapter_model.safetensors")).unwrap();
        let registry = registry(|_| {});
        registry.register(request_in(&directory, "a")).unwrap();
        let mut back_offs = Vec::new();
        for _ in 0..8 {
            acquire(&registry, "a").unwrap_err();
            let mut state = registry.shared.state.lock();
            let failure = state.entries.get_mut("a").unwrap().failure.as_mut().unwrap();
            back_offs.push(failure.back_off.as_secs());
            failure.retry_at = Instant::now();
        }
        assert_eq!(back_offs, [1, 2, 4, 8, 16, 32, 60, 60]);
    }

    #[test]
    fn the_least_recently_used_leaves_first() {
        let all = ["a", "b", "c", "d"];
        let directory = folder(&all);
        let registry = registry(|config| config.max_loaded_loras = Some(2));
        for name in all {
            registry.register(request_in(&directory, name)).unwrap();
        }
        let on_host = || -> Vec<String> {
            let mut names: Vec<_> = registry.list().into_iter().filter(|info| info.state == AdapterState::Host).collect();
            names.sort_by(|a, b| a.name.cmp(&b.name));
            names.into_iter().map(|info| info.name.to_string()).collect()
        };
        acquire(&registry, "a").unwrap();
        acquire(&registry, "b").unwrap();
        acquire(&registry, "a").unwrap();
        acquire(&registry, "c").unwrap();
        assert_eq!(on_host(), ["a", "c"]);
        // Least recently used first; d was never used.
        assert_eq!(names(&registry), ["d", "b", "a", "c"]);
        // A leased one stays, though it was used longest ago.
        let lease = acquire(&registry, "a").unwrap();
        acquire(&registry, "c").unwrap();
        acquire(&registry, "d").unwrap();
        assert_eq!(on_host(), ["a", "d"]);
        // With every one leased there is no room; the error leaves things as they are.
        let other = acquire(&registry, "d").unwrap();
        let error = acquire(&registry, "b").unwrap_err();
        assert_eq!(error, AdapterError::NothingToEvict { loaded: 2, limit: 2 });
        drop((lease, other));
        acquire(&registry, "b").unwrap();
        assert_eq!(registry.stats().loaded, 2);
        assert_eq!(registry.stats().evictions_total, 3);
        // What was evicted is known still, with its version.
        assert!(registry.info("a").unwrap().version.is_some());
    }

    #[test]
    fn the_first_that_came_leaves_first_under_fifo() {
        let all = ["a", "b", "c"];
        let directory = folder(&all);
        let registry = registry(|config| {
            config.max_loaded_loras = Some(2);
            config.eviction = EvictionPolicy::Fifo;
        });
        for name in ["a", "b"] {
            block_on(registry.load(request_in(&directory, name))).unwrap();
        }
        acquire(&registry, "a").unwrap();
        block_on(registry.load(request_in(&directory, "c"))).unwrap();
        assert_eq!(registry.info("a").unwrap().state, AdapterState::Registered);
        assert_eq!(registry.info("b").unwrap().state, AdapterState::Host);
    }

    #[test]
    fn a_load_without_room_registers_nothing() {
        let directory = folder(&["a", "b"]);
        let registry = registry(|config| config.max_loaded_loras = Some(1));
        block_on(registry.load(request_in(&directory, "a"))).unwrap();
        let lease = acquire(&registry, "a").unwrap();
        let error = block_on(registry.load(request_in(&directory, "b"))).unwrap_err();
        assert!(matches!(error, AdapterError::NothingToEvict { .. }));
        assert_eq!(names(&registry), ["a"]);
        drop(lease);
        block_on(registry.load(request_in(&directory, "b"))).unwrap();
    }

    #[test]
    fn pins_are_limited_and_never_evicted() {
        let all = ["a", "b", "c", "d"];
        let directory = folder(&all);
        let registry = registry(|config| {
            config.max_pinned = 2;
            config.max_loaded_loras = Some(3);
        });
        let pinned = |name: &str| LoadRequest {
            pinned: true,
            ..request_in(&directory, name)
        };
        block_on(registry.load(pinned("a"))).unwrap();
        registry.register(request_in(&directory, "b")).unwrap();
        let before = registry.pins_generation();
        registry.pin("b", true).unwrap();
        assert_ne!(registry.pins_generation(), before);
        // Pinning a registered one brings it to the host.
        acquire(&registry, "b").unwrap();
        assert_eq!(
            registry.pinned().iter().map(|adapter| adapter.name.to_string()).collect::<Vec<_>>(),
            ["a", "b"]
        );
        let error = block_on(registry.load(pinned("c"))).unwrap_err();
        assert!(error.to_string().contains("starvation"), "{error}");
        assert!(registry.info("c").is_none());
        registry.register(request_in(&directory, "c")).unwrap();
        assert!(matches!(
            registry.pin("c", true),
            Err(AdapterError::TooManyPinned { pinned: 2, limit: 2, .. })
        ));
        // Twice is once.
        registry.pin("a", true).unwrap();
        for name in ["c", "d", "c", "d"] {
            let _ = registry.register(request_in(&directory, name));
            acquire(&registry, name).unwrap();
        }
        assert_eq!(registry.info("a").unwrap().state, AdapterState::Host);
        assert_eq!(registry.info("b").unwrap().state, AdapterState::Host);
        registry.pin("a", false).unwrap();
        acquire(&registry, "c").unwrap();
        assert_eq!(registry.info("a").unwrap().state, AdapterState::Registered);
        registry.pin("c", true).unwrap();
        assert!(matches!(registry.pin("nobody", true), Err(AdapterError::Unknown { .. })));
    }

    #[test]
    fn no_pin_is_allowed_with_one_place_in_a_batch() {
        let directory = folder(&["a"]);
        let registry = registry(|config| config.max_pinned = 0);
        let request = LoadRequest {
            pinned: true,
            ..request_in(&directory, "a")
        };
        assert!(block_on(registry.load(request)).unwrap_err().to_string().contains("starvation"));
    }

    #[test]
    fn equal_content_is_one_copy_and_one_version() {
        let directory = tempfile::TempDir::new().unwrap();
        AdapterFiles::simple(&tiny_decoder(), 1).write_to(directory.path());
        let registry = registry(|_| {});
        for name in ["a", "b"] {
            block_on(registry.load(request(name, &directory))).unwrap();
        }
        let (a, b) = (acquire(&registry, "a").unwrap(), acquire(&registry, "b").unwrap());
        assert!(Arc::ptr_eq(a.weights(), b.weights()));
        assert_eq!(registry.stats().host_bytes, a.weights().bytes());
        let version = a.version();
        drop((a, b));
        for name in ["a", "b"] {
            block_on(registry.unload(name)).unwrap();
        }
        assert_eq!(registry.stats().host_bytes, 0);
        block_on(registry.load(request("c", &directory))).unwrap();
        assert_eq!(acquire(&registry, "c").unwrap().version(), version);
    }

    #[test]
    fn replacing_leaves_requests_in_flight_on_the_old_version() {
        let directory = folder(&["one", "two"]);
        let registry = registry(|config| config.max_loaded_loras = Some(1));
        let with = |folder: &str, replace| LoadRequest {
            name: "a".into(),
            replace,
            ..request_in(&directory, folder)
        };
        let first = block_on(registry.load(with("one", true))).unwrap();
        let old = acquire(&registry, "a").unwrap();
        let error = block_on(registry.load(with("two", false))).unwrap_err();
        assert!(matches!(error, AdapterError::AlreadyLoaded { .. }));
        let second = block_on(registry.load(with("two", true))).unwrap();
        assert_ne!(first.version, second.version);
        let new = acquire(&registry, "a").unwrap();
        assert_eq!(Some(old.version().to_string()), first.version);
        assert_eq!(Some(new.version().to_string()), second.version);
        assert_eq!(registry.info("a").unwrap().leases, 2);
        // Unloading waits for both versions.
        drop(new);
        let mut unload = registry.unload("a");
        assert!(futures::FutureExt::now_or_never(&mut unload).is_none());
        drop(old);
        assert_eq!(block_on(unload).unwrap().waited_for, 1);
    }

    #[test]
    fn a_replacement_that_fails_leaves_the_old_version() {
        let directory = folder(&["one", "two"]);
        std::fs::write(directory.path().join("two/adapter_model.safetensors"), b"bad").unwrap();
        let registry = registry(|_| {});
        let with = |folder: &str| LoadRequest {
            name: "a".into(),
            replace: true,
            ..request_in(&directory, folder)
        };
        let first = block_on(registry.load(with("one"))).unwrap();
        block_on(registry.load(with("two"))).unwrap_err();
        assert_eq!(registry.info("a").unwrap(), first);
    }

    #[test]
    fn replacing_another_version_than_expected_is_a_conflict() {
        let directory = folder(&["one", "two"]);
        let registry = registry(|_| {});
        let with = |folder: &str| LoadRequest {
            name: "a".into(),
            replace: true,
            ..request_in(&directory, folder)
        };
        let absent = block_on(registry.load_expecting(with("one"), Some("0".repeat(64)))).unwrap_err();
        assert!(
            matches!(absent, AdapterError::VersionConflict { ref got, .. } if got == "none"),
            "{absent}"
        );
        let first = block_on(registry.load(with("one"))).unwrap();
        let second = block_on(registry.load_expecting(with("two"), first.version.clone())).unwrap();
        let conflict = block_on(registry.load_expecting(with("one"), first.version.clone())).unwrap_err();
        assert!(matches!(conflict, AdapterError::VersionConflict { ref got, .. } if Some(got) == second.version.as_ref()));
        assert_eq!(registry.info("a").unwrap().version, second.version);
    }

    #[test]
    fn of_two_loads_of_one_name_at_once_one_wins() {
        let directory = folder(&["one", "two"]);
        let registry = registry(|config| config.loader_threads = 4);
        let loads = ["one", "two", "one", "two"].map(|folder| {
            registry.load(LoadRequest {
                name: "a".into(),
                ..request_in(&directory, folder)
            })
        });
        let results = block_on(futures::future::join_all(loads));
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
        for error in results.into_iter().filter_map(Result::err) {
            assert!(matches!(error, AdapterError::AlreadyLoaded { .. }), "{error}");
        }
        assert!(registry.shared.state.lock().claimed.is_empty());
    }

    #[test]
    fn a_name_forgotten_while_it_loads_stays_forgotten() {
        let directory = folder(&["a"]);
        let registry = registry(|_| {});
        registry.register(request_in(&directory, "a")).unwrap();
        let mut waiter = registry.acquire("a");
        let at_once = futures::FutureExt::now_or_never(&mut waiter);
        block_on(registry.unload("a")).unwrap();
        // Either the load was faster, or the waiter hears that the name is unknown.
        match at_once.unwrap_or_else(|| block_on(waiter)) {
            Ok(lease) => drop(lease),
            Err(error) => assert!(matches!(error, AdapterError::Unknown { .. }), "{error}"),
        }
        assert!(registry.list().is_empty());
        assert!(matches!(acquire(&registry, "a"), Err(AdapterError::Unknown { .. })));
        assert_eq!(registry.stats().leases, 0);
    }

    #[test]
    fn a_panic_in_a_load_is_an_error_and_the_pool_lives() {
        struct Panics;
        impl crate::adapter::BaseWeights for Panics {
            fn read_row(&self, _: crate::adapter::ModuleId, _: usize, _: &mut [f32]) {
                panic!("the disk is on fire");
            }
            fn bias(&self, _: crate::adapter::ModuleId) -> Option<Vec<f32>> {
                None
            }
        }
        let decoder = tiny_decoder();
        let mut files = AdapterFiles::new(&decoder, serde_json::json!({"r": 2, "target_modules": ["embed_tokens"]}), 1);
        files.add(crate::adapter::ModuleId::EmbedTokens, "base_layer.weight", &[11, 8], &mut 1);
        let bad = files.write();
        let registry = registry(|config| {
            config.limits.base = Some(Arc::new(|| Ok(Box::new(Panics))));
            config.loader_threads = 1;
        });
        for _ in 0..3 {
            let error = block_on(registry.load(request("a", &bad))).unwrap_err();
            assert!(
                matches!(error, AdapterError::Internal { ref reason } if reason == "the disk is on fire"),
                "{error}"
            );
        }
        let good = AdapterFiles::simple(&decoder, 1).write();
        block_on(registry.load(request("a", &good))).unwrap();
        // The loader counts itself idle after it has answered.
        while registry.stats().loading > 0 {
            std::thread::yield_now();
        }
    }

    #[test]
    fn files_that_change_are_a_new_version_at_the_next_read() {
        let directory = folder(&["a"]);
        let registry = registry(|config| config.max_loaded_loras = Some(1));
        registry.register(request_in(&directory, "a")).unwrap();
        let old = acquire(&registry, "a").unwrap().version();
        AdapterFiles::simple(&tiny_decoder(), 99).write_to(&directory.path().join("a"));
        assert_eq!(acquire(&registry, "a").unwrap().version(), old);
        let other = folder(&["b"]);
        block_on(registry.load(request_in(&other, "b"))).unwrap();
        assert_ne!(acquire(&registry, "a").unwrap().version(), old);
    }

    #[test]
    fn adapter_folders_are_found_by_name() {
        let directory = folder(&["a", "b"]);
        std::fs::create_dir(directory.path().join("empty")).unwrap();
        let registry = registry(|config| config.adapter_dirs = vec![directory.path().to_owned()]);
        assert!(names(&registry).is_empty());
        drop(acquire(&registry, "b").unwrap());
        assert_eq!(names(&registry), ["b"]);
        for unknown in ["c", "empty", "../a", ".", "..", "a/", ""] {
            assert!(matches!(acquire(&registry, unknown), Err(AdapterError::Unknown { .. })), "{unknown}");
        }
        // One that appears later.
        AdapterFiles::simple(&tiny_decoder(), 7).write_to(&directory.path().join("empty"));
        acquire(&registry, "empty").unwrap();
        assert_eq!(registry.scan_adapter_dirs(), ["a"]);
        assert!(registry.scan_adapter_dirs().is_empty());
        assert_eq!(registry.stats().registered, 3);
    }

    #[test]
    fn a_full_queue_of_loads_refuses() {
        let directory = folder(&["a"]);
        let registry = registry(|config| config.max_queued_loads = 0);
        let error = block_on(registry.load(request_in(&directory, "a"))).unwrap_err();
        assert_eq!(error, AdapterError::TooManyLoads { waiting: 0, limit: 0 });
        registry.register(request_in(&directory, "a")).unwrap();
        assert!(matches!(acquire(&registry, "a"), Err(AdapterError::TooManyLoads { .. })));
        // Nothing is left claimed or loading.
        assert!(registry.shared.state.lock().claimed.is_empty());
        assert_eq!(registry.info("a").unwrap().state, AdapterState::Registered);
    }

    #[test]
    fn leases_outlive_the_registry_and_waiters_are_told() {
        let directory = folder(&["a"]);
        let registry = registry(|_| {});
        block_on(registry.load(request_in(&directory, "a"))).unwrap();
        let lease = acquire(&registry, "a").unwrap();
        drop(registry);
        assert!(!lease.weights().modules.is_empty());
    }

    #[test]
    fn thousands_of_names_share_bounded_memory() {
        let directory = folder(&["x", "y", "z"]);
        let registry = registry(|config| config.max_loaded_loras = Some(20));
        for index in 0..10_000 {
            let folder = ["x", "y", "z"][index % 3];
            registry
                .register(LoadRequest {
                    name: format!("adapter-{index}"),
                    ..request_in(&directory, folder)
                })
                .unwrap();
        }
        let one = acquire(&registry, "adapter-0").unwrap().weights().bytes();
        for index in (0..10_000).step_by(41) {
            acquire(&registry, &format!("adapter-{index}")).unwrap();
            assert!(registry.stats().loaded <= 20);
            assert!(registry.stats().host_bytes <= 3 * one);
        }
        let error = acquire(&registry, "nobody").unwrap_err().to_string();
        assert!(error.contains("and 9968 more"), "{error}");
        assert!(error.len() < 2000);
    }

    mod random {
        use proptest::prelude::*;

        use super::*;

        /// What a client or a worker does.
        #[derive(Clone, Debug)]
        enum Action {
            Register(usize),
            Load {
                name: usize,
                content: usize,
                replace: bool,
                pinned: bool,
            },
            Unload(usize),
            Acquire(usize),
            StopWaiting(usize),
            Clone(prop::sample::Index),
            Drop(prop::sample::Index),
            Pin(usize, bool),
        }

        const NAMES: usize = 5;
        const LIMIT: usize = 3;

        fn action() -> impl Strategy<Value = Action> {
            let name = 0..NAMES;
            prop_oneof![
                1 => name.clone().prop_map(Action::Register),
                1 => (name.clone(), 0..4usize, any::<bool>(), any::<bool>()).prop_map(|(name, content, replace, pinned)| Action::Load {
                    name,
                    content,
                    replace,
                    pinned
                }),
                1 => name.clone().prop_map(Action::Unload),
                4 => name.clone().prop_map(Action::Acquire),
                1 => name.clone().prop_map(Action::StopWaiting),
                1 => any::<prop::sample::Index>().prop_map(Action::Clone),
                3 => any::<prop::sample::Index>().prop_map(Action::Drop),
                1 => (name, any::<bool>()).prop_map(|(name, pinned)| Action::Pin(name, pinned)),
            ]
        }

        proptest! {
            #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

            /// Whatever happens in whatever order: counts add up, limits hold, and in the end nothing is held.
            #[test]
            fn leases_and_bounds_are_conserved(actions in prop::collection::vec(action(), 1..60)) {
                // The last content is damaged.
                let contents = folder(&["0", "1", "2", "3"]);
                std::fs::write(contents.path().join("3/adapter_model.safetensors"), b"bad").unwrap();
                let registry = registry(|config| {
                    config.max_loaded_loras = Some(LIMIT);
                    config.max_pinned = 2;
                });
                let request = |name: usize, content: usize| LoadRequest { name: format!("n{name}"), ..request_in(&contents, &content.to_string()) };
                // Leases with the number of requests that they stand for: clones share one.
                let mut leases: Vec<(usize, AdapterLease)> = Vec::new();
                let mut next = 0;
                for action in actions {
                    match action {
                        Action::Register(name) => drop(registry.register(request(name, name % 4))),
                        Action::Load { name, content, replace, pinned } => {
                            let known = registry.info(&format!("n{name}"));
                            let result = block_on(registry.load(LoadRequest { replace, pinned, ..request(name, content) }));
                            match result {
                                Ok(_) => prop_assert!(content != 3 && (known.is_none() || replace)),
                                // As before, but for what others may have evicted.
                                Err(_) => prop_assert_eq!(known.is_some(), registry.info(&format!("n{name}")).is_some()),
                            }
                        }
                        Action::Unload(name) => {
                            let name = format!("n{name}");
                            leases.retain(|(_, lease)| **lease.name() != *name);
                            let known = registry.info(&name);
                            match block_on(registry.unload(&name)) {
                                Ok(report) => prop_assert_eq!(report.waited_for, 0),
                                Err(_) => prop_assert!(known.is_none()),
                            }
                            prop_assert!(registry.info(&name).is_none());
                        }
                        Action::Acquire(name) => {
                            if let Ok(lease) = acquire(&registry, &format!("n{name}")) {
                                leases.push((next, lease));
                                next += 1;
                            }
                        }
                        Action::StopWaiting(name) => {
                            let name = format!("n{name}");
                            drop(futures::FutureExt::now_or_never(registry.acquire(&name)));
                        }
                        Action::Clone(index) if !leases.is_empty() => {
                            let lease = index.get(&leases).clone();
                            leases.push(lease);
                        }
                        Action::Drop(index) if !leases.is_empty() => drop(leases.swap_remove(index.index(leases.len()))),
                        Action::Clone(_) | Action::Drop(_) => {}
                        Action::Pin(name, pinned) => drop(registry.pin(&format!("n{name}"), pinned)),
                    }
                    let stats = registry.stats();
                    prop_assert!(stats.loaded <= LIMIT, "{} loaded", stats.loaded);
                    prop_assert!(stats.pinned <= 2, "{} pinned", stats.pinned);
                    // Loads that nobody waits for any more may hold a lease for a moment.
                    let distinct: HashSet<usize> = leases.iter().map(|(request, _)| *request).collect();
                    if stats.loading == 0 {
                        prop_assert_eq!(registry.stats().leases, distinct.len());
                    }
                    for info in registry.list() {
                        let own: HashSet<usize> =
                            leases.iter().filter(|(_, lease)| *lease.name() == info.name).map(|(request, _)| *request).collect();
                        prop_assert!(info.leases >= own.len());
                        if !own.is_empty() && info.pinned {
                            prop_assert!(info.version.is_some());
                        }
                    }
                }
                leases.clear();
                while registry.stats().loading > 0 {
                    std::thread::yield_now();
                }
                prop_assert_eq!(registry.stats().leases, 0);
                prop_assert!(registry.list().iter().all(|info| info.leases == 0));
            }
        }
    }
}
