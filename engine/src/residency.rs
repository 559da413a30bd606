//! [`DeviceResidency`]: which adapters are on the device.
//!
//! Bounded by bytes, each adapter at its own rank. An adapter that a running sequence or a step in flight holds, or that is pinned,
//! never leaves. Uploads are begun here and polled; nothing waits for one.
//!
//! Where adapters and KV blocks share their memory, the border between them is moved from here: ahead of need while the cache has blocks to
//! spare, those of prefixes that nobody uses included, so that an upload need not wait for steps that use them still.
//!
//! Adapters that nobody uses and cached prefixes that nobody uses have one order of age, by the clock of [`KvBlocks::tick`]: what was used least
//! recently leaves first, whoever needs the memory and whichever kind it is. (With [`EvictionPolicy::Fifo`], for adapters that come, the age of one
//! that is there is that of its upload.)
//! An adapter that needs room takes KV blocks that are free, then the oldest of both kinds; it never takes a block that a running sequence has or
//! grows into next, so it makes none of them wait. A KV cache without free blocks gets those of adapters that are older than its oldest prefix, a
//! sixteenth of the memory at a time since others may have to move for it; and, when what runs needs more, of all that nobody uses. Whether it
//! helps is worked out before anything is given up.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Instant,
};

use crate::{
    adapter::{HostAdapter, VersionId, registry::ResidentSet},
    backend::{Backend, BackendError, Capacity},
    batch::AdapterHandle,
    block_pool::BlockMove,
    llm::EvictionPolicy,
    stats::{Histogram, LOAD_SECONDS_BOUNDS},
};

/// An adapter on the device. Held by each running sequence that uses it and by steps in flight: while anyone but
/// [`DeviceResidency`] holds it, it stays.
#[derive(Debug)]
pub struct ResidentAdapter {
    /// Content identity.
    pub version: VersionId,
    /// The backend's name for it.
    pub handle: AdapterHandle,
}

/// What became of asking for an adapter.
#[derive(Clone, Debug)]
pub enum Residency {
    /// Usable by a batch.
    Ready(Arc<ResidentAdapter>),
    /// On its way; ask again at the next step.
    Uploading,
    /// Everything that could make room is in use; ask again later.
    NoRoom,
    /// Can never be there; a sentence for the client.
    Impossible(String),
}

/// The scheduler's view of adapter residency, so that it needs no device.
pub trait AdapterResidency {
    /// Asks for an adapter to be usable, and begins to make it so; that may take blocks of the cache.
    ///
    /// # Errors
    /// `Device`: the engine is done.
    fn request(&mut self, adapter: &Arc<HostAdapter>, cache: &mut dyn KvBlocks) -> Result<Residency, BackendError>;

    /// Begins to make an adapter usable of bytes that nobody has: nothing leaves for it, and no KV block is taken. `None` where that is not
    /// possible (ask with [`Self::request`] when its turn has come), else whether it is usable already. May be called between two steps'
    /// scheduling.
    ///
    /// # Errors
    /// `Device`: the engine is done.
    fn prefetch(&mut self, adapter: &Arc<HostAdapter>, cache: &mut dyn KvBlocks) -> Result<Option<bool>, BackendError>;

    /// Makes `missing` more KV blocks of what is free or nobody uses, or none. False if that is too little.
    ///
    /// # Errors
    /// `Device`: the engine is done.
    fn make_blocks(&mut self, missing: usize, whose: BlocksFor, cache: &mut dyn KvBlocks) -> Result<bool, BackendError>;
}

/// Who lacks blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlocksFor {
    /// A sequence that runs: it goes before every adapter that nobody runs on yet.
    Running,
    /// A request that waits: the adapters of those before it stay.
    Waiting,
}

/// The residency's view of the KV cache: how many blocks it has, and what for.
pub trait KvBlocks {
    /// Blocks that there are.
    fn num_blocks(&self) -> usize;
    /// Of those, free: nothing is lost with them.
    fn num_free(&self) -> usize;
    /// Of those, the ones of cached prefixes that nobody uses.
    fn num_cached(&self) -> usize;
    /// The time of a use now: later than those of all blocks released before, earlier than those of all released after.
    fn tick(&mut self) -> u64;
    /// When the cached prefix that nobody has used for longest was used last.
    fn oldest_use(&self) -> Option<u64>;
    /// Drops the last block of that one, which is free then. False if there is none.
    fn forget_oldest(&mut self) -> bool;
    /// Blocks of running sequences, and one more for each to grow into. May be more than there are.
    fn num_needed(&self) -> usize;
    /// Goes down to `num_blocks`, no fewer than are needed. Whatever lies above moves as the result says; prefixes may be dropped for that.
    fn shrink(&mut self, num_blocks: usize) -> Vec<BlockMove>;
    /// Goes up to `num_blocks`.
    fn grow(&mut self, num_blocks: usize);
}

struct Entry {
    adapter: Arc<ResidentAdapter>,
    bytes: usize,
    /// When its upload began.
    began: Instant,
    ready: bool,
    /// By the clock that blocks have, too.
    uploaded_at: u64,
    /// When it was asked for, or was in use at the begin of a step.
    last_used: u64,
    asked_in_pass: u64,
}

impl Entry {
    fn is_held(&self) -> bool {
        Arc::strong_count(&self.adapter) > 1
    }

    /// The one with the lowest leaves first.
    fn age(&self, policy: EvictionPolicy) -> (u64, u64) {
        match policy {
            EvictionPolicy::Lru => (self.last_used, self.uploaded_at),
            EvictionPolicy::Fifo => (self.uploaded_at, self.uploaded_at),
        }
    }
}

/// Bytes are kept ready for so many adapters of the size that was asked for last, and taken from the cache when there are fewer than
/// [`FEWEST_READY`]: bytes that blocks gave up just now are those of steps in flight, and an upload into them waits.
pub(crate) const READY_ADAPTERS: usize = 8;
pub(crate) const FEWEST_READY: usize = 4;
/// At most so many adapters' worth of blocks that hold something is taken in a step: what lies above the border moves down, on the stream that
/// everybody's step is on (2 MiB in about 2 µs on an H100).
const READY_ADAPTERS_A_STEP: usize = 2;
/// One part of so many is the most of the shared memory that is kept ready, and the least of the cache's blocks that nobody uses then.
const READY_PART: usize = 16;
/// When no more than one part of so many of the cache's blocks is free, it gets what is not kept ready, if that is as many; when no more is even
/// unused, all.
const SHORT_PART: usize = 64;

/// Most sizes that are kept.
const MAX_SIZES: usize = 1 << 16;

/// The adapters on one backend. See the module.
pub struct DeviceResidency {
    capacity: Capacity,
    policy: EvictionPolicy,
    entries: BTreeMap<VersionId, Entry>,
    pinned: Vec<Arc<HostAdapter>>,
    used_bytes: usize,
    /// What the backend said of adapters that were asked for: each step asks for all that wait.
    sizes: HashMap<VersionId, usize>,
    /// Of the adapter that came last.
    last_bytes: usize,
    pass: u64,
    evictions: u64,
    uploads: u64,
    upload_seconds: Histogram,
    residents: Arc<ResidentSet>,
}

impl DeviceResidency {
    /// Nothing resident. `residents` is told which versions are usable.
    pub fn new(capacity: Capacity, policy: EvictionPolicy, residents: Arc<ResidentSet>) -> Self {
        Self {
            capacity,
            policy,
            residents,
            entries: BTreeMap::new(),
            pinned: Vec::new(),
            used_bytes: 0,
            pass: 0,
            sizes: HashMap::new(),
            last_bytes: 0,
            evictions: 0,
            uploads: 0,
            upload_seconds: Histogram::new(LOAD_SECONDS_BOUNDS),
        }
    }

    /// Bytes of all resident adapters, those on their way included.
    pub fn used_bytes(&self) -> usize {
        self.used_bytes
    }

    /// Bytes that they may have.
    pub fn capacity_bytes(&self) -> usize {
        self.capacity.adapter_bytes
    }

    /// Adapters that left for others, or for KV blocks.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Uploads begun. Grows whenever the set of resident adapters changes by an arrival.
    pub fn uploads(&self) -> u64 {
        self.uploads
    }

    /// From the begin of an upload until a batch may use the adapter.
    pub fn upload_seconds(&self) -> &Histogram {
        &self.upload_seconds
    }

    /// Whether an upload is on its way.
    pub fn is_uploading(&self) -> bool {
        self.entries.values().any(|entry| !entry.ready)
    }

    /// Begins a step: polls uploads, uploads pinned adapters that are not there, gives a full cache the bytes that no adapter has, and has
    /// bytes ready for the adapters to come as long as the cache has blocks to spare.
    ///
    /// # Errors
    /// `Device`.
    pub fn begin_step(&mut self, backend: &mut dyn Backend, cache: &mut dyn KvBlocks) -> Result<(), BackendError> {
        self.pass += 1;
        let now = cache.tick();
        for entry in self.entries.values_mut().filter(|entry| entry.is_held() || !entry.ready) {
            entry.last_used = now;
            if entry.ready {
                continue;
            }
            entry.ready = backend.poll_upload(entry.adapter.handle)?;
            if entry.ready {
                self.upload_seconds.observe(entry.began.elapsed().as_secs_f64());
                self.residents.insert(entry.adapter.version);
            }
        }
        for pinned_idx in 0..self.pinned.len() {
            let adapter = self.pinned[pinned_idx].clone();
            if !self.entries.contains_key(&adapter.version) {
                self.request(backend, &adapter, cache)?;
            }
        }
        if self.capacity.is_shared() {
            self.keep_ready(backend, cache)?;
        }
        Ok(())
    }

    /// Has bytes ready for several adapters, before anybody needs them, and gives the others to a cache that has no free blocks.
    fn keep_ready(&mut self, backend: &mut dyn Backend, cache: &mut dyn KvBlocks) -> Result<(), BackendError> {
        let few = self.capacity.num_blocks / SHORT_PART;
        let spare = cache.num_free() + cache.num_cached();
        // Far fewer than those that are left when bytes are made ready.
        let ready = if spare <= few { 0 } else { self.ready_bytes() };
        if self.free_bytes(cache) < ready * FEWEST_READY / READY_ADAPTERS {
            let spare = spare.saturating_sub(self.capacity.num_blocks / READY_PART);
            return self.make_ready(ready, spare, backend, cache);
        }
        if cache.num_free() > few {
            return Ok(());
        }
        self.evict_aged(ready, backend, cache);
        // Adapters may have to move for it: not for a few blocks, if there are others.
        if self.num_gained(ready, cache) > few || spare <= few {
            self.give_free_bytes(ready, backend, cache)?;
        }
        Ok(())
    }

    /// Evicts for the cache what is older than its oldest prefix, once that is worth it. Until then it is what adapters that come have evicted.
    fn evict_aged(&mut self, ready_bytes: usize, backend: &mut dyn Backend, cache: &dyn KvBlocks) {
        let Some(oldest) = cache.oldest_use() else { return };
        let is_aged = |entry: &&Entry| entry.last_used < oldest && self.may_leave(entry, Keep::Recent);
        let aged_bytes: usize = self.entries.values().filter(is_aged).map(|entry| entry.bytes).sum();
        if aged_bytes < self.capacity.shared_bytes / READY_PART {
            return;
        }
        while self.num_gained(ready_bytes, cache) < self.capacity.num_blocks / READY_PART
            && self.evict_older(backend, EvictionPolicy::Lru, Keep::Recent, Some(oldest))
        {}
    }

    /// Blocks that there could be more, beside so many bytes that adapters don't have.
    fn num_gained(&self, ready_bytes: usize, cache: &dyn KvBlocks) -> usize {
        self.capacity
            .blocks_beside(self.used_bytes + ready_bytes)
            .saturating_sub(cache.num_blocks())
    }

    /// Bytes that are to be ready; 0 as long as no adapter's size is known, or where there is no room for one more.
    fn ready_bytes(&self) -> usize {
        let capacity = &self.capacity;
        let most = (capacity.shared_bytes / READY_PART).min(capacity.adapter_bytes.saturating_sub(self.used_bytes));
        let wanted = (READY_ADAPTERS * self.last_bytes).min(most);
        if wanted < self.last_bytes { 0 } else { wanted }
    }

    /// Takes `spare` blocks of the cache at most: free ones, then what nobody has used for longest, which may be adapters.
    fn make_ready(&mut self, ready_bytes: usize, spare: usize, backend: &mut dyn Backend, cache: &mut dyn KvBlocks) -> Result<(), BackendError> {
        let num_taken = cache.num_blocks() - cache.num_free();
        let most_moved = (READY_ADAPTERS_A_STEP * self.last_bytes).div_ceil(self.capacity.kv_block_bytes);
        let kept = (cache.num_blocks() - spare).max(num_taken.saturating_sub(most_moved));
        let fewest = cache.num_needed().max(self.capacity.min_blocks).max(kept);
        let num_left = |used_bytes: usize, capacity: &Capacity| capacity.blocks_beside(used_bytes + ready_bytes).max(fewest);
        while cache.num_blocks() - cache.num_free() > num_left(self.used_bytes, &self.capacity)
            && cache
                .oldest_use()
                .is_some_and(|used| self.evict_older(backend, self.policy, Keep::Recent, Some(used)) || cache.forget_oldest())
        {}
        self.shrink(num_left(self.used_bytes, &self.capacity), backend, cache)
    }

    fn shrink(&mut self, num_blocks: usize, backend: &mut dyn Backend, cache: &mut dyn KvBlocks) -> Result<(), BackendError> {
        if num_blocks < cache.num_blocks() {
            let moves = cache.shrink(num_blocks);
            backend.set_kv_blocks(num_blocks, &moves)?;
        }
        Ok(())
    }

    /// Bytes that neither adapters nor blocks have.
    fn free_bytes(&self, cache: &dyn KvBlocks) -> usize {
        let capacity = &self.capacity;
        let for_adapters = match capacity.is_shared() {
            true => capacity
                .adapter_bytes
                .min(capacity.shared_bytes - cache.num_blocks() * capacity.kv_block_bytes),
            false => capacity.adapter_bytes,
        };
        for_adapters.saturating_sub(self.used_bytes)
    }

    /// Replaces the set of pinned adapters. Unpinned ones stay until room is needed.
    pub fn set_pinned(&mut self, pinned: Vec<Arc<HostAdapter>>) {
        self.pinned = pinned;
    }

    /// See [`AdapterResidency::request`]. An adapter asked for since `begin_step` does not leave for one asked for after it.
    ///
    /// # Errors
    /// `Device`.
    pub fn request(&mut self, backend: &mut dyn Backend, adapter: &Arc<HostAdapter>, cache: &mut dyn KvBlocks) -> Result<Residency, BackendError> {
        let now = cache.tick();
        if let Some(entry) = self.entries.get_mut(&adapter.version) {
            entry.asked_in_pass = self.pass;
            entry.last_used = now;
            return Ok(if entry.ready {
                Residency::Ready(entry.adapter.clone())
            } else {
                Residency::Uploading
            });
        }
        let bytes = match self.bytes_of(backend, adapter) {
            Ok(bytes) => bytes,
            // This adapter can't be there, which is no fault of the device's.
            Err(BackendError::BadBatch(reason)) => return Ok(Residency::Impossible(reason)),
            Err(error) => return Err(error),
        };
        if let Some(reason) = self.never_fits(bytes) {
            return Ok(Residency::Impossible(reason));
        }
        if !self.make_room(backend, bytes, cache)? {
            return Ok(Residency::NoRoom);
        }
        loop {
            let began = Instant::now();
            match backend.begin_upload(adapter) {
                Ok(handle) => {
                    let version = adapter.version;
                    let resident = Arc::new(ResidentAdapter { version, handle });
                    let ready = self.insert(backend, resident.clone(), bytes, (began, now))?;
                    return Ok(if ready { Residency::Ready(resident) } else { Residency::Uploading });
                }
                // There will be one free run when those on their way have arrived.
                Err(BackendError::OutOfMemory { .. }) if self.is_uploading() => return Ok(Residency::NoRoom),
                // The backend's own measure of what fits may be stricter than the sum of the bytes.
                Err(BackendError::OutOfMemory { .. }) if self.evict_older(backend, self.policy, Keep::Asked, None) => {}
                Err(error @ BackendError::OutOfMemory { .. }) if self.entries.is_empty() => return Ok(Residency::Impossible(error.to_string())),
                Err(BackendError::OutOfMemory { .. }) => return Ok(Residency::NoRoom),
                Err(BackendError::BadBatch(reason)) => return Ok(Residency::Impossible(reason)),
                Err(error) => return Err(error),
            }
        }
    }

    /// See [`AdapterResidency::prefetch`].
    ///
    /// # Errors
    /// `Device`.
    pub fn prefetch(
        &mut self,
        backend: &mut dyn Backend,
        adapter: &Arc<HostAdapter>,
        cache: &mut dyn KvBlocks,
    ) -> Result<Option<bool>, BackendError> {
        if let Some(entry) = self.entries.get(&adapter.version) {
            return Ok(Some(entry.ready));
        }
        let num_uploading = self.entries.values().filter(|entry| !entry.ready).count();
        if num_uploading >= self.capacity.max_adapters_per_batch {
            return Ok(None);
        }
        let begun = self.bytes_of(backend, adapter).and_then(|bytes| {
            let fits = bytes <= self.free_bytes(cache) && self.never_fits(bytes).is_none();
            fits.then(|| Ok((bytes, Instant::now(), backend.begin_upload(adapter)?))).transpose()
        });
        let (bytes, began, handle) = match begun {
            Ok(Some(begun)) => begun,
            // The request hears why when its turn comes.
            Ok(None) | Err(BackendError::OutOfMemory { .. } | BackendError::BadBatch(_)) => return Ok(None),
            Err(error) => return Err(error),
        };
        let version = adapter.version;
        let resident = Arc::new(ResidentAdapter { version, handle });
        self.insert(backend, resident, bytes, (began, cache.tick())).map(Some)
    }

    fn bytes_of(&mut self, backend: &dyn Backend, adapter: &HostAdapter) -> Result<usize, BackendError> {
        if let Some(bytes) = self.sizes.get(&adapter.version) {
            return Ok(*bytes);
        }
        let bytes = backend.adapter_bytes(adapter)?;
        if self.sizes.len() >= MAX_SIZES {
            self.sizes.clear();
        }
        self.sizes.insert(adapter.version, bytes);
        Ok(bytes)
    }

    /// Notes an upload that has begun. Whether it is done already.
    fn insert(
        &mut self,
        backend: &mut dyn Backend,
        adapter: Arc<ResidentAdapter>,
        bytes: usize,
        (began, now): (Instant, u64),
    ) -> Result<bool, BackendError> {
        let ready = backend.poll_upload(adapter.handle)?;
        self.used_bytes += bytes;
        self.last_bytes = bytes;
        self.uploads += 1;
        if ready {
            self.upload_seconds.observe(began.elapsed().as_secs_f64());
            self.residents.insert(adapter.version);
        }
        let entry = Entry {
            bytes,
            began,
            ready,
            uploaded_at: now,
            last_used: now,
            asked_in_pass: self.pass,
            adapter: adapter.clone(),
        };
        let replaced = self.entries.insert(adapter.version, entry);
        assert!(replaced.is_none(), "one copy of a version");
        Ok(ready)
    }

    fn never_fits(&self, bytes: usize) -> Option<String> {
        let is_pinned = |version: VersionId| self.pinned.iter().any(|pinned| pinned.version == version);
        let pinned_bytes: usize = self
            .entries
            .iter()
            .filter(|(version, _)| is_pinned(**version))
            .map(|(_, entry)| entry.bytes)
            .sum();
        (pinned_bytes + bytes > self.capacity.adapter_bytes).then(|| {
            format!(
                "needs {bytes} bytes on the device; {} bytes are for adapters, pinned ones take {pinned_bytes} of them",
                self.capacity.adapter_bytes
            )
        })
    }

    /// Makes `bytes` free: of free KV blocks, then of what nobody has used for longest; or does nothing when all of that is too little.
    fn make_room(&mut self, backend: &mut dyn Backend, bytes: usize, cache: &mut dyn KvBlocks) -> Result<bool, BackendError> {
        let fewest = cache.num_needed().max(self.capacity.min_blocks);
        let most_used = self.capacity.adapter_bytes.checked_sub(bytes);
        let num_blocks = cache.num_blocks();
        let fits = |used_bytes: usize, fewest: usize, capacity: &Capacity| {
            most_used.is_some_and(|most| used_bytes <= most) && capacity.blocks_beside(used_bytes + bytes) >= fewest.min(num_blocks)
        };
        if !fits(self.used_bytes - self.evictable_bytes(Keep::Asked), fewest, &self.capacity) {
            return Ok(false);
        }
        while !fits(self.used_bytes, fewest.max(num_blocks - cache.num_free()), &self.capacity) {
            // Blocks help as long as more than the fewest have something, and adapters may have more bytes.
            let is_helped_by_blocks = num_blocks - cache.num_free() > fewest && most_used.is_some_and(|most| self.used_bytes <= most);
            let oldest_prefix = if is_helped_by_blocks { cache.oldest_use() } else { None };
            let made = self.evict_older(backend, self.policy, Keep::Asked, oldest_prefix) || (oldest_prefix.is_some() && cache.forget_oldest());
            assert!(made, "what may leave is enough");
        }
        self.shrink(self.capacity.blocks_beside(self.used_bytes + bytes), backend, cache)?;
        Ok(true)
    }

    /// See [`AdapterResidency::make_blocks`].
    ///
    /// # Errors
    /// `Device`.
    pub fn make_blocks(
        &mut self,
        backend: &mut dyn Backend,
        missing: usize,
        whose: BlocksFor,
        cache: &mut dyn KvBlocks,
    ) -> Result<bool, BackendError> {
        let keep = match whose {
            BlocksFor::Running => Keep::Held,
            BlocksFor::Waiting => Keep::Asked,
        };
        let wanted = cache.num_blocks() + missing;
        if self.capacity.blocks_beside(self.used_bytes - self.evictable_bytes(keep)) < wanted {
            return Ok(false);
        }
        while self.capacity.blocks_beside(self.used_bytes) < wanted {
            assert!(self.evict_older(backend, EvictionPolicy::Lru, keep, None), "evictable bytes were counted");
        }
        self.give_free_bytes(0, backend, cache)?;
        Ok(cache.num_blocks() >= wanted)
    }

    /// Makes blocks of the bytes that no adapter has, all but `kept_bytes`.
    fn give_free_bytes(&mut self, kept_bytes: usize, backend: &mut dyn Backend, cache: &mut dyn KvBlocks) -> Result<(), BackendError> {
        let num_blocks = self.capacity.blocks_beside(self.used_bytes + kept_bytes);
        if num_blocks > cache.num_blocks() {
            cache.grow(backend.set_kv_blocks(num_blocks, &[])?);
        }
        Ok(())
    }

    fn evictable_bytes(&self, keep: Keep) -> usize {
        self.entries
            .values()
            .filter(|entry| self.may_leave(entry, keep))
            .map(|entry| entry.bytes)
            .sum()
    }

    /// Evicts the adapter that is to leave first, if it is older than the other, where there is another. False if none has left.
    fn evict_older(&mut self, backend: &mut dyn Backend, policy: EvictionPolicy, keep: Keep, other: Option<u64>) -> bool {
        let may_leave = self.entries.values().filter(|entry| self.may_leave(entry, keep));
        let victim = may_leave
            .min_by_key(|entry| entry.age(policy))
            .filter(|entry| other.is_none_or(|other| entry.age(policy).0 < other))
            .map(|entry| entry.adapter.version);
        let Some(version) = victim else { return false };
        let entry = self.entries.remove(&version).expect("it was just found");
        self.residents.evict(&version);
        backend.free_adapter(entry.adapter.handle);
        self.used_bytes -= entry.bytes;
        self.evictions += 1;
        true
    }

    fn may_leave(&self, entry: &Entry, keep: Keep) -> bool {
        let is_pinned = self.pinned.iter().any(|pinned| pinned.version == entry.adapter.version);
        let is_kept = match keep {
            Keep::Held => false,
            Keep::Asked => entry.asked_in_pass == self.pass,
            Keep::Recent => entry.asked_in_pass + 1 >= self.pass,
        };
        entry.ready && !entry.is_held() && !is_pinned && !is_kept
    }
}

/// Which adapters never leave, besides pinned ones.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    /// Those that are in use.
    Held,
    /// Those, and the ones that were asked for in this pass.
    Asked,
    /// Those, and the ones that were asked for in the last: requests that wait ask for them again when this one has begun.
    Recent,
}

impl Drop for DeviceResidency {
    fn drop(&mut self) {
        self.entries.keys().for_each(|version| self.residents.remove(version));
    }
}

/// A [`DeviceResidency`] with its backend, for the length of one scheduling pass.
pub struct BackendResidency<'a> {
    /// Who is there.
    pub residency: &'a mut DeviceResidency,
    /// The device.
    pub backend: &'a mut dyn Backend,
}

impl AdapterResidency for BackendResidency<'_> {
    fn request(&mut self, adapter: &Arc<HostAdapter>, cache: &mut dyn KvBlocks) -> Result<Residency, BackendError> {
        self.residency.request(self.backend, adapter, cache)
    }

    fn prefetch(&mut self, adapter: &Arc<HostAdapter>, cache: &mut dyn KvBlocks) -> Result<Option<bool>, BackendError> {
        self.residency.prefetch(self.backend, adapter, cache)
    }

    fn make_blocks(&mut self, missing: usize, whose: BlocksFor, cache: &mut dyn KvBlocks) -> Result<bool, BackendError> {
        self.residency.make_blocks(self.backend, missing, whose, cache)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        block_pool::{BlockKey, BlockPool},
        testing::{FakeBackend, Rng, host_adapter},
    };

    /// A cache that nothing runs in.
    struct Cache(BlockPool);

    impl KvBlocks for Cache {
        fn num_blocks(&self) -> usize {
            self.0.num_blocks()
        }
        fn num_free(&self) -> usize {
            self.0.num_free()
        }
        fn num_cached(&self) -> usize {
            self.0.num_cached()
        }
        fn tick(&mut self) -> u64 {
            self.0.tick()
        }
        fn oldest_use(&self) -> Option<u64> {
            self.0.oldest_use()
        }
        fn forget_oldest(&mut self) -> bool {
            self.0.forget_oldest()
        }
        fn num_needed(&self) -> usize {
            self.0.num_used()
        }
        fn shrink(&mut self, num_blocks: usize) -> Vec<BlockMove> {
            self.0.shrink(num_blocks)
        }
        fn grow(&mut self, num_blocks: usize) {
            self.0.grow(num_blocks);
        }
    }

    /// Uses adapters and prefixes of one block at random. Whatever leaves for an adapter, or when a step begins, was used before all that stays.
    /// Gives back how many adapters and how many blocks left.
    fn random_uses(seed: u64) -> [usize; 2] {
        const NUM_BLOCKS: usize = 64;
        const BLOCK_BYTES: usize = 50;
        let mut rng = Rng(seed);
        let capacity = Capacity {
            num_blocks: NUM_BLOCKS,
            min_blocks: 1,
            block_size: 4,
            kv_block_bytes: BLOCK_BYTES,
            max_batch_tokens: 64,
            adapter_bytes: (NUM_BLOCKS - 1) * BLOCK_BYTES,
            shared_bytes: NUM_BLOCKS * BLOCK_BYTES,
            max_adapters_per_batch: 8,
        };
        let mut residency = DeviceResidency::new(capacity.clone(), EvictionPolicy::Lru, Arc::default());
        let mut backend = FakeBackend::new(capacity);
        let mut cache = Cache(BlockPool::new(NUM_BLOCKS));
        // All of them fit into what adapters may have: then only ages decide.
        let adapters: Vec<_> = (0..16).map(|number| host_adapter(number, 60 + 30 * rng.below(5))).collect();
        // When each was used last: adapters by version; of prefixes as many of the last as are cached.
        let mut adapters_used: BTreeMap<VersionId, usize> = BTreeMap::new();
        let mut prefixes_used: BTreeMap<u32, usize> = BTreeMap::new();
        let num_prefixes = 10 + rng.below(60);
        let prefers_adapters = rng.one_in(2);
        let mut left = [0, 0];
        for now in 0..400 {
            let adapter = &adapters[rng.below(16)];
            let uses_adapter = if prefers_adapters { !rng.one_in(3) } else { rng.one_in(3) };
            let cached_before = cache.num_cached();
            residency.begin_step(&mut backend, &mut cache).unwrap();
            if uses_adapter {
                adapters_used.insert(adapter.version, now);
                let answer = residency.request(&mut backend, adapter, &mut cache).unwrap();
                assert!(matches!(answer, Residency::Ready(_)), "{answer:?}");
            }
            let resident = backend.resident_versions();
            let mut prefixes: Vec<usize> = prefixes_used.values().copied().collect();
            prefixes.sort_unstable();
            let forgotten = prefixes.len() - cached_before..prefixes.len() - cache.num_cached();
            let left_now = adapters_used
                .iter()
                .filter(|(version, _)| !resident.contains(version))
                .map(|(_, used)| *used);
            let last_lost = left_now.chain(prefixes[forgotten.clone()].iter().copied()).max();
            let stay = adapters_used
                .iter()
                .filter(|(version, _)| resident.contains(version))
                .map(|(_, used)| *used);
            let first_kept = stay.chain(prefixes[forgotten.end..].iter().copied()).min();
            if let (Some(lost), Some(kept)) = (last_lost, first_kept) {
                assert!(lost < kept, "what was used at {lost} has gone at {now}, and not what was used at {kept}");
            }
            left[0] += adapters_used.len();
            adapters_used.retain(|version, _| resident.contains(version));
            left[0] -= adapters_used.len();
            left[1] += forgotten.len();
            prefixes_used.retain(|_, used| prefixes[forgotten.end..].contains(used));
            if !uses_adapter {
                // The pool itself takes the oldest block when none is free: that is no choice of this module's.
                let number = rng.below(num_prefixes) as u32;
                let key = BlockKey::root(None).child(&[number]);
                let block_id = cache.0.try_share(&key).or_else(|| cache.0.try_allocate()).expect("nothing is in use");
                cache.0.publish(block_id, key);
                cache.0.release(block_id);
                prefixes_used.insert(number, now);
                let mut used: Vec<usize> = prefixes_used.values().copied().collect();
                used.sort_unstable();
                let first = used[used.len() - cache.num_cached()];
                prefixes_used.retain(|_, used| *used >= first);
            }
            cache.0.assert_consistent();
            assert_eq!(cache.num_blocks(), backend.num_blocks);
            assert!(cache.num_blocks() * BLOCK_BYTES + residency.used_bytes() <= NUM_BLOCKS * BLOCK_BYTES);
        }
        left
    }

    #[test]
    fn the_policy_says_who_leaves_the_device_and_pinned_ones_do_not() {
        for (policy, gone, other) in [(EvictionPolicy::Lru, 1, 0), (EvictionPolicy::Fifo, 0, 1)] {
            for (pinned, gone) in [(None, gone), (Some(gone), other)] {
                let capacity = Capacity {
                    num_blocks: 4,
                    min_blocks: 4,
                    block_size: 4,
                    kv_block_bytes: 50,
                    max_batch_tokens: 64,
                    adapter_bytes: 200,
                    shared_bytes: 0,
                    max_adapters_per_batch: 8,
                };
                let mut residency = DeviceResidency::new(capacity.clone(), policy, Arc::default());
                let (mut backend, mut cache) = (FakeBackend::new(capacity), Cache(BlockPool::new(4)));
                let adapters: Vec<_> = (0..3).map(|number| host_adapter(number, 100)).collect();
                residency.set_pinned(pinned.map(|number: usize| adapters[number].clone()).into_iter().collect());
                // Room for two. Pinned ones are there before they are asked for, so that the first is asked for first in any case.
                let mut ask = |number: usize| {
                    let answer = residency.request(&mut backend, &adapters[number], &mut cache).unwrap();
                    assert!(matches!(answer, Residency::Ready(_)), "{answer:?}");
                    drop(answer);
                    residency.begin_step(&mut backend, &mut cache).unwrap();
                };
                [0, 1, 0, 2].into_iter().for_each(&mut ask);
                let mut left = adapters.iter().filter(|adapter| !backend.resident_versions().contains(&adapter.version));
                assert_eq!(
                    left.next().map(|adapter| adapter.version),
                    Some(adapters[gone].version),
                    "{policy:?}, {pinned:?} is pinned"
                );
                assert!(left.next().is_none());
            }
        }
    }

    #[test]
    fn what_leaves_was_used_before_all_that_stays() {
        let mut left = [0, 0];
        for seed in 0..100 {
            let [adapters, blocks] = std::panic::catch_unwind(|| random_uses(seed)).unwrap_or_else(|panic| {
                eprintln!("failed with seed {seed}");
                std::panic::resume_unwind(panic)
            });
            left = [left[0] + adapters, left[1] + blocks];
        }
        assert!(left[0] > 100 && left[1] > 100, "{} adapters and {} blocks have left", left[0], left[1]);
    }
}
