//! A fixed set of worker threads beside the caller, made for many short parallel sections in a row.
//!
//! A step of a small model has hundreds of sections of 20 to 200 µs. So a worker that has nothing to do first watches the job word for a
//! short while and only then parks; and the caller never waits for a worker that has not begun: on a machine with more threads than
//! cores a descheduled worker costs its share of the speed, not a time slice per section.

use std::any::Any;
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::buffer::{AlignedBuffer, Arena, Region};

/// How long an idle worker watches for the next section before it parks: longer than the serial parts between two sections.
const SPIN: Duration = Duration::from_micros(60);

/// Job word: bit 31 says that workers may join, the bits below count those that have, the upper half is the job's number.
const OPEN: u64 = 1 << 31;
const JOINED: u64 = OPEN - 1;

type Task = dyn Fn(usize) + Sync;

/// Fixed worker threads and the caller. Owned by whoever computes; no global state.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Set while a section runs: a second caller, or a task that calls back, runs its section alone.
    busy: AtomicBool,
    /// Reused by the kernels between calls.
    scratch: Mutex<AlignedBuffer>,
    /// Where packed matrices lie.
    arena: Mutex<Arena>,
}

struct Shared {
    job_word: AtomicU64,
    /// Written by the caller while the word is closed and nobody is joined; read by workers that have joined.
    job: UnsafeCell<Option<Job>>,
    next_task: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    parked: Vec<AtomicBool>,
    shutdown: AtomicBool,
}

#[derive(Clone, Copy)]
struct Job {
    /// Borrowed from the caller of `run`, which doesn't return while a worker is joined.
    task: *const Task,
    num_tasks: usize,
}

// SAFETY: `job` is written only by the one caller that holds `busy`, while the word is closed with nobody joined, and published by the
// release store of the word; the task behind the pointer is `Sync`. Everything else is atomic or locked.
unsafe impl Sync for Shared {}
// SAFETY: as above; the raw pointer is only dereferenced by workers that have joined, during the call that set it.
unsafe impl Send for Shared {}

impl ThreadPool {
    /// A pool that computes on `num_threads` threads, the caller counted: it starts `num_threads - 1`.
    ///
    /// Panics if `num_threads` is 0 or a thread can't be started.
    pub fn new(num_threads: usize) -> Self {
        assert!(num_threads >= 1, "a pool needs at least the caller's thread");
        let num_workers = num_threads - 1;
        let shared = Arc::new(Shared {
            job_word: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            next_task: AtomicUsize::new(0),
            panic: Mutex::new(None),
            parked: (0..num_workers).map(|_| AtomicBool::new(false)).collect(),
            shutdown: AtomicBool::new(false),
        });
        let workers = (0..num_workers)
            .map(|worker_idx| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("cpu-kernel-{}", worker_idx + 1))
                    .spawn(move || shared.work(worker_idx))
                    .expect("the system can start a thread")
            })
            .collect();
        Self {
            shared,
            workers,
            busy: AtomicBool::new(false),
            scratch: Mutex::default(),
            arena: Mutex::default(),
        }
    }

    /// Threads that compute, the caller counted.
    pub fn num_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task` once with each of `0..num_tasks`, on all threads, and returns when all are done. Tasks are handed out in order.
    ///
    /// A panic in a task is raised again here, once every thread has left the section; tasks not yet begun are then skipped.
    /// Called from a task, or while another thread is in `run`, it runs its tasks on the calling thread.
    pub fn run(&self, num_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let alone = num_tasks <= 1 || self.workers.is_empty();
        if alone || self.busy.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            (0..num_tasks).for_each(task);
            return;
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. No worker holds the pointer after this call: it waits below until none is joined.
        let task: *const Task = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static Task>(task) };
        let job = Job { task, num_tasks };
        // SAFETY: `busy` is ours, so the word is closed and nobody is joined: no one else looks at `job`.
        unsafe { *shared.job.get() = Some(job) };
        shared.next_task.store(0, Ordering::Relaxed);
        let job_number = (shared.job_word.load(Ordering::Relaxed) >> 32).wrapping_add(1) & u64::from(u32::MAX);
        // SeqCst, as are a parking worker's two steps: either it sees the open word or we see it parked.
        shared.job_word.store(job_number << 32 | OPEN, Ordering::SeqCst);
        self.wake(num_tasks - 1);

        shared.run_tasks(job);

        shared.job_word.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0_u32;
        while shared.job_word.load(Ordering::Acquire) & JOINED != 0 {
            spins += 1;
            if spins.is_multiple_of(64) {
                std::thread::yield_now()
            } else {
                std::hint::spin_loop()
            }
        }
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.busy.store(false, Ordering::Release);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Cuts `out` into runs of whole rows of `row_len` and calls `task(first_row, rows)` on each, in parallel.
    /// A run has at least `min_rows` rows, so that little work stays on the calling thread.
    ///
    /// Panics if `out` isn't whole rows.
    pub fn for_rows<T: Send>(&self, out: &mut [T], row_len: usize, min_rows: usize, task: impl Fn(usize, &mut [T]) + Sync) {
        assert!(
            row_len > 0 && out.len().is_multiple_of(row_len),
            "{} elements are not whole rows of {row_len}",
            out.len()
        );
        let num_rows = out.len() / row_len;
        let num_runs = (num_rows / min_rows.max(1)).clamp(1, 2 * self.num_threads());
        if num_runs == 1 {
            task(0, out);
            return;
        }
        let out = DisjointMut::new(out);
        self.run(num_runs, &|run| {
            let (first_row, end_row) = (run * num_rows / num_runs, (run + 1) * num_rows / num_runs);
            // SAFETY: runs are disjoint row ranges.
            task(first_row, unsafe { out.slice(first_row * row_len, (end_row - first_row) * row_len) });
        });
    }

    /// Lends the pool's scratch memory; a fresh buffer if another thread has it.
    pub(super) fn with_scratch<R>(&self, f: impl FnOnce(&mut AlignedBuffer) -> R) -> R {
        match self.scratch.try_lock() {
            Ok(mut scratch) => f(&mut scratch),
            Err(std::sync::TryLockError::Poisoned(scratch)) => f(&mut scratch.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => f(&mut AlignedBuffer::default()),
        }
    }

    /// Zeroed memory for what stays, beside what was taken before.
    pub(super) fn take_memory(&self, bytes: usize) -> Region {
        self.arena.lock().unwrap_or_else(PoisonError::into_inner).take(bytes)
    }

    fn wake(&self, at_most: usize) {
        for (worker, parked) in self.workers.iter().zip(&self.shared.parked).take(at_most) {
            if parked.load(Ordering::SeqCst) && parked.swap(false, Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.shutdown.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches its tasks' panics, so it can't have panicked itself.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn work(&self, worker_idx: usize) {
        let mut done_number = 0;
        while let Some(word) = self.wait_for_job(worker_idx, done_number) {
            if self
                .job_word
                .compare_exchange(word, word + 1, Ordering::AcqRel, Ordering::Relaxed)
                .is_err()
            {
                continue;
            }
            done_number = word >> 32;
            // SAFETY: we are joined, so the caller that wrote `job` is still in `run` and doesn't write it.
            let job = unsafe { *self.job.get() };
            self.run_tasks(job.expect("an open word has a job"));
            self.job_word.fetch_sub(1, Ordering::Release);
        }
    }

    /// The open word of a job other than `done_number`, or `None` at shutdown.
    fn wait_for_job(&self, worker_idx: usize, done_number: u64) -> Option<u64> {
        let find = || {
            let word = self.job_word.load(Ordering::SeqCst);
            (word & OPEN != 0 && word >> 32 != done_number).then_some(word)
        };
        let mut idle_since = Instant::now();
        loop {
            for _ in 0..32 {
                if let Some(word) = find() {
                    return Some(word);
                }
                std::hint::spin_loop();
            }
            if self.shutdown.load(Ordering::SeqCst) {
                return None;
            }
            if idle_since.elapsed() < SPIN {
                // Whoever else wants this core gets it: it may be the caller.
                std::thread::yield_now();
                continue;
            }
            self.parked[worker_idx].store(true, Ordering::SeqCst);
            if find().is_none() && !self.shutdown.load(Ordering::SeqCst) {
                std::thread::park();
            }
            self.parked[worker_idx].store(false, Ordering::SeqCst);
            idle_since = Instant::now();
        }
    }

    fn run_tasks(&self, job: Job) {
        // SAFETY: the caller of `run` keeps the task alive until nobody is joined; it and joined workers are the only ones here.
        let task = unsafe { &*job.task };
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let task_idx = self.next_task.fetch_add(1, Ordering::Relaxed);
                if task_idx >= job.num_tasks {
                    break;
                }
                task(task_idx);
            }
        }));
        if let Err(panic) = result {
            self.next_task.store(job.num_tasks, Ordering::Relaxed);
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
    }
}

/// A slice of which the tasks of one section write disjoint parts.
pub(super) struct DisjointMut<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]` of which each thread takes other parts, as the contract of `slice` demands.
unsafe impl<T: Send> Sync for DisjointMut<'_, T> {}

impl<'a, T> DisjointMut<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            borrow: PhantomData,
        }
    }

    /// The part from `start`, `len` long. Panics if it isn't inside.
    ///
    /// # Safety
    /// No two parts that are alive at the same time may overlap.
    #[expect(clippy::mut_from_ref, reason = "the parts are disjoint by contract")]
    #[inline(always)]
    pub(super) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "a part must lie inside the slice");
        // SAFETY: inside by the check above; not aliased by the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_exactly_once() {
        for num_threads in [1, 2, 3, 8] {
            let pool = ThreadPool::new(num_threads);
            assert_eq!(pool.num_threads(), num_threads);
            for num_tasks in [0, 1, 2, 7, 100, 1000] {
                let counts: Vec<AtomicUsize> = (0..num_tasks).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..20 {
                    pool.run(num_tasks, &|task_idx| {
                        counts[task_idx].fetch_add(1, Ordering::Relaxed);
                    });
                }
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 20));
            }
        }
    }

    #[test]
    fn workers_wake_after_they_have_parked() {
        let pool = ThreadPool::new(2);
        for _ in 0..3 {
            while !pool.shared.parked[0].load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            // Two tasks that wait for each other: only two threads can finish them.
            let barrier = std::sync::Barrier::new(2);
            pool.run(2, &|_| {
                barrier.wait();
            });
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_survives() {
        let pool = ThreadPool::new(3);
        for panicking in [0, 5, 63] {
            let result = catch_unwind(AssertUnwindSafe(|| pool.run(64, &|task_idx| assert_ne!(task_idx, panicking))));
            assert!(result.is_err());
            let sum = AtomicUsize::new(0);
            pool.run(10, &|task_idx| {
                sum.fetch_add(task_idx, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 45);
        }
    }

    #[test]
    fn nested_and_concurrent_sections_finish() {
        let pool = ThreadPool::new(2);
        let count = AtomicUsize::new(0);
        let nested = || {
            for _ in 0..50 {
                pool.run(4, &|_| {
                    pool.run(3, &|_| {
                        count.fetch_add(1, Ordering::Relaxed);
                    })
                });
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(nested);
            }
        });
        assert_eq!(count.into_inner(), 3 * 50 * 12);
    }

    #[test]
    fn rows_are_cut_without_gap_or_overlap() {
        let pool = ThreadPool::new(3);
        for num_rows in [1, 2, 5, 64, 133] {
            let mut out = vec![0_usize; num_rows * 7];
            pool.for_rows(&mut out, 7, 2, |first_row, rows| {
                for (idx, value) in rows.iter_mut().enumerate() {
                    *value += first_row * 7 + idx + 1;
                }
            });
            assert!(out.iter().enumerate().all(|(idx, &value)| value == idx + 1));
        }
    }
}
