//! [`MaskPool`]: constraints work out their masks on threads of their own, so that a slow grammar holds up its own request alone.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
};

use parking_lot::Mutex;

use crate::request::{Constraint, RequestId};

/// More threads than this were never busy at once in a batch of hundreds of constrained rows.
const MAX_THREADS: usize = 8;

/// A mask that is wanted.
pub(crate) struct MaskJob {
    pub request_id: RequestId,
    pub constraint: Box<dyn Constraint>,
    /// The token that was chosen last; `None` for a request's first mask.
    pub chosen: Option<u32>,
    /// Words of the mask: a bit for each token that the request may have.
    pub mask_words: usize,
    /// Comes back with the answer.
    pub round: u64,
}

/// What came of it.
pub(crate) struct MaskAnswer {
    pub request_id: RequestId,
    pub constraint: Box<dyn Constraint>,
    /// The mask for the next position; `None` when nothing may follow. The error is a sentence for the client.
    pub mask: Result<Option<Arc<[u32]>>, String>,
    pub round: u64,
}

/// Threads that work out masks; they start with the first job and end when the pool is dropped, a job in hand included.
pub(crate) struct MaskPool {
    answer: Arc<dyn Fn(MaskAnswer) + Send + Sync>,
    jobs: Option<Sender<MaskJob>>,
}

impl MaskPool {
    /// `answer` is called on the pool's threads.
    pub fn new(answer: impl Fn(MaskAnswer) + Send + Sync + 'static) -> Self {
        Self {
            answer: Arc::new(answer),
            jobs: None,
        }
    }

    /// Asks for a mask. It is worked out here and now if the system gives no thread.
    pub fn ask(&mut self, job: MaskJob) {
        let jobs = self.jobs.take().or_else(|| self.start());
        match &jobs {
            Some(sender) => {
                if let Err(refused) = sender.send(job) {
                    (self.answer)(work_out(refused.0));
                }
            }
            None => (self.answer)(work_out(job)),
        }
        self.jobs = jobs;
    }

    /// `None`: not one thread could be had.
    fn start(&self) -> Option<Sender<MaskJob>> {
        let (sender, receiver) = channel();
        let receiver = Arc::new(Mutex::new(receiver));
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let started = (0..cores.div_ceil(2).min(MAX_THREADS)).filter(|_| {
            let (receiver, answer) = (Arc::clone(&receiver), Arc::clone(&self.answer));
            let body = move || {
                while let Some(job) = next_job(&receiver) {
                    answer(work_out(job));
                }
            };
            std::thread::Builder::new().name("polylora-masks".to_owned()).spawn(body).is_ok()
        });
        (started.count() > 0).then_some(sender)
    }
}

fn next_job(receiver: &Mutex<Receiver<MaskJob>>) -> Option<MaskJob> {
    receiver.lock().recv().ok()
}

/// Commits the chosen token, if there is one, and fills the mask for the next position. A panic in a constraint is an error of its request.
fn work_out(job: MaskJob) -> MaskAnswer {
    let MaskJob {
        request_id,
        mut constraint,
        chosen,
        mask_words,
        round,
    } = job;
    let call = AssertUnwindSafe(|| {
        if let Some(token_id) = chosen {
            constraint.commit(token_id)?;
        }
        let mut mask = vec![u32::MAX; mask_words];
        let goes_on = constraint.fill_mask(&mut mask)?;
        Ok(goes_on.then(|| mask.into()))
    });
    let mask = catch_unwind(call).unwrap_or_else(|panic| Err(format!("it panicked: {}", panic_message(&*panic))));
    MaskAnswer {
        request_id,
        constraint,
        mask,
        round,
    }
}

/// What a panic said.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let owned = panic.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a message")
}
