//! Locks the pages of adapters in host memory, so that the device copies from them by itself: on one thread, and with pauses while steps run.
//!
//! The driver takes a lock for it that every launch needs. On an H100's host, four threads that locked 84 MB each made a launch wait for up to
//! 4 ms (0.08 ms without them), one call for all of it for 19 ms, `cuMemHostAlloc` for as long as it took; and where the pages' memory had to be
//! fetched by the hypervisor first, ten times as long. So nobody waits for this: an adapter that is not locked yet is copied through a stage, and
//! the memory of one that left goes a little later than it is counted as gone (84 MB in 0.03 s beside steps), but before anything else is locked:
//! however many adapters wait to be locked, no more memory than of the one that is being locked is kept beside what is counted.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering::Relaxed},
        mpsc::{Receiver, Sender, channel},
    },
    time::Duration,
};

use polylora_kernels::{
    cpu::HugeBuffer,
    cuda::{CudaError, Device, RegisteredMemory},
};

use crate::adapter::{AlignedBytes, HoldMemory, HostAdapter, PackedDtype};

/// While steps run, the driver is let alone for so many times as long as it was held up.
const REST: u32 = 4;
/// Or for so long, if that is longer.
const SHORTEST_REST: Duration = Duration::from_micros(200);

enum Job {
    Lock(Weak<AlignedBytes>),
    Unlock(RegisteredMemory, HugeBuffer<u8>),
}

/// What is asked for, in the order in which it is done: what gives memory back first.
struct Jobs<J> {
    inbox: Receiver<J>,
    gives_back: fn(&J) -> bool,
    giving_back: VecDeque<J>,
    others: VecDeque<J>,
}

impl<J> Jobs<J> {
    fn new(inbox: Receiver<J>, gives_back: fn(&J) -> bool) -> Self {
        Self {
            inbox,
            gives_back,
            giving_back: VecDeque::new(),
            others: VecDeque::new(),
        }
    }

    /// Waits for one. `None`: nobody is left to ask for any.
    fn next(&mut self) -> Option<J> {
        for job in self.inbox.try_iter() {
            let queue = if (self.gives_back)(&job) {
                &mut self.giving_back
            } else {
                &mut self.others
            };
            queue.push_back(job);
        }
        let waiting = self.giving_back.pop_front().or_else(|| self.others.pop_front());
        waiting.or_else(|| self.inbox.recv().ok())
    }
}

/// Asks for pages to be locked.
#[derive(Clone)]
pub(super) struct PageLocker {
    jobs: Sender<(Job, PageLocker)>,
}

impl PageLocker {
    /// Starts the thread, which ends when nobody is left to ask it. `steps` are those in flight.
    pub fn new(device: &Arc<Device>, steps: &Arc<AtomicUsize>) -> Result<Self, CudaError> {
        let (jobs, inbox) = channel();
        let thread = Thread {
            device: device.clone(),
            steps: steps.clone(),
        };
        std::thread::Builder::new()
            .name("polylora-page-lock".into())
            .spawn(move || thread.run(Jobs::new(inbox, |(job, _)| matches!(job, Job::Unlock(..)))))
            .map_err(|error| CudaError::NoDevice(format!("no thread to lock pages: {error}")))?;
        Ok(Self { jobs })
    }

    /// Has an adapter's memory locked soon, for as long as the host keeps it; or not, where the system does not allow it. Of no use for f32, which
    /// has to be rounded on the way.
    pub fn ask(&self, host: &HostAdapter) {
        if host.dtype == PackedDtype::Bf16 && host.blob.is_held().is_none() {
            let job = Job::Lock(Arc::downgrade(&host.blob));
            // Without the thread, copies go through a stage.
            let _ = self.jobs.send((job, self.clone()));
        }
    }
}

struct Thread {
    device: Arc<Device>,
    steps: Arc<AtomicUsize>,
}

impl Thread {
    fn run(&self, mut jobs: Jobs<(Job, PageLocker)>) {
        while let Some((job, locker)) = jobs.next() {
            match job {
                Job::Unlock(registered, memory) => {
                    registered.release(|took| self.rest(took));
                    drop(memory);
                }
                Job::Lock(memory) => {
                    // It may have gone meanwhile.
                    if let Some(memory) = memory.upgrade() {
                        memory.hold_with(|bytes| self.lock(bytes, locker));
                    }
                }
            }
        }
    }

    fn lock(&self, memory: &[u8], locker: PageLocker) -> Option<Box<dyn HoldMemory>> {
        // SAFETY: `Locked` gives the memory up after the registration.
        match unsafe { RegisteredMemory::new(&self.device, memory, |took| self.rest(took)) } {
            Ok(registered) => Some(Box::new(Locked { registered, locker })),
            Err(error) => {
                tracing::debug!(%error, "an adapter's memory is not page-locked");
                None
            }
        }
    }

    fn rest(&self, took: Duration) {
        if self.steps.load(Relaxed) > 0 {
            std::thread::sleep(SHORTEST_REST.max(took * REST));
        }
    }
}

struct Locked {
    registered: RegisteredMemory,
    locker: PageLocker,
}

impl HoldMemory for Locked {
    fn release(self: Box<Self>, memory: HugeBuffer<u8>) {
        let Self { registered, locker } = *self;
        // Should the thread be gone, what comes back is dropped here, in this order.
        let _ = locker.jobs.send((Job::Unlock(registered, memory), locker.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_gives_memory_back_overtakes_what_takes_it() {
        let (sender, inbox) = channel();
        let mut jobs = Jobs::new(inbox, |job: &i32| *job < 0);
        let ask = |asked: &[i32]| asked.iter().for_each(|job| sender.send(*job).unwrap());
        ask(&[1, 2, -1, 3, -2]);
        assert_eq!([0; 3].map(|_| jobs.next()), [-1, -2, 1].map(Some));
        ask(&[4, -3]);
        assert_eq!([0; 4].map(|_| jobs.next()), [-3, 2, 3, 4].map(Some));
        ask(&[5]);
        drop(sender);
        assert_eq!([0; 2].map(|_| jobs.next()), [Some(5), None]);
    }
}
