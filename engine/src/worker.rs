//! The engine thread: admit, schedule, launch, commit.
//!
//! Over a backend that runs steps beside the host, step n + 1 is scheduled and launched while n runs, and n's output is read afterwards: a
//! sequence that ended in n has had one row too many. Over one that does not, each step is committed before the next is scheduled.
//!
//! It owns the backend, the scheduler and every request's end of its event channel. It sleeps when there is nothing to do. When the
//! device fails, or the thread panics, every request ends with one `Failed(Engine)` and the engine is unhealthy for good.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst},
        mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::{mpsc::UnboundedSender, oneshot, watch};

use crate::{
    EngineStats, Histogram,
    adapter::{AdapterLease, registry::AdapterRegistry},
    backend::{Backend, BackendError, Launched},
    batch::StepOutput,
    masks::{MaskAnswer, MaskJob, MaskPool, panic_message},
    request::{FinishReason, GenerationRequest, RequestError, RequestId, TokenEvent},
    residency::{BackendResidency, DeviceResidency},
    scheduler::{Schedule, ScheduledStep, Scheduler},
    sequence::Sequence,
    stages::Stages,
    stats::{AdapterCounters, AdapterTable, LOAD_SECONDS_BOUNDS},
};

/// How often an upload is looked at while nothing else can run.
const UPLOAD_POLL_INTERVAL: Duration = Duration::from_micros(100);

/// Between two looks at a step that runs, about a microsecond: nothing else is to be done, and its end is to be seen at once.
const SPINS_BETWEEN_POLLS: usize = 16;

/// How long a step waits for masks that were asked for since the last one. Most grammars take a tenth of it, so that a constrained
/// sequence is in every step; one that takes longer sits steps out, and nobody waits for it again.
const MASK_PATIENCE: Duration = Duration::from_micros(500);

const STEP_SECONDS_BOUNDS: &[f64] = &[0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];
const STEP_ROWS_BOUNDS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0];
const QUEUE_SECONDS_BOUNDS: &[f64] = &[0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// What the engine thread is told.
pub(crate) enum Command {
    Submit(Box<NewRequest>),
    /// Something outside changed: pins.
    Wake,
    /// A constraint's mask is there.
    Mask(MaskAnswer),
    FlushCache(oneshot::Sender<bool>),
    AbortAll,
    /// Ends the requests whose adapter was unloaded by force.
    EndRevoked,
    Shutdown {
        deadline: Option<Instant>,
        done: oneshot::Sender<()>,
    },
}

/// A request on its way to the engine thread.
pub(crate) struct NewRequest {
    pub request_id: RequestId,
    pub request: GenerationRequest,
    pub events: EventSender,
    pub permit: Permit,
    pub stages: Arc<Stages>,
}

/// What the engine thread and the callers' threads both see. No lock here is held for longer than a pointer is copied.
pub(crate) struct Shared {
    pub accepting: AtomicBool,
    pub in_flight: AtomicUsize,
    /// Why the engine is done for good; `None` while it is well.
    pub failure: watch::Sender<Option<String>>,
    pub stats: Mutex<Arc<EngineStats>>,
    pub adapters: AdapterTable,
}

impl Shared {
    pub fn new() -> Self {
        Self {
            accepting: AtomicBool::new(true),
            in_flight: AtomicUsize::new(0),
            failure: watch::Sender::new(None),
            stats: Mutex::default(),
            adapters: AdapterTable::default(),
        }
    }
}

/// One request's place among those that may be in the engine at once.
pub(crate) struct Permit(Arc<Shared>);

impl Permit {
    /// `Err`: how many there are already.
    pub fn try_take(shared: &Arc<Shared>, limit: usize) -> Result<Self, usize> {
        shared
            .in_flight
            .fetch_update(SeqCst, SeqCst, |in_flight| (in_flight < limit).then_some(in_flight + 1))
            .map(|_| Self(shared.clone()))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, SeqCst);
    }
}

/// The engine's end of one request's events. However it goes away, exactly one terminal event was sent.
pub(crate) struct EventSender {
    sender: UnboundedSender<TokenEvent>,
    ended: bool,
}

impl EventSender {
    pub fn new(sender: UnboundedSender<TokenEvent>) -> Self {
        Self { sender, ended: false }
    }

    fn end(mut self, event: TokenEvent) {
        assert!(event.is_terminal(), "a request ends with a terminal event");
        self.ended = true;
        // Nobody listening is no error.
        self.sender.send(event).ok();
    }
}

impl Drop for EventSender {
    fn drop(&mut self) {
        if !self.ended {
            self.sender.send(TokenEvent::Failed(RequestError::ShuttingDown)).ok();
        }
    }
}

/// An event that is sent once the step's statistics are published.
enum Outgoing {
    Event(UnboundedSender<TokenEvent>, TokenEvent),
    End(EventSender, TokenEvent),
}

/// A request that the scheduler has a sequence of.
struct ActiveRequest {
    events: EventSender,
    stages: Arc<Stages>,
    prompt_len: usize,
    gauge: Option<AdapterGauge>,
    _permit: Permit,
}

/// One request's part of its adapter's gauges.
struct AdapterGauge {
    counters: Arc<AdapterCounters>,
    runs: bool,
}

impl AdapterGauge {
    fn new(counters: Arc<AdapterCounters>) -> Self {
        counters.requests.fetch_add(1, Relaxed);
        counters.waiting.fetch_add(1, Relaxed);
        Self { counters, runs: false }
    }

    fn set_runs(&mut self, runs: bool) {
        self.current().fetch_sub(1, Relaxed);
        self.runs = runs;
        self.current().fetch_add(1, Relaxed);
    }

    fn current(&self) -> &AtomicU64 {
        if self.runs { &self.counters.running } else { &self.counters.waiting }
    }
}

impl Drop for AdapterGauge {
    fn drop(&mut self) {
        self.current().fetch_sub(1, Relaxed);
    }
}

/// Asked to stop: at the deadline, or when no request is left.
struct Drain {
    deadline: Option<Instant>,
    done: oneshot::Sender<()>,
}

/// A step that the backend runs.
struct InFlight {
    step: ScheduledStep,
    launched: Instant,
}

/// The engine thread's state.
pub(crate) struct Worker {
    backend: Box<dyn Backend>,
    scheduler: Scheduler,
    residency: DeviceResidency,
    inbox: Receiver<Command>,
    requests: HashMap<RequestId, ActiveRequest>,
    shared: Arc<Shared>,
    masks: MaskPool,
    /// Of the base model.
    vocab_size: usize,
    /// Masks asked for in this round that are not there yet.
    awaited_masks: usize,
    mask_round: u64,
    stats: EngineStats,
    drain: Option<Drain>,
    drained: Option<oneshot::Sender<()>>,
    flushes: Vec<oneshot::Sender<bool>>,
    /// Requests wait, but none can run before an upload is done.
    is_stalled: bool,
    in_flight: Option<InFlight>,
    /// Commands were taken while a step was waited for: [`Self::admit`] has not yet done what it does about all commands.
    has_taken: bool,
    last_commit: Instant,
    adapters: Option<Arc<AdapterRegistry>>,
    pins_generation: Option<usize>,
    outbox: Vec<Outgoing>,
}

impl Worker {
    pub fn new(
        backend: Box<dyn Backend>,
        scheduler: Scheduler,
        residency: DeviceResidency,
        (commands, inbox): (Weak<Sender<Command>>, Receiver<Command>),
        shared: Arc<Shared>,
        adapters: Option<Arc<AdapterRegistry>>,
        vocab_size: usize,
    ) -> Self {
        let stats = EngineStats {
            healthy: true,
            step_seconds: Histogram::new(STEP_SECONDS_BOUNDS),
            step_rows: Histogram::new(STEP_ROWS_BOUNDS),
            step_sequences: Histogram::new(STEP_ROWS_BOUNDS),
            queue_seconds: Histogram::new(QUEUE_SECONDS_BOUNDS),
            prefill_seconds: Histogram::new(QUEUE_SECONDS_BOUNDS),
            upload_seconds: Histogram::new(LOAD_SECONDS_BOUNDS),
            ..EngineStats::default()
        };
        let mut worker = Self {
            backend,
            scheduler,
            residency,
            inbox,
            requests: HashMap::new(),
            shared,
            masks: MaskPool::new(move |answer| {
                // Nobody is left to be told when the engine is gone.
                if let Some(commands) = commands.upgrade() {
                    commands.send(Command::Mask(answer)).ok();
                }
            }),
            vocab_size,
            awaited_masks: 0,
            mask_round: 0,
            stats,
            drain: None,
            drained: None,
            flushes: Vec::new(),
            is_stalled: false,
            in_flight: None,
            has_taken: false,
            last_commit: Instant::now(),
            adapters,
            pins_generation: None,
            outbox: Vec::new(),
        };
        worker.publish();
        worker
    }

    /// The thread's whole life.
    pub fn run(mut self) {
        let reason = match catch_unwind(AssertUnwindSafe(|| self.run_steps())) {
            Ok(Ok(())) => {
                // Whoever waits for the end finds the device's memory free.
                let drained = self.drained.take();
                drop(self);
                drained.map(|done| done.send(()));
                return;
            }
            Ok(Err(error)) => error.to_string(),
            Err(panic) => format!("the engine thread panicked: {}", panic_message(&*panic)),
        };
        self.fail(&reason);
    }

    fn run_steps(&mut self) -> Result<(), BackendError> {
        while self.admit()? {
            let step = self.schedule()?;
            let launched = step.map(|step| self.launch(step)).transpose()?.flatten();
            self.commit_in_flight()?;
            self.in_flight = launched;
        }
        Ok(())
    }

    // Admit.

    /// Takes commands, waiting for one if there is nothing else to do, and ends what was cancelled. False: the engine is to stop.
    fn admit(&mut self) -> Result<bool, BackendError> {
        match self.next_command() {
            Ok(command) => self.handle(command),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(false),
        }
        while let Ok(command) = self.inbox.try_recv() {
            self.handle(command);
        }
        self.refresh_pins();
        self.residency.begin_step(&mut *self.backend, &mut self.scheduler.kv_blocks())?;
        self.reap_cancelled();
        self.publish();
        self.flush_cache_if_asked();
        Ok(!self.is_drained())
    }

    fn next_command(&mut self) -> Result<Command, RecvTimeoutError> {
        let is_idle = self.requests.is_empty() && self.drain.is_none();
        let waits_for_upload = if is_idle { self.residency.is_uploading() } else { self.is_stalled };
        let has_taken = std::mem::take(&mut self.has_taken);
        if has_taken || self.in_flight.is_some() || !(is_idle || waits_for_upload) {
            self.inbox.try_recv().map_err(|error| match error {
                TryRecvError::Empty => RecvTimeoutError::Timeout,
                TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
            })
        } else if waits_for_upload {
            self.inbox.recv_timeout(UPLOAD_POLL_INTERVAL)
        } else {
            self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected)
        }
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Submit(new) => self.add(*new),
            Command::Wake => {}
            Command::Mask(answer) => self.take_mask(answer),
            Command::FlushCache(answer) => self.flushes.push(answer),
            Command::AbortAll => self.end_all(|| TokenEvent::Finished {
                reason: FinishReason::Aborted,
            }),
            Command::EndRevoked => self.end_revoked(),
            Command::Shutdown { deadline, done } => self.drain = Some(Drain { deadline, done }),
        }
    }

    fn add(&mut self, new: NewRequest) {
        let request_id = new.request_id;
        let counters = new.request.adapter.as_ref().map(|lease| self.shared.adapters.counters(lease.label()));
        let active = ActiveRequest {
            events: new.events,
            stages: new.stages,
            prompt_len: new.request.prompt_tokens.len(),
            gauge: counters.map(AdapterGauge::new),
            _permit: new.permit,
        };
        self.requests.insert(request_id, active);
        let is_revoked = new.request.adapter.as_ref().is_some_and(AdapterLease::is_revoked);
        self.scheduler.add(Sequence::new(request_id, new.request));
        if is_revoked {
            let reason = FinishReason::AdapterUnloaded;
            return self.remove(request_id, TokenEvent::Finished { reason });
        }
        self.ask_for_mask(request_id, None);
    }

    fn refresh_pins(&mut self) {
        let Some(registry) = &self.adapters else { return };
        let generation = registry.pins_generation();
        if self.pins_generation != Some(generation) {
            self.pins_generation = Some(generation);
            let pinned = registry.pinned().into_iter().map(|adapter| adapter.weights).collect();
            self.residency.set_pinned(pinned);
        }
    }

    fn end_revoked(&mut self) {
        let revoked: Vec<RequestId> = self
            .scheduler
            .sequences()
            .filter(|sequence| sequence.adapter().is_some_and(AdapterLease::is_revoked))
            .map(|sequence| sequence.request_id)
            .collect();
        for request_id in revoked {
            let reason = FinishReason::AdapterUnloaded;
            self.remove(request_id, TokenEvent::Finished { reason });
        }
    }

    fn reap_cancelled(&mut self) {
        let cancelled: Vec<RequestId> = self
            .requests
            .iter()
            .filter(|(_, request)| request.events.sender.is_closed())
            .map(|(request_id, _)| *request_id)
            .collect();
        let reason = FinishReason::Aborted;
        for request_id in cancelled {
            self.remove(request_id, TokenEvent::Finished { reason: reason.clone() });
        }
    }

    fn flush_cache_if_asked(&mut self) {
        if self.flushes.is_empty() {
            return;
        }
        let is_idle = self.requests.is_empty();
        if is_idle {
            self.scheduler.flush_cache();
            self.publish();
        }
        for answer in self.flushes.drain(..) {
            answer.send(is_idle).ok();
        }
    }

    fn is_drained(&mut self) -> bool {
        let Some(drain) = self
            .drain
            .take_if(|drain| self.requests.is_empty() || drain.deadline.is_some_and(|deadline| Instant::now() >= deadline))
        else {
            return false;
        };
        self.end_all(|| TokenEvent::Failed(RequestError::ShuttingDown));
        self.publish();
        self.drained = Some(drain.done);
        true
    }

    // Schedule, launch, commit.

    fn schedule(&mut self) -> Result<Option<ScheduledStep>, BackendError> {
        if self.scheduler.must_see_tokens() {
            self.commit_in_flight()?;
        }
        self.await_masks();
        let mut residency = BackendResidency {
            residency: &mut self.residency,
            backend: &mut *self.backend,
        };
        let Schedule {
            step,
            admitted,
            preempted,
            failed,
            first_asks,
        } = self.scheduler.schedule(&mut residency)?;
        for (request_id, runs) in admitted
            .into_iter()
            .map(|id| (id, true))
            .chain(preempted.into_iter().map(|id| (id, false)))
        {
            self.note_runs(request_id, runs);
        }
        for (name, is_hit) in first_asks {
            self.note_first_ask(&name, is_hit);
        }
        for (request_id, error) in failed {
            self.push_event(request_id, TokenEvent::Failed(error));
        }
        self.is_stalled = step.is_none() && self.in_flight.is_none();
        if self.is_stalled {
            self.publish();
        }
        Ok(step)
    }

    fn note_first_ask(&mut self, name: &Arc<str>, is_hit: bool) {
        let counters = self.shared.adapters.counters(name);
        if is_hit { &counters.hits } else { &counters.misses }.fetch_add(1, Relaxed);
        *(if is_hit {
            &mut self.stats.device_hits_total
        } else {
            &mut self.stats.device_misses_total
        }) += 1;
    }

    fn note_runs(&mut self, request_id: RequestId, runs: bool) {
        let request = self.requests.get_mut(&request_id).expect("a scheduled request is active");
        let waited = if runs { request.stages.admit() } else { None };
        if let Some(waited) = waited {
            self.stats.queue_seconds.observe(waited.as_secs_f64());
        }
        if let Some(gauge) = &mut request.gauge {
            gauge.set_runs(runs);
            if let Some(waited) = waited {
                gauge.counters.admitted.fetch_add(1, Relaxed);
                gauge.counters.waiting_nanos.fetch_add(waited.as_nanos() as u64, Relaxed);
            }
        }
    }

    /// Runs a step to its end, or gives it back while the backend runs it.
    fn launch(&mut self, step: ScheduledStep) -> Result<Option<InFlight>, BackendError> {
        let launched = Instant::now();
        let _span = tracing::debug_span!(
            "step",
            rows = step.batch.token_ids.len(),
            sequences = step.batch.sequences.len(),
            adapters = step.batch.lora_segments.len()
        )
        .entered();
        let in_flight = InFlight { step, launched };
        match self.backend.launch(&in_flight.step.batch)? {
            Launched::Running => Ok(Some(in_flight)),
            Launched::Done(output) => self.commit(in_flight, output).map(|()| None),
        }
    }

    fn commit_in_flight(&mut self) -> Result<(), BackendError> {
        let Some(in_flight) = self.in_flight.take() else {
            return Ok(());
        };
        self.await_step()?;
        let output = self.backend.collect()?;
        self.commit(in_flight, output)
    }

    /// Takes commands until the step in flight is done. The adapter of a request that comes meanwhile is on its way before its turn is.
    fn await_step(&mut self) -> Result<(), BackendError> {
        while !self.backend.is_collectable()? {
            let Ok(command) = self.inbox.try_recv() else {
                (0..SPINS_BETWEEN_POLLS).for_each(|_| std::hint::spin_loop());
                continue;
            };
            let arrived = match &command {
                Command::Submit(new) => Some(new.request_id),
                _ => None,
            };
            self.handle(command);
            self.has_taken = true;
            if let Some(request_id) = arrived {
                self.prefetch(request_id)?;
            }
        }
        Ok(())
    }

    fn prefetch(&mut self, request_id: RequestId) -> Result<(), BackendError> {
        let mut residency = BackendResidency {
            residency: &mut self.residency,
            backend: &mut *self.backend,
        };
        if let Some((name, is_hit)) = self.scheduler.prefetch_arrival(request_id, &mut residency)? {
            self.note_first_ask(&name, is_hit);
        }
        Ok(())
    }

    fn commit(&mut self, in_flight: InFlight, output: StepOutput) -> Result<(), BackendError> {
        let InFlight { step, launched } = in_flight;
        self.stats.step_rows.observe(step.batch.token_ids.len() as f64);
        self.stats.step_sequences.observe(step.batch.sequences.len() as f64);
        let mut events = Vec::new();
        self.scheduler.commit(step, output, &mut events)?;
        for (request_id, event) in events {
            let token_id = match &event {
                TokenEvent::Token { token_id, .. } => Some(*token_id),
                TokenEvent::Started { cached_tokens, .. } => {
                    let stages = self.requests.get(&request_id).map(|request| &request.stages);
                    let took = stages.map_or(Duration::ZERO, |stages| stages.compute(*cached_tokens));
                    self.stats.prefill_seconds.observe(took.as_secs_f64());
                    None
                }
                _ => None,
            };
            self.push_event(request_id, event);
            if token_id.is_some() {
                self.ask_for_mask(request_id, token_id);
            }
        }
        self.stats.steps_total += 1;
        let now = Instant::now();
        // A step that was launched while another ran has had the device since that one's end.
        self.stats
            .step_seconds
            .observe(now.duration_since(launched.max(self.last_commit)).as_secs_f64());
        self.last_commit = now;
        self.publish();
        Ok(())
    }

    // Masks.

    /// Has a request's constraint told of the token that was chosen, if one was, and its mask for the next one worked out. A sequence that
    /// ended with this token is gone and needs none.
    fn ask_for_mask(&mut self, request_id: RequestId, chosen: Option<u32>) {
        let Some(sequence) = self.scheduler.sequence_mut(request_id) else {
            return;
        };
        let vocab_size = sequence.adapter().map_or(self.vocab_size, |lease| lease.vocab_size(self.vocab_size));
        if let Some(constraint) = sequence.constraint.take() {
            self.awaited_masks += 1;
            self.masks.ask(MaskJob {
                request_id,
                constraint,
                chosen,
                mask_words: vocab_size.div_ceil(32),
                round: self.mask_round,
            });
        }
    }

    /// Takes commands until the masks of this round are there, for `MASK_PATIENCE` at most; then a new round begins.
    fn await_masks(&mut self) {
        let begin = Instant::now();
        while self.awaited_masks > 0 {
            let Some(left) = MASK_PATIENCE.checked_sub(begin.elapsed()) else { break };
            match self.inbox.recv_timeout(left) {
                Ok(command) => self.handle(command),
                Err(_) => break,
            }
        }
        self.awaited_masks = 0;
        self.mask_round += 1;
    }

    fn take_mask(&mut self, answer: MaskAnswer) {
        if answer.round == self.mask_round {
            self.awaited_masks -= 1;
        }
        // Whoever was aborted meanwhile needs no mask.
        let Some(sequence) = self.scheduler.sequence_mut(answer.request_id) else {
            return;
        };
        let event = match answer.mask {
            Ok(Some(mask)) => {
                sequence.constraint = Some(answer.constraint);
                return sequence.set_mask(mask);
            }
            Ok(None) => TokenEvent::Finished {
                reason: FinishReason::ConstraintDone,
            },
            Err(reason) => TokenEvent::Failed(RequestError::Constraint(reason)),
        };
        self.remove(answer.request_id, event);
    }

    // Ends.

    fn remove(&mut self, request_id: RequestId, event: TokenEvent) {
        self.scheduler.remove(request_id);
        self.push_event(request_id, event);
    }

    fn end_all(&mut self, event: impl Fn() -> TokenEvent) {
        let request_ids: Vec<RequestId> = self.requests.keys().copied().collect();
        for request_id in request_ids {
            self.remove(request_id, event());
        }
    }

    /// Keeps an event for `publish`. The terminal one ends the request: its sequence is gone already, its place in the queue goes here.
    fn push_event(&mut self, request_id: RequestId, event: TokenEvent) {
        if event.is_terminal() {
            let request = self.requests.remove(&request_id).expect("a request ends once");
            self.stats.finished_total += 1;
            self.outbox.push(Outgoing::End(request.events, event));
            return;
        }
        let request = &self.requests[&request_id];
        if let Some(gauge) = &request.gauge {
            match &event {
                TokenEvent::Started { .. } => gauge.counters.prompt_tokens.fetch_add(request.prompt_len as u64, Relaxed),
                _ => gauge.counters.output_tokens.fetch_add(1, Relaxed),
            };
        }
        self.outbox.push(Outgoing::Event(request.events.sender.clone(), event));
    }

    /// Makes statistics visible, then sends the events that were kept: whoever sees a request's end finds its lease, its blocks and its
    /// place in the queue free, and the statistics counting it.
    fn publish(&mut self) {
        let counters = self.scheduler.counters();
        let pool = self.scheduler.pool();
        let stats = &mut self.stats;
        stats.running = self.scheduler.num_running();
        stats.waiting = self.scheduler.num_waiting();
        stats.used_blocks = pool.num_used();
        stats.cached_blocks = pool.num_cached();
        stats.total_blocks = pool.num_blocks();
        stats.prompt_tokens_total = counters.prompt_tokens;
        stats.cached_tokens_total = counters.cached_tokens;
        stats.output_tokens_total = counters.output_tokens;
        stats.preemptions_total = counters.preemptions;
        stats.device_adapter_bytes = self.residency.used_bytes();
        stats.device_adapter_capacity_bytes = self.residency.capacity_bytes();
        stats.device_uploads_total = self.residency.uploads();
        stats.device_evictions_total = self.residency.evictions();
        if stats.upload_seconds != *self.residency.upload_seconds() {
            stats.upload_seconds = self.residency.upload_seconds().clone();
        }
        *self.shared.stats.lock() = Arc::new(stats.clone());
        for outgoing in self.outbox.drain(..) {
            match outgoing {
                Outgoing::Event(sender, event) => drop(sender.send(event)),
                Outgoing::End(events, event) => events.end(event),
            }
        }
    }

    /// The engine is done: every request ends, now and later.
    fn fail(self, reason: &str) {
        let Self {
            scheduler,
            backend,
            residency,
            inbox,
            requests,
            shared,
            mut stats,
            drain,
            flushes,
            outbox,
            ..
        } = self;
        tracing::error!(reason, "the engine failed");
        shared.failure.send_replace(Some(reason.to_owned()));
        stats.healthy = false;
        stats.running = 0;
        stats.waiting = 0;
        stats.used_blocks = 0;
        stats.finished_total += requests.len() as u64;
        *shared.stats.lock() = Arc::new(stats);
        // What panicked may panic again when it is dropped.
        catch_unwind(AssertUnwindSafe(|| drop(scheduler))).ok();
        drop(residency);
        catch_unwind(AssertUnwindSafe(|| drop(backend))).ok();
        let failed = || TokenEvent::Failed(RequestError::Engine(reason.to_owned()));
        for outgoing in outbox {
            match outgoing {
                Outgoing::Event(sender, event) => drop(sender.send(event)),
                Outgoing::End(events, event) => events.end(event),
            }
        }
        for (_, request) in requests {
            let events = request.events;
            drop(request.gauge);
            drop(request._permit);
            events.end(failed());
        }
        drop(flushes);
        if let Some(drain) = drain {
            drain.done.send(()).ok();
        }
        for command in inbox {
            match command {
                Command::Submit(new) => {
                    let NewRequest { request, events, permit, .. } = *new;
                    drop((request, permit));
                    events.end(failed());
                }
                Command::FlushCache(answer) => drop(answer.send(false)),
                Command::Shutdown { done, .. } => drop(done.send(())),
                Command::Wake | Command::Mask(_) | Command::AbortAll | Command::EndRevoked => {}
            }
        }
    }
}
