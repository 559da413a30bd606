//! Host memory for adapters, page-locked so that the device copies from it by itself, and kept when an adapter leaves: the next one finds it locked.
//!
//! To lock pages the driver takes a lock that every launch needs, for as long as the system is busy with them, and that waits for whatever else changes
//! the process's memory. On an H100's host, four threads that locked 84 MB each made a launch wait for up to 4 ms (0.08 ms without them), one call for all
//! of it for 19 ms, `cuMemHostAlloc` for as long as it took; and where the hypervisor had to fetch the memory first, ten times as long. So one thread
//! locks, 2 MiB at a time, with pauses while steps run, a reserve of it before anybody asks; and not while an adapter is written to memory that has no
//! pages yet (then one part took up to 37 ms, and 0.25 ms else). Nobody waits for it: an adapter that is not locked yet is copied through a stage.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use polylora_kernels::cuda::{CudaError, Device, HostSlab};

use super::ledger::{Ledger, Run, Work};
use crate::adapter::{HostMemory, HostRun};

/// While steps run, the driver is let alone for so many times as long as it was held up.
const REST: u32 = 4;
/// Or for so long, if that is longer.
const SHORTEST_REST: Duration = Duration::from_micros(200);
/// Longer where nobody waits for what was done.
const RESERVE_REST: Duration = Duration::from_millis(2);

/// The memory, and the thread that locks it, which ends with this.
pub(super) struct LockedMemory {
    shared: Option<Arc<Shared>>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    slab: HostSlab,
    book: Mutex<Book>,
    /// There is work, or the end.
    changed: Condvar,
    steps: Arc<AtomicUsize>,
}

struct Book {
    ledger: Ledger,
    is_ending: bool,
}

impl LockedMemory {
    /// At most `bytes`, which are address space until they are used; about `reserve_bytes` of it are kept locked for adapters to come. `steps` are
    /// those in flight. Without address space there is no such memory.
    pub fn new(device: &Arc<Device>, bytes: usize, reserve_bytes: usize, steps: &Arc<AtomicUsize>) -> Result<Self, CudaError> {
        let num_parts = bytes / HostSlab::PART;
        if num_parts == 0 {
            return Ok(Self { shared: None, thread: None });
        }
        let slab = match HostSlab::new(device, num_parts) {
            Ok(slab) => slab,
            Err(error) => {
                tracing::warn!(%error, bytes, "adapters' host memory is not page-locked: no address space");
                return Ok(Self { shared: None, thread: None });
            }
        };
        let shared = Arc::new(Shared {
            slab,
            book: Mutex::new(Book {
                ledger: Ledger::new(num_parts, HostSlab::PART, reserve_bytes),
                is_ending: false,
            }),
            changed: Condvar::new(),
            steps: steps.clone(),
        });
        let own = shared.clone();
        let thread = std::thread::Builder::new()
            .name("polylora-page-lock".into())
            .spawn(move || own.keep_locked())
            .map_err(|error| CudaError::NoDevice(format!("no thread to lock pages: {error}")))?;
        Ok(Self {
            shared: Some(shared),
            thread: Some(thread),
        })
    }

    /// Where adapters are to lie.
    pub fn memory(&self) -> Option<Arc<dyn HostMemory>> {
        self.shared.clone().map(|shared| Arc::new(Pool(shared)) as _)
    }
}

impl Drop for LockedMemory {
    fn drop(&mut self) {
        if let Some(shared) = &self.shared {
            shared.book.lock().is_ending = true;
            shared.changed.notify_one();
        }
        if let Some(thread) = self.thread.take() {
            // One that panicked has nothing left to give.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn keep_locked(&self) {
        loop {
            let work = {
                let mut book = self.book.lock();
                loop {
                    if book.is_ending {
                        return;
                    }
                    match book.ledger.next_work() {
                        Some(work) => break work,
                        None => self.changed.wait(&mut book),
                    }
                }
            };
            let (took, rest) = match work {
                Work::Lock(part) => (self.lock(part), SHORTEST_REST),
                Work::Reserve(part) => {
                    // Before the driver is: the pages may take long.
                    self.slab.populate(part);
                    (self.lock(part), RESERVE_REST)
                }
                Work::Discard(part, run) => {
                    let begin = Instant::now();
                    // SAFETY: no run but this one has bytes of the part, and the ledger gives them to nobody while it has.
                    unsafe { self.slab.discard(part) };
                    let took = begin.elapsed();
                    self.book.lock().ledger.discarded(&run);
                    (took, SHORTEST_REST)
                }
            };
            if self.steps.load(Relaxed) > 0 {
                std::thread::sleep(rest.max(took * REST));
            }
        }
    }

    fn lock(&self, part: usize) -> Duration {
        let begin = Instant::now();
        let result = self.slab.lock(part);
        let took = begin.elapsed();
        let mut book = self.book.lock();
        match result {
            Ok(()) => book.ledger.locked(part),
            Err(error) => {
                tracing::warn!(%error, "adapters' host memory is not page-locked from here on");
                book.ledger.cannot_lock(part);
            }
        }
        took
    }

    fn change(&self, change: impl FnOnce(&mut Ledger)) {
        change(&mut self.book.lock().ledger);
        self.changed.notify_one();
    }
}

struct Pool(Arc<Shared>);

impl HostMemory for Pool {
    fn take(&self, bytes: usize) -> Option<Box<dyn HostRun>> {
        let run = self.0.book.lock().ledger.allocate(bytes)?;
        self.0.changed.notify_one();
        Some(Box::new(Taken {
            run,
            bytes,
            shared: self.0.clone(),
        }))
    }
}

struct Taken {
    run: Run,
    /// Those asked for.
    bytes: usize,
    shared: Arc<Shared>,
}

impl Taken {
    fn start(&self) -> *mut u8 {
        self.shared.slab.start().as_ptr().wrapping_add(self.run.offset)
    }
}

impl HostRun for Taken {
    fn bytes(&self) -> &[u8] {
        // SAFETY: inside the slab, zeros or what was written to it, and this run's alone until it is freed; shared as `&self` is.
        unsafe { std::slice::from_raw_parts(self.start(), self.bytes) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.bytes) }
    }

    fn filled(&mut self) {
        let run = &mut self.run;
        self.shared.change(|ledger| ledger.filled(run));
    }

    fn is_locked(&self) -> bool {
        self.shared.slab.is_locked(&(self.run.offset..self.run.offset + self.run.bytes))
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let run = &mut self.run;
        self.shared.change(|ledger| ledger.free(run));
    }
}
