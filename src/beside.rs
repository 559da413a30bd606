//! Work that takes long enough to hold up others: it is done beside the threads that serve connections and streams.
//!
//! Those threads answer many requests in turn, so nothing on one may compute for more than about a millisecond. What does (a large body, many
//! texts, another's chat template) gets a thread of its own, for as long as there are [turns](TURNS): the engine needs the cores, too. One text
//! alone is tokenized without a turn, on a thread of the runtime's that may block.

use std::{num::NonZero, sync::LazyLock};

use tokio::{
    runtime::{Handle, RuntimeFlavor},
    sync::Semaphore,
};

/// Bodies up to this size are read, rendered and tokenized where they came: that takes less time than to hand them over would.
pub const LARGE_BYTES: usize = 64 << 10;

/// How many work beside at once.
static TURNS: LazyLock<Semaphore> = LazyLock::new(|| Semaphore::new(std::thread::available_parallelism().map_or(1, NonZero::get).max(2)));

/// Does `work` beside the thread's other tasks if it is `slow`, else right here.
pub async fn beside_if<T>(slow: bool, work: impl FnOnce() -> T) -> T {
    if slow { beside(work).await } else { work() }
}

/// Does `work` beside the thread's other tasks, when it is its turn.
pub async fn beside<T>(work: impl FnOnce() -> T) -> T {
    let _turn = TURNS.acquire().await.expect("nobody closes it");
    blocking(work)
}

/// Does `work`, which may take long, here, while another thread takes this one's other tasks over.
pub fn blocking<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        // A runtime of one thread (of tests) has nobody to take over; without one there is nothing to be taken.
        _ => work(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{sync::mpsc, time::Duration};

    use super::*;

    /// Long enough for any machine.
    pub const PATIENCE: Duration = Duration::from_secs(120);

    /// What is beside a task of this runtime is on another thread than its only one.
    pub fn one_worker() -> tokio::runtime::Runtime {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(1).enable_all().build().unwrap()
    }

    #[test]
    fn what_is_slow_holds_up_no_other_task_of_its_thread() {
        let runtime = one_worker();
        let (begun, has_begun) = mpsc::channel();
        let (served, is_served) = mpsc::channel();
        let slow = runtime.spawn(beside(move || {
            begun.send(()).unwrap();
            // Ends when the other task was served, which is on the same, only thread.
            is_served.recv_timeout(PATIENCE)
        }));
        has_begun.recv_timeout(PATIENCE).unwrap();
        runtime.spawn(async move { served.send("another") });
        assert_eq!(runtime.block_on(slow).unwrap(), Ok("another"));
    }

    #[tokio::test]
    async fn on_a_runtime_of_one_thread_it_is_done_at_once() {
        assert_eq!(beside_if(true, || 1).await + beside_if(false, || 2).await, 3);
    }
}
