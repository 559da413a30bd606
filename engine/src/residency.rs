//! [`DeviceResidency`]: which adapters are on the device.
//!
//! Bounded by bytes, each adapter at its own rank. An adapter that a running sequence or a step in flight holds, or that is pinned,
//! never leaves. Uploads are begun here and polled; nothing waits for one.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use crate::{
    adapter::{HostAdapter, VersionId, registry::ResidentSet},
    backend::{Backend, BackendError},
    batch::AdapterHandle,
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
    /// Asks for an adapter to be usable, and begins to make it so.
    ///
    /// # Errors
    /// `Device`: the engine is done.
    fn request(&mut self, adapter: &Arc<HostAdapter>) -> Result<Residency, BackendError>;
}

struct Entry {
    adapter: Arc<ResidentAdapter>,
    bytes: usize,
    /// When its upload began.
    began: Instant,
    ready: bool,
    uploaded_at: u64,
    last_used: u64,
    asked_in_pass: u64,
}

/// The adapters on one backend. See the module.
pub struct DeviceResidency {
    capacity_bytes: usize,
    policy: EvictionPolicy,
    entries: BTreeMap<VersionId, Entry>,
    pinned: Vec<Arc<HostAdapter>>,
    used_bytes: usize,
    clock: u64,
    pass: u64,
    evictions: u64,
    uploads: u64,
    upload_seconds: Histogram,
    residents: Arc<ResidentSet>,
}

impl DeviceResidency {
    /// Nothing resident. `residents` is told which versions are usable.
    pub fn new(capacity_bytes: usize, policy: EvictionPolicy, residents: Arc<ResidentSet>) -> Self {
        Self {
            capacity_bytes,
            policy,
            residents,
            entries: BTreeMap::new(),
            pinned: Vec::new(),
            used_bytes: 0,
            clock: 0,
            pass: 0,
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
        self.capacity_bytes
    }

    /// Adapters that left for others.
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

    /// Begins a step: polls uploads, and uploads pinned adapters that are not there.
    ///
    /// # Errors
    /// `Device`.
    pub fn begin_step(&mut self, backend: &mut dyn Backend) -> Result<(), BackendError> {
        self.pass += 1;
        for entry in self.entries.values_mut().filter(|entry| !entry.ready) {
            entry.ready = backend.poll_upload(entry.adapter.handle)?;
            if entry.ready {
                self.upload_seconds.observe(entry.began.elapsed().as_secs_f64());
                self.residents.insert(entry.adapter.version);
            }
        }
        for pinned_idx in 0..self.pinned.len() {
            let adapter = self.pinned[pinned_idx].clone();
            if !self.entries.contains_key(&adapter.version) {
                self.request(backend, &adapter)?;
            }
        }
        Ok(())
    }

    /// Replaces the set of pinned adapters. Unpinned ones stay until room is needed.
    pub fn set_pinned(&mut self, pinned: Vec<Arc<HostAdapter>>) {
        self.pinned = pinned;
    }

    /// See [`AdapterResidency::request`]. An adapter asked for since `begin_step` does not leave for one asked for after it.
    ///
    /// # Errors
    /// `Device`.
    pub fn request(&mut self, backend: &mut dyn Backend, adapter: &Arc<HostAdapter>) -> Result<Residency, BackendError> {
        self.clock += 1;
        if let Some(entry) = self.entries.get_mut(&adapter.version) {
            entry.asked_in_pass = self.pass;
            entry.last_used = self.clock;
            return Ok(if entry.ready {
                Residency::Ready(entry.adapter.clone())
            } else {
                Residency::Uploading
            });
        }
        if let Some(reason) = self.never_fits(adapter) {
            return Ok(Residency::Impossible(reason));
        }
        if !self.make_room(backend, adapter.bytes()) {
            return Ok(Residency::NoRoom);
        }
        loop {
            let began = Instant::now();
            match backend.begin_upload(adapter) {
                Ok(handle) => {
                    let ready = backend.poll_upload(handle)?;
                    let resident = Arc::new(ResidentAdapter {
                        version: adapter.version,
                        handle,
                    });
                    self.insert(resident.clone(), adapter.bytes(), began, ready);
                    return Ok(if ready { Residency::Ready(resident) } else { Residency::Uploading });
                }
                // The backend's own measure of what fits may be stricter than the sum of the bytes.
                Err(BackendError::OutOfMemory { .. }) if self.evict_one(backend) => {}
                Err(error @ BackendError::OutOfMemory { .. }) if self.entries.is_empty() => return Ok(Residency::Impossible(error.to_string())),
                Err(BackendError::OutOfMemory { .. }) => return Ok(Residency::NoRoom),
                // Nothing was begun: this adapter can't be there, which is no fault of the device's.
                Err(BackendError::BadBatch(reason)) => return Ok(Residency::Impossible(reason)),
                Err(error) => return Err(error),
            }
        }
    }

    fn insert(&mut self, adapter: Arc<ResidentAdapter>, bytes: usize, began: Instant, ready: bool) {
        self.used_bytes += bytes;
        self.uploads += 1;
        if ready {
            self.upload_seconds.observe(began.elapsed().as_secs_f64());
            self.residents.insert(adapter.version);
        }
        let entry = Entry {
            bytes,
            began,
            ready,
            uploaded_at: self.clock,
            last_used: self.clock,
            asked_in_pass: self.pass,
            adapter: adapter.clone(),
        };
        let replaced = self.entries.insert(adapter.version, entry);
        assert!(replaced.is_none(), "one copy of a version");
    }

    fn never_fits(&self, adapter: &HostAdapter) -> Option<String> {
        let is_pinned = |version: VersionId| self.pinned.iter().any(|pinned| pinned.version == version);
        let pinned_bytes: usize = self
            .entries
            .iter()
            .filter(|(version, _)| is_pinned(**version))
            .map(|(_, entry)| entry.bytes)
            .sum();
        (pinned_bytes + adapter.bytes() > self.capacity_bytes).then(|| {
            format!(
                "needs {} bytes on the device; {} bytes are for adapters, pinned ones take {pinned_bytes} of them",
                adapter.bytes(),
                self.capacity_bytes
            )
        })
    }

    /// Evicts until `bytes` are free, or nothing when that is not possible.
    fn make_room(&mut self, backend: &mut dyn Backend, bytes: usize) -> bool {
        let evictable: usize = self.entries.values().filter(|entry| self.may_leave(entry)).map(|entry| entry.bytes).sum();
        if self.used_bytes - evictable + bytes > self.capacity_bytes {
            return false;
        }
        while self.used_bytes + bytes > self.capacity_bytes {
            assert!(self.evict_one(backend), "evictable bytes were counted");
        }
        true
    }

    fn evict_one(&mut self, backend: &mut dyn Backend) -> bool {
        let victim = self
            .entries
            .values()
            .filter(|entry| self.may_leave(entry))
            .min_by_key(|entry| match self.policy {
                EvictionPolicy::Lru => entry.last_used,
                EvictionPolicy::Fifo => entry.uploaded_at,
            })
            .map(|entry| entry.adapter.version);
        let Some(version) = victim else { return false };
        let entry = self.entries.remove(&version).expect("it was just found");
        self.residents.evict(&version);
        backend.free_adapter(entry.adapter.handle);
        self.used_bytes -= entry.bytes;
        self.evictions += 1;
        true
    }

    fn may_leave(&self, entry: &Entry) -> bool {
        let is_held = Arc::strong_count(&entry.adapter) > 1;
        let is_pinned = self.pinned.iter().any(|pinned| pinned.version == entry.adapter.version);
        entry.ready && !is_held && !is_pinned && entry.asked_in_pass != self.pass
    }
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
    fn request(&mut self, adapter: &Arc<HostAdapter>) -> Result<Residency, BackendError> {
        self.residency.request(self.backend, adapter)
    }
}
