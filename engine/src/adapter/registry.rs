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
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use futures::{
    StreamExt, TryStreamExt,
    future::{Either, select, try_join_all},
    stream,
};
use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};
use tokio::sync::oneshot;

use super::{
    AdapterError, HostAdapter, HostPart, ResolvedAdapter, VersionId,
    combine::{Part, combine, combined_version, parse_expression},
    lease::{AdapterLease, Hold, LeaseGuard, LeaseOwner, UnloadMode, Unloading},
    load::{CoverageReport, LoraLimits, load_adapter},
};
use crate::{
    BoxFuture,
    decoder::DecoderConfig,
    files::{FileSource, SourceStamp},
    stats::{AdapterMoves, Histogram, LOAD_SECONDS_BOUNDS},
};

/// Longest name, in bytes.
const MAX_NAME_BYTES: usize = 256;
/// What requests on combinations are counted under.
pub const COMBINATION_LABEL: &str = "(combination)";
/// How often loads that wait for room are looked at for having waited too long.
const ROOM_CHECK: Duration = Duration::from_millis(250);
/// How often a folder is read that changes while it is read.
const READ_ATTEMPTS: usize = 3;
/// Names listed in an `Unknown` error; a server may have thousands.
const NAMES_IN_ERROR: usize = 32;
/// Names (and versions) whose moves are kept for who asks; when there are more, nobody asks, and they begin anew.
const MAX_MOVED: usize = 65_536;
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
    /// Only swap if the name has this version (hex) at the moment of the swap.
    pub expected_version: Option<String>,
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
    /// Bytes of host memory that its companion takes (see [`super::Companion`]), what it shares with others included.
    pub companion_bytes: usize,
    /// Whether it is pinned.
    pub pinned: bool,
    /// Requests that hold it.
    pub leases: usize,
    /// Requests that asked for it since it was registered.
    pub requests_total: u64,
    /// Of those, the ones that found its weights in host memory.
    pub hits_total: u64,
    /// When a request last asked for it.
    pub last_used: Option<SystemTime>,
    /// Why its last load failed, until one succeeds.
    pub last_error: Option<String>,
    /// Coverage, keys without effect, and the like: what `inspect` shows.
    pub report: Option<Arc<CoverageReport>>,
    /// Of a combination (`a+b*0.5`): the names in it. Empty for an adapter.
    pub parts: Vec<Arc<str>>,
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
    /// Bytes of their weights, those of combinations included; `None` is unbounded. What several names share counts once.
    pub max_loaded_bytes: Option<usize>,
    /// Pinned adapters: `max_loras_per_batch - 1`.
    pub max_pinned: usize,
    /// Threads that read, check and pack.
    pub loader_threads: usize,
    /// Loads that may wait for a thread.
    pub max_queued_loads: usize,
    /// How long a request waits for room in host memory while every adapter there is pinned or leased.
    pub room_timeout: Duration,
    /// Adapters in one combination (`a+b`).
    pub max_combined: usize,
    /// Combinations in host memory, beside the adapters: those in use, and those kept for the next request.
    pub max_combinations: usize,
}

impl RegistryConfig {
    /// Names, and bytes.
    fn limits_of_host(&self) -> (usize, usize) {
        (self.max_loaded_loras.unwrap_or(usize::MAX), self.max_loaded_bytes.unwrap_or(usize::MAX))
    }

    /// A loader thread for each four cores, two to eight of them; LRU, no bound on host memory, seven pins.
    pub fn new(limits: LoraLimits) -> Self {
        Self {
            limits,
            base_names: Vec::new(),
            max_loaded_loras: None,
            max_loaded_bytes: None,
            max_pinned: 7,
            loader_threads: std::thread::available_parallelism().map_or(2, |cores| (cores.get() / 4).clamp(2, 8)),
            max_queued_loads: 1024,
            room_timeout: Duration::from_secs(60),
            max_combined: 4,
            max_combinations: 64,
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
    /// Bytes of adapters in host memory, weights and companions; what several share counts once, what only leases hold counts too.
    pub host_bytes: usize,
    /// Of those, the ones of names and of kept combinations: what `max_loaded_bytes` bounds. The others belong to requests in flight.
    pub loaded_bytes: usize,
    /// Combinations in host memory.
    pub combinations: usize,
    /// Loads that wait for a thread or run.
    pub loading: usize,
    /// Loads that wait for room.
    pub waiting_for_room: usize,
    /// Loads that succeeded.
    pub loads_total: u64,
    /// Loads that failed.
    pub load_failures_total: u64,
    /// Time spent in loads.
    pub load_seconds_total: f64,
    /// Reading, checking and packing an adapter that could be loaded.
    pub pack_seconds: Histogram,
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
    moves: Mutex<HashMap<VersionId, DeviceMoves>>,
}

/// How often a version came to the device and left it for others.
#[derive(Clone, Copy, Debug, Default)]
struct DeviceMoves {
    uploads: u64,
    evictions: u64,
}

impl ResidentSet {
    /// A version became usable.
    pub fn insert(&self, version: VersionId) {
        self.versions.write().insert(version);
        self.moved(version, |moves| moves.uploads += 1);
    }

    /// A version left for another.
    pub fn evict(&self, version: &VersionId) {
        self.remove(version);
        self.moved(*version, |moves| moves.evictions += 1);
    }

    fn moved(&self, version: VersionId, count: impl FnOnce(&mut DeviceMoves)) {
        let mut moves = self.moves.lock();
        if moves.len() >= MAX_MOVED {
            moves.clear();
        }
        count(moves.entry(version).or_default());
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

/// What is known of a version once it was read; stays when its weights leave.
struct Facts {
    version: VersionId,
    report: Arc<CoverageReport>,
    max_lora_rank: u32,
    target_modules: Vec<String>,
    bytes: usize,
    companion_bytes: usize,
    /// All that it keeps in host memory.
    parts: Vec<HostPart>,
}

/// A failure and when the next attempt is due.
struct Failure {
    error: AdapterError,
    retry_at: Instant,
    back_off: Duration,
}

type LeaseSender = oneshot::Sender<Result<AdapterLease, AdapterError>>;
type LeaseReceiver = oneshot::Receiver<Result<AdapterLease, AdapterError>>;

/// Who waits for a load, and how long for room: as long as another, whenever it came.
struct Waiter {
    sender: LeaseSender,
    deadline: Instant,
}

/// Weights of a registered name.
enum Tier {
    Registered,
    Loading(Vec<Waiter>),
    Host(Arc<HostAdapter>),
}

struct Entry {
    name: Arc<str>,
    files: FileSource,
    source: Arc<str>,
    pinned: bool,
    tier: Tier,
    facts: Option<Arc<Facts>>,
    hold: Arc<Hold>,
    /// Holds of versions that this name had before and that requests still run on.
    previous: Vec<Arc<Hold>>,
    /// Tells this registration from an earlier one of the same name.
    registration: u64,
    /// Ticks of the registry's clock.
    last_used: u64,
    loaded_at: u64,
    last_used_time: Option<SystemTime>,
    requests_total: u64,
    hits_total: u64,
    failure: Option<Failure>,
}

/// What [`AdapterInfo`] is made of: cheap to take while the registry is locked.
struct Glance {
    name: Arc<str>,
    source: Arc<str>,
    on_host: bool,
    facts: Option<Arc<Facts>>,
    pinned: bool,
    leases: usize,
    requests_total: u64,
    hits_total: u64,
    last_used: Option<SystemTime>,
    last_error: Option<AdapterError>,
}

impl Glance {
    fn at(entry: &Entry) -> Self {
        Self {
            name: entry.name.clone(),
            source: entry.source.clone(),
            on_host: matches!(entry.tier, Tier::Host(_)),
            facts: entry.facts.clone(),
            pinned: entry.pinned,
            leases: entry.hold.count() + entry.previous.iter().map(|hold| hold.count()).sum::<usize>(),
            requests_total: entry.requests_total,
            hits_total: entry.hits_total,
            last_used: entry.last_used_time,
            last_error: entry.failure.as_ref().map(|failure| failure.error.clone()),
        }
    }
}

/// Least recently used first; those never used come first, in order of registration.
fn list_order(entry: &Entry) -> (u64, u64) {
    (entry.last_used, entry.registration)
}

#[derive(Default)]
struct State {
    entries: HashMap<Arc<str>, Entry>,
    /// The names of `entries` in their order: errors tell the first few, and must not look at all of thousands for that.
    names: BTreeSet<Arc<str>>,
    /// Weights by content, as long as anything holds them.
    versions: HashMap<VersionId, Weak<HostAdapter>>,
    /// What folders held when they were read, as long as the weights are anywhere: such a folder is not read again. One with a companion is, once
    /// it has left the host, even if the device uses the same bytes still: what left is most of it, and it goes into the version like the weights.
    read: HashMap<SourceStamp, (Weak<HostAdapter>, Arc<Facts>)>,
    /// Loads that found no room, the first to be tried first. Their entries are `Loading`.
    parked: VecDeque<Parked<Load>>,
    /// Combinations that found no room, likewise.
    parked_combinations: VecDeque<Parked<Combine>>,
    /// Combinations in host memory, the last used last.
    combinations: VecDeque<Combination>,
    /// Names that a `load` is working on, and who waits for it.
    claimed: HashMap<String, Vec<oneshot::Sender<()>>>,
    clock: u64,
    /// Names whose weights are on the host.
    loaded: HashSet<Arc<str>>,
    /// What those names and the combinations keep in host memory.
    tier: Parts,
    /// What the request wants that gathers leases.
    wanted: Option<WantedBytes>,
    /// Adapters that have left for others, until [`unlock`] drops them.
    leaving: Vec<Arc<HostAdapter>>,
    num_pinned: usize,
    loads_total: u64,
    load_failures_total: u64,
    load_time: Duration,
    pack_seconds: Histogram,
    /// Since they were taken last.
    moves: HashMap<Arc<str>, AdapterMoves>,
    evictions_total: u64,
    hits_total: u64,
    misses_total: u64,
}

/// Host memory that names (and combinations) keep or would keep, by [`HostPart::id`]: each part counts once.
#[derive(Default)]
struct Parts {
    uses: HashMap<[u8; 32], PartUse>,
    /// Of all of them.
    bytes: usize,
}

/// How many names (and combinations) have a part.
struct PartUse {
    uses: usize,
    bytes: usize,
}

impl Parts {
    fn has(&self, id: &[u8; 32]) -> bool {
        self.uses.contains_key(id)
    }

    fn add(&mut self, parts: &[HostPart]) {
        for HostPart { id, bytes } in parts {
            let part = self.uses.entry(*id).or_insert(PartUse { uses: 0, bytes: *bytes });
            part.uses += 1;
            if part.uses == 1 {
                self.bytes += bytes;
            }
        }
    }

    fn remove(&mut self, parts: &[HostPart]) {
        for HostPart { id, .. } in parts {
            let part = self.uses.get_mut(id).expect("what leaves has entered");
            part.uses -= 1;
            if part.uses == 0 {
                self.bytes -= part.bytes;
                self.uses.remove(id);
            }
        }
    }
}

/// Bytes of host memory that a request's adapters and combinations take together, as far as the adapters were ever read.
///
/// Each name is looked at once, and again whenever what is known of it changes: whoever changes that tells ([`State::is_known`]), under the
/// lock that the first look was under. So at every moment the sum is the one that a look at all names would give, also when one was replaced
/// by a larger one meanwhile, and all of it costs as much as there are names. Of those that the request has its leases on already, what it
/// holds counts, and nothing once that was replaced: then it is out of the bound, and in nobody's way.
struct WantedBytes {
    names: HashMap<Arc<str>, WantedName>,
    parts: Parts,
    sums_bytes: usize,
    limit: usize,
    /// Told when they are more than may be.
    refuse: Option<oneshot::Sender<AdapterError>>,
}

/// One adapter of a [`WantedBytes`].
#[derive(Default)]
struct WantedName {
    /// Leases that the request has not got yet.
    num_waiting: usize,
    /// Different combinations that it is in.
    num_sums: usize,
    facts: Option<Arc<Facts>>,
}

impl WantedBytes {
    fn new(wanted: &[Wanted<'_>], limit: usize) -> Self {
        let mut names: HashMap<Arc<str>, WantedName> = HashMap::new();
        for name in wanted.iter().flat_map(Wanted::names) {
            names.entry(name.into()).or_default().num_waiting += 1;
        }
        for sum in wanted.iter().filter_map(Wanted::sum).collect::<HashSet<_>>() {
            for (name, _) in sum {
                names.entry(name.into()).or_default().num_sums += 1;
            }
        }
        Self {
            names,
            parts: Parts::default(),
            sums_bytes: 0,
            limit,
            refuse: None,
        }
    }

    /// Has every name looked up.
    fn look_up(&mut self, facts_of: impl Fn(&str) -> Option<Arc<Facts>>) {
        for name in self.names.keys().cloned().collect::<Vec<_>>() {
            self.set(&name, facts_of(&name).as_ref());
        }
    }

    /// What is known of a name from here on, in place of what was.
    fn set(&mut self, name: &str, facts: Option<&Arc<Facts>>) {
        let Some(own) = self.names.get_mut(name) else { return };
        let old = own.facts.take();
        if let Some(old) = &old {
            self.parts.remove(&old.parts);
        }
        if own.num_waiting == 0 {
            // Its combinations are those of what the request holds.
            return;
        }
        own.facts = facts.cloned();
        self.sums_bytes -= old.map_or(0, |old| own.num_sums * old.bytes);
        if let Some(new) = facts {
            self.parts.add(&new.parts);
            // A combination's weights are as large as its parts' together, but for padding; a tokenizer it shares with them.
            self.sums_bytes += own.num_sums * new.bytes;
        }
        if let Err(error) = self.check()
            && let Some(refuse) = self.refuse.take()
        {
            // Whoever waited may have gone.
            let _ = refuse.send(error);
        }
    }

    /// The request has got a lease.
    fn is_leased(&mut self, lease: &AdapterLease) {
        let Some(own) = self.names.get_mut(lease.name()) else { return };
        own.num_waiting -= 1;
        if own.num_waiting == 0 && own.facts.as_ref().is_some_and(|facts| facts.version != lease.version()) {
            // It was replaced since the lease was made.
            self.set(lease.name(), None);
        }
    }

    fn check(&self) -> Result<(), AdapterError> {
        match self.parts.bytes + self.sums_bytes {
            got if got > self.limit => Err(AdapterError::TooManyBytes { got, limit: self.limit }),
            _ => Ok(()),
        }
    }
}

/// The registry's look at what a request gathers; ended by its drop.
struct Watch<'a> {
    shared: &'a Shared,
    refused: oneshot::Receiver<AdapterError>,
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.shared.state.lock().wanted = None;
        // What it waited for need not be loaded for it any more.
        self.shared.room_may_be();
    }
}

/// A combination's weights, and the leases on them.
struct Combination {
    weights: Arc<HostAdapter>,
    hold: Arc<Hold>,
}

/// Work that may have to wait until a lease ends.
struct Parked<W> {
    work: W,
    deadline: Instant,
    /// The room that is kept for it while a loader works on it.
    grant: Option<Grant>,
}

/// What work is going to take of the host tier.
#[derive(Clone, Copy)]
struct Need {
    names: usize,
    combinations: usize,
    bytes: usize,
}

/// What is left of the host tier.
struct Room {
    names: usize,
    combinations: usize,
    bytes: usize,
    limit_bytes: usize,
}

impl Room {
    /// Takes what is needed if it is there. What is larger than all room there could be is let through, to be refused.
    fn take(&mut self, need: Need) -> bool {
        if need.bytes > self.limit_bytes {
            return true;
        }
        if need.names > self.names || need.combinations > self.combinations || need.bytes > self.bytes {
            return false;
        }
        self.names -= need.names;
        self.combinations -= need.combinations;
        self.bytes -= need.bytes;
        true
    }
}

trait NeedsRoom {
    /// What it needs beside the parts that are there.
    fn need(&self, is_there: impl Fn(&[u8; 32]) -> bool) -> Need;
    /// Where it waits.
    fn queue(state: &mut State) -> &mut VecDeque<Parked<Self>>
    where
        Self: Sized;
}

/// Room that loaders are about to fill. Without it, of two that were told of the same room the later could take it.
#[derive(Default)]
struct Granted {
    names: AtomicUsize,
    combinations: AtomicUsize,
    bytes: AtomicUsize,
}

/// A part of [`Granted`], given back on drop: then the room is filled, or it is others'.
struct Grant {
    granted: Arc<Granted>,
    need: Need,
}

impl Grant {
    fn new(granted: &Arc<Granted>, need: Need) -> Self {
        granted.names.fetch_add(need.names, Ordering::SeqCst);
        granted.combinations.fetch_add(need.combinations, Ordering::SeqCst);
        granted.bytes.fetch_add(need.bytes, Ordering::SeqCst);
        Self {
            granted: granted.clone(),
            need,
        }
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        self.granted.names.fetch_sub(self.need.names, Ordering::SeqCst);
        self.granted.combinations.fetch_sub(self.need.combinations, Ordering::SeqCst);
        self.granted.bytes.fetch_sub(self.need.bytes, Ordering::SeqCst);
    }
}

/// A registered adapter to be brought to the host.
struct Load {
    name: Arc<str>,
    registration: u64,
    /// What it was when it was read last.
    facts: Option<Arc<Facts>>,
}

impl NeedsRoom for Load {
    /// No bytes before it was ever read.
    fn need(&self, is_there: impl Fn(&[u8; 32]) -> bool) -> Need {
        let parts = self.facts.iter().flat_map(|facts| &facts.parts);
        Need {
            names: 1,
            combinations: 0,
            bytes: parts.filter(|part| !is_there(&part.id)).map(|part| part.bytes).sum(),
        }
    }

    fn queue(state: &mut State) -> &mut VecDeque<Parked<Self>> {
        &mut state.parked
    }
}

/// Adapters to be added up.
struct Combine {
    expression: Arc<str>,
    parts: Vec<(AdapterLease, f32)>,
    done: LeaseSender,
}

impl NeedsRoom for Combine {
    /// Where modules come together there is less padding than in the parts.
    fn need(&self, _: impl Fn(&[u8; 32]) -> bool) -> Need {
        Need {
            names: 0,
            combinations: 1,
            bytes: self.parts.iter().map(|(lease, _)| lease.weights().bytes()).sum(),
        }
    }

    fn queue(state: &mut State) -> &mut VecDeque<Parked<Self>> {
        &mut state.parked_combinations
    }
}

impl Combine {
    /// The registry's lock must not be held: the parts' leases end here.
    fn fail(self, error: AdapterError) {
        drop(self.parts);
        // Whoever waited may have gone.
        let _ = self.done.send(Err(error));
    }

    /// The registry's lock must not be held: if whoever waited has gone, the leases end here.
    fn answer(self, weights: Arc<HostAdapter>, guard: LeaseGuard) {
        let parts = self.parts.into_iter().map(|(lease, _)| lease).collect();
        let lease = AdapterLease::combined(self.expression, COMBINATION_LABEL.into(), weights, guard, parts);
        let _ = self.done.send(Ok(lease));
    }
}

/// What a loader thread is to do.
enum Job {
    /// Bring a registered adapter to the host.
    Fetch(Parked<Load>),
    /// Read and register.
    Load {
        request: LoadRequest,
        done: oneshot::Sender<Result<AdapterInfo, AdapterError>>,
        _claim: Claim,
    },
    /// Add up adapters.
    Combine(Parked<Combine>),
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    running: usize,
    closed: bool,
}

struct Shared {
    me: Weak<Shared>,
    config: RegistryConfig,
    decoder: Arc<DecoderConfig>,
    state: Mutex<State>,
    queue: Mutex<Queue>,
    wake: Condvar,
    residents: Arc<ResidentSet>,
    leases: AtomicUsize,
    pins_changed: AtomicUsize,
    /// Who is told of that.
    on_pins_changed: OnceLock<Box<dyn Fn() + Send + Sync>>,
    /// As many as wait for room, or one more: read without the lock when a lease ends.
    parked: AtomicUsize,
    granted: Arc<Granted>,
    /// Held by the one request that holds some leases and waits for others: were there two, each could wait for what the other holds.
    gathering: tokio::sync::Mutex<()>,
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
        let shared = Arc::new_cyclic(|me| Shared {
            me: me.clone(),
            parked: AtomicUsize::new(0),
            granted: Arc::default(),
            decoder,
            state: Mutex::new(State {
                pack_seconds: Histogram::new(LOAD_SECONDS_BOUNDS),
                ..State::default()
            }),
            queue: Mutex::default(),
            wake: Condvar::new(),
            residents: Arc::default(),
            leases: AtomicUsize::new(0),
            pins_changed: AtomicUsize::new(0),
            on_pins_changed: OnceLock::new(),
            gathering: tokio::sync::Mutex::default(),
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
        state.insert(request, None, None);
        if pinned {
            if let Err(error) = shared.fetch(&mut state, &name, None) {
                state.remove(&name);
                return Err(error);
            }
            shared.pins_have_changed();
        }
        Ok(())
    }

    /// Reads, checks, packs and registers an adapter. With `replace`, a name that is taken gets the new version atomically: requests
    /// in flight end on the old one; with `expected_version`, only if it has that version then. Once a loader has the request it is
    /// carried out, even if the future is dropped. While all room in host memory is in use by requests, the name has its new content at once and is
    /// read again at its first request; if it is to be pinned that is an error.
    ///
    /// # Errors
    /// Any of [`AdapterError`] but `Unknown`; nothing was registered, and a version that was to be replaced is as before.
    pub fn load(&self, request: LoadRequest) -> BoxFuture<'_, Result<AdapterInfo, AdapterError>> {
        Box::pin(async move {
            self.shared.check_name(&request.name)?;
            let claim = self.claim(&request.name).await;
            {
                // Refused before its files are read, where that is possible already; checked again at the end.
                let state = self.shared.state.lock();
                self.shared.check_load(&state, &request)?;
            }
            let (done, result) = oneshot::channel();
            self.shared.enqueue(Job::Load {
                request,
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
    /// An expression like `a+b*0.5` gives a lease on the combination, which holds one on each of its parts; a name that is taken is
    /// that name, whatever it looks like. While everything on the host is pinned or leased it waits for room.
    ///
    /// # Errors
    /// `Unknown`; what the load gave; `NothingToEvict`, `HostMemoryFull`, `TooManyCombinations` after `room_timeout`; `BadName` and
    /// `Incompatible` for combinations that can't be, `TooManyAdapters` and `TooManyBytes` for those that can't be in host memory beside
    /// their parts.
    pub fn acquire<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<AdapterLease, AdapterError>> {
        Box::pin(async move {
            let wanted = self.shared.parse(name)?;
            let Wanted::Sum { expression, parts } = &wanted else {
                return self.acquire_one(name).await;
            };
            let wanted = std::slice::from_ref(&wanted);
            self.check_number(wanted)?;
            self.check_bytes(wanted)?;
            if let Some(lease) = self.combine_now(expression, parts).await? {
                return Ok(lease);
            }
            let mut leases = self.gather(wanted).await?;
            leases.pop().ok_or_else(loader_gone)
        })
    }

    /// Leases on several, all of them or none. Two calls never wait for each other's, as two series of `acquire` may.
    ///
    /// # Errors
    /// As `acquire`; `TooManyAdapters`, `TooManySums` and `TooManyBytes` for more than there may be in host memory, as soon as that is known:
    /// of adapters that were never read, when they are.
    pub fn acquire_all<'a>(&'a self, names: &'a [&'a str]) -> BoxFuture<'a, Result<Vec<AdapterLease>, AdapterError>> {
        Box::pin(async move {
            let wanted = names.iter().map(|name| self.shared.parse(name)).collect::<Result<Vec<_>, _>>()?;
            self.check_number(&wanted)?;
            self.check_sums(&wanted)?;
            // Who finds all there holds nothing while it waits, and so need not wait for who does.
            if wanted.iter().all(|wanted| matches!(wanted, Wanted::One(_)))
                && let Some(leases) = self.shared.leases_now(names, true)
            {
                return Ok(leases);
            }
            self.check_bytes(&wanted)?;
            self.gather(&wanted).await
        })
    }

    /// Leases on all that is wanted, one such request after the other: it holds some while it waits for others.
    async fn gather(&self, wanted: &[Wanted<'_>]) -> Result<Vec<AdapterLease>, AdapterError> {
        let deadline = Instant::now() + self.shared.config.room_timeout;
        let _only_one = self.shared.gathering.lock().await;
        let mut watch = self.shared.watch(wanted);
        let each = wanted
            .iter()
            .map(|wanted| -> BoxFuture<'_, _> { Box::pin(self.acquire_wanted(wanted, deadline)) });
        // One loader is left to others.
        let at_once = self.shared.config.loader_threads.saturating_sub(1).max(1);
        let all = stream::iter(each.collect::<Vec<_>>()).buffered(at_once).try_collect();
        match select(&mut watch.refused, all).await {
            Either::Left((refused, _)) => Err(refused.unwrap_or_else(|_| loader_gone())),
            Either::Right((leases, _)) => leases,
        }
    }

    async fn acquire_wanted(&self, wanted: &Wanted<'_>, deadline: Instant) -> Result<AdapterLease, AdapterError> {
        match wanted {
            Wanted::One(name) => self.acquire_watched(name).await,
            Wanted::Sum { expression, parts } => {
                let leases = try_join_all(parts.iter().map(|part| self.acquire_watched(part.name))).await?;
                let (work, combined) = self.combination(expression, parts, leases);
                if let Some(work) = work {
                    self.shared.enqueue(Job::Combine(Parked { work, deadline, grant: None }))?;
                }
                combined.await.unwrap_or_else(|_| Err(loader_gone()))
            }
        }
    }

    /// The combination, if its parts are there and it is, too, or there is room for it now: nobody waits for room who holds leases and is
    /// not the one that [`Self::gather`] lets do so.
    async fn combine_now(&self, expression: &str, parts: &[Part<'_>]) -> Result<Option<AdapterLease>, AdapterError> {
        let names: Vec<&str> = parts.iter().map(|part| part.name).collect();
        let Some(leases) = self.shared.leases_now(&names, false) else {
            return Ok(None);
        };
        let (work, combined) = self.combination(expression, parts, leases);
        if let Some(work) = work {
            let Some(grant) = self.shared.grant_now(&work) else {
                return Ok(None);
            };
            let (deadline, grant) = (Instant::now(), Some(grant));
            self.shared.enqueue(Job::Combine(Parked { work, deadline, grant }))?;
        }
        match combined.await.unwrap_or_else(|_| Err(loader_gone())) {
            // Others were faster to the room.
            Err(error) if is_no_room(&error) => Ok(None),
            result => {
                self.shared.count_hits(&names);
                result.map(Some)
            }
        }
    }

    /// Refuses what could never be in host memory at once.
    fn check_number(&self, wanted: &[Wanted<'_>]) -> Result<(), AdapterError> {
        let got = wanted.iter().flat_map(Wanted::names).collect::<HashSet<_>>().len();
        match self.shared.config.max_loaded_loras {
            Some(limit) if got > limit => Err(AdapterError::TooManyAdapters { got, limit }),
            _ => Ok(()),
        }
    }

    /// The same of combinations: a request would wait for the end of those that it holds.
    fn check_sums(&self, wanted: &[Wanted<'_>]) -> Result<(), AdapterError> {
        let limit = self.shared.config.max_combinations;
        match wanted.iter().filter_map(Wanted::sum).collect::<HashSet<_>>().len() {
            got if got > limit => Err(AdapterError::TooManySums { got, limit }),
            _ => Ok(()),
        }
    }

    /// The same of bytes, as far as the adapters were ever read.
    fn check_bytes(&self, wanted: &[Wanted<'_>]) -> Result<(), AdapterError> {
        let Some(limit) = self.shared.config.max_loaded_bytes else {
            return Ok(());
        };
        let mut bytes = WantedBytes::new(wanted, limit);
        let state = self.shared.state.lock();
        bytes.look_up(|name| state.facts(name));
        bytes.check()
    }

    async fn acquire_one(&self, name: &str) -> Result<AdapterLease, AdapterError> {
        match self.shared.acquire(name)? {
            Acquired::Lease(lease) => Ok(lease),
            Acquired::Loading(receiver) => receiver.await.unwrap_or_else(|_| Err(loader_gone())),
        }
    }

    async fn acquire_watched(&self, name: &str) -> Result<AdapterLease, AdapterError> {
        let lease = self.acquire_one(name).await?;
        if let Some(wanted) = &mut self.shared.state.lock().wanted {
            wanted.is_leased(&lease);
        }
        Ok(lease)
    }

    /// Where a lease on a combination of these will come, and what is left to be done for that.
    fn combination(&self, expression: &str, parts: &[Part<'_>], leases: Vec<AdapterLease>) -> (Option<Combine>, LeaseReceiver) {
        let parts: Vec<(AdapterLease, f32)> = leases.into_iter().zip(parts).map(|(lease, part)| (lease, part.weight)).collect();
        let (done, combined) = oneshot::channel();
        if let [(lease, 1.0)] = &parts[..] {
            // Its receiver is here.
            let _ = done.send(Ok(lease.clone()));
            return (None, combined);
        }
        let expression = expression.into();
        (self.shared.answer_from_kept(Combine { expression, parts, done }), combined)
    }

    /// A lease if the adapter is in host memory now.
    pub fn try_acquire(&self, name: &str) -> Option<AdapterLease> {
        let mut state = self.shared.state.lock();
        self.shared.lease(&mut state, name, true)
    }

    /// Forgets a name at once: it is unknown from here on, and waiters for its load are told so. Requests that hold a lease finish on
    /// it, or with [`UnloadMode::Abort`] are to be ended by who runs them (see [`AdapterLease::is_revoked`]).
    ///
    /// # Errors
    /// `Unknown`.
    pub fn unload(&self, name: &str, mode: UnloadMode) -> Result<Unloading, AdapterError> {
        Ok(Unloading::new(name, mode, self.shared.forget(name)?))
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
        state.num_pinned = if pinned { state.num_pinned + 1 } else { state.num_pinned - 1 };
        drop(state);
        shared.room_may_be();
        shared.pins_have_changed();
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

    /// Has `tell` called whenever that has grown, for one who sleeps between steps: the weights of a pinned adapter come when a loader has read
    /// them. It is called on any thread and with the registry locked: it may not wait, nor ask the registry. The first one given stays.
    pub fn on_pins_changed(&self, tell: Box<dyn Fn() + Send + Sync>) {
        drop(self.shared.on_pins_changed.set(tell));
    }

    /// Every registered adapter, least recently used first; those never used come first, in order of registration.
    pub fn list(&self) -> Vec<AdapterInfo> {
        let mut entries: Vec<_> = {
            let state = self.shared.state.lock();
            state.entries.values().map(|entry| (list_order(entry), Glance::at(entry))).collect()
        };
        // Sorted and put into words without the lock: there may be thousands, and requests wait for it.
        entries.sort_unstable_by_key(|(order, _)| *order);
        entries.into_iter().map(|(_, glance)| self.shared.describe(glance)).collect()
    }

    /// The names of `list`.
    pub fn names(&self) -> Vec<Arc<str>> {
        let mut names: Vec<_> = {
            let state = self.shared.state.lock();
            state.entries.values().map(|entry| (list_order(entry), entry.name.clone())).collect()
        };
        names.sort_unstable_by_key(|(order, _)| *order);
        names.into_iter().map(|(_, name)| name).collect()
    }

    /// The first names in alphabetical order.
    pub fn first_names(&self, most: usize) -> Vec<Arc<str>> {
        self.shared.state.lock().names.iter().take(most).cloned().collect()
    }

    /// One registered adapter; an expression (see `acquire`) is described by its parts, if there are all of them.
    pub fn info(&self, name: &str) -> Option<AdapterInfo> {
        if let Some(entry) = self.shared.state.lock().entries.get(name) {
            return Some(self.shared.info(entry));
        }
        let parts = parse_expression(name, self.shared.config.max_combined).ok()??;
        let parts = parts.iter().map(|part| self.info(part.name)).collect::<Option<Vec<_>>>()?;
        Some(combined_info(name, &parts))
    }

    /// The adapters that came or went since this was called last.
    pub fn take_moves(&self) -> Vec<AdapterMoves> {
        let on_device = std::mem::take(&mut *self.shared.residents.moves.lock());
        let mut state = self.shared.state.lock();
        let mut moves = std::mem::take(&mut state.moves);
        if !on_device.is_empty() {
            // Once each, so that the sum is that of the device: for the name that was used last of those that have the version, for none if
            // none has it any more.
            let mut names: HashMap<VersionId, &Entry> = HashMap::new();
            for entry in state.entries.values() {
                let version = entry.facts.as_ref().map(|facts| facts.version);
                if let Some(version) = version.filter(|version| on_device.contains_key(version)) {
                    let last = names.entry(version).or_insert(entry);
                    if (last.last_used, &last.name) < (entry.last_used, &entry.name) {
                        *last = entry;
                    }
                }
            }
            for (version, entry) in names {
                let moves = moves.entry(entry.name.clone()).or_default();
                moves.device_uploads += on_device[&version].uploads;
                moves.device_evictions += on_device[&version].evictions;
            }
        }
        drop(state);
        moves.into_iter().map(|(name, moves)| AdapterMoves { name, ..moves }).collect()
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
            pinned: state.num_pinned,
            leases: self.shared.leases.load(Ordering::Acquire),
            host_bytes: distinct_bytes(versions.iter().map(|weights| &**weights)),
            loaded_bytes: state.tier.bytes,
            combinations: state.combinations.len(),
            loading: waiting + running,
            waiting_for_room: state.parked.len() + state.parked_combinations.len(),
            loads_total: state.loads_total,
            load_failures_total: state.load_failures_total,
            load_seconds_total: state.load_time.as_secs_f64(),
            pack_seconds: state.pack_seconds.clone(),
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

/// What a name stands for.
enum Wanted<'a> {
    /// An adapter, known or not.
    One(&'a str),
    /// A combination of adapters.
    Sum { expression: &'a str, parts: Vec<Part<'a>> },
}

impl Wanted<'_> {
    fn names(&self) -> impl Iterator<Item = &str> {
        let (one, parts) = match self {
            Self::One(name) => (Some(*name), &[][..]),
            Self::Sum { parts, .. } => (None, &parts[..]),
        };
        one.into_iter().chain(parts.iter().map(|part| part.name))
    }

    /// What tells a combination from others, however it is written. One adapter in full is none.
    fn sum(&self) -> Option<Vec<(&str, u32)>> {
        match self {
            Self::Sum { parts, .. } if !matches!(&parts[..], [Part { weight: 1.0, .. }]) => {
                Some(parts.iter().map(|part| (part.name, part.weight.to_bits())).collect())
            }
            _ => None,
        }
    }
}

/// What may not leave the host.
#[derive(Default)]
struct Staying {
    names: usize,
    parts: HashMap<[u8; 32], usize>,
}

impl Staying {
    fn bytes(&self) -> usize {
        self.parts.values().sum()
    }

    fn has(&self, id: &[u8; 32]) -> bool {
        self.parts.contains_key(id)
    }
}

enum Acquired {
    Lease(AdapterLease),
    Loading(LeaseReceiver),
}

impl State {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Adds an entry under a free name.
    fn insert(&mut self, request: LoadRequest, weights: Option<Arc<HostAdapter>>, facts: Option<Arc<Facts>>) {
        let tick = self.tick();
        let name: Arc<str> = request.name.as_str().into();
        let tier = self.tier_with(&name, weights);
        self.num_pinned += usize::from(request.pinned);
        self.is_known(&name, facts.as_ref());
        let entry = Entry {
            name: name.clone(),
            files: request.files,
            source: request.source.into(),
            pinned: request.pinned,
            tier,
            facts,
            hold: Arc::default(),
            previous: Vec::new(),
            registration: tick,
            last_used: 0,
            loaded_at: tick,
            last_used_time: None,
            requests_total: 0,
            hits_total: 0,
            failure: None,
        };
        self.names.insert(Arc::clone(&name));
        self.entries.insert(name, entry);
    }

    /// Of a name whose weights may be there.
    fn tier_with(&mut self, name: &Arc<str>, weights: Option<Arc<HostAdapter>>) -> Tier {
        match weights {
            None => Tier::Registered,
            Some(weights) => {
                self.enter_host(name, &weights);
                Tier::Host(weights)
            }
        }
    }

    /// What [`Self::insert`] did, undone.
    fn remove(&mut self, name: &str) -> Option<Entry> {
        let entry = self.entries.remove(name)?;
        self.names.remove(name);
        self.is_known(name, None);
        if let Tier::Host(weights) = &entry.tier {
            self.leave_host(name, weights);
        }
        self.num_pinned -= usize::from(entry.pinned);
        Some(entry)
    }

    /// Counts a move of a name.
    fn moved(&mut self, name: &str, count: impl FnOnce(&mut AdapterMoves)) {
        if let Some(moves) = self.moves.get_mut(name) {
            return count(moves);
        }
        if self.moves.len() >= MAX_MOVED {
            self.moves.clear();
        }
        count(self.moves.entry(name.into()).or_default());
    }

    /// A name's weights are on the host from here on.
    fn enter_host(&mut self, name: &Arc<str>, weights: &HostAdapter) {
        self.loaded.insert(name.clone());
        self.enter_tier(weights);
    }

    /// A name's weights leave the host.
    fn leave_host(&mut self, name: &str, weights: &HostAdapter) {
        self.loaded.remove(name);
        self.leave_tier(weights);
    }

    /// What is known of a name has changed: a request that gathers leases may want it.
    fn is_known(&mut self, name: &str, facts: Option<&Arc<Facts>>) {
        if let Some(wanted) = &mut self.wanted {
            wanted.set(name, facts);
        }
    }

    fn facts(&self, name: &str) -> Option<Arc<Facts>> {
        self.entries.get(name)?.facts.clone()
    }

    fn enter_tier(&mut self, weights: &HostAdapter) {
        self.tier.add(&weights.host_parts());
    }

    fn leave_tier(&mut self, weights: &HostAdapter) {
        self.tier.remove(&weights.host_parts());
    }

    /// Bytes that these weights would add to the tier as it is.
    fn missing_bytes(&self, weights: &HostAdapter) -> usize {
        weights.missing_bytes(|id| self.tier.has(id))
    }

    /// What a folder in this state holds, if that is known and still in memory.
    fn known(&self, stamp: &SourceStamp) -> Option<(Arc<HostAdapter>, Arc<Facts>)> {
        let (weights, facts) = self.read.get(stamp)?;
        Some((weights.upgrade()?, facts.clone()))
    }

    fn remember(&mut self, stamp: SourceStamp, weights: &Arc<HostAdapter>, facts: &Arc<Facts>) {
        if self.read.len() > 2 * self.tier.uses.len() + 64 {
            self.read.retain(|_, (weights, _)| weights.strong_count() > 0);
        }
        self.read.insert(stamp, (Arc::downgrade(weights), facts.clone()));
    }

    /// The entry of a load, if it still waits for it.
    fn current(&self, load: &Load) -> Option<&Entry> {
        let entry = self.entries.get(&load.name)?;
        (entry.registration == load.registration && matches!(entry.tier, Tier::Loading(_))).then_some(entry)
    }

    /// Whether anybody waits for a load. One that nobody waits for is given up here: the next request starts another.
    fn is_wanted(&mut self, load: &Load) -> bool {
        if self.current(load).is_none() {
            return false;
        }
        let Some(entry) = self.entries.get_mut(&load.name) else { return false };
        let Tier::Loading(waiters) = &entry.tier else { return false };
        let wanted = entry.pinned || waiters.iter().any(|waiter| !waiter.sender.is_closed());
        if !wanted {
            entry.tier = Tier::Registered;
        }
        wanted
    }

    /// Whose time is up of those who wait for a load that finds no room, and how long the others wait on; a pinned adapter always does. `None`
    /// if nobody is left to wait.
    fn whose_time_is_up(&mut self, name: &str, room_timeout: Duration) -> Option<(Vec<Waiter>, Instant)> {
        let now = Instant::now();
        let entry = self.entries.get_mut(name)?;
        let Tier::Loading(waiters) = &mut entry.tier else { return None };
        let first = waiters.iter().map(|waiter| waiter.deadline).filter(|deadline| now < *deadline).min();
        let deadline = first.or_else(|| entry.pinned.then(|| now + room_timeout))?;
        let (over, rest) = std::mem::take(waiters).into_iter().partition(|waiter| waiter.deadline <= now);
        *waiters = rest;
        Some((over, deadline))
    }

    /// Names, and what is kept in host memory, that may not leave: pinned, or in use.
    fn staying(&self) -> Staying {
        let mut staying = self.staying_by(|entry| !may_leave(entry));
        for combination in self.combinations_in_use() {
            staying
                .parts
                .extend(combination.weights.host_parts().iter().map(|part| (part.id, part.bytes)));
        }
        staying
    }

    fn staying_by(&self, stays: impl Fn(&Entry) -> bool) -> Staying {
        let loaded = self.loaded.iter().filter_map(|name| self.entries.get(name));
        let mut staying = Staying::default();
        for entry in loaded.filter(|entry| stays(entry)) {
            staying.names += 1;
            if let Tier::Host(weights) = &entry.tier {
                staying.parts.extend(weights.host_parts().iter().map(|part| (part.id, part.bytes)));
            }
        }
        staying
    }

    fn combinations_in_use(&self) -> impl Iterator<Item = &Combination> {
        self.combinations.iter().filter(|combination| combination.hold.count() > 0)
    }

    /// One copy for equal content, whoever holds the other.
    fn share(&mut self, weights: Arc<HostAdapter>) -> Arc<HostAdapter> {
        if let Some(same) = self.versions.get(&weights.version).and_then(Weak::upgrade) {
            self.leaving.push(weights);
            return same;
        }
        if self.versions.len() > 2 * self.tier.uses.len() + 64 {
            self.versions.retain(|_, weights| weights.strong_count() > 0);
        }
        self.versions.insert(weights.version, Arc::downgrade(&weights));
        weights
    }
}

impl Shared {
    fn parse<'a>(&self, name: &'a str) -> Result<Wanted<'a>, AdapterError> {
        if self.state.lock().entries.contains_key(name) {
            return Ok(Wanted::One(name));
        }
        Ok(match parse_expression(name, self.config.max_combined)? {
            Some(parts) => Wanted::Sum { expression: name, parts },
            None => Wanted::One(name),
        })
    }

    fn check_name(&self, name: &str) -> Result<(), AdapterError> {
        check_adapter_name(name, &self.config.base_names)
    }

    fn check_pins(&self, state: &State, name: &str, pinned: bool) -> Result<(), AdapterError> {
        if !pinned {
            return Ok(());
        }
        let others = state.num_pinned - usize::from(state.entries.get(name).is_some_and(|entry| entry.pinned));
        if others < self.config.max_pinned {
            return Ok(());
        }
        Err(AdapterError::TooManyPinned {
            name: name.to_owned(),
            pinned: others,
            limit: self.config.max_pinned,
        })
    }

    fn check_load(&self, state: &State, request: &LoadRequest) -> Result<(), AdapterError> {
        let name = || request.name.clone();
        let existing = state.entries.get(request.name.as_str());
        if existing.is_some() && !request.replace {
            return Err(AdapterError::AlreadyLoaded { name: name() });
        }
        if let Some(expected) = &request.expected_version {
            let got = existing.and_then(|entry| entry.facts.as_ref()).map(|facts| facts.version.to_string());
            if got.as_ref() != Some(expected) {
                return Err(AdapterError::VersionConflict {
                    name: name(),
                    expected: expected.clone(),
                    got: got.unwrap_or_else(|| "none".into()),
                });
            }
        }
        self.check_pins(state, &request.name, request.pinned)
    }

    fn unknown(&self, state: &State, name: &str) -> AdapterError {
        let mut loaded: Vec<String> = state.names.iter().take(NAMES_IN_ERROR).map(|name| name.to_string()).collect();
        let more = state.names.len() - loaded.len();
        if more > 0 {
            loaded.push(format!("and {more} more"));
        }
        AdapterError::Unknown {
            name: name.to_owned(),
            loaded,
        }
    }

    fn info(&self, entry: &Entry) -> AdapterInfo {
        self.describe(Glance::at(entry))
    }

    /// Needs no lock.
    fn describe(&self, glance: Glance) -> AdapterInfo {
        let facts = glance.facts.as_ref();
        let on_device = facts.is_some_and(|facts| self.residents.contains(&facts.version));
        AdapterInfo {
            name: glance.name,
            source: glance.source.to_string(),
            state: match glance.on_host {
                _ if on_device => AdapterState::Device,
                true => AdapterState::Host,
                false => AdapterState::Registered,
            },
            version: facts.map(|facts| facts.version.to_string()),
            max_lora_rank: facts.map_or(0, |facts| facts.max_lora_rank),
            target_modules: facts.map_or_else(Vec::new, |facts| facts.target_modules.clone()),
            bytes: facts.map_or(0, |facts| facts.bytes),
            companion_bytes: facts.map_or(0, |facts| facts.companion_bytes),
            pinned: glance.pinned,
            leases: glance.leases,
            requests_total: glance.requests_total,
            hits_total: glance.hits_total,
            last_used: glance.last_used,
            last_error: glance.last_error.map(|error| error.to_string()),
            report: facts.map(|facts| facts.report.clone()),
            parts: Vec::new(),
        }
    }

    fn guard(&self, hold: &Arc<Hold>) -> LeaseGuard {
        self.leases.fetch_add(1, Ordering::AcqRel);
        let owner: Weak<dyn LeaseOwner> = self.me.clone();
        LeaseGuard::new(hold, Some(owner))
    }

    /// A lease on an entry that is on the host; `counts` if it is a request's own, and not one that waited for a load.
    fn lease(&self, state: &mut State, name: &str, counts: bool) -> Option<AdapterLease> {
        let tick = state.tick();
        let entry = state.entries.get_mut(name)?;
        let Tier::Host(weights) = &entry.tier else { return None };
        entry.last_used = tick;
        entry.last_used_time = Some(SystemTime::now());
        let lease = AdapterLease::counted(entry.name.clone(), weights.clone(), self.guard(&entry.hold));
        if !counts {
            return Some(lease.after_load());
        }
        entry.requests_total += 1;
        entry.hits_total += 1;
        state.hits_total += 1;
        Some(lease)
    }

    /// Leases on all of them, if all are on the host now; `counts` as for [`Self::lease`].
    fn leases_now(&self, names: &[&str], counts: bool) -> Option<Vec<AdapterLease>> {
        let mut state = self.state.lock();
        let is_there = |name: &&str| state.entries.get(*name).is_some_and(|entry| matches!(entry.tier, Tier::Host(_)));
        if !names.iter().all(is_there) {
            return None;
        }
        // All are there, so that none is dropped with the lock held.
        names.iter().map(|name| self.lease(&mut state, name, counts)).collect()
    }

    /// A request has found all of these on the host, and goes on with that.
    fn count_hits(&self, names: &[&str]) {
        let mut state = self.state.lock();
        state.hits_total += names.len() as u64;
        for name in names {
            if let Some(entry) = state.entries.get_mut(*name) {
                entry.requests_total += 1;
                entry.hits_total += 1;
            }
        }
    }

    /// Watches the bytes of what a request gathers.
    fn watch(&self, wanted: &[Wanted<'_>]) -> Watch<'_> {
        let (refuse, refused) = oneshot::channel();
        let mut bytes = WantedBytes::new(wanted, self.config.limits_of_host().1);
        bytes.refuse = Some(refuse);
        let mut state = self.state.lock();
        bytes.look_up(|name| state.facts(name));
        // What is there of it is not the first to leave for the rest.
        let tick = state.tick();
        for name in bytes.names.keys() {
            if let Some(entry) = state.entries.get_mut(name) {
                entry.last_used = tick;
            }
        }
        state.wanted = Some(bytes);
        drop(state);
        Watch { shared: self, refused }
    }

    fn acquire(&self, name: &str) -> Result<Acquired, AdapterError> {
        let mut state = self.state.lock();
        if let Some(lease) = self.lease(&mut state, name, true) {
            return Ok(Acquired::Lease(lease));
        }
        let Some((key, _)) = state.entries.get_key_value(name) else {
            return Err(self.unknown(&state, name));
        };
        let key = key.clone();
        if let Some(entry) = state.entries.get_mut(name) {
            entry.requests_total += 1;
            entry.last_used_time = Some(SystemTime::now());
        }
        let (sender, receiver) = oneshot::channel();
        self.fetch(&mut state, &key, Some(sender))?;
        state.misses_total += 1;
        Ok(Acquired::Loading(receiver))
    }

    /// Sees to it that a registered adapter is being loaded. Does nothing for one on the host.
    fn fetch(&self, state: &mut State, name: &Arc<str>, waiter: Option<LeaseSender>) -> Result<(), AdapterError> {
        let Some(entry) = state.entries.get_mut(name) else { return Ok(()) };
        let deadline = Instant::now() + self.config.room_timeout;
        let waiter = waiter.map(|sender| Waiter { sender, deadline });
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
        let work = Load {
            name: name.clone(),
            registration: entry.registration,
            facts: entry.facts.clone(),
        };
        self.enqueue(Job::Fetch(Parked { work, deadline, grant: None }))?;
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

    fn pins_have_changed(&self) {
        self.pins_changed.fetch_add(1, Ordering::Release);
        if let Some(tell) = self.on_pins_changed.get() {
            tell();
        }
    }

    fn forget(&self, name: &str) -> Result<Vec<Arc<Hold>>, AdapterError> {
        let (entry, error) = {
            let mut state = self.state.lock();
            let Some(entry) = state.remove(name) else {
                return Err(self.unknown(&state, name));
            };
            let error = matches!(entry.tier, Tier::Loading(_)).then(|| self.unknown(&state, name));
            (entry, error)
        };
        if entry.pinned {
            self.pins_have_changed();
        }
        self.room_may_be();
        if let (Tier::Loading(waiters), Some(error)) = (entry.tier, error) {
            refuse(waiters, &error);
        }
        let mut holds = entry.previous;
        holds.push(entry.hold);
        Ok(holds)
    }

    // The loader threads.

    fn run_loader(&self) {
        // Those of a load, which this thread and those that it starts are, are not the ones that others wait for.
        polylora_kernels::cpu::stand_back();
        let mut last_check = Instant::now();
        loop {
            let job = {
                let mut queue = self.queue.lock();
                loop {
                    // However many jobs there are.
                    if self.parked.load(Ordering::SeqCst) > 0 && last_check.elapsed() >= ROOM_CHECK {
                        last_check = Instant::now();
                        MutexGuard::unlocked(&mut queue, || self.give_up_on_overdue());
                    }
                    if let Some(job) = queue.jobs.pop_front() {
                        queue.running += 1;
                        break job;
                    }
                    if queue.closed {
                        return;
                    }
                    if self.parked.load(Ordering::SeqCst) == 0 {
                        self.wake.wait(&mut queue);
                    } else {
                        self.wake.wait_for(&mut queue, ROOM_CHECK);
                    }
                }
            };
            self.run_job(job);
            // What it was granted it has taken, or not: then others may.
            self.room_may_be();
            self.queue.lock().running -= 1;
        }
    }

    fn run_job(&self, job: Job) {
        match job {
            Job::Fetch(load) => self.run_fetch(load),
            Job::Load { request, done, _claim } => {
                let name = request.name.clone();
                let loaded = self.read(&request.files);
                let result = loaded.and_then(|loaded| self.finish_load(request, loaded));
                if result.is_err() {
                    let mut state = self.state.lock();
                    state.load_failures_total += 1;
                    state.moved(&name, |moves| moves.load_failures += 1);
                }
                // The claim first: who hears the answer may load the same name at once.
                drop(_claim);
                let _ = done.send(result);
            }
            Job::Combine(combine) => self.run_combine(combine),
        }
    }

    fn run_fetch(&self, load: Parked<Load>) {
        let files = {
            let mut state = self.state.lock();
            // Forgotten or replaced meanwhile: whoever waited has had an answer. Or has gone: nothing leaves for what nobody wants.
            match state.is_wanted(&load.work).then(|| state.current(&load.work)).flatten() {
                Some(entry) => entry.files.clone(),
                None => return,
            }
        };
        // Looked at before the files are read, so that nothing is read in vain while there is no room.
        if let Some(load) = self.park_without_room(load) {
            let loaded = self.read(&files);
            self.finish_fetch(load, loaded);
        }
    }

    fn run_combine(&self, combine_job: Parked<Combine>) {
        // Others may have waited for the same one.
        let Some(work) = self.answer_from_kept(combine_job.work) else { return };
        let Some(combine_job) = self.park_without_room(Parked { work, ..combine_job }) else {
            return;
        };
        let borrowed = borrow_parts(&combine_job.work.parts);
        let make = || combine(&borrowed, &self.config.limits);
        let combined = std::panic::catch_unwind(std::panic::AssertUnwindSafe(make)).unwrap_or_else(|panic| Err(panicked(&*panic)));
        match combined {
            Ok(combined) => self.finish_combine(combine_job, combined),
            Err(error) => combine_job.work.fail(error),
        }
    }

    fn finish_combine(&self, combine_job: Parked<Combine>, combined: HostAdapter) {
        let mut state = self.state.lock();
        if let Err(error) = self.make_room_for_combination(&mut state, &combined) {
            drop(state);
            if is_no_room(&error) && Instant::now() < combine_job.deadline {
                // Others were faster to the room that there was.
                self.park(combine_job);
            } else {
                combine_job.work.fail(error);
            }
            return;
        }
        let weights = state.share(Arc::new(combined));
        state.enter_tier(&weights);
        let hold = Arc::default();
        // Before anybody else may evict it.
        let guard = self.guard(&hold);
        state.combinations.push_back(Combination {
            weights: weights.clone(),
            hold,
        });
        unlock(state);
        combine_job.work.answer(weights, guard);
    }

    /// Gives a lease on the combination if it is in host memory; otherwise gives the work back.
    fn answer_from_kept(&self, work: Combine) -> Option<Combine> {
        let version = combined_version(&borrow_parts(&work.parts));
        let (weights, guard) = {
            let mut state = self.state.lock();
            let Some(index) = state.combinations.iter().position(|kept| kept.weights.version == version) else {
                return Some(work);
            };
            let kept = state.combinations.remove(index).expect("it was just found");
            let lease = (kept.weights.clone(), self.guard(&kept.hold));
            state.combinations.push_back(kept);
            lease
        };
        work.answer(weights, guard);
        None
    }

    /// Reads and packs, unless the same files were read before and what they hold is still somewhere. Of equal content there is one copy.
    fn read(&self, files: &FileSource) -> Result<(Arc<HostAdapter>, Arc<Facts>), AdapterError> {
        let start = Instant::now();
        let result = self.read_unchanging(files);
        let took = start.elapsed();
        let mut state = self.state.lock();
        state.load_time += took;
        if result.is_ok() {
            state.pack_seconds.observe(took.as_secs_f64());
        }
        drop(state);
        result
    }

    /// A folder may be replaced, or a file written to, between the reading of one file and of another: then what was read belongs
    /// together no more, and is read again.
    fn read_unchanging(&self, files: &FileSource) -> Result<(Arc<HostAdapter>, Arc<Facts>), AdapterError> {
        for _ in 0..READ_ATTEMPTS {
            let stamp = files.stamp();
            if let Some(known) = stamp.and_then(|stamp| self.state.lock().known(&stamp)) {
                return Ok(known);
            }
            let result = self.read_once(files);
            if files.stamp() != stamp {
                continue;
            }
            return result.map(|(weights, facts)| {
                let mut state = self.state.lock();
                // Before it is remembered: of two copies the one that stays.
                let weights = state.share(weights);
                if let Some(stamp) = stamp.filter(SourceStamp::is_settled) {
                    state.remember(stamp, &weights, &facts);
                }
                unlock(state);
                (weights, facts)
            });
        }
        Err(AdapterError::BadFile {
            file: files.directory().map_or_else(String::new, |directory| directory.display().to_string()),
            reason: format!("its files changed while they were read, {READ_ATTEMPTS} times"),
        })
    }

    /// A panic is an error like another.
    fn read_once(&self, files: &FileSource) -> Result<(Arc<HostAdapter>, Arc<Facts>), AdapterError> {
        let load = || load_adapter(files, &self.decoder, &self.config.limits);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(load)).unwrap_or_else(|panic| Err(panicked(&*panic)));
        result.map(|(weights, report)| {
            let facts = Facts {
                version: weights.version,
                max_lora_rank: weights.max_lora_rank,
                target_modules: target_modules(&report),
                bytes: weights.bytes(),
                companion_bytes: distinct_bytes([&weights]) - weights.bytes(),
                parts: weights.host_parts(),
                report: Arc::new(report),
            };
            (Arc::new(weights), Arc::new(facts))
        })
    }

    /// Gives the work back, with room granted to it, or parks it with those that came before and after it.
    fn park_without_room<W: NeedsRoom>(&self, mut parked: Parked<W>) -> Option<Parked<W>> {
        if parked.grant.is_some() || Instant::now() >= parked.deadline {
            return Some(parked);
        }
        let mut state = self.state.lock();
        // Counted before the look: a lease that ends after the look sees the count, one that ends before it has made room.
        self.parked.fetch_add(1, Ordering::SeqCst);
        if W::queue(&mut state).is_empty()
            && let Some(need) = self.room_now(&state, &parked.work)
        {
            self.parked.fetch_sub(1, Ordering::SeqCst);
            parked.grant = Some(Grant::new(&self.granted, need));
            return Some(parked);
        }
        self.line_up(state, parked);
        None
    }

    /// Parks work that found no room in the end, and looks again: a lease may have ended since.
    fn park<W: NeedsRoom>(&self, mut work: Parked<W>) {
        work.grant = None;
        let state = self.state.lock();
        self.parked.fetch_add(1, Ordering::SeqCst);
        self.line_up(state, work);
    }

    /// Puts work that is counted already to those that came before and after it, and looks for room for all of them.
    fn line_up<W: NeedsRoom>(&self, mut state: MutexGuard<'_, State>, work: Parked<W>) {
        enqueue_by_deadline(W::queue(&mut state), work);
        drop(state);
        self.room_may_be();
        self.watch_deadlines();
    }

    /// Wakes loaders that sleep without an end, as they may while nobody waits for room.
    fn watch_deadlines(&self) {
        // With the lock, so that none is between its look at the count and its sleep.
        drop(self.queue.lock());
        self.wake.notify_all();
    }

    /// Something may have made room: whoever waits is granted it, first come, first served. The decision is taken under the lock, and
    /// nobody leaves the line without room, so that of equals nobody overtakes. Who needs more bytes than there are is passed over: a
    /// request that holds leases may wait for a small adapter behind one that waits for just these leases.
    fn room_may_be(&self) {
        if self.parked.load(Ordering::SeqCst) == 0 {
            return;
        }
        let mut jobs = Vec::new();
        let mut unwanted = Vec::new();
        {
            let mut state = self.state.lock();
            let staying = state.staying();
            let mut room = self.room(&state, &staying);
            for load in std::mem::take(&mut state.parked) {
                let need = load.work.need(|id| staying.has(id));
                if !state.is_wanted(&load.work) {
                    self.parked.fetch_sub(1, Ordering::SeqCst);
                } else if room.take(need) {
                    jobs.push(Job::Fetch(self.grant(load, need)));
                } else {
                    state.parked.push_back(load);
                }
            }
            for combine in std::mem::take(&mut state.parked_combinations) {
                let need = combine.work.need(|id| staying.has(id));
                if combine.work.done.is_closed() {
                    self.parked.fetch_sub(1, Ordering::SeqCst);
                    unwanted.push(combine);
                } else if room.take(need) {
                    jobs.push(Job::Combine(self.grant(combine, need)));
                } else {
                    state.parked_combinations.push_back(combine);
                }
            }
        }
        if !jobs.is_empty() {
            // They were admitted to the queue before, so that the bound does not count them twice, and have waited longest.
            let mut queue = self.queue.lock();
            for job in jobs.into_iter().rev() {
                queue.jobs.push_front(job);
            }
            drop(queue);
            self.wake.notify_all();
        }
        // Their leases end here, without the lock; each may make room again.
        drop(unwanted);
    }

    /// Takes work out of those who wait.
    fn grant<W>(&self, work: Parked<W>, need: Need) -> Parked<W> {
        self.parked.fetch_sub(1, Ordering::SeqCst);
        let grant = Some(Grant::new(&self.granted, need));
        Parked { grant, ..work }
    }

    /// What work needs, if there is room for it beside what is granted to others.
    fn room_now<W: NeedsRoom>(&self, state: &State, work: &W) -> Option<Need> {
        let granted = |count: &AtomicUsize| count.load(Ordering::SeqCst);
        let need = work.need(|id| state.tier.has(id));
        let names = granted(&self.granted.names) + need.names;
        let bytes = granted(&self.granted.bytes).saturating_add(need.bytes);
        if need.combinations == 0 && self.fits_as_it_is(state, names, bytes) {
            return Some(need);
        }
        let staying = state.staying();
        let need = work.need(|id| staying.has(id));
        self.room(state, &staying).take(need).then_some(need)
    }

    /// Room for work that must not wait, beside what is granted to others and what those get first who wait.
    fn grant_now<W: NeedsRoom>(&self, work: &W) -> Option<Grant> {
        let state = self.state.lock();
        let staying = state.staying();
        let mut room = self.room(&state, &staying);
        for load in &state.parked {
            room.take(load.work.need(|id| staying.has(id)));
        }
        for combine in &state.parked_combinations {
            room.take(combine.work.need(|id| staying.has(id)));
        }
        let need = work.need(|id| staying.has(id));
        room.take(need).then(|| Grant::new(&self.granted, need))
    }

    /// What would be left if all left that may, beside what is granted.
    fn room(&self, state: &State, staying: &Staying) -> Room {
        let (limit, limit_bytes) = self.config.limits_of_host();
        let left = |limit: usize, used: usize, granted: &AtomicUsize| limit.saturating_sub(used).saturating_sub(granted.load(Ordering::SeqCst));
        Room {
            names: left(limit, staying.names, &self.granted.names),
            combinations: left(
                self.config.max_combinations,
                state.combinations_in_use().count(),
                &self.granted.combinations,
            ),
            bytes: left(limit_bytes, staying.bytes(), &self.granted.bytes),
            limit_bytes,
        }
    }

    /// Ends the waiting of work that has found no room for too long.
    fn give_up_on_overdue(&self) {
        let now = Instant::now();
        let (loads, combines) = {
            let mut state = self.state.lock();
            let loads = take_overdue(&mut state.parked, now);
            let combines = take_overdue(&mut state.parked_combinations, now);
            self.parked.fetch_sub(loads.len() + combines.len(), Ordering::SeqCst);
            (self.without_room(&state, loads), self.without_room(&state, combines))
        };
        for (load, error) in loads {
            self.finish_fetch(load, Err(error));
        }
        for (combine, error) in combines {
            combine.work.fail(error);
        }
    }

    /// Work with what there was no room of.
    fn without_room<W: NeedsRoom>(&self, state: &State, works: Vec<Parked<W>>) -> Vec<(Parked<W>, AdapterError)> {
        let reason = |work: &Parked<W>| {
            let (limit, limit_bytes) = self.config.limits_of_host();
            let (staying, in_use) = (state.staying(), state.combinations_in_use().count());
            let need = work.work.need(|id| staying.has(id));
            // What is not short of bytes may find all places granted to others.
            let any_bytes = limit_bytes == usize::MAX;
            if need.combinations > 0 && (any_bytes || in_use + need.combinations > self.config.max_combinations) {
                let limit = self.config.max_combinations;
                AdapterError::TooManyCombinations { in_use, limit }
            } else if need.names > 0 && (any_bytes || staying.names + need.names > limit) {
                let loaded = state.loaded.len();
                AdapterError::NothingToEvict { loaded, limit }
            } else {
                AdapterError::HostMemoryFull {
                    needed_bytes: need.bytes,
                    used_bytes: staying.bytes(),
                    limit_bytes,
                }
            }
        };
        works
            .into_iter()
            .map(|work| {
                let error = reason(&work);
                (work, error)
            })
            .collect()
    }

    fn finish_fetch(&self, mut load: Parked<Load>, loaded: Result<(Arc<HostAdapter>, Arc<Facts>), AdapterError>) {
        let mut state = self.state.lock();
        if state.current(&load.work).is_none() {
            return;
        }
        let loaded = match loaded {
            Ok((weights, facts)) => {
                // Who needs it beside others is told now if that never fits, and not when it has waited for room in vain.
                state.is_known(&load.work.name, Some(&facts));
                match self.make_room(&mut state, 1, &weights) {
                    Ok(()) => Ok((weights, facts)),
                    Err(error) => {
                        state.leaving.push(weights);
                        if is_no_room(&error)
                            && let Some(entry) = state.entries.get_mut(&load.work.name)
                        {
                            entry.facts.get_or_insert_with(|| facts.clone());
                            load.work.facts = Some(facts);
                        }
                        Err(error)
                    }
                }
            }
            Err(error) => Err(error),
        };
        // Others were faster to the room that there was, it is larger than was known, or it has waited for too long for some.
        if let Err(error) = &loaded
            && is_no_room(error)
            && let Some((over, deadline)) = state.whose_time_is_up(&load.work.name, self.config.room_timeout)
        {
            unlock(state);
            self.park(Parked { deadline, ..load });
            return refuse(over, error);
        }
        let name = &load.work.name;
        let tick = state.tick();
        let Some(entry) = state.entries.get_mut(name) else { return };
        let Tier::Loading(waiters) = std::mem::replace(&mut entry.tier, Tier::Registered) else {
            return;
        };
        match loaded {
            Ok((weights, facts)) => {
                // The files may have changed since they were last read: requests of the old version count on the old hold.
                if entry.facts.as_ref().is_some_and(|old| old.version != facts.version) && entry.hold.count() > 0 {
                    let old = std::mem::take(&mut entry.hold);
                    entry.previous.push(old);
                }
                entry.tier = Tier::Host(weights.clone());
                entry.facts = Some(facts);
                entry.loaded_at = tick;
                entry.failure = None;
                let pinned = entry.pinned;
                state.enter_host(name, &weights);
                // From here on only the tier and leases hold them: who is answered may let them go, and look.
                drop(weights);
                state.loads_total += 1;
                state.moved(name, |moves| moves.loads += 1);
                if pinned {
                    self.pins_have_changed();
                }
                let answers = self.leases_for(&mut state, name, waiters);
                unlock(state);
                answer(answers);
            }
            Err(error) => {
                // A full tier is no fault of the adapter's: the next request may try at once.
                if !is_no_room(&error) {
                    tracing::warn!(%name, source = %entry.source, %error, "a registered adapter can't be loaded");
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
                state.moved(name, |moves| moves.load_failures += 1);
                unlock(state);
                refuse(waiters, &error);
            }
        }
    }

    fn finish_load(&self, request: LoadRequest, loaded: (Arc<HostAdapter>, Arc<Facts>)) -> Result<AdapterInfo, AdapterError> {
        let mut state = self.state.lock();
        self.check_load(&state, &request)?;
        let (weights, facts) = loaded;
        let name: Arc<str> = request.name.as_str().into();
        let old = state.entries.get(request.name.as_str()).and_then(|entry| match &entry.tier {
            Tier::Host(weights) => Some((entry.name.clone(), weights.clone())),
            Tier::Registered | Tier::Loading(_) => None,
        });
        if let Some((name, old)) = &old {
            state.leave_host(name, old);
        }
        let is_pinned = request.pinned || state.entries.get(request.name.as_str()).is_some_and(|entry| entry.pinned);
        let weights = match self.make_room(&mut state, 1, &weights) {
            Ok(()) => Some(weights),
            Err(error) => {
                // Room that is in use comes back: the name has its new content now, and is read for the first request that finds room. What is pinned
                // has to be there, and what pinned ones leave no room for would never come.
                let pinned = state.staying_by(|entry| entry.pinned);
                let comes_later = is_no_room(&error) && !is_pinned && self.room_beside(&state, &pinned, 1, &weights).is_ok();
                state.leaving.push(weights);
                if !comes_later {
                    if let Some((name, old)) = &old {
                        state.enter_host(name, old);
                    }
                    unlock(state);
                    return Err(error);
                }
                None
            }
        };
        let is_there = weights.is_some();
        let waiters = self.put(&mut state, request, weights, facts);
        if let Some((_, old)) = old {
            state.leaving.push(old);
        }
        state.loads_total += 1;
        state.moved(&name, |moves| moves.loads += 1);
        if is_pinned {
            self.pins_have_changed();
        }
        let (answers, refused) = match is_there {
            true => (self.leases_for(&mut state, &name, waiters), None),
            false => (Vec::new(), self.fetch_for(&mut state, &name, waiters)),
        };
        let info = state.entries.get(&name).map(|entry| self.info(entry));
        unlock(state);
        answer(answers);
        if let Some((waiters, error)) = refused {
            refuse(waiters, &error);
        }
        info.ok_or_else(loader_gone)
    }

    /// Has the new content read for those who waited for the old. They and why, if that can't be.
    fn fetch_for(&self, state: &mut State, name: &Arc<str>, waiters: Vec<Waiter>) -> Option<(Vec<Waiter>, AdapterError)> {
        if waiters.is_empty() {
            return None;
        }
        if let Err(error) = self.fetch(state, name, None) {
            return Some((waiters, error));
        }
        if let Some(Tier::Loading(waiting)) = state.entries.get_mut(name).map(|entry| &mut entry.tier) {
            waiting.extend(waiters);
        }
        None
    }

    /// Leases for those who waited, made before anyone else can evict what was just loaded.
    fn leases_for(&self, state: &mut State, name: &str, waiters: Vec<Waiter>) -> Vec<(LeaseSender, AdapterLease)> {
        let lease = |waiter: Waiter| Some((waiter.sender, self.lease(state, name, false)?));
        waiters.into_iter().filter_map(lease).collect()
    }

    /// Registers new content under a name, free or taken (whose old weights have left the tier). Gives those who waited for the old
    /// content's load.
    fn put(&self, state: &mut State, request: LoadRequest, weights: Option<Arc<HostAdapter>>, facts: Arc<Facts>) -> Vec<Waiter> {
        let Some(mut old) = state.entries.remove(request.name.as_str()) else {
            state.insert(request, weights, Some(facts));
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
        let tier = state.tier_with(&old.name, weights);
        state.num_pinned += usize::from(request.pinned && !old.pinned);
        state.is_known(&old.name, Some(&facts));
        let entry = Entry {
            files: request.files,
            source: request.source.into(),
            // A replacement stays pinned: unpinning is asked for by name.
            pinned: request.pinned || old.pinned,
            tier,
            facts: Some(facts),
            registration: tick,
            loaded_at: tick,
            failure: None,
            ..old
        };
        state.entries.insert(entry.name.clone(), entry);
        waiters
    }

    /// Whether `names` more names with `bytes` more bytes could be on the host, if nobody left.
    fn fits_as_it_is(&self, state: &State, names: usize, bytes: usize) -> bool {
        let (limit, limit_bytes) = self.config.limits_of_host();
        state.loaded.len() + names <= limit && state.tier.bytes.saturating_add(bytes) <= limit_bytes
    }

    /// Whether `names` more names with these weights could be on the host, if all left that may.
    fn room_for(&self, state: &State, names: usize, weights: &HostAdapter) -> Result<(), AdapterError> {
        if self.fits_as_it_is(state, names, state.missing_bytes(weights)) {
            return Ok(());
        }
        self.room_beside(state, &state.staying(), names, weights)
    }

    /// Whether they could be if all left but these.
    fn room_beside(&self, state: &State, staying: &Staying, names: usize, weights: &HostAdapter) -> Result<(), AdapterError> {
        let (limit, limit_bytes) = self.config.limits_of_host();
        if staying.names + names > limit {
            return Err(AdapterError::NothingToEvict {
                loaded: state.loaded.len(),
                limit,
            });
        }
        let (needed_bytes, used_bytes) = (weights.missing_bytes(|id| staying.has(id)), staying.bytes());
        if used_bytes.saturating_add(needed_bytes) > limit_bytes {
            return Err(AdapterError::HostMemoryFull {
                needed_bytes,
                used_bytes,
                limit_bytes,
            });
        }
        Ok(())
    }

    /// Evicts until `names` more names with these weights may be on the host, or nothing if that can't be.
    fn make_room(&self, state: &mut State, names: usize, weights: &HostAdapter) -> Result<(), AdapterError> {
        self.check_size(weights)?;
        self.room_for(state, names, weights)?;
        let (limit, limit_bytes) = self.config.limits_of_host();
        loop {
            // Who leaves may take a part along that these weights were to share.
            let lacks_bytes = state.tier.bytes + state.missing_bytes(weights) > limit_bytes;
            if !lacks_bytes && state.loaded.len() + names <= limit {
                return Ok(());
            }
            if !(lacks_bytes && evict_combination(state)) {
                self.evict(state)?;
            }
        }
    }

    /// Refuses what is larger than all room there could be.
    fn check_size(&self, weights: &HostAdapter) -> Result<(), AdapterError> {
        let (_, limit_bytes) = self.config.limits_of_host();
        let all_bytes = distinct_bytes([weights]);
        if all_bytes > limit_bytes {
            let own = match all_bytes - weights.bytes() {
                0 => String::new(),
                bytes => format!(", its own tokenizer's {bytes} included"),
            };
            return Err(AdapterError::Incompatible {
                reason: format!("it takes {all_bytes} bytes of host memory{own}, at most {limit_bytes} are for adapters (--max-loaded-lora-bytes)"),
            });
        }
        Ok(())
    }

    /// Lets the name leave that was used least recently; to be loaded is a use, or what an admin loads ahead would leave for the next such load.
    fn evict(&self, state: &mut State) -> Result<(), AdapterError> {
        let names = state.loaded.iter().filter_map(|name| state.entries.get(name));
        let candidates = names.filter(|entry| may_leave(entry));
        let victim = candidates.min_by_key(|entry| entry.last_used.max(entry.loaded_at));
        let Some(name) = victim.map(|entry| entry.name.clone()) else {
            return Err(AdapterError::NothingToEvict {
                loaded: state.loaded.len(),
                limit: self.config.max_loaded_loras.unwrap_or(usize::MAX),
            });
        };
        if let Some(entry) = state.entries.get_mut(&name)
            && let Tier::Host(weights) = std::mem::replace(&mut entry.tier, Tier::Registered)
        {
            state.leave_host(&name, &weights);
            state.leaving.push(weights);
        }
        state.evictions_total += 1;
        state.moved(&name, |moves| moves.host_evictions += 1);
        Ok(())
    }

    fn room_for_combinations(&self, state: &State, number: usize) -> Result<(), AdapterError> {
        let limit = self.config.max_combinations;
        let in_use = state.combinations_in_use().count();
        if in_use + number > limit {
            return Err(AdapterError::TooManyCombinations { in_use, limit });
        }
        Ok(())
    }

    fn make_room_for_combination(&self, state: &mut State, weights: &HostAdapter) -> Result<(), AdapterError> {
        self.check_size(weights)?;
        self.room_for_combinations(state, 1)?;
        self.room_for(state, 0, weights)?;
        while state.combinations.len() >= self.config.max_combinations && evict_combination(state) {}
        self.make_room(state, 0, weights)
    }
}

impl LeaseOwner for Shared {
    fn lease_ended(&self) {
        self.leases.fetch_sub(1, Ordering::AcqRel);
    }

    /// Takes the registry's lock, but only if somebody waits for room.
    fn adapter_is_free(&self) {
        self.room_may_be();
    }
}

/// Gives the lock back, and then drops what has left the host: that takes milliseconds where it is large.
fn unlock(mut state: MutexGuard<'_, State>) {
    let leaving = std::mem::take(&mut state.leaving);
    drop(state);
    drop(leaving);
}

/// Bytes of host memory that different versions take together.
fn distinct_bytes<'a>(versions: impl IntoIterator<Item = &'a HostAdapter>) -> usize {
    let (mut bytes, mut companions) = (0, HashMap::new());
    for weights in versions {
        bytes += weights.bytes();
        if let Some(companion) = &weights.companion {
            companions.extend(companion.parts().iter().map(|part| (part.id, part.bytes)));
        }
    }
    bytes + companions.values().sum::<usize>()
}

fn may_leave(entry: &Entry) -> bool {
    !entry.pinned && entry.hold.count() == 0
}

/// Lets the combination leave that was unused for longest; false if all are in use.
fn evict_combination(state: &mut State) -> bool {
    let Some(index) = state.combinations.iter().position(|combination| combination.hold.count() == 0) else {
        return false;
    };
    if let Some(combination) = state.combinations.remove(index) {
        state.leave_tier(&combination.weights);
        state.leaving.push(combination.weights);
    }
    true
}

/// Whether an error says that there is no room now.
fn is_no_room(error: &AdapterError) -> bool {
    use AdapterError::{HostMemoryFull, NothingToEvict, TooManyCombinations};
    matches!(error, NothingToEvict { .. } | HostMemoryFull { .. } | TooManyCombinations { .. })
}

/// Who came earlier has the earlier deadline.
fn enqueue_by_deadline<W>(parked: &mut VecDeque<Parked<W>>, work: Parked<W>) {
    let place = parked.partition_point(|other| other.deadline <= work.deadline);
    parked.insert(place, work);
}

/// Takes what has waited too long off the front.
fn take_overdue<W>(parked: &mut VecDeque<Parked<W>>, now: Instant) -> Vec<Parked<W>> {
    let overdue = parked.partition_point(|work| work.deadline <= now);
    parked.drain(..overdue).collect()
}

/// Whether an adapter may have a name.
///
/// A comma separates names in SGLang's wire format, a colon the base from the adapter in `model`; whitespace at the ends, control
/// characters, backslashes and `..` only serve to deceive. Slashes are fine (a path or a Hub id may be a name), empty parts aren't,
/// except for the first. Names in parentheses are what metrics call the base model, and several adapters together.
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
    } else if name.starts_with('(') && name.ends_with(')') {
        "is in parentheses, as what metrics call the base model and others together".to_owned()
    } else if base_names.iter().any(|base| base == name) {
        "is the base model's".to_owned()
    } else {
        return Ok(());
    };
    let shown: String = name.chars().take(MAX_NAME_BYTES).collect();
    Err(AdapterError::BadName { name: shown, reason })
}

/// Sends leases to those who waited. Whoever has gone drops the lease, so the registry's lock must not be held.
fn answer(answers: Vec<(LeaseSender, AdapterLease)>) {
    for (waiter, lease) in answers {
        let _ = waiter.send(Ok(lease));
    }
}

fn refuse(waiters: Vec<Waiter>, error: &AdapterError) {
    for waiter in waiters {
        // Whoever waited may have gone.
        let _ = waiter.sender.send(Err(error.clone()));
    }
}

fn borrow_parts(parts: &[(AdapterLease, f32)]) -> Vec<(&HostAdapter, f32)> {
    parts.iter().map(|(lease, weight)| (&**lease.weights(), *weight)).collect()
}

/// What is known of a combination from its parts: the state of the one that is furthest from the device.
fn combined_info(expression: &str, parts: &[AdapterInfo]) -> AdapterInfo {
    let distance = |state| match state {
        AdapterState::Registered => 2,
        AdapterState::Host => 1,
        AdapterState::Device => 0,
    };
    let furthest = parts.iter().map(|part| part.state).max_by_key(|state| distance(*state));
    let mut target_modules: Vec<String> = parts.iter().flat_map(|part| part.target_modules.clone()).collect();
    target_modules.sort();
    target_modules.dedup();
    AdapterInfo {
        name: expression.into(),
        source: parts.iter().map(|part| part.source.as_str()).collect::<Vec<_>>().join(" + "),
        state: furthest.unwrap_or(AdapterState::Registered),
        version: None,
        max_lora_rank: parts.iter().map(|part| part.max_lora_rank).sum(),
        target_modules,
        bytes: parts.iter().map(|part| part.bytes).sum(),
        companion_bytes: parts.iter().map(|part| part.companion_bytes).sum(),
        pinned: false,
        leases: 0,
        requests_total: 0,
        hits_total: 0,
        last_used: None,
        last_error: parts.iter().find_map(|part| part.last_error.clone()),
        report: None,
        parts: parts.iter().map(|part| part.name.clone()).collect(),
    }
}

fn panicked(panic: &(dyn std::any::Any + Send)) -> AdapterError {
    let text = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".into());
    tracing::error!(panic = %text, "a loader panicked");
    AdapterError::Internal { reason: text }
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
    use crate::adapter::{
        UnloadReport,
        testing::{AdapterFiles, limits, source, tiny_decoder},
    };

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
            expected_version: None,
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
            let waiter = scope.spawn(|| unload(&registry, "a"));
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

    fn source_of(directory: &tempfile::TempDir, name: &str) -> FileSource {
        FileSource::Directory(directory.path().join(name))
    }

    fn request_in(directory: &tempfile::TempDir, name: &str) -> LoadRequest {
        LoadRequest {
            name: name.into(),
            files: source_of(directory, name),
            source: name.into(),
            pinned: false,
            replace: false,
            expected_version: None,
        }
    }

    fn names(registry: &AdapterRegistry) -> Vec<String> {
        let listed: Vec<String> = registry.list().iter().map(|info| info.name.to_string()).collect();
        assert!(registry.names().iter().map(|name| &**name).eq(&listed));
        listed
    }

    fn unload(registry: &AdapterRegistry, name: &str) -> Result<UnloadReport, AdapterError> {
        Ok(block_on(registry.unload(name, UnloadMode::Drain)?.drained()))
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
            "", "a,b", "a:b", ":", "a\\b", "a\nb", "\u{0}", "a\u{7f}", " a", "a ", "a//b", "a/", "../a", "a/../b", "..", "base", "(base)", "(other)",
            &long,
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
        assert!(lease.waited_for_load() && !registry.try_acquire("a").unwrap().waited_for_load());
        let info = registry.info("a").unwrap();
        assert_eq!((info.state, info.leases, info.requests_total), (AdapterState::Host, 1, 2));
        assert_eq!(info.version, Some(lease.version().to_string()));
        assert_eq!(info.bytes, lease.weights().bytes());
        registry.residents().insert(lease.version());
        assert_eq!(registry.info("a").unwrap().state, AdapterState::Device);
        registry.residents().remove(&lease.version());
        assert_eq!(registry.info("a").unwrap().state, AdapterState::Host);
        let stats = registry.stats();
        assert_eq!((stats.hits_total, stats.misses_total, stats.loads_total), (1, 1, 1));
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
        assert_eq!(unload(&registry, "a").unwrap().waited_for, 0);
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
        assert!(registry.info("a").unwrap().last_error.is_some_and(|error| error.contains("damaged")));
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
        assert_eq!(registry.info("a").unwrap().last_error, None);
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
        let registry = registry(|config| {
            config.max_loaded_loras = Some(2);
            config.room_timeout = Duration::ZERO;
        });
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
        assert_eq!(registry.stats().waiting_for_room, 0);
        drop((lease, other));
        acquire(&registry, "b").unwrap();
        assert_eq!(registry.stats().loaded, 2);
        assert_eq!(registry.stats().evictions_total, 3);
        let moved = || {
            let moves = registry.take_moves().into_iter().map(|moves| {
                let counts = [
                    moves.loads,
                    moves.load_failures,
                    moves.host_evictions,
                    moves.device_uploads,
                    moves.device_evictions,
                ];
                (moves.name.to_string(), counts)
            });
            moves.collect::<std::collections::BTreeMap<_, _>>()
        };
        let counts = [
            ("a", [1, 0, 1, 0, 0]),
            ("b", [2, 1, 1, 0, 0]),
            ("c", [1, 0, 1, 0, 0]),
            ("d", [1, 0, 0, 0, 0]),
        ];
        assert_eq!(moved(), counts.map(|(name, counts)| (name.to_owned(), counts)).into());
        assert!(registry.stats().pack_seconds.count() >= 5);
        // Each is told once; what the device says of a version is its names'.
        let version = acquire(&registry, "b").unwrap().version();
        registry.residents().insert(version);
        registry.residents().evict(&version);
        registry.residents().evict(&VersionId([0; 32]));
        assert_eq!(moved(), [("b".to_owned(), [0, 0, 0, 1, 1])].into());
        assert!(moved().is_empty());
        // What was evicted is known still, with its version.
        assert!(registry.info("a").unwrap().version.is_some());
    }

    #[test]
    fn requests_wait_for_room_and_get_it_in_turn() {
        let all = ["a", "b", "c", "d"];
        let directory = folder(&all);
        let registry = registry(|config| config.max_loaded_loras = Some(1));
        for name in all {
            registry.register(request_in(&directory, name)).unwrap();
        }
        let first = acquire(&registry, "a").unwrap();
        // They wait, each in its turn; one has gone before its turn, one's name is forgotten.
        let poll = |future: &mut BoxFuture<'_, Result<AdapterLease, AdapterError>>| {
            assert!(futures::FutureExt::now_or_never(&mut *future).is_none());
        };
        let wait_until_parked = |count: usize| {
            while registry.stats().waiting_for_room < count {
                std::thread::yield_now();
            }
        };
        let mut waiters = Vec::new();
        for (index, name) in ["b", "c", "d"].into_iter().enumerate() {
            let mut waiter = registry.acquire(name);
            poll(&mut waiter);
            wait_until_parked(index + 1);
            waiters.push(waiter);
        }
        unload(&registry, "c").unwrap();
        let mut waiters = waiters.into_iter();
        let (b, c, d) = (waiters.next().unwrap(), waiters.next().unwrap(), waiters.next().unwrap());
        assert!(matches!(block_on(c), Err(AdapterError::Unknown { .. })));
        drop(first);
        let second = block_on(b).unwrap();
        assert_eq!(registry.stats().loaded, 1);
        assert_eq!(registry.info("a").unwrap().state, AdapterState::Registered);
        drop(second);
        block_on(d).unwrap();
        let stats = registry.stats();
        assert_eq!((stats.loaded, stats.waiting_for_room, stats.leases), (1, 0, 0));
        assert_eq!(registry.shared.parked.load(Ordering::SeqCst), 0);
    }

    /// Puts an end to the time of the first who waits for room for this adapter, as if it had passed.
    fn let_time_pass(registry: &AdapterRegistry, name: &str) -> Instant {
        let now = Instant::now();
        let mut state = registry.shared.state.lock();
        if let Some(Entry {
            tier: Tier::Loading(waiters),
            ..
        }) = state.entries.get_mut(name)
            && let Some(first) = waiters.first_mut()
        {
            first.deadline = now;
        }
        state.parked.iter_mut().find(|load| *load.work.name == *name).unwrap().deadline = now;
        now
    }

    /// Two names, and room for one, which the first has.
    fn one_place_in_use() -> (tempfile::TempDir, AdapterRegistry, AdapterLease) {
        let directory = folder(&["a", "b"]);
        let registry = registry(|config| {
            config.max_loaded_loras = Some(1);
            config.room_timeout = FOR_EVER;
        });
        for name in ["a", "b"] {
            registry.register(request_in(&directory, name)).unwrap();
        }
        let held = acquire(&registry, "a").unwrap();
        (directory, registry, held)
    }

    #[test]
    fn who_comes_later_waits_for_room_as_long_as_who_came_first() {
        let (_directory, registry, held) = one_place_in_use();
        let (mut first, mut second) = (registry.acquire("b"), registry.acquire("b"));
        poll_until_parked(&registry, &mut first, "b");
        assert!(is_pending(&mut second));
        let_time_pass(&registry, "b");
        let no_room = AdapterError::NothingToEvict { loaded: 1, limit: 1 };
        assert_eq!(block_on(first).unwrap_err(), no_room);
        assert!(is_pending(&mut second));
        drop(held);
        block_on(second).unwrap();
        assert_eq!(registry.stats().load_failures_total, 0);
    }

    #[test]
    fn a_pinned_adapter_waits_for_room_until_there_is_some() {
        let (_directory, registry, held) = one_place_in_use();
        registry.pin("b", true).unwrap();
        while registry.stats().waiting_for_room == 0 {
            std::thread::yield_now();
        }
        let over = let_time_pass(&registry, "b");
        loop {
            let state = registry.shared.state.lock();
            assert!(matches!(state.entries["b"].tier, Tier::Loading(_)), "it is given up");
            if state.parked.iter().any(|load| load.deadline != over) {
                break;
            }
            drop(state);
            std::thread::yield_now();
        }
        drop(held);
        while registry.pinned().is_empty() {
            std::thread::yield_now();
        }
        assert_eq!(registry.info("b").unwrap().state, AdapterState::Host);
    }

    #[test]
    fn what_nobody_waits_for_any_more_is_not_read() {
        let directory = folder(&["a", "b", "gate"]);
        let mut open = None;
        let registry = registry(|config| {
            config.max_loaded_loras = Some(1);
            open = Some(gate(config, &directory));
        });
        for name in ["a", "b"] {
            registry.register(request_in(&directory, name)).unwrap();
        }
        drop(acquire(&registry, "a").unwrap());
        let mut busy = registry.load(request_in(&directory, "gate"));
        assert!(is_pending(&mut busy));
        let mut gone = registry.acquire("b");
        assert!(is_pending(&mut gone));
        drop(gone);
        drop(open);
        block_on(busy).unwrap_err();
        until_idle(&registry);
        let state = |name| registry.info(name).unwrap().state;
        assert_eq!(["a", "b"].map(state), [AdapterState::Host, AdapterState::Registered]);
        drop(acquire(&registry, "b").unwrap());
    }

    #[test]
    fn far_more_adapters_than_room_are_all_served() {
        let names: Vec<String> = (0..24).map(|index| format!("n{index}")).collect();
        let directory = folder(&["x", "y", "z"]);
        let registry = registry(|config| {
            config.max_loaded_loras = Some(2);
            config.loader_threads = 3;
        });
        for (index, name) in names.iter().enumerate() {
            registry
                .register(LoadRequest {
                    name: name.clone(),
                    ..request_in(&directory, ["x", "y", "z"][index % 3])
                })
                .unwrap();
        }
        std::thread::scope(|scope| {
            for start in 0..8 {
                let (registry, names) = (&registry, &names);
                scope.spawn(move || {
                    for index in 0..30 {
                        let lease = acquire(registry, &names[(start * 5 + index * 7) % names.len()]).unwrap();
                        assert!(registry.stats().loaded <= 2);
                        drop(lease);
                    }
                });
            }
        });
        let stats = registry.stats();
        assert_eq!((stats.leases, stats.waiting_for_room), (0, 0));
    }

    #[test]
    fn bytes_bound_the_host_tier_too() {
        let all = ["a", "b", "c", "same as a"];
        let directory = folder(&all);
        AdapterFiles::simple(&tiny_decoder(), 1).write_to(&directory.path().join("same as a"));
        let bytes = load_adapter(&source_of(&directory, "a"), &tiny_decoder(), &limits()).unwrap().0.bytes();
        let registry = registry(|config| {
            config.max_loaded_bytes = Some(2 * bytes);
            config.room_timeout = Duration::ZERO;
        });
        for name in all {
            registry.register(request_in(&directory, name)).unwrap();
        }
        let used = || (registry.stats().loaded, registry.stats().loaded_bytes);
        drop(acquire(&registry, "a").unwrap());
        drop(acquire(&registry, "same as a").unwrap());
        assert_eq!(used(), (2, bytes), "equal content counts once");
        drop(acquire(&registry, "b").unwrap());
        assert_eq!(used(), (3, 2 * bytes));
        // Both names of the content that was used longest ago leave before there is room.
        drop(acquire(&registry, "c").unwrap());
        assert_eq!(used(), (2, 2 * bytes));
        assert_eq!(registry.stats().evictions_total, 2);
        let (b, c) = (acquire(&registry, "b").unwrap(), acquire(&registry, "c").unwrap());
        let error = acquire(&registry, "a").unwrap_err();
        let full = AdapterError::HostMemoryFull {
            needed_bytes: bytes,
            used_bytes: 2 * bytes,
            limit_bytes: 2 * bytes,
        };
        assert_eq!(error, full);
        // A replacement needs no more room than what it replaces leaves, and a leased old version is its requests' affair.
        let replacement = LoadRequest {
            name: "b".into(),
            replace: true,
            ..request_in(&directory, "a")
        };
        block_on(registry.load(replacement)).unwrap();
        assert_eq!(used(), (2, 2 * bytes));
        assert_eq!(registry.stats().host_bytes, 3 * bytes);
        drop((b, c));
        // A combination takes room like an adapter, and leaves for one.
        drop(acquire(&registry, "b*0.5").unwrap());
        assert_eq!(registry.stats().combinations, 1);
        assert!(registry.stats().loaded_bytes <= 2 * bytes);
        drop(acquire(&registry, "c").unwrap());
        assert!(registry.stats().loaded_bytes <= 2 * bytes);
        unload(&registry, "b").unwrap();
        unload(&registry, "c").unwrap();
        drop(acquire(&registry, "a").unwrap());
        assert!(registry.stats().loaded_bytes <= 2 * bytes);
    }

    /// Parts as `tokenizer.json` lists them: `[[id, bytes], …]`.
    struct Parts(Vec<HostPart>);

    impl crate::adapter::Companion for Parts {
        fn digest(&self) -> [u8; 32] {
            self.0.iter().fold([0; 32], |mut digest, part| {
                digest[part.id[0] as usize] = part.bytes as u8;
                digest
            })
        }

        fn parts(&self) -> Vec<HostPart> {
            self.0.clone()
        }
    }

    fn read_parts(files: &FileSource) -> Option<Arc<dyn crate::adapter::Companion>> {
        let json = files.read("tokenizer.json", 1000).ok()?;
        let parts: Vec<(u8, usize)> = serde_json::from_slice(&json).unwrap();
        let parts = parts.into_iter().map(|(id, bytes)| HostPart { id: [id; 32], bytes });
        Some(Arc::new(Parts(parts.collect())))
    }

    #[test]
    fn what_comes_with_adapters_counts_once_however_many_share_it() {
        let all = ["a", "b", "c", "large"];
        let directory = folder(&all);
        let weights = load_adapter(&source_of(&directory, "a"), &tiny_decoder(), &limits()).unwrap().0.bytes();
        let limit = 2 * weights + 100_000 + 20;
        for (name, parts) in [
            ("a", serde_json::json!([[1, 100_000], [2, 10]])),
            ("b", serde_json::json!([[1, 100_000], [3, 10]])),
            ("c", serde_json::json!([[4, 90_000]])),
            ("large", serde_json::json!([[5, limit]])),
        ] {
            std::fs::write(directory.path().join(name).join("tokenizer.json"), parts.to_string()).unwrap();
        }
        let registry = registry(|config| {
            config.max_loaded_bytes = Some(limit);
            config.room_timeout = Duration::ZERO;
            config.limits.companion = Some(Arc::new(|files, _| Ok(read_parts(files))));
        });
        for name in all {
            registry.register(request_in(&directory, name)).unwrap();
        }
        let used = || (registry.stats().loaded, registry.stats().loaded_bytes);
        let a = acquire(&registry, "a").unwrap();
        assert_eq!(registry.info("a").unwrap().companion_bytes, 100_010);
        assert_eq!(registry.info("a").unwrap().bytes, weights);
        drop(acquire(&registry, "b").unwrap());
        assert_eq!(used(), (2, limit), "the shared part counts once");
        assert_eq!(registry.stats().host_bytes, limit);
        // With the other in use, what they share does not leave, and there is no room for this one.
        let full = AdapterError::HostMemoryFull {
            needed_bytes: weights + 90_000,
            used_bytes: weights + 100_010,
            limit_bytes: limit,
        };
        assert_eq!(acquire(&registry, "c").unwrap_err(), full);
        assert_eq!(used(), (2, limit), "nobody left in vain");
        drop(a);
        drop(acquire(&registry, "c").unwrap());
        assert_eq!(used(), (1, weights + 90_000), "who left took the shared part along");
        assert_eq!(registry.stats().host_bytes, weights + 90_000);
        // It would share with one that has to leave for it.
        drop(acquire(&registry, "b").unwrap());
        assert_eq!(used(), (1, weights + 100_010));
        let error = acquire(&registry, "large").unwrap_err();
        let (needed, own) = (weights + limit, format!("its own tokenizer's {limit} included"));
        assert!(
            matches!(&error, AdapterError::Incompatible { reason } if reason.contains(&own) && reason.contains(&needed.to_string())),
            "{error}"
        );
        unload(&registry, "b").unwrap();
        assert_eq!((used(), registry.stats().host_bytes), ((0, 0), 0));
    }

    #[test]
    fn an_adapter_larger_than_all_room_is_refused_at_once() {
        let directory = folder(&["a"]);
        let registry = registry(|config| config.max_loaded_bytes = Some(10));
        for error in [block_on(registry.load(request_in(&directory, "a"))).unwrap_err(), {
            registry.register(request_in(&directory, "a")).unwrap();
            acquire(&registry, "a").unwrap_err()
        }] {
            assert!(
                matches!(&error, AdapterError::Incompatible { reason } if reason.contains("at most 10")),
                "{error}"
            );
        }
        assert_eq!(registry.stats().loaded_bytes, 0);
    }

    #[test]
    fn requests_wait_for_bytes_without_reading_again_and_again() {
        let directory = folder(&["a", "b"]);
        let bytes = load_adapter(&source_of(&directory, "a"), &tiny_decoder(), &limits()).unwrap().0.bytes();
        let registry = registry(|config| config.max_loaded_bytes = Some(bytes + bytes / 2));
        for name in ["a", "b"] {
            registry.register(request_in(&directory, name)).unwrap();
        }
        let first = acquire(&registry, "a").unwrap();
        let mut waiter = registry.acquire("b");
        assert!(futures::FutureExt::now_or_never(&mut waiter).is_none());
        while registry.stats().waiting_for_room == 0 {
            std::thread::yield_now();
        }
        // Its size is known now, so that it is not read while there is no room for it.
        let spent = registry.stats().load_seconds_total;
        registry.shared.room_may_be();
        while registry.stats().waiting_for_room == 0 || registry.stats().loading > 0 {
            std::thread::yield_now();
        }
        assert_eq!(registry.stats().load_seconds_total, spent);
        drop(first);
        assert_eq!(block_on(waiter).unwrap().name().as_ref(), "b");
        assert_eq!(registry.stats().loaded, 1);
    }

    #[test]
    fn a_small_adapter_does_not_wait_behind_a_large_one_and_who_has_gone_waits_for_nothing() {
        let directory = folder(&["p", "q", "x", "y"]);
        let large = serde_json::json!({"r": 16, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]});
        let large_folder = directory.path().join("large");
        std::fs::create_dir(&large_folder).unwrap();
        AdapterFiles::new(&tiny_decoder(), large, 9).write_to(&large_folder);
        let bytes_of = |name| load_adapter(&source_of(&directory, name), &tiny_decoder(), &limits()).unwrap().0.bytes();
        let small = bytes_of("p");
        assert!(bytes_of("large") > 2 * small);
        // Room for the large one, or for two small ones beside its lack of it.
        let registry = registry(|config| config.max_loaded_bytes = Some(bytes_of("large").max(3 * small)));
        for name in ["p", "q", "x", "y", "large"] {
            registry.register(request_in(&directory, name)).unwrap();
        }
        // A request that holds some adapters and waits for one more must not stand behind one that waits for its leases.
        let held = (acquire(&registry, "p").unwrap(), acquire(&registry, "q").unwrap());
        let mut waiter = registry.acquire("large");
        assert!(futures::FutureExt::now_or_never(&mut waiter).is_none());
        while registry.stats().waiting_for_room == 0 {
            std::thread::yield_now();
        }
        drop(acquire(&registry, "x").unwrap());
        assert_eq!(registry.stats().waiting_for_room, 1);
        // Nobody waits for the large one any more: it is not read when there is room, and can be asked for again.
        drop(waiter);
        drop(held);
        drop(acquire(&registry, "y").unwrap());
        while registry.stats().waiting_for_room > 0 {
            std::thread::yield_now();
        }
        assert_eq!(registry.info("large").unwrap().state, AdapterState::Registered);
        drop(acquire(&registry, "large").unwrap());
        assert_eq!(registry.shared.parked.load(Ordering::SeqCst), 0);
        // A loader gives back what it was granted when it has answered.
        while registry.shared.granted.bytes.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
    }

    #[test]
    fn sums_and_batches_do_not_wait_for_each_other() {
        let all = ["a", "b", "c", "d"];
        let directory = folder(&all);
        let registry = registry(|config| {
            config.max_loaded_loras = Some(2);
            config.max_combinations = 1;
            config.loader_threads = 3;
        });
        for name in all {
            registry.register(request_in(&directory, name)).unwrap();
        }
        std::thread::scope(|scope| {
            for start in 0..6 {
                let registry = &registry;
                scope.spawn(move || {
                    for index in 0..20 {
                        let (one, other) = (all[(start + index) % 4], all[(start + index + 1 + index % 3) % 4]);
                        match (start + index) % 3 {
                            0 => drop(acquire(registry, &format!("{one}+{other}*0.5")).unwrap()),
                            1 => drop(block_on(registry.acquire_all(&[one, other, one])).unwrap()),
                            _ => drop(acquire(registry, one).unwrap()),
                        }
                        let stats = registry.stats();
                        assert!(stats.loaded <= 2 && stats.combinations <= 1, "{stats:?}");
                    }
                });
            }
        });
        while registry.stats().loading > 0 {
            std::thread::yield_now();
        }
        let stats = registry.stats();
        assert_eq!((stats.leases, stats.waiting_for_room), (0, 0));
        assert_eq!(registry.shared.parked.load(Ordering::SeqCst), 0);
        let too_many = block_on(registry.acquire_all(&["a", "b+c"])).unwrap_err();
        assert_eq!(too_many, AdapterError::TooManyAdapters { got: 3, limit: 2 });
    }

    #[test]
    fn combinations_in_use_are_bounded() {
        let directory = folder(&["a"]);
        let registry = registry(|config| {
            config.max_combinations = 2;
            config.room_timeout = Duration::ZERO;
        });
        registry.register(request_in(&directory, "a")).unwrap();
        let held = [acquire(&registry, "a*0.1").unwrap(), acquire(&registry, "a*0.2").unwrap()];
        let again = acquire(&registry, "a*0.1").unwrap();
        let error = acquire(&registry, "a*0.3").unwrap_err();
        assert_eq!(error, AdapterError::TooManyCombinations { in_use: 2, limit: 2 });
        drop((held, again));
        drop(acquire(&registry, "a*0.3").unwrap());
        assert_eq!(registry.stats().combinations, 2);
        assert_eq!(registry.stats().leases, 0);
    }

    #[test]
    fn more_combinations_than_there_may_be_are_refused_at_once_in_a_batch_and_named_after_a_wait() {
        let directory = folder(&["a", "b"]);
        let registry = registry(|config| {
            config.max_combinations = 2;
            config.room_timeout = Duration::from_millis(1);
        });
        registry.register(request_in(&directory, "a")).unwrap();
        registry.register(request_in(&directory, "b")).unwrap();
        // The third would wait for the first to end, and all other batches behind it.
        let all = futures::FutureExt::now_or_never(registry.acquire_all(&["a*0.1", "a+b", "a*0.3", "a"]));
        assert_eq!(
            all.expect("it waits for nothing").unwrap_err(),
            AdapterError::TooManySums { got: 3, limit: 2 }
        );
        let held = block_on(registry.acquire_all(&["a*0.1", "a+b", "b+a", "b*0.5+b*0.5", "a"])).unwrap();
        assert_eq!(
            acquire(&registry, "a*0.3").unwrap_err(),
            AdapterError::TooManyCombinations { in_use: 2, limit: 2 }
        );
        drop(held);
        assert_eq!(registry.stats().leases, 0);
    }

    #[test]
    fn a_batch_whose_adapters_are_there_waits_for_nobody() {
        let directory = folder(&["a", "b", "c"]);
        let registry = registry(|config| config.max_loaded_loras = Some(2));
        for name in ["a", "b", "c"] {
            registry.register(request_in(&directory, name)).unwrap();
        }
        let held = (acquire(&registry, "a").unwrap(), acquire(&registry, "b").unwrap());
        let mut waiting = registry.acquire_all(&["a", "c"]);
        assert!(futures::FutureExt::now_or_never(&mut waiting).is_none(), "there is no room for c");
        let now = futures::FutureExt::now_or_never(registry.acquire_all(&["b", "a", "b"]));
        let leases = now.expect("it waits for nothing").unwrap();
        assert_eq!(leases.iter().map(|lease| &**lease.name()).collect::<Vec<_>>(), ["b", "a", "b"]);
        drop((leases, held));
        assert_eq!(block_on(waiting).unwrap().len(), 2);
        assert_eq!(registry.stats().leases, 0);
    }

    #[test]
    fn a_batch_that_is_larger_than_host_memory_is_refused_at_once_when_that_is_known() {
        let directory = folder(&["a", "b", "c"]);
        let bytes = load_adapter(&source_of(&directory, "a"), &tiny_decoder(), &limits()).unwrap().0.bytes();
        let registry = registry(|config| {
            config.max_loaded_bytes = Some(2 * bytes);
            config.room_timeout = FOR_EVER;
        });
        for name in ["a", "b", "c"] {
            registry.register(request_in(&directory, name)).unwrap();
        }
        let (got, limit) = (3 * bytes, 2 * bytes);
        let too_many = AdapterError::TooManyBytes { got, limit };
        // Nobody knows how large the third is before it was read: then it does not wait for the other two to end.
        assert_eq!(block_on(registry.acquire_all(&["a", "b", "c"])).unwrap_err(), too_many);
        for batch in [&["a", "b", "c"][..], &["c", "b", "b", "a"], &["a", "a*0.5", "a*0.25"]] {
            let now = futures::FutureExt::now_or_never(registry.acquire_all(batch));
            assert_eq!(now.expect("it waits for nothing").unwrap_err(), too_many);
        }
        let sum = futures::FutureExt::now_or_never(registry.acquire("a+c"));
        assert_eq!(
            sum.expect("it waits for nothing").unwrap_err(),
            AdapterError::TooManyBytes { got: 4 * bytes, limit }
        );
        drop(block_on(registry.acquire_all(&["a", "c", "a", "c*1.0"])).unwrap());
        drop(block_on(registry.acquire_all(&["a", "a*0.5"])).unwrap());
        until_idle(&registry);
        assert_eq!(registry.stats().leases, 0);
    }

    /// A wait that a test never sees the end of.
    const FOR_EVER: Duration = Duration::from_secs(100 * 24 * 3600);

    /// Waits for the end of what loaders do when they have answered: a lease for who has gone ends then.
    fn until_idle(registry: &AdapterRegistry) {
        while registry.stats().waiting_for_room + registry.stats().loading > 0 {
            std::thread::yield_now();
        }
    }

    fn is_pending<T>(future: &mut BoxFuture<'_, T>) -> bool {
        futures::FutureExt::now_or_never(future).is_none()
    }

    #[test]
    fn a_sum_of_adapters_that_were_never_read_is_refused_when_they_are_and_it_can_not_be_beside_them() {
        let directory = folder(&["a", "b", "c"]);
        let bytes = load_adapter(&source_of(&directory, "a"), &tiny_decoder(), &limits()).unwrap().0.bytes();
        let (got, limit) = (4 * bytes, 4 * bytes - 1);
        let registry = registry(|config| {
            config.max_loaded_bytes = Some(limit);
            config.room_timeout = FOR_EVER;
        });
        for name in ["a", "b", "c"] {
            registry.register(request_in(&directory, name)).unwrap();
        }
        let too_many = AdapterError::TooManyBytes { got, limit };
        assert_eq!(acquire(&registry, "a+b").unwrap_err(), too_many);
        assert_eq!(
            block_on(registry.acquire_all(&["c", "c*1", "b", "c*0.5", "b*0.25"])).unwrap_err(),
            too_many
        );
        drop(block_on(registry.acquire_all(&["c*0.5", "a"])).unwrap());
        until_idle(&registry);
        assert_eq!(registry.stats().leases, 0);
        assert!(registry.shared.state.lock().wanted.is_none());
    }

    #[test]
    fn a_batch_whose_tokenizers_do_not_fit_is_refused_when_that_is_known() {
        let directory = folder(&["a", "b", "c"]);
        let weights = load_adapter(&source_of(&directory, "a"), &tiny_decoder(), &limits()).unwrap().0.bytes();
        for (name, parts) in [
            ("a", serde_json::json!([[1, 100_000]])),
            ("b", serde_json::json!([[1, 100_000], [2, 50_000]])),
        ] {
            std::fs::write(directory.path().join(name).join("tokenizer.json"), parts.to_string()).unwrap();
        }
        let limit = 3 * weights + 150_000 - 1;
        let registry = registry(|config| {
            config.max_loaded_bytes = Some(limit);
            config.room_timeout = FOR_EVER;
            config.limits.companion = Some(Arc::new(|files, _| Ok(read_parts(files))));
        });
        for name in ["a", "b", "c"] {
            registry.register(request_in(&directory, name)).unwrap();
        }
        let too_many = AdapterError::TooManyBytes { got: limit + 1, limit };
        assert_eq!(block_on(registry.acquire_all(&["a", "b", "c"])).unwrap_err(), too_many);
        let known = futures::FutureExt::now_or_never(registry.acquire_all(&["c", "b", "a"]));
        assert_eq!(known.expect("it waits for nothing").unwrap_err(), too_many);
        // What the two share counts once.
        drop(block_on(registry.acquire_all(&["a", "b"])).unwrap());
    }

    /// Adds adapters of these ranks to a folder; gives the bytes of each.
    fn ranks(directory: &tempfile::TempDir, ranks: &[(&str, u32)]) -> Vec<usize> {
        let bytes = |(index, (name, rank)): (usize, &(&str, u32))| {
            let folder = directory.path().join(name);
            std::fs::create_dir(&folder).unwrap();
            let config = serde_json::json!({"r": rank, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]});
            AdapterFiles::new(&tiny_decoder(), config, 100 + index as u32).write_to(&folder);
            load_adapter(&source_of(directory, name), &tiny_decoder(), &limits()).unwrap().0.bytes()
        };
        ranks.iter().enumerate().map(bytes).collect()
    }

    /// Polls a request until it waits for room for this adapter.
    fn poll_until_parked<T>(registry: &AdapterRegistry, waiting: &mut BoxFuture<'_, T>, name: &str) {
        let is_parked = || registry.shared.state.lock().parked.iter().any(|load| *load.work.name == *name);
        while !is_parked() {
            assert!(is_pending(waiting));
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_batch_is_refused_when_an_adapter_that_it_is_to_get_has_become_too_large_for_it() {
        let directory = tempfile::TempDir::new().unwrap();
        let all = [("a", 2), ("b", 16), ("c", 2), ("x", 8), ("new c", 8)];
        let bytes = ranks(&directory, &all);
        let [a, b, _, _, new_c] = bytes[..] else { panic!("five") };
        let (got, limit) = (a + b + new_c, a + b + new_c - 1);
        let registry = registry(|config| {
            config.max_loaded_bytes = Some(limit);
            config.room_timeout = FOR_EVER;
            config.loader_threads = 1;
        });
        for name in ["x", "b", "a", "c"] {
            registry.register(request_in(&directory, name)).unwrap();
            drop(acquire(&registry, name).unwrap());
        }
        // It has the first and waits until there is room for the second.
        let held = acquire(&registry, "x").unwrap();
        let mut waiting = registry.acquire_all(&["a", "b", "c"]);
        poll_until_parked(&registry, &mut waiting, "b");
        let replacement = LoadRequest {
            name: "c".into(),
            replace: true,
            ..request_in(&directory, "new c")
        };
        block_on(registry.load(replacement)).unwrap();
        assert_eq!(block_on(waiting).unwrap_err(), AdapterError::TooManyBytes { got, limit });
        drop(held);
        // The same when the files of one are others than when they were read last.
        unload(&registry, "c").unwrap();
        registry.register(request_in(&directory, "c")).unwrap();
        drop(acquire(&registry, "c").unwrap());
        drop(block_on(registry.acquire_all(&["b", "x"])).unwrap());
        assert_eq!(registry.info("c").unwrap().state, AdapterState::Registered);
        std::fs::remove_dir_all(directory.path().join("c")).unwrap();
        std::fs::rename(directory.path().join("new c"), directory.path().join("c")).unwrap();
        assert_eq!(
            block_on(registry.acquire_all(&["a", "b", "c"])).unwrap_err(),
            AdapterError::TooManyBytes { got, limit }
        );
        until_idle(&registry);
        assert_eq!(registry.stats().leases, 0);
    }

    #[test]
    fn a_batch_does_not_suffer_from_what_replaces_an_adapter_that_it_has_already() {
        let directory = tempfile::TempDir::new().unwrap();
        let bytes = ranks(&directory, &[("a", 2), ("b", 4), ("x", 2), ("new a", 16)]);
        let registry = registry(|config| {
            // The new version beside one that is small, but not beside the batch's other one.
            config.max_loaded_bytes = Some(bytes[2] + bytes[3]);
            config.max_loaded_loras = Some(2);
            config.room_timeout = FOR_EVER;
        });
        for name in ["a", "b", "x"] {
            registry.register(request_in(&directory, name)).unwrap();
            drop(acquire(&registry, name).unwrap());
        }
        let old = registry.info("a").unwrap().version;
        let held = acquire(&registry, "x").unwrap();
        let mut waiting = registry.acquire_all(&["a", "b"]);
        poll_until_parked(&registry, &mut waiting, "b");
        let replacement = LoadRequest {
            name: "a".into(),
            replace: true,
            ..request_in(&directory, "new a")
        };
        block_on(registry.load(replacement)).unwrap();
        let leases = block_on(waiting).unwrap();
        assert_eq!(Some(leases[0].version().to_string()), old);
        drop((leases, held));
        until_idle(&registry);
        assert_eq!(registry.stats().leases, 0);
    }

    #[test]
    fn a_name_waits_for_no_bytes_that_another_has_in_memory_already() {
        let directory = folder(&["a", "b", "same as a"]);
        AdapterFiles::simple(&tiny_decoder(), 1).write_to(&directory.path().join("same as a"));
        let bytes = load_adapter(&source_of(&directory, "a"), &tiny_decoder(), &limits()).unwrap().0.bytes();
        let registry = registry(|config| {
            config.max_loaded_bytes = Some(bytes);
            config.room_timeout = FOR_EVER;
        });
        for name in ["a", "same as a", "b"] {
            registry.register(request_in(&directory, name)).unwrap();
            drop(acquire(&registry, name).unwrap());
        }
        assert_eq!(registry.stats().loaded, 1, "the third has taken the room of both");
        let leases = block_on(registry.acquire_all(&["a", "same as a"])).unwrap();
        assert!(Arc::ptr_eq(leases[0].weights(), leases[1].weights()));
    }

    /// Has the only loader stop when it reads the folder "gate", which fails when what this gives is dropped.
    fn gate(config: &mut RegistryConfig, directory: &tempfile::TempDir) -> std::sync::mpsc::Sender<()> {
        std::fs::write(directory.path().join("gate/tokenizer.json"), b"[]").unwrap();
        let (open, gate) = std::sync::mpsc::channel();
        let gate = Mutex::new(gate);
        config.loader_threads = 1;
        config.limits.companion = Some(Arc::new(move |files, _| {
            if files.contains("tokenizer.json") {
                gate.lock().recv().unwrap_or(());
                return Err(AdapterError::Internal { reason: "the gate".into() });
            }
            Ok(None)
        }));
        open
    }

    #[test]
    fn two_sums_never_wait_for_the_room_that_each_others_parts_take() {
        let directory = folder(&["a", "b", "c", "d", "gate"]);
        let bytes = load_adapter(&source_of(&directory, "a"), &tiny_decoder(), &limits()).unwrap().0.bytes();
        let mut open = None;
        let registry = registry(|config| {
            // Two adapters and their sum.
            config.max_loaded_bytes = Some(4 * bytes);
            config.room_timeout = FOR_EVER;
            open = Some(gate(config, &directory));
        });
        for name in ["a", "b", "c", "d"] {
            registry.register(request_in(&directory, name)).unwrap();
            drop(acquire(&registry, name).unwrap());
        }
        // While the loader is busy both ask for what is there.
        let mut busy = registry.load(request_in(&directory, "gate"));
        assert!(is_pending(&mut busy));
        let (mut one, mut other) = (registry.acquire("a+b"), registry.acquire("c+d"));
        assert!(is_pending(&mut one) && is_pending(&mut other));
        drop(open);
        block_on(busy).unwrap_err();
        block_on(futures::future::join(async { drop(one.await.unwrap()) }, async {
            drop(other.await.unwrap())
        }));
        let requests = |name| {
            let info = registry.info(name).unwrap();
            (info.requests_total, info.leases)
        };
        assert_eq!(
            ["a", "b", "c", "d"].map(requests),
            [(2, 0); 4],
            "each counts once, however often it was tried"
        );
    }

    #[test]
    fn the_adapters_of_a_batch_are_read_at_once() {
        let directory = folder(&["a", "b"]);
        let (inside, both) = (Mutex::new(0), Condvar::new());
        let registry = registry(|config| {
            config.loader_threads = 3;
            config.limits.companion = Some(Arc::new(move |_, _| {
                let mut inside = inside.lock();
                *inside += 1;
                both.notify_all();
                let alone = both
                    .wait_while_for(&mut inside, |inside| *inside < 2, Duration::from_secs(120))
                    .timed_out();
                match alone {
                    true => Err(AdapterError::Internal { reason: "alone".into() }),
                    false => Ok(None),
                }
            }));
        });
        for name in ["a", "b"] {
            registry.register(request_in(&directory, name)).unwrap();
        }
        let leases = block_on(registry.acquire_all(&["a", "b"])).unwrap();
        assert_eq!(leases.iter().map(|lease| &**lease.name()).collect::<Vec<_>>(), ["a", "b"]);
    }

    /// Tells whether the registry could be used while it was dropped.
    struct Dropped {
        shared: Weak<Shared>,
        free: Arc<Mutex<Vec<bool>>>,
    }

    impl crate::adapter::Companion for Dropped {
        fn digest(&self) -> [u8; 32] {
            [0; 32]
        }

        fn parts(&self) -> Vec<HostPart> {
            Vec::new()
        }
    }

    impl Drop for Dropped {
        fn drop(&mut self) {
            if let Some(shared) = self.shared.upgrade() {
                self.free.lock().push(shared.state.try_lock().is_some());
            }
        }
    }

    #[test]
    fn nobody_waits_while_what_was_read_in_vain_is_dropped() {
        let directory = folder(&["a", "b"]);
        let free = Arc::<Mutex<Vec<bool>>>::default();
        let shared = Arc::new(std::sync::OnceLock::<Weak<Shared>>::new());
        let made = (Arc::clone(&free), shared.clone());
        let registry = registry(|config| {
            config.max_loaded_loras = Some(2);
            config.room_timeout = Duration::ZERO;
            config.loader_threads = 1;
            config.limits.companion = Some(Arc::new(move |_, _| {
                let (free, shared) = (made.0.clone(), made.1.get().expect("it was made").clone());
                Ok(Some(Arc::new(Dropped { shared, free })))
            }));
        });
        shared.set(registry.shared.me.clone()).expect("once");
        let named = |name: &str, folder| LoadRequest {
            name: name.into(),
            ..request_in(&directory, folder)
        };
        // The same content twice, which is one copy; what there is no room for, loaded and fetched.
        for name in ["one", "two"] {
            block_on(registry.load(named(name, "a"))).unwrap();
        }
        let held = (acquire(&registry, "one").unwrap(), acquire(&registry, "two").unwrap());
        block_on(registry.load(LoadRequest {
            pinned: true,
            ..named("three", "b")
        }))
        .unwrap_err();
        registry.register(named("four", "b")).unwrap();
        acquire(&registry, "four").unwrap_err();
        // The loader lets go of what it loaded before it counts itself idle.
        while registry.shared.queue.lock().running > 0 {
            std::thread::yield_now();
        }
        assert_eq!(*free.lock(), [true; 3]);
        drop(held);
    }

    #[test]
    fn files_in_memory_load_like_a_folder() {
        let directory = folder(&["a"]);
        let files = ["adapter_config.json", "adapter_model.safetensors"].map(|name| crate::MemoryFile {
            name: name.into(),
            bytes: std::fs::read(directory.path().join("a").join(name)).unwrap(),
        });
        let registry = registry(|config| config.max_loaded_loras = Some(1));
        let from_disk = block_on(registry.load(request_in(&directory, "a"))).unwrap();
        let pushed = LoadRequest {
            name: "pushed".into(),
            files: FileSource::Memory(files.into()),
            ..request_in(&directory, "a")
        };
        assert_eq!(block_on(registry.load(pushed.clone())).unwrap().version, from_disk.version);
        // It comes back after others had its place.
        drop(acquire(&registry, "a").unwrap());
        drop(acquire(&registry, "pushed").unwrap());
        assert!(pushed.files.memory_bytes() > 100);
        let missing = LoadRequest {
            name: "missing".into(),
            files: FileSource::Memory(Arc::new([])),
            ..pushed
        };
        assert_eq!(
            block_on(registry.load(missing)).unwrap_err().to_string(),
            "adapter_config.json: no such file"
        );
    }

    #[test]
    fn the_list_says_who_was_used_and_when() {
        let directory = folder(&["a", "b"]);
        let registry = registry(|_| {});
        for name in ["a", "b"] {
            registry.register(request_in(&directory, name)).unwrap();
        }
        let before = SystemTime::now();
        (0..3).for_each(|_| drop(acquire(&registry, "a").unwrap()));
        let info = registry.info("a").unwrap();
        assert_eq!((info.requests_total, info.hits_total), (3, 2));
        assert!(info.last_used.is_some_and(|time| time >= before && time <= SystemTime::now()));
        let other = registry.info("b").unwrap();
        assert_eq!((other.requests_total, other.hits_total, other.last_used), (0, 0, None));
    }

    /// A base model whose weights are looked at only by adapters on embeddings: then something happens to their folder.
    fn while_reading(happens: impl Fn() + Send + Sync + 'static) -> LoraLimits {
        LoraLimits {
            base: Some(Arc::new(move || {
                happens();
                Err(AdapterError::Internal {
                    reason: "no base model".into(),
                })
            })),
            ..limits()
        }
    }

    /// An adapter beside a copy of the base's embedding, which makes the loader look at the base.
    fn with_base_copy(seed: u32) -> AdapterFiles {
        let decoder = tiny_decoder();
        let mut files = AdapterFiles::new(&decoder, serde_json::json!({"r": 2, "target_modules": ["embed_tokens"]}), seed);
        files.add(crate::adapter::ModuleId::EmbedTokens, "base_layer.weight", &[11, 8], &mut 1);
        files
    }

    #[test]
    fn a_folder_that_is_replaced_while_it_is_read_is_read_again() {
        let directory = tempfile::TempDir::new().unwrap();
        let (live, next, old) = ("live", "next", "old");
        let path = |name: &str| directory.path().join(name);
        for name in [live, next] {
            std::fs::create_dir(path(name)).unwrap();
        }
        with_base_copy(1).write_to(&path(live));
        AdapterFiles::simple(&tiny_decoder(), 2).write_to(&path(next));
        let expected = load_adapter(&FileSource::Directory(path(next)), &tiny_decoder(), &limits())
            .unwrap()
            .0
            .version;
        let (from, to, away) = (path(next), path(live), path(old));
        let registry = registry(|config| {
            config.limits = while_reading(move || {
                if from.exists() {
                    std::fs::rename(&to, &away).unwrap();
                    std::fs::rename(&from, &to).unwrap();
                }
            });
        });
        let info = block_on(registry.load(request_in(&directory, live))).unwrap();
        assert_eq!(info.version, Some(expected.to_string()));
        assert!(path(old).exists());
    }

    #[test]
    fn a_folder_that_never_keeps_still_is_an_error() {
        let directory = with_base_copy(1).write();
        let path = directory.path().to_owned();
        let writes = std::sync::atomic::AtomicUsize::new(0);
        let registry = registry(|config| {
            config.limits = while_reading(move || {
                let write = writes.fetch_add(1, Ordering::SeqCst);
                std::fs::write(path.join(format!("file-{write}")), b"x").unwrap();
            });
        });
        let error = block_on(registry.load(request("a", &directory))).unwrap_err();
        assert!(error.to_string().contains("changed while they were read, 3 times"), "{error}");
        assert!(registry.list().is_empty());
        assert!(directory.path().join("file-2").exists() && !directory.path().join("file-3").exists());
    }

    #[test]
    fn what_happens_to_files_between_registration_and_use_is_an_error_of_its_own_requests() {
        let decoder = tiny_decoder();
        let nan = {
            let mut files = AdapterFiles::simple(&decoder, 1);
            let tensor = files.tensors.values_mut().next().unwrap();
            tensor.bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
            files.weights()
        };
        let all = ["deleted", "no weights", "truncated", "not finite", "good"];
        let directory = folder(&all);
        let registry = registry(|config| config.loader_threads = 1);
        for name in all {
            registry.register(request_in(&directory, name)).unwrap();
        }
        let weights = |name: &str| directory.path().join(name).join("adapter_model.safetensors");
        std::fs::remove_dir_all(directory.path().join("deleted")).unwrap();
        std::fs::remove_file(weights("no weights")).unwrap();
        let file = std::fs::File::options().write(true).open(weights("truncated")).unwrap();
        file.set_len(file.metadata().unwrap().len() - 5).unwrap();
        std::fs::write(weights("not finite"), nan).unwrap();
        for (name, words) in [
            ("deleted", "adapter_config.json: no such file"),
            ("no weights", "adapter_model.safetensors: no such file"),
            ("truncated", "damaged safetensors file"),
            ("not finite", "NaN"),
        ] {
            let error = acquire(&registry, name).unwrap_err();
            assert!(error.to_string().contains(words), "{name}: {error}");
            drop(acquire(&registry, "good").unwrap());
        }
        let stats = registry.stats();
        assert_eq!((stats.load_failures_total, stats.leases, stats.loaded), (4, 0, 1));
    }

    #[test]
    fn a_folder_that_was_read_before_is_not_read_again() {
        let directory = folder(&["a"]);
        let registry = registry(|config| config.max_loaded_loras = Some(1));
        let read = |name: &str| {
            let request = LoadRequest {
                name: name.into(),
                ..request_in(&directory, "a")
            };
            registry.register(request).unwrap();
            acquire(&registry, name).unwrap()
        };
        let first = read("x");
        let remembered = || registry.shared.state.lock().read.len();
        assert_eq!(remembered(), 0, "it was written just now: the clock could hide another write");
        // What a file's times say of its last change can't be set back, so that the state is put in by hand.
        let stamp = source_of(&directory, "a").stamp().unwrap();
        let facts = registry.shared.state.lock().entries["x"].facts.clone().unwrap();
        registry.shared.state.lock().remember(stamp, first.weights(), &facts);
        let (known, _) = registry.shared.read(&source_of(&directory, "a")).unwrap();
        assert!(Arc::ptr_eq(&known, first.weights()));
        // Any change shows; what is the same in the end is still one copy; and what nobody holds is read anew.
        std::fs::write(directory.path().join("a/notes.txt"), b"x").unwrap();
        let loaded = || registry.shared.read(&source_of(&directory, "a")).unwrap().0;
        assert!(source_of(&directory, "a").stamp() != Some(stamp) && Arc::ptr_eq(&loaded(), first.weights()));
        AdapterFiles::simple(&tiny_decoder(), 99).write_to(&directory.path().join("a"));
        assert_ne!(loaded().version, first.version());
        drop((first, known));
        unload(&registry, "x").unwrap();
        // The loader lets go of what it loaded after it has answered.
        while registry.stats().loading > 0 {
            std::thread::yield_now();
        }
        assert!(registry.shared.state.lock().known(&stamp).is_none());
    }

    #[test]
    fn what_was_loaded_just_now_stays_before_what_was_used_earlier() {
        let all = ["a", "b", "c"];
        let directory = folder(&all);
        let registry = registry(|config| config.max_loaded_loras = Some(2));
        let load = |name| block_on(registry.load(request_in(&directory, name))).unwrap();
        load("a");
        acquire(&registry, "a").unwrap();
        load("b");
        load("c");
        let states = all.map(|name| registry.info(name).unwrap().state);
        assert_eq!(states, [AdapterState::Registered, AdapterState::Host, AdapterState::Host]);
    }

    #[test]
    fn who_waits_for_pins_is_told_when_they_are_there() {
        let directory = folder(&["a"]);
        let registry = registry(|_| {});
        let (tell, told) = std::sync::mpsc::channel();
        registry.on_pins_changed(Box::new(move || tell.send(()).unwrap()));
        registry.register(request_in(&directory, "a")).unwrap();
        registry.pin("a", true).unwrap();
        // Once for the pin, and once, if it has not come before, for the weights.
        while registry.pinned().is_empty() {
            told.recv_timeout(Duration::from_secs(120)).expect("it is told of");
        }
        told.try_iter().for_each(drop);
        unload(&registry, "a").unwrap();
        assert!(told.try_recv().is_ok(), "it is pinned no more");
    }

    #[test]
    fn a_pinned_load_without_room_registers_nothing() {
        let directory = folder(&["a", "b"]);
        let registry = registry(|config| config.max_loaded_loras = Some(1));
        block_on(registry.load(request_in(&directory, "a"))).unwrap();
        let lease = acquire(&registry, "a").unwrap();
        let pinned = || LoadRequest {
            pinned: true,
            ..request_in(&directory, "b")
        };
        let error = block_on(registry.load(pinned())).unwrap_err();
        assert!(matches!(error, AdapterError::NothingToEvict { .. }));
        assert_eq!(names(&registry), ["a"]);
        drop(lease);
        block_on(registry.load(pinned())).unwrap();
        // With the only place pinned there will be none for another.
        let error = block_on(registry.load(request_in(&directory, "a again"))).unwrap_err();
        assert!(matches!(error, AdapterError::BadFile { .. }), "{error}");
        let error = block_on(registry.load(LoadRequest {
            replace: true,
            ..request_in(&directory, "a")
        }))
        .unwrap_err();
        assert!(matches!(error, AdapterError::NothingToEvict { .. }), "{error}");
    }

    #[test]
    fn what_is_loaded_while_all_room_is_in_use_is_read_when_there_is_some() {
        let directory = folder(&["a", "b", "c"]);
        let registry = registry(|config| config.max_loaded_loras = Some(1));
        block_on(registry.load(request_in(&directory, "a"))).unwrap();
        let lease = acquire(&registry, "a").unwrap();
        let loaded = block_on(registry.load(request_in(&directory, "b"))).unwrap();
        assert_eq!((loaded.state, loaded.leases), (AdapterState::Registered, 0));
        let first = loaded.version.expect("it was read and checked");
        assert_eq!(registry.stats().loaded, 1);
        // Someone waits for it; the name is replaced meanwhile; the one who waited gets what the name has now.
        let mut waiting = registry.acquire("b");
        assert!(is_pending(&mut waiting));
        let replaced = block_on(registry.load(LoadRequest {
            replace: true,
            expected_version: Some(first.clone()),
            name: "b".into(),
            ..request_in(&directory, "c")
        }))
        .unwrap();
        let second = replaced.version.expect("it was read, too");
        assert_ne!(first, second);
        assert!(is_pending(&mut waiting), "a is in use still");
        drop(lease);
        let lease = block_on(waiting).unwrap();
        assert_eq!(lease.weights().version.to_string(), second);
        assert_eq!(registry.info("b").unwrap().state, AdapterState::Host);
        drop(lease);
        assert_eq!(registry.stats().leases, 0);
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
            unload(&registry, name).unwrap();
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
        let unloading = registry.unload("a", UnloadMode::Drain).unwrap();
        assert_eq!(unloading.report().still_running, 1);
        drop(old);
        assert_eq!(block_on(unloading.drained()).waited_for, 1);
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
        let load = |folder: &str, expected_version| {
            block_on(registry.load(LoadRequest {
                name: "a".into(),
                replace: true,
                expected_version,
                ..request_in(&directory, folder)
            }))
        };
        let absent = load("one", Some("0".repeat(64))).unwrap_err();
        assert!(
            matches!(absent, AdapterError::VersionConflict { ref got, .. } if got == "none"),
            "{absent}"
        );
        let first = load("one", None).unwrap();
        let second = load("two", first.version.clone()).unwrap();
        let conflict = load("one", first.version.clone()).unwrap_err();
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
        unload(&registry, "a").unwrap();
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
    fn a_full_queue_of_loads_refuses() {
        let directory = folder(&["a"]);
        let registry = registry(|config| config.max_queued_loads = 0);
        let error = block_on(registry.load(request_in(&directory, "a"))).unwrap_err();
        assert_eq!(error, AdapterError::TooManyLoads { waiting: 0, limit: 0 });
        let pinned = LoadRequest {
            pinned: true,
            ..request_in(&directory, "a")
        };
        assert!(matches!(registry.register(pinned), Err(AdapterError::TooManyLoads { .. })));
        assert_eq!((registry.stats().registered, registry.stats().pinned), (0, 0), "completely or not at all");
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
        let first = || registry.first_names(3).iter().map(|name| name.to_string()).collect::<Vec<_>>();
        assert_eq!(first(), ["adapter-0", "adapter-1", "adapter-10"]);
        unload(&registry, "adapter-1").unwrap();
        assert_eq!(first(), ["adapter-0", "adapter-10", "adapter-100"]);
        assert_eq!(registry.first_names(20_000).len(), 9_999);
    }

    #[test]
    fn a_combination_holds_its_parts_and_is_made_once() {
        let directory = folder(&["a", "b", "a+b"]);
        let registry = registry(|config| config.max_combinations = 2);
        for name in ["a", "b"] {
            registry.register(request_in(&directory, name)).unwrap();
        }
        let info = registry.info("a*0.5+b").unwrap();
        assert_eq!((info.state, &*info.name), (AdapterState::Registered, "a*0.5+b"));
        assert!(registry.info("a+nobody").is_none());
        let lease = acquire(&registry, "a*0.5+b").unwrap();
        let info = registry.info("a*0.5+b").unwrap();
        assert_eq!((info.state, info.max_lora_rank), (AdapterState::Host, 4));
        assert_eq!(&**lease.name(), "a*0.5+b");
        assert_eq!(lease.weights().max_lora_rank, 4);
        assert_eq!((registry.info("a").unwrap().leases, registry.info("b").unwrap().leases), (1, 1));
        let same = acquire(&registry, "b + a*0.5").unwrap();
        assert!(Arc::ptr_eq(same.weights(), lease.weights()));
        drop((lease, same));
        assert_eq!(registry.stats().leases, 0);
        // Kept for the next request, two of them at most.
        let bytes = |text: &str| acquire(&registry, text).unwrap().weights().bytes();
        let all = bytes("a") + bytes("b") + bytes("a*0.1+b") + bytes("a*0.2+b") + bytes("a*0.3+b");
        assert_eq!(registry.stats().host_bytes, all - bytes("a*0.3+b"));
        // A weight of one is the adapter itself; a name that is taken is no expression.
        assert_eq!(acquire(&registry, "a*1").unwrap().version(), acquire(&registry, "a").unwrap().version());
        block_on(registry.load(request_in(&directory, "a+b"))).unwrap();
        assert_eq!(acquire(&registry, "a+b").unwrap().weights().max_lora_rank, 2);
        assert!(matches!(acquire(&registry, "a+nobody"), Err(AdapterError::Unknown { ref name, .. }) if name == "nobody"));
        assert!(matches!(acquire(&registry, "a*x"), Err(AdapterError::BadName { .. })));
        assert_eq!(registry.stats().leases, 0);
    }

    mod random {
        use futures::FutureExt;
        use proptest::prelude::*;

        use super::*;

        /// What a client, a worker or an operator does.
        #[derive(Clone, Debug)]
        enum Action {
            Register(usize),
            Load {
                name: usize,
                content: usize,
                replace: bool,
                pinned: bool,
            },
            Unload(usize, UnloadMode),
            Acquire(usize),
            /// `n0*0.3`, or `n0+n1*0.3`.
            AcquireSum(usize, Option<usize>, u8),
            /// The second one's weight is 1, or a few tenths.
            AcquireAll(usize, usize, Option<u8>),
            StopWaiting(prop::sample::Index),
            Clone(prop::sample::Index),
            Drop(prop::sample::Index),
            Pin(usize, bool),
        }

        const NAMES: usize = 5;
        const LIMIT: usize = 4;
        const COMBINATIONS: usize = 2;
        /// What stays damaged.
        const BAD: usize = 3;

        fn action() -> impl Strategy<Value = Action> {
            let name = 0..NAMES;
            let mode = prop_oneof![Just(UnloadMode::Drain), Just(UnloadMode::Abort)];
            prop_oneof![
                1 => name.clone().prop_map(Action::Register),
                2 => (name.clone(), 0..=BAD, any::<bool>(), any::<bool>()).prop_map(|(name, content, replace, pinned)| Action::Load {
                    name,
                    content,
                    replace,
                    pinned
                }),
                1 => (name.clone(), mode).prop_map(|(name, mode)| Action::Unload(name, mode)),
                3 => name.clone().prop_map(Action::Acquire),
                3 => (name.clone(), prop::option::of(name.clone()), 1..4u8).prop_map(|(one, other, weight)| Action::AcquireSum(one, other, weight)),
                1 => (name.clone(), name.clone(), prop::option::of(1..4u8)).prop_map(|(one, other, weight)| Action::AcquireAll(one, other, weight)),
                1 => any::<prop::sample::Index>().prop_map(Action::StopWaiting),
                1 => any::<prop::sample::Index>().prop_map(Action::Clone),
                4 => any::<prop::sample::Index>().prop_map(Action::Drop),
                1 => (name, any::<bool>()).prop_map(|(name, pinned)| Action::Pin(name, pinned)),
            ]
        }

        /// A request that waits, and then holds.
        enum Wait<'a> {
            One(BoxFuture<'a, Result<AdapterLease, AdapterError>>),
            All(BoxFuture<'a, Result<Vec<AdapterLease>, AdapterError>>),
        }

        impl Wait<'_> {
            /// What it has come to, if it has.
            fn poll(&mut self) -> Option<Vec<AdapterLease>> {
                let result = match self {
                    Wait::One(future) => future.now_or_never()?.map(|lease| vec![lease]),
                    Wait::All(future) => future.now_or_never()?,
                };
                Some(result.unwrap_or_default())
            }
        }

        struct Clients<'a> {
            registry: &'a AdapterRegistry,
            waiting: Vec<Wait<'a>>,
            /// With the number of the lease: clones share it.
            leases: Vec<(usize, AdapterLease)>,
            next: usize,
        }

        impl<'a> Clients<'a> {
            fn acquire(&mut self, name: &str) {
                // The future borrows its name for as long as it lives; a few bytes a case are left.
                let name: &'static str = name.to_owned().leak();
                self.waiting.push(Wait::One(self.registry.acquire(name)));
            }

            fn acquire_all(&mut self, names: [&str; 2]) {
                let names = names.map(|name| &*name.to_owned().leak()).to_vec().leak();
                self.waiting.push(Wait::All(self.registry.acquire_all(names)));
            }

            /// Lets every waiting request go on as far as it can.
            fn poll(&mut self) {
                for mut wait in std::mem::take(&mut self.waiting) {
                    match wait.poll() {
                        None => self.waiting.push(wait),
                        Some(leases) => {
                            for lease in leases {
                                self.leases.push((self.next, lease));
                                self.next += 1;
                            }
                        }
                    }
                }
            }

            /// Leases as the registry counts them: a combination has its own and its parts'.
            fn counted(&self) -> usize {
                let distinct: HashMap<usize, usize> = self.leases.iter().map(|(number, lease)| (*number, 1 + parts_of(lease).len())).collect();
                distinct.values().sum()
            }
        }

        /// The names in a combination's expression; none for an adapter.
        fn parts_of(lease: &AdapterLease) -> Vec<&str> {
            let name: &str = lease.name();
            if !name.contains(['+', '*']) {
                return Vec::new();
            }
            name.split('+').filter_map(|part| part.split('*').next()).collect()
        }

        proptest! {
            #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(96) })]

            /// Whatever happens in whatever order: counts add up, limits hold, whoever waits is answered, and in the end nothing is held.
            #[test]
            fn leases_and_bounds_are_conserved(actions in prop::collection::vec(action(), 1..80)) {
                let contents = folder(&["0", "1", "2", "3"]);
                std::fs::write(contents.path().join(BAD.to_string()).join("adapter_model.safetensors"), b"bad").unwrap();
                let bytes = load_adapter(&source_of(&contents, "0"), &tiny_decoder(), &limits()).unwrap().0.bytes();
                // Two adapters and their sum fit, and nothing more.
                let limit_bytes = 4 * bytes;
                let registry = registry(|config| {
                    config.max_loaded_loras = Some(LIMIT);
                    config.max_loaded_bytes = Some(limit_bytes);
                    config.max_combinations = COMBINATIONS;
                    config.max_pinned = 2;
                    config.loader_threads = 2;
                    // Whoever waits for room waits until there is some.
                    config.room_timeout = Duration::from_secs(3600);
                });
                let request = |name: usize, content: usize| LoadRequest { name: format!("n{name}"), ..request_in(&contents, &content.to_string()) };
                let mut clients = Clients { registry: &registry, waiting: Vec::new(), leases: Vec::new(), next: 0 };
                let (mut unloadings, mut unloaded) = (Vec::new(), HashSet::new());
                for action in actions {
                    match action {
                        Action::Register(name) => drop(registry.register(request(name, name % 4))),
                        Action::Load { name, content, replace, pinned } => {
                            let known = registry.info(&format!("n{name}"));
                            let result = block_on(registry.load(LoadRequest { replace, pinned, ..request(name, content) }));
                            match result {
                                Ok(_) => prop_assert!(content != BAD && (known.is_none() || replace)),
                                // As before, but for what others may have evicted.
                                Err(_) => prop_assert_eq!(known.is_some(), registry.info(&format!("n{name}")).is_some()),
                            }
                        }
                        Action::Unload(name, mode) => {
                            let name = format!("n{name}");
                            let known = registry.info(&name);
                            match registry.unload(&name, mode) {
                                Ok(unloading) => unloadings.push(unloading),
                                Err(_) => prop_assert!(known.is_none()),
                            }
                            prop_assert!(registry.info(&name).is_none());
                            let was_unloaded = !unloaded.insert(name.clone());
                            for (_, lease) in &clients.leases {
                                let uses = **lease.name() == *name || parts_of(lease).contains(&&*name);
                                let is_forced = known.is_some() && mode == UnloadMode::Abort && !was_unloaded;
                                prop_assert!(!is_forced || !uses || lease.is_revoked(), "{lease:?}");
                            }
                            // Who runs them ends them.
                            clients.leases.retain(|(_, lease)| !lease.is_revoked());
                        }
                        Action::Acquire(name) => clients.acquire(&format!("n{name}")),
                        Action::AcquireSum(one, other, weight) => match other.filter(|other| *other != one) {
                            None => clients.acquire(&format!("n{one}*0.{weight}")),
                            Some(other) => clients.acquire(&format!("n{one}+n{other}*0.{weight}")),
                        },
                        Action::AcquireAll(one, other, weight) => {
                            let weight = weight.map_or_else(String::new, |weight| format!("*0.{weight}"));
                            clients.acquire_all([&format!("n{one}"), &format!("n{other}{weight}")]);
                        }
                        Action::StopWaiting(index) if !clients.waiting.is_empty() => drop(clients.waiting.swap_remove(index.index(clients.waiting.len()))),
                        Action::Clone(index) if !clients.leases.is_empty() => {
                            let lease = index.get(&clients.leases).clone();
                            clients.leases.push(lease);
                        }
                        Action::Drop(index) if !clients.leases.is_empty() => {
                            let place = index.index(clients.leases.len());
                            drop(clients.leases.swap_remove(place));
                        }
                        Action::StopWaiting(_) | Action::Clone(_) | Action::Drop(_) => {}
                        Action::Pin(name, pinned) => drop(registry.pin(&format!("n{name}"), pinned)),
                    }
                    clients.poll();
                    let stats = registry.stats();
                    prop_assert!(stats.loaded <= LIMIT, "{} loaded", stats.loaded);
                    prop_assert!(stats.loaded_bytes <= limit_bytes, "{} bytes", stats.loaded_bytes);
                    prop_assert!(stats.combinations <= COMBINATIONS, "{} combinations", stats.combinations);
                    prop_assert!(stats.pinned <= 2, "{} pinned", stats.pinned);
                    prop_assert!(stats.leases >= clients.counted());
                    // Loads and sums that are not done may hold a lease, also after whoever waited for them has gone.
                    if stats.loading == 0 && stats.waiting_for_room == 0 && clients.waiting.is_empty() {
                        prop_assert_eq!(registry.stats().leases, clients.counted());
                    }
                    // Leases on a name that was unloaded are not the next one's of that name.
                    for info in registry.list().iter().filter(|info| !unloaded.contains(&*info.name)) {
                        let uses = |lease: &AdapterLease| *lease.name() == info.name || parts_of(lease).contains(&&*info.name);
                        let own: HashSet<usize> = clients.leases.iter().filter(|(_, lease)| uses(lease)).map(|(number, _)| *number).collect();
                        prop_assert!(info.leases >= own.len(), "{info:?}");
                    }
                }
                // Without pins there is room for any one request: each is answered, if those that were end.
                for name in 0..NAMES {
                    drop(registry.pin(&format!("n{name}"), false));
                }
                let end = Instant::now() + Duration::from_secs(120);
                while !clients.waiting.is_empty() {
                    clients.leases.clear();
                    clients.poll();
                    prop_assert!(Instant::now() < end, "{} wait for ever: {:?}", clients.waiting.len(), registry.stats());
                    std::thread::yield_now();
                }
                clients.leases.clear();
                for unloading in &unloadings {
                    prop_assert_eq!(block_on(unloading.drained()).still_running, 0);
                }
                while registry.stats().loading > 0 || registry.stats().waiting_for_room > 0 {
                    prop_assert!(Instant::now() < end, "work that nobody ends: {:?}", registry.stats());
                    std::thread::yield_now();
                }
                prop_assert_eq!(registry.stats().leases, 0);
                prop_assert!(registry.list().iter().all(|info| info.leases == 0));
                prop_assert_eq!(registry.shared.parked.load(Ordering::SeqCst), 0);
            }
        }
    }
}
