//! [`Scheduler`]: which rows the next step has. Pure: no I/O, no clock, no device, no tokenizer.
//!
//! A step is scheduled by [`Scheduler::schedule`] and taken back by [`Scheduler::commit`]. One more step may be scheduled before the
//! last one is committed (its unknown input tokens are [`carried`](crate::batch::CarriedToken)); rows of sequences that ended or were
//! preempted in between are ignored by `commit`.
//!
//! **Admission** goes by [`FairQueue`]. A request is admitted when a sequence may still run, its adapter is on the device, and there are
//! blocks for all of its known tokens; one whose adapter is not there yet is passed over, one that lacks blocks is waited for. One whose
//! prefix another request is computing just now (`n` answers to one prompt arrive together) is passed over until that is in the cache.
//! The quantum is the token budget of a step: a smaller one would break up what may fill a step together, with a larger one a flow would have
//! several steps to itself before another's turn.
//! A prompt makes a step longer for everybody in it. One that is *late*, since its adapter had to be read, or was on its way when its turn came,
//! may meet the next one in a step, and its adapter's way would show in others' tokens: so while others decode and [few](FEW_WAITING) wait, it is
//! looked at after the others, and leaves the step to them if one of theirs begins in it, or another late one's, at most [`MOST_YIELDS`] times.
//! **Turns**: when running sequences have more distinct adapters than a step may have, the adapters whose last turn is longest ago go
//! first; one that has just been admitted stands at the end of that ring. Base rows are in every step.
//! **Preemption**: a sequence that needs a block when none is left pushes back the one admitted last (perhaps itself), whose KV is
//! recomputed later. The one admitted first is never pushed back, so somebody always ends.
//!
//! **Memory** may be shared with adapters ([`residency`](crate::residency)). Then a sequence that lacks blocks first has idle adapters
//! evicted for them, and a request's adapter may take blocks that nobody has. That neither of the two can keep the other from ever running
//! is seen thus: an adapter takes no block that a running sequence has or grows into next, and a sequence takes no adapter that is in use,
//! so what runs goes on, and the one admitted first ends. A request that waits for room meanwhile, for blocks or for an adapter, sees no
//! more than so many others start: those behind one that lacks blocks are not looked at, and those behind one whose adapter has no room
//! only until as many have started as can run. When nothing runs, nothing is in use: the first request finds room for its adapter, which
//! fits beside `min_blocks`, and then blocks, since its tokens fit `min_blocks`.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use crate::{
    adapter::{AdapterLease, VersionId},
    backend::BackendError,
    batch::{LoraSegment, SampleFailure, SampleOutput, StepBatch, StepOutput},
    block_pool::{BlockMove, BlockPool},
    fairness::{FairQueue, FlowKey, Turn},
    request::{FinishReason, RequestError, RequestId, TokenEvent},
    residency::{AdapterResidency, BlocksFor, KvBlocks, Residency, ResidentAdapter},
    sequence::{AppendedRows, Sequence, Start, StartRules},
};

/// A late prompt leaves so many steps to others' at most: at a hundred arrivals a second and 7 ms a step, three steps of four have one.
const MOST_YIELDS: u32 = 8;
/// And none when more requests than so many wait: then steps with several prompts are what they wait for.
const FEW_WAITING: usize = 4;

/// The limits of a scheduler.
#[derive(Clone, Debug)]
pub struct SchedulerConfig {
    /// KV blocks at first, and at most.
    pub num_blocks: usize,
    /// KV blocks that there are at least: fewer where adapters share their memory. A sequence needs no more.
    pub min_blocks: usize,
    /// Positions per block.
    pub block_size: usize,
    /// Most rows of one step.
    pub token_budget: usize,
    /// Most rows of prefill in a step that also decodes: how long a prompt may hold up others' next tokens.
    pub mixed_prefill_tokens: usize,
    /// Sequences running at once; at most `token_budget`, so that every decoding sequence has its row.
    pub max_running_requests: usize,
    /// Distinct adapters of one step, at least 1.
    pub max_loras_per_batch: usize,
    /// Whether prefixes are cached.
    pub prefix_caching: bool,
    /// A request whose next so many prompt tokens another one is computing just now waits for them.
    pub min_awaited_tokens: usize,
    /// Tokens that end generation.
    pub eos_token_ids: Vec<u32>,
    /// See [`FairQueue`].
    pub overtake_limit: u64,
}

/// What `schedule` decided.
#[derive(Debug, Default)]
pub struct Schedule {
    /// The step to execute; `None` when there is nothing to run now.
    pub step: Option<ScheduledStep>,
    /// Requests that were admitted, in order. A preempted one is admitted again.
    pub admitted: Vec<RequestId>,
    /// Requests whose sequences were pushed back, perhaps right after they were admitted.
    pub preempted: Vec<RequestId>,
    /// Requests that ended because their adapter can't be used.
    pub failed: Vec<(RequestId, RequestError)>,
    /// Adapters that a request asked for the first time, and whether they were on the device.
    pub first_asks: Vec<(Arc<str>, bool)>,
}

/// A step between `schedule` and `commit`.
#[derive(Debug)]
pub struct ScheduledStep {
    /// What the backend executes.
    pub batch: StepBatch,
    rows: Vec<AppendedRows>,
    /// Keeps the adapters of the step on the device until it is committed.
    _adapters: Vec<Arc<ResidentAdapter>>,
}

/// Counters and gauges of a scheduler. See [`EngineStats`](crate::EngineStats).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedulerCounters {
    /// Prompt tokens computed or found cached, each once.
    pub prompt_tokens: u64,
    /// Of those, found cached.
    pub cached_tokens: u64,
    /// Output tokens.
    pub output_tokens: u64,
    /// Sequences pushed back.
    pub preemptions: u64,
}

/// Whose turn it is among the adapters of running sequences.
#[derive(Debug)]
struct AdapterTurn {
    /// Running sequences.
    num_sequences: usize,
    /// The step of its last turn, or of its admission.
    last_step: u64,
}

/// See the module.
pub struct Scheduler {
    config: SchedulerConfig,
    pool: BlockPool,
    sequences: HashMap<RequestId, Sequence>,
    waiting: FairQueue,
    /// In order of admission.
    running: Vec<RequestId>,
    running_adapters: BTreeMap<VersionId, AdapterTurn>,
    /// The request that was refused room on the device for its adapter, and `waiting.taken()` then.
    denied_room: Option<(RequestId, u64)>,
    step: u64,
    arrivals: u64,
    counters: SchedulerCounters,
    /// Grows when the set of sequences or their states change.
    membership: u64,
}

impl Scheduler {
    /// Nothing waits, nothing runs.
    pub fn new(config: SchedulerConfig) -> Self {
        assert!(
            config.block_size > 0 && (1..=config.num_blocks).contains(&config.min_blocks),
            "there is a KV cache"
        );
        assert!(
            (1..=config.token_budget).contains(&config.max_running_requests),
            "each running sequence has a row in a step"
        );
        assert!(config.mixed_prefill_tokens > 0, "a prompt could wait for ever beside others' decoding");
        assert!(config.max_loras_per_batch > 0, "a request with an adapter could never run");
        Self {
            pool: BlockPool::new(config.num_blocks),
            sequences: HashMap::new(),
            waiting: FairQueue::new(config.token_budget as u64, config.overtake_limit),
            running: Vec::new(),
            running_adapters: BTreeMap::new(),
            denied_room: None,
            step: 0,
            arrivals: 0,
            counters: SchedulerCounters::default(),
            membership: 0,
            config,
        }
    }

    /// Adds a waiting sequence. Its tokens and output together fit the KV cache: `submit` has seen to it.
    pub fn add(&mut self, mut sequence: Sequence) {
        sequence.arrival = self.arrivals;
        self.arrivals += 1;
        self.membership += 1;
        let request_id = sequence.request_id;
        self.waiting.push(flow_key(&sequence), sequence.arrival, request_id);
        let replaced = self.sequences.insert(request_id, sequence);
        assert!(replaced.is_none(), "request ids are unique");
    }

    /// Forgets a sequence and frees what it holds. False if there is none.
    pub fn remove(&mut self, request_id: RequestId) -> bool {
        let Some(mut sequence) = self.sequences.remove(&request_id) else {
            return false;
        };
        self.membership += 1;
        if self.denied_room.is_some_and(|(denied, _)| denied == request_id) {
            self.denied_room = None;
        }
        let key = flow_key(&sequence);
        match self.running.iter().position(|running| *running == request_id) {
            Some(place) => {
                self.running.remove(place);
                self.release_running(&mut sequence);
                self.waiting.end_running(&key);
            }
            None => self.waiting.remove_waiting(&key, request_id),
        }
        true
    }

    /// A sequence, waiting or running.
    pub fn sequence_mut(&mut self, request_id: RequestId) -> Option<&mut Sequence> {
        self.sequences.get_mut(&request_id)
    }

    /// Every sequence, in no order.
    pub fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.sequences.values()
    }

    /// Sequences in the batch.
    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait, preempted ones included.
    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether a sequence is running.
    pub fn is_running(&self, sequence: &Sequence) -> bool {
        sequence.num_blocks() > 0
    }

    /// The blocks.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// The blocks, for whoever shares their memory.
    pub fn kv_blocks(&mut self) -> impl KvBlocks + '_ {
        self.kv_blocks_but(0)
    }

    /// The same, with so many more that nobody else may have.
    fn kv_blocks_but(&mut self, num_reserved: usize) -> SchedulerBlocks<'_> {
        SchedulerBlocks {
            pool: &mut self.pool,
            sequences: &mut self.sequences,
            // One for each running sequence to grow into.
            num_reserved: self.running.len() + num_reserved,
        }
    }

    /// Counters.
    pub fn counters(&self) -> SchedulerCounters {
        self.counters
    }

    /// Changes whenever sequences come, go, start or are preempted.
    pub fn membership(&self) -> u64 {
        self.membership
    }

    /// Whether a running sequence can't go on before the host has seen the token that a step in flight chooses for it: it has a
    /// constraint or a penalty. Scheduling one step ahead would leave it out of every second step.
    pub fn must_see_tokens(&self) -> bool {
        self.running.iter().any(|request_id| self.sequences[request_id].must_see_token())
    }

    /// Drops every cached prefix that no running sequence uses.
    pub fn flush_cache(&mut self) {
        self.pool.flush_cache();
    }

    /// Admits what may be admitted and chooses the rows of the next step.
    ///
    /// # Errors
    /// What the device said to a request for an adapter; the engine is done then.
    pub fn schedule(&mut self, residency: &mut dyn AdapterResidency) -> Result<Schedule, BackendError> {
        self.step += 1;
        let mut schedule = Schedule::default();
        self.admit(residency, &mut schedule)?;
        let rows = self.choose_rows(residency, &mut schedule.preempted)?;
        if !rows.is_empty() {
            schedule.step = Some(self.build_step(rows));
        }
        Ok(schedule)
    }

    /// Takes a step's output: counts rows as computed, appends tokens, ends and frees sequences. Events come in order for each request.
    ///
    /// # Errors
    /// `Device` if the output does not belong to the step; nothing was taken then.
    pub fn commit(&mut self, step: ScheduledStep, output: StepOutput, events: &mut Vec<(RequestId, TokenEvent)>) -> Result<(), BackendError> {
        if output.samples.len() != step.batch.samples.len() {
            return Err(BackendError::Device(format!(
                "{} samples were asked for, {} came back",
                step.batch.samples.len(),
                output.samples.len()
            )));
        }
        let mut samples = output.samples;
        for rows in step.rows {
            let is_current = self.sequences.get(&rows.request_id).is_some_and(|sequence| sequence.epoch == rows.epoch);
            if is_current {
                self.commit_rows(&rows, &mut samples, &step.batch, events);
            }
        }
        Ok(())
    }

    /// Panics unless blocks, queues and adapters agree with the sequences. For tests.
    pub fn assert_consistent(&self) {
        self.pool.assert_consistent();
        assert_eq!(self.running.len() + self.waiting.len(), self.sequences.len(), "a sequence runs or waits");
        let mut held = BTreeSet::new();
        let mut adapters: BTreeMap<VersionId, usize> = BTreeMap::new();
        for sequence in self.sequences.values() {
            let runs = self.running.contains(&sequence.request_id);
            assert_eq!(runs, sequence.num_blocks() > 0, "running sequences hold blocks, waiting ones do not");
            assert_eq!(runs && sequence.adapter().is_some(), sequence.resident().is_some(), "place on the device");
            assert!(sequence.num_yields <= MOST_YIELDS, "nobody yields without an end");
            held.extend(sequence.block_ids());
            if let (true, Some(version)) = (runs, sequence.version()) {
                *adapters.entry(version).or_default() += 1;
            }
        }
        assert_eq!(held.len(), self.pool.num_used(), "every used block is held by a running sequence");
        let turns: BTreeMap<_, _> = self
            .running_adapters
            .iter()
            .map(|(version, turn)| (*version, turn.num_sequences))
            .collect();
        assert_eq!(turns, adapters, "running sequences of each adapter");
    }

    // Admission.

    fn admit(&mut self, residency: &mut dyn AdapterResidency, schedule: &mut Schedule) -> Result<(), BackendError> {
        let mut prefill_rows: usize = self
            .running
            .iter()
            .map(|id| self.sequences[id].num_uncomputed())
            .filter(|rows| *rows > 1)
            .sum();
        let spreads = self.spreads_prompts();
        let mut late = Vec::new();
        let mut num_prompts = 0;
        let mut overdue = self.waiting.overdue_turn();
        let mut cursor = None;
        // Blocks that the first request behind `cursor` waits for.
        let mut num_awaited = 0;
        while self.running.len() < self.config.max_running_requests && prefill_rows < self.config.token_budget {
            let is_overdue = overdue.is_some();
            let Some((turn, request_id)) = overdue.take().or_else(|| self.waiting.next_turn(cursor)) else {
                break;
            };
            if spreads && !is_overdue && self.may_yield(request_id, residency, schedule)? {
                late.push((turn, request_id));
                cursor = Some(turn);
                continue;
            }
            match self.admit_one(turn, request_id, residency, schedule)? {
                // It may be the same flow's turn again.
                Admission::Admitted { num_rows } => {
                    prefill_rows += num_rows;
                    num_prompts += usize::from(num_rows > 1);
                    let is_late = |request_id| late.iter().any(|(_, late_id)| *late_id == request_id);
                    overdue = self.waiting.overdue_turn().filter(|(_, request_id)| !is_late(*request_id));
                }
                Admission::Failed(_) => {}
                Admission::NotYet | Admission::NoRoom if is_overdue => {}
                Admission::NotYet | Admission::NoRoom => cursor = Some(turn),
                Admission::NoBlocks => {
                    // All: what is free now and more.
                    num_awaited = self.pool.num_blocks();
                    break;
                }
            }
        }
        for (turn, request_id) in late {
            if num_prompts > 0 {
                self.sequences.get_mut(&request_id).expect("a queued request has a sequence").num_yields += 1;
                continue;
            }
            // There is a place for each that waits.
            match self.admit_one(turn, request_id, residency, schedule)? {
                Admission::Admitted { num_rows } => num_prompts += usize::from(num_rows > 1),
                Admission::NoBlocks => num_awaited = self.pool.num_blocks(),
                Admission::NotYet | Admission::NoRoom | Admission::Failed(_) => {}
            }
        }
        self.prefetch(cursor, num_awaited, residency, schedule)
    }

    /// Whether late prompts are kept apart from others: somebody's next token would wait for both, and there is room for all that wait.
    fn spreads_prompts(&self) -> bool {
        let num_waiting = self.waiting.len();
        num_waiting <= FEW_WAITING
            && self.denied_room.is_none()
            && self.running.len() + num_waiting <= self.config.max_running_requests
            && self.running.iter().any(|request_id| self.sequences[request_id].num_schedulable() == 1)
    }

    /// Whether a waiting request is late, could be admitted now as far as its adapter goes, and has not yielded often enough. Asks for its adapter,
    /// so that it does not leave for others' meanwhile.
    fn may_yield(&mut self, request_id: RequestId, residency: &mut dyn AdapterResidency, schedule: &mut Schedule) -> Result<bool, BackendError> {
        let sequence = &self.sequences[&request_id];
        if !sequence.is_late || sequence.num_yields >= MOST_YIELDS {
            return Ok(false);
        }
        let lease = sequence.adapter().cloned().expect("it is late by its adapter");
        let answer = self.ask(request_id, &lease, 0, residency, schedule)?;
        Ok(matches!(answer, Residency::Ready(_)))
    }

    /// Admits a request whose turn it is, if that is possible now, and notes what came of it.
    fn admit_one(
        &mut self,
        turn: Turn,
        request_id: RequestId,
        residency: &mut dyn AdapterResidency,
        schedule: &mut Schedule,
    ) -> Result<Admission, BackendError> {
        let admission = self.try_admit(turn, request_id, residency, schedule)?;
        self.note_denied_room(request_id, &admission);
        match &admission {
            Admission::Admitted { .. } => schedule.admitted.push(request_id),
            Admission::Failed(error) => {
                self.remove(request_id);
                schedule.failed.push((request_id, error.clone()));
            }
            Admission::NotYet | Admission::NoRoom | Admission::NoBlocks => {}
        }
        Ok(admission)
    }

    fn try_admit(
        &mut self,
        turn: Turn,
        request_id: RequestId,
        residency: &mut dyn AdapterResidency,
        schedule: &mut Schedule,
    ) -> Result<Admission, BackendError> {
        let mut resident = None;
        let adapter = self.sequences[&request_id].adapter().cloned();
        // Where memory is shared, the KV of the others keeps the adapter out as much as their adapters do.
        let takes_room = adapter.is_some() || self.config.min_blocks < self.config.num_blocks;
        if takes_room && self.is_draining().is_some_and(|denied| denied != request_id) {
            return Ok(Admission::NotYet);
        }
        if let Some(lease) = adapter {
            match self.ask(request_id, &lease, 0, residency, schedule)? {
                Residency::Ready(adapter) => resident = Some(adapter),
                Residency::Uploading => {
                    self.sequences.get_mut(&request_id).expect("a queued request has a sequence").is_late = true;
                    return Ok(Admission::NotYet);
                }
                Residency::NoRoom => return Ok(Admission::NoRoom),
                Residency::Impossible(reason) => {
                    let adapter = lease.name().to_string();
                    return Ok(Admission::Failed(RequestError::Adapter { adapter, reason }));
                }
            }
        }
        let rules = StartRules {
            block_size: self.config.block_size,
            prefix_caching: self.config.prefix_caching,
            // One block for each running sequence is left to grow into, or preemptions would follow at once.
            reserve: self.running.len(),
            min_awaited_tokens: self.config.min_awaited_tokens,
        };
        loop {
            let sequence = self.sequences.get_mut(&request_id).expect("a queued request has a sequence");
            match sequence.try_start(&mut self.pool, resident.as_ref(), &rules) {
                Start::Started => break,
                Start::PrefixInTheMaking => return Ok(Admission::NotYet),
                Start::TooFewBlocks { missing } if residency.make_blocks(missing, BlocksFor::Waiting, &mut self.kv_blocks())? => {}
                Start::TooFewBlocks { .. } => {
                    assert!(!self.running.is_empty(), "a request that fits the KV cache alone can start alone");
                    return Ok(Admission::NoBlocks);
                }
            }
        }
        let sequence = self.sequences.get_mut(&request_id).expect("a queued request has a sequence");
        sequence.is_late = false;
        let num_rows = sequence.num_uncomputed();
        if let Some(version) = sequence.version() {
            let turn = self.running_adapters.entry(version).or_insert(AdapterTurn {
                num_sequences: 0,
                last_step: self.step,
            });
            turn.num_sequences += 1;
        }
        let taken = self.waiting.take(turn, num_rows as u64);
        assert_eq!(taken, request_id, "the request that was looked at");
        self.running.push(request_id);
        self.membership += 1;
        Ok(Admission::Admitted { num_rows })
    }

    /// Asks for a waiting request's adapter, which may not take the last `num_reserved` blocks; the first time counts as a hit or a miss.
    fn ask(
        &mut self,
        request_id: RequestId,
        lease: &AdapterLease,
        num_reserved: usize,
        residency: &mut dyn AdapterResidency,
        schedule: &mut Schedule,
    ) -> Result<Residency, BackendError> {
        let answer = residency.request(lease.weights(), &mut self.kv_blocks_but(num_reserved))?;
        let sequence = self.sequences.get_mut(&request_id).expect("a queued request has a sequence");
        if !std::mem::replace(&mut sequence.counted_residency, true) {
            let is_hit = matches!(answer, Residency::Ready(_));
            schedule.first_asks.push((lease.label().clone(), is_hit));
        }
        Ok(answer)
    }

    /// Begins to bring the adapter of a request that has just come to the device, if there is room at hand: a step may still run, and its turn be
    /// looked at only then. The adapter's label and whether it was there, if it was asked for.
    ///
    /// # Errors
    /// What the device said; the engine is done then.
    pub fn prefetch_arrival(
        &mut self,
        request_id: RequestId,
        residency: &mut dyn AdapterResidency,
    ) -> Result<Option<(Arc<str>, bool)>, BackendError> {
        // Free bytes are for whoever was refused some.
        if self.denied_room.is_some() {
            return Ok(None);
        }
        let Some(lease) = self.sequences.get(&request_id).and_then(|sequence| sequence.adapter().cloned()) else {
            return Ok(None);
        };
        let Some(is_there) = residency.prefetch(lease.weights(), &mut self.kv_blocks())? else {
            return Ok(None);
        };
        let sequence = self.sequences.get_mut(&request_id).expect("it was just found");
        let is_first = !std::mem::replace(&mut sequence.counted_residency, true);
        Ok(is_first.then(|| (lease.label().clone(), is_there)))
    }

    fn note_denied_room(&mut self, request_id: RequestId, admission: &Admission) {
        let is_denied = matches!(admission, Admission::NoRoom);
        match self.denied_room {
            None if is_denied => self.denied_room = Some((request_id, self.waiting.taken())),
            Some((denied, _)) if denied == request_id && !is_denied => self.denied_room = None,
            _ => {}
        }
    }

    /// Adapters that are in use leave the device only when their requests end. Once a request has waited for that while as many
    /// others were admitted as can run, no other request that takes of the same memory is, until it is its turn: this one's.
    fn is_draining(&self) -> Option<RequestId> {
        let (denied, taken) = self.denied_room?;
        (self.waiting.taken() - taken >= self.config.max_running_requests as u64).then_some(denied)
    }

    /// Brings the adapters of the requests that come next to the device; `num_awaited` blocks are not for them.
    fn prefetch(
        &mut self,
        mut cursor: Option<Turn>,
        num_awaited: usize,
        residency: &mut dyn AdapterResidency,
        schedule: &mut Schedule,
    ) -> Result<(), BackendError> {
        let mut asked = BTreeSet::new();
        while asked.len() < self.config.max_loras_per_batch && self.is_draining().is_none() {
            let Some((turn, request_id)) = self.waiting.next_turn(cursor) else {
                break;
            };
            if let Some(lease) = self.sequences[&request_id].adapter().cloned() {
                asked.insert(lease.version());
                if matches!(self.ask(request_id, &lease, num_awaited, residency, schedule)?, Residency::NoRoom) {
                    break;
                }
            }
            cursor = Some(turn);
        }
        Ok(())
    }

    // Rows.

    /// Sequences of the step with their rows, in order of admission. Blocks for the rows are taken; that may preempt.
    fn choose_rows(&mut self, residency: &mut dyn AdapterResidency, preempted: &mut Vec<RequestId>) -> Result<Vec<(RequestId, usize)>, BackendError> {
        let adapters = self.choose_adapters();
        let takes_part = |sequence: &Sequence| sequence.version().is_none_or(|version| adapters.contains(&version));
        // Decoding sequences first: they are what others see stutter. Then prefill, in order of admission.
        let (mut decodes, mut prefills) = (Vec::new(), Vec::new());
        for request_id in &self.running {
            let sequence = &self.sequences[request_id];
            match sequence.num_schedulable() {
                0 => {}
                _ if !takes_part(sequence) || sequence.needs_mask() => {}
                1 => decodes.push((*request_id, 1)),
                num_rows => prefills.push((*request_id, num_rows)),
            }
        }
        let mut budget = self.config.token_budget - decodes.len();
        if !decodes.is_empty() {
            budget = budget.min(self.config.mixed_prefill_tokens);
        }
        for (_, num_rows) in &mut prefills {
            *num_rows = (*num_rows).min(budget);
            budget -= *num_rows;
        }
        prefills.retain(|(_, num_rows)| *num_rows > 0);
        let mut chosen = Vec::with_capacity(decodes.len() + prefills.len());
        // Only decoding sequences may need a block here, and a preempted sequence was admitted later than the one that needs it: it comes
        // further on in this list, if at all, and `chosen` has none that was preempted.
        for (request_id, num_rows) in decodes.into_iter().chain(prefills) {
            if self.try_make_blocks(request_id, num_rows, residency, preempted)? {
                chosen.push((request_id, num_rows));
            }
        }
        Ok(chosen)
    }

    /// The adapters of this step: all that run, or the ones whose last turn is longest ago.
    fn choose_adapters(&mut self) -> BTreeSet<VersionId> {
        let mut candidates: BTreeMap<VersionId, u64> = BTreeMap::new();
        for request_id in &self.running {
            let sequence = &self.sequences[request_id];
            if let Some(version) = sequence.version().filter(|_| sequence.num_schedulable() > 0) {
                candidates.entry(version).or_insert_with(|| self.running_adapters[&version].last_step);
            }
        }
        let mut by_turn: Vec<(u64, VersionId)> = candidates.into_iter().map(|(version, last_step)| (last_step, version)).collect();
        by_turn.sort_unstable();
        by_turn.truncate(self.config.max_loras_per_batch);
        for (_, version) in &by_turn {
            self.running_adapters.get_mut(version).expect("it has running sequences").last_step = self.step;
        }
        by_turn.into_iter().map(|(_, version)| version).collect()
    }

    /// Blocks for a running sequence's next rows, of what idle adapters have or by preemption if need be. False if it was itself preempted.
    fn try_make_blocks(
        &mut self,
        request_id: RequestId,
        num_rows: usize,
        residency: &mut dyn AdapterResidency,
        preempted: &mut Vec<RequestId>,
    ) -> Result<bool, BackendError> {
        loop {
            let sequence = self.sequences.get_mut(&request_id).expect("a running request has a sequence");
            if sequence.num_blocks() == 0 {
                return Ok(false);
            }
            match sequence.try_grow(&mut self.pool, self.config.block_size, num_rows) {
                Ok(()) => return Ok(true),
                Err(missing) if residency.make_blocks(missing, BlocksFor::Running, &mut self.kv_blocks())? => continue,
                Err(_) => {}
            }
            let last = *self.running.last().expect("it is running itself");
            self.preempt(last);
            preempted.push(last);
        }
    }

    fn preempt(&mut self, request_id: RequestId) {
        assert_eq!(self.running.pop(), Some(request_id), "the sequence admitted last is preempted");
        assert!(
            !self.running.is_empty(),
            "a sequence that runs alone has blocks enough: `submit` has seen to it"
        );
        let mut sequence = self.sequences.remove(&request_id).expect("a running request has a sequence");
        self.release_running(&mut sequence);
        self.waiting.push_back(&flow_key(&sequence), sequence.arrival, request_id);
        self.sequences.insert(request_id, sequence);
        self.counters.preemptions += 1;
        self.membership += 1;
    }

    /// Gives back what a sequence that no longer runs has held.
    fn release_running(&mut self, sequence: &mut Sequence) {
        sequence.release(&mut self.pool);
        if let Some(version) = sequence.version() {
            let turn = self.running_adapters.get_mut(&version).expect("it had a running sequence");
            turn.num_sequences -= 1;
            if turn.num_sequences == 0 {
                self.running_adapters.remove(&version);
            }
        }
    }

    /// Rows in the batch's order: base rows first, then adapter by adapter.
    fn build_step(&mut self, mut chosen: Vec<(RequestId, usize)>) -> ScheduledStep {
        // Stable: within an adapter the order of admission stays.
        chosen.sort_by_key(|(request_id, _)| self.sequences[request_id].resident().map(|adapter| adapter.handle));
        let mut batch = StepBatch::default();
        let mut rows = Vec::with_capacity(chosen.len());
        let mut adapters: Vec<Arc<ResidentAdapter>> = Vec::new();
        for (request_id, num_rows) in chosen {
            let sequence = self.sequences.get_mut(&request_id).expect("a running request has a sequence");
            let row_start = batch.token_ids.len() as u32;
            if let Some(adapter) = sequence.resident() {
                match batch.lora_segments.last_mut() {
                    Some(segment) if segment.adapter == adapter.handle => segment.num_rows += num_rows as u32,
                    _ => {
                        batch.lora_segments.push(LoraSegment {
                            adapter: adapter.handle,
                            row_start,
                            num_rows: num_rows as u32,
                        });
                        adapters.push(adapter.clone());
                    }
                }
            }
            rows.push(sequence.append_rows(num_rows, self.config.block_size, &self.config.eos_token_ids, &mut batch));
        }
        assert!(batch.token_ids.len() <= self.config.token_budget, "token budget");
        assert!(
            batch.lora_segments.len() <= self.config.max_loras_per_batch,
            "distinct adapters of a step"
        );
        ScheduledStep {
            batch,
            rows,
            _adapters: adapters,
        }
    }

    // Commit.

    fn commit_rows(&mut self, rows: &AppendedRows, samples: &mut [SampleOutput], batch: &StepBatch, events: &mut Vec<(RequestId, TokenEvent)>) {
        let request_id = rows.request_id;
        let sequence = self.sequences.get_mut(&request_id).expect("the caller has looked");
        sequence.commit_rows(rows.num_rows);
        if self.config.prefix_caching {
            sequence.publish_blocks(&mut self.pool, self.config.block_size);
        }
        let mut chosen = None;
        for (sample, asked) in samples[rows.samples.clone()].iter_mut().zip(&batch.samples[rows.samples.clone()]) {
            let given = match (&asked.prompt_logprob, sample.prompt_logprobs.take()) {
                (None, _) => true,
                (Some(_), Some(logprobs)) => {
                    sequence.push_prompt_logprobs(logprobs);
                    true
                }
                (Some(_), None) => false,
            };
            if asked.choose.is_some() {
                chosen = sample.token_id.map(|token_id| (token_id, sample.logprobs.take()));
            }
            if !given || (asked.choose.is_some() && chosen.is_none()) {
                let error = match sample.failure {
                    Some(SampleFailure::NotFinite) => RequestError::NotFinite,
                    Some(failure @ SampleFailure::NothingAllowed) => RequestError::Constraint(failure.to_string()),
                    None => RequestError::Engine("the device gave no answer for a row".to_owned()),
                };
                self.remove(request_id);
                events.push((request_id, TokenEvent::Failed(error)));
                return;
            }
        }
        if let Some((cached_tokens, prompt_logprobs)) = sequence.take_started() {
            self.counters.prompt_tokens += sequence.prompt_len() as u64;
            self.counters.cached_tokens += cached_tokens as u64;
            let started = TokenEvent::Started {
                cached_tokens: cached_tokens as u32,
                prompt_logprobs,
            };
            events.push((request_id, started));
            if sequence.is_at_max_tokens() {
                self.finish(request_id, FinishReason::Length, events);
                return;
            }
        }
        if let Some((token_id, logprobs)) = chosen {
            let finish = sequence.push_output(token_id, &self.config.eos_token_ids);
            let key = flow_key(sequence);
            self.counters.output_tokens += 1;
            events.push((request_id, TokenEvent::Token { token_id, logprobs }));
            self.waiting.charge(&key, 1);
            if let Some(reason) = finish {
                self.finish(request_id, reason, events);
            }
        }
    }

    fn finish(&mut self, request_id: RequestId, reason: FinishReason, events: &mut Vec<(RequestId, TokenEvent)>) {
        self.remove(request_id);
        events.push((request_id, TokenEvent::Finished { reason }));
    }
}

/// See [`Scheduler::kv_blocks`].
struct SchedulerBlocks<'a> {
    pool: &'a mut BlockPool,
    sequences: &'a mut HashMap<RequestId, Sequence>,
    num_reserved: usize,
}

impl KvBlocks for SchedulerBlocks<'_> {
    fn num_blocks(&self) -> usize {
        self.pool.num_blocks()
    }

    fn num_free(&self) -> usize {
        self.pool.num_free()
    }

    fn num_cached(&self) -> usize {
        self.pool.num_cached()
    }

    fn tick(&mut self) -> u64 {
        self.pool.tick()
    }

    fn oldest_use(&self) -> Option<u64> {
        self.pool.oldest_use()
    }

    fn forget_oldest(&mut self) -> bool {
        self.pool.forget_oldest()
    }

    fn num_needed(&self) -> usize {
        self.pool.num_used() + self.num_reserved
    }

    fn shrink(&mut self, num_blocks: usize) -> Vec<BlockMove> {
        let moves = self.pool.shrink(num_blocks);
        if !moves.is_empty() {
            let moved = moves.iter().map(|block| (block.from, block.to)).collect();
            self.sequences.values_mut().for_each(|sequence| sequence.move_blocks(&moved));
        }
        moves
    }

    fn grow(&mut self, num_blocks: usize) {
        self.pool.grow(num_blocks);
    }
}

enum Admission {
    Admitted { num_rows: usize },
    NotYet,
    NoRoom,
    NoBlocks,
    Failed(RequestError),
}

fn flow_key(sequence: &Sequence) -> FlowKey {
    FlowKey {
        adapter: sequence.version(),
        fairness_key: sequence.fairness_key.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        adapter::HostAdapter,
        backend::{Backend, Capacity},
        llm::EvictionPolicy,
        request::{GenerationRequest, LogprobsParams, PromptLogprobsParams},
        residency::{BackendResidency, DeviceResidency, FEWEST_READY, READY_ADAPTERS},
        testing::{
            EOS, FakeBackend, LeaseCount, Rng, VOCAB_SIZE, expected_events, host_adapter, random_request, request, tokens, without_cached_tokens,
        },
    };

    /// A scheduler over a fake backend, driven by hand.
    struct Bench {
        scheduler: Scheduler,
        residency: DeviceResidency,
        backend: FakeBackend,
        events: BTreeMap<RequestId, Vec<TokenEvent>>,
        ended: BTreeSet<RequestId>,
        next_id: u64,
        leases: LeaseCount,
        in_flight: Option<ScheduledStep>,
        preempted: usize,
    }

    #[derive(Clone)]
    struct Limits {
        num_blocks: usize,
        /// `Some`: adapters share the blocks' memory, all but so many blocks of it; a block has `BLOCK_BYTES`.
        shared_but: Option<usize>,
        block_size: usize,
        token_budget: usize,
        mixed_prefill: usize,
        max_running: usize,
        max_loras: usize,
        adapter_bytes: usize,
        prefix_caching: bool,
        min_awaited_tokens: usize,
    }

    const BLOCK_BYTES: usize = 50;

    const ROOMY: Limits = Limits {
        num_blocks: 256,
        shared_but: None,
        block_size: 4,
        token_budget: 64,
        mixed_prefill: 64,
        max_running: 16,
        max_loras: 8,
        adapter_bytes: 1 << 20,
        prefix_caching: true,
        min_awaited_tokens: 8,
    };

    impl Bench {
        fn new(limits: Limits) -> Self {
            let config = SchedulerConfig {
                num_blocks: limits.num_blocks,
                min_blocks: limits.shared_but.unwrap_or(limits.num_blocks),
                block_size: limits.block_size,
                token_budget: limits.token_budget,
                mixed_prefill_tokens: limits.mixed_prefill,
                max_running_requests: limits.max_running,
                max_loras_per_batch: limits.max_loras,
                prefix_caching: limits.prefix_caching,
                min_awaited_tokens: limits.min_awaited_tokens,
                eos_token_ids: vec![EOS],
                overtake_limit: 64,
            };
            let capacity = Capacity {
                num_blocks: limits.num_blocks,
                min_blocks: limits.shared_but.unwrap_or(limits.num_blocks),
                block_size: limits.block_size,
                kv_block_bytes: BLOCK_BYTES,
                max_batch_tokens: limits.token_budget,
                adapter_bytes: limits.shared_but.map_or(limits.adapter_bytes, |min_blocks| {
                    limits.adapter_bytes.min((limits.num_blocks - min_blocks) * BLOCK_BYTES)
                }),
                shared_bytes: limits.num_blocks * BLOCK_BYTES,
                max_adapters_per_batch: limits.max_loras,
            };
            Self {
                scheduler: Scheduler::new(config),
                residency: DeviceResidency::new(capacity.clone(), EvictionPolicy::Lru, Arc::default()),
                backend: FakeBackend::new(capacity),
                events: BTreeMap::new(),
                ended: BTreeSet::new(),
                next_id: 0,
                leases: LeaseCount::default(),
                in_flight: None,
                preempted: 0,
            }
        }

        fn add(&mut self, request: GenerationRequest) -> RequestId {
            let request_id = RequestId(self.next_id);
            self.next_id += 1;
            self.events.insert(request_id, Vec::new());
            self.scheduler.add(Sequence::new(request_id, request));
            request_id
        }

        /// What the worker does for a request that comes while it waits for a step.
        fn prefetch(&mut self, request_id: RequestId) -> Option<bool> {
            let mut residency = BackendResidency {
                residency: &mut self.residency,
                backend: &mut self.backend,
            };
            let asked = self.scheduler.prefetch_arrival(request_id, &mut residency);
            asked.expect("no failure is scripted").map(|(_, is_there)| is_there)
        }

        fn request(&self, prompt: Vec<u32>, max_tokens: u32, adapter: Option<&Arc<HostAdapter>>) -> GenerationRequest {
            let lease = adapter.map(|adapter| self.leases.lease("adapter", adapter));
            request(prompt, max_tokens, lease)
        }

        fn schedule(&mut self) -> Option<ScheduledStep> {
            self.residency
                .begin_step(&mut self.backend, &mut self.scheduler.kv_blocks())
                .expect("no failure is scripted");
            let mut residency = BackendResidency {
                residency: &mut self.residency,
                backend: &mut self.backend,
            };
            let schedule = self.scheduler.schedule(&mut residency).expect("no failure is scripted");
            self.preempted += schedule.preempted.len();
            for (request_id, error) in schedule.failed {
                self.record(request_id, TokenEvent::Failed(error));
            }
            schedule.step
        }

        fn commit(&mut self, step: ScheduledStep, output: StepOutput) {
            let mut events = Vec::new();
            self.scheduler.commit(step, output, &mut events).expect("the output belongs to the step");
            for (request_id, event) in events {
                self.record(request_id, event);
            }
        }

        fn record(&mut self, request_id: RequestId, event: TokenEvent) {
            assert!(!self.ended.contains(&request_id), "{request_id:?} got {event:?} after its end");
            if event.is_terminal() {
                self.ended.insert(request_id);
            }
            self.events.get_mut(&request_id).expect("it was added").push(event);
        }

        /// One step; false when nothing ran.
        fn step(&mut self) -> Option<StepBatch> {
            let step = self.schedule()?;
            let batch = step.batch.clone();
            let output = self.backend.execute(&batch).expect("no failure is scripted");
            self.commit(step, output);
            Some(batch)
        }

        /// One step, scheduled before the last one is committed. False when nothing is in flight.
        fn pipelined_step(&mut self) -> bool {
            self.backend.is_pipelined = true;
            let next = self.schedule();
            if let Some(step) = &next {
                self.backend.launch(&step.batch).expect("no failure is scripted");
            }
            if let Some(step) = self.in_flight.take() {
                let output = self.backend.collect().expect("no failure is scripted");
                self.commit(step, output);
            }
            self.in_flight = next;
            self.in_flight.is_some()
        }

        fn run(&mut self) {
            for _ in 0..10_000 {
                if self.scheduler.sequences.is_empty() {
                    return;
                }
                self.step();
            }
            panic!("requests that never end");
        }

        fn assert_memory_is_shared_out(&self) {
            let capacity = self.backend.capacity();
            let num_blocks = self.scheduler.pool().num_blocks();
            assert_eq!(num_blocks, self.backend.num_blocks, "the border is where the backend has it");
            assert!((capacity.min_blocks..=capacity.num_blocks).contains(&num_blocks));
            if capacity.is_shared() {
                let taken = num_blocks * capacity.kv_block_bytes + self.residency.used_bytes();
                assert!(taken <= capacity.shared_bytes, "{taken} bytes of {}", capacity.shared_bytes);
            }
        }

        fn cached_tokens(&self, request_id: RequestId) -> u32 {
            match &self.events[&request_id][0] {
                TokenEvent::Started { cached_tokens, .. } => *cached_tokens,
                event => panic!("{event:?}"),
            }
        }
    }

    /// 20 blocks of 4 positions, 12 of which adapters may have the memory of.
    const SHARED: Limits = Limits {
        num_blocks: 20,
        shared_but: Some(8),
        ..ROOMY
    };

    /// 400 blocks, of all but 8 of which adapters may have the memory.
    const SHARED_AND_LARGE: Limits = Limits {
        num_blocks: 400,
        shared_but: Some(8),
        adapter_bytes: 400 * BLOCK_BYTES,
        ..ROOMY
    };

    #[test]
    fn bytes_are_ready_before_they_are_asked_for_and_go_back_to_sequences_that_need_them() {
        let mut bench = Bench::new(SHARED_AND_LARGE);
        let adapters: Vec<_> = (0..12).map(|number| host_adapter(number, 2 * BLOCK_BYTES)).collect();
        let ask = |bench: &mut Bench, adapter: usize| {
            let request = bench.request(prompt(4), 2, Some(&adapters[adapter]));
            bench.add(request)
        };
        // Of the first one's size nothing was known.
        let first = ask(&mut bench, 0);
        assert_eq!(bench.prefetch(first), None, "every byte is the cache's");
        bench.run();
        bench.schedule();
        assert_eq!(bench.scheduler.pool().num_blocks(), 400 - 2 - 2 * READY_ADAPTERS);
        let moves = bench.backend.border_moves;
        for adapter in 1..=FEWEST_READY {
            let request_id = ask(&mut bench, adapter);
            assert_eq!(bench.prefetch(request_id), Some(true), "it was a miss, and is there at once");
            bench.run();
        }
        assert_eq!(bench.backend.border_moves, moves, "from what was ready");
        let next = ask(&mut bench, FEWEST_READY + 1);
        bench.prefetch(next);
        bench.run();
        bench.schedule();
        assert_eq!(bench.backend.border_moves, moves + 1, "and again for several");
        assert_eq!(bench.residency.evictions(), 0);
        // Prefixes may fill the rest of the cache, but not these bytes.
        let fill = |bench: &mut Bench, tenants: std::ops::Range<u32>, prompt_len: u32, max_tokens: u32| {
            for first in tenants {
                let prompt = (first..first + prompt_len).map(|position| position % 60).collect();
                let mut request = bench.request(prompt, max_tokens, None);
                request.fairness_key = first.to_string().into();
                bench.add(request);
            }
            let mut fewest_ready = usize::MAX;
            while !bench.scheduler.sequences.is_empty() {
                bench.step();
                let taken = bench.scheduler.pool().num_blocks() * BLOCK_BYTES + bench.residency.used_bytes();
                fewest_ready = fewest_ready.min(400 * BLOCK_BYTES - taken);
            }
            fewest_ready
        };
        assert!(fill(&mut bench, 0..60, 40, 4) >= FEWEST_READY * 2 * BLOCK_BYTES, "some are ready");
        assert!(bench.scheduler.pool().num_free() < 20, "{} are free", bench.scheduler.pool().num_free());
        // What runs needs them and gets them: 16 sequences of 49 blocks.
        assert_eq!(fill(&mut bench, 0..16, 96, 100), 0, "none is");
        bench.scheduler.assert_consistent();
    }

    #[test]
    fn a_cache_full_of_idle_prefixes_has_bytes_ready_for_the_next_adapter() {
        let mut bench = Bench::new(SHARED_AND_LARGE);
        let adapters: Vec<_> = (0..40).map(|number| host_adapter(number, 2 * BLOCK_BYTES)).collect();
        let old: Vec<u32> = (0..41).collect();
        ask(&mut bench, old.clone(), None);
        for first in 0..60 {
            ask(&mut bench, other_prompt(first), None);
        }
        assert!(bench.scheduler.pool().num_free() <= 1);
        // The first one's size is not known before it comes; every later one finds its bytes ready, and is on its way before its turn.
        for (number, adapter) in adapters.iter().enumerate() {
            let request = bench.request(prompt(4), 2, Some(adapter));
            let request_id = bench.add(request);
            assert_eq!(bench.prefetch(request_id), (number > 0).then_some(true), "adapter {number}");
            for _ in 0..6 {
                let num_blocks = bench.scheduler.pool().num_blocks();
                bench.step();
                bench.assert_memory_is_shared_out();
                let moved = num_blocks - bench.scheduler.pool().num_blocks();
                assert!(moved <= 6, "{moved} blocks in a step: what moves for them holds everybody up");
            }
            assert!(bench.ended.contains(&request_id));
            let taken = 400 - bench.scheduler.pool().num_blocks();
            assert!(
                taken <= 2 * (number + 1 + READY_ADAPTERS),
                "{taken} blocks for {number}: no more than a few adapters' ahead"
            );
        }
        assert_eq!(bench.residency.evictions(), 0);
        assert_eq!(ask(&mut bench, other_prompt(59), None), 40, "the prefix used last is still there");
        assert_eq!(ask(&mut bench, old, None), 0, "the one used longest ago is not");
        bench.scheduler.assert_consistent();
    }

    #[test]
    fn an_adapter_takes_free_blocks_and_gives_them_back_when_nobody_uses_it() {
        let mut bench = Bench::new(SHARED);
        let adapter = host_adapter(1, 6 * BLOCK_BYTES - 1);
        let request = bench.request(prompt(4), 2, Some(&adapter));
        bench.add(request);
        bench.run();
        assert_eq!(
            (bench.scheduler.pool().num_blocks(), bench.residency.used_bytes()),
            (14, 6 * BLOCK_BYTES - 1)
        );
        // Four sequences of five blocks each.
        let mut expected = BTreeMap::new();
        for first in 0..4 {
            let request = bench.request((first..first + 8).collect(), 12, None);
            let events = expected_events(&request);
            expected.insert(bench.add(request), events);
        }
        bench.run();
        assert_eq!((bench.scheduler.pool().num_blocks(), bench.residency.used_bytes()), (20, 0));
        assert_eq!((bench.residency.evictions(), bench.preempted), (1, 0));
        for (request_id, expected) in expected {
            assert_eq!(bench.events[&request_id], expected);
        }
    }

    #[test]
    fn a_sequence_whose_blocks_move_goes_on_and_its_prefix_is_found_where_it_went() {
        for is_pipelined in [false, true] {
            let mut bench = Bench::new(SHARED);
            let step = |bench: &mut Bench| match is_pipelined {
                true => drop(bench.pipelined_step()),
                false => drop(bench.step()),
            };
            // The first two have the lower blocks, and end while the third still runs.
            for first in [20, 30] {
                let request = bench.request((first..first + 20).collect(), 1, None);
                bench.add(request);
            }
            let mut request = bench.request(prompt(20), 20, None);
            request.sampling.seed = 5;
            let expected = expected_events(&request);
            let moved = bench.add(request);
            for _ in 0..4 {
                step(&mut bench);
            }
            assert_eq!((bench.ended.len(), bench.scheduler.num_running()), (2, 1));
            let adapter = host_adapter(1, 8 * BLOCK_BYTES);
            let request = bench.request(prompt(4), 3, Some(&adapter));
            let expected_other = expected_events(&request);
            let other = bench.add(request);
            while bench.ended.len() < 4 {
                step(&mut bench);
                bench.scheduler.assert_consistent();
            }
            assert!(bench.backend.block_moves > 0, "the third sequence had blocks above the twelfth");
            assert_eq!(bench.scheduler.pool().num_blocks(), 12);
            assert_eq!(bench.events[&moved], expected);
            assert_eq!(bench.events[&other], expected_other);
            while bench.in_flight.is_some() {
                step(&mut bench);
            }
            let request = bench.request(prompt(20), 2, None);
            let again = bench.add(request);
            while bench.ended.len() < 5 {
                step(&mut bench);
            }
            assert_eq!(bench.cached_tokens(again), 16);
            assert_eq!(tokens(&bench.events[&again]), tokens(&expected)[..2]);
        }
    }

    #[test]
    fn an_adapter_takes_no_block_that_a_running_sequence_grows_into() {
        let mut bench = Bench::new(SHARED);
        let sequences: Vec<RequestId> = (0..2)
            .map(|first| {
                let request = bench.request((first..first + 9).collect(), 23, None);
                bench.add(request)
            })
            .collect();
        bench.step();
        // 8 blocks each at the end, 3 now: of the other 14, two are theirs to grow into.
        let (small, large) = (host_adapter(1, 11 * BLOCK_BYTES), host_adapter(2, 12 * BLOCK_BYTES));
        for adapter in [&large, &small] {
            let request = bench.request(prompt(3), 2, Some(adapter));
            bench.add(request);
        }
        while !sequences.iter().all(|request_id| bench.ended.contains(request_id)) {
            bench.step();
        }
        bench.run();
        assert_eq!(bench.preempted, 0);
        assert_eq!(bench.ended.len(), 4, "and everybody is served");
    }

    #[test]
    fn what_is_fetched_ahead_takes_no_block_that_a_request_waits_for() {
        let mut bench = Bench::new(SHARED);
        for first in 0..2 {
            let request = bench.request((first..first + 21).collect(), 11, None);
            bench.add(request);
        }
        bench.step();
        // 8 blocks are left, two of them to grow into: too few for 7 by one.
        let mut request = bench.request(prompt(28), 2, None);
        request.fairness_key = "first".into();
        let first = bench.add(request);
        let adapter = host_adapter(1, 3 * BLOCK_BYTES);
        let mut request = bench.request(prompt(3), 2, Some(&adapter));
        request.fairness_key = "second".into();
        bench.add(request);
        let mut steps = 0;
        while bench.events[&first].is_empty() && bench.scheduler.num_running() == 2 {
            assert_eq!(bench.residency.uploads(), 0);
            bench.step();
            steps += 1;
        }
        assert!(steps > 5, "it waited until the others had ended");
        bench.run();
        assert_eq!((bench.ended.len(), bench.residency.uploads(), bench.preempted), (4, 1, 0));
    }

    /// 41 tokens, others for each `first`.
    fn other_prompt(first: u32) -> Vec<u32> {
        (first..first + 41).map(|position| (7 * position + first) % VOCAB_SIZE).collect()
    }

    /// One request, to its end; its tokens that came from the cache.
    fn ask(bench: &mut Bench, prompt: Vec<u32>, adapter: Option<&Arc<HostAdapter>>) -> u32 {
        let request = bench.request(prompt, 1, adapter);
        let request_id = bench.add(request);
        bench.run();
        bench.scheduler.assert_consistent();
        bench.assert_memory_is_shared_out();
        bench.cached_tokens(request_id)
    }

    #[test]
    fn an_adapter_takes_of_what_was_used_least_recently_and_a_request_fails_when_there_is_nothing() {
        let mut bench = Bench::new(SHARED);
        let adapters: Vec<_> = (0..4).map(|number| host_adapter(number, 6 * BLOCK_BYTES)).collect();
        let state = |bench: &Bench| (bench.residency.evictions(), bench.scheduler.pool().num_cached());
        ask(&mut bench, prompt(41), None);
        ask(&mut bench, vec![1, 2], Some(&adapters[0]));
        assert_eq!(state(&bench), (0, 10), "of free blocks");
        // The prefix is older: of 10 blocks 8 have room beside two adapters.
        ask(&mut bench, vec![1, 2], Some(&adapters[1]));
        assert_eq!(
            (bench.residency.evictions(), bench.scheduler.pool().num_blocks()),
            (0, 8),
            "of the prefix"
        );
        assert_eq!(ask(&mut bench, prompt(29), None), 28, "the end of the long one was dropped first");
        // The older adapter is the oldest now.
        let (_, cached) = state(&bench);
        ask(&mut bench, vec![1, 2], Some(&adapters[2]));
        assert_eq!(state(&bench), (1, cached), "of the adapter used longest ago");
        assert!(bench.backend.resident_versions().contains(&adapters[1].version));
        // Who is used again is not the oldest any more, and pinned ones stay.
        ask(&mut bench, vec![1, 2], Some(&adapters[1]));
        bench.residency.set_pinned(vec![adapters[2].clone()]);
        ask(&mut bench, vec![1, 2], Some(&adapters[3]));
        let resident = [2, 3].map(|number: usize| adapters[number].version);
        assert_eq!(bench.backend.resident_versions(), resident.into());
        bench.residency.set_pinned(Vec::new());
        let too_large = host_adapter(9, 12 * BLOCK_BYTES + 1);
        let request = bench.request(prompt(2), 1, Some(&too_large));
        let failed = bench.add(request);
        bench.run();
        assert!(matches!(&bench.events[&failed][..], [TokenEvent::Failed(RequestError::Adapter { .. })]));
    }

    #[test]
    fn prefixes_take_the_bytes_of_idle_adapters_that_were_used_before_them() {
        for is_pinned in [false, true] {
            let mut bench = Bench::new(SHARED_AND_LARGE);
            let adapters: Vec<_> = (0..20).map(|number| host_adapter(number, 10 * BLOCK_BYTES)).collect();
            for adapter in &adapters {
                ask(&mut bench, vec![1, 2], Some(adapter));
            }
            if is_pinned {
                bench.residency.set_pinned(adapters.clone());
            }
            // One is used all the time, and a prefix, too; sixty others are used once. Nothing that runs needs more than 11 blocks.
            for first in 0..60 {
                ask(&mut bench, other_prompt(first), None);
                ask(&mut bench, vec![1, 2], Some(&adapters[7]));
                ask(&mut bench, prompt(25), None);
            }
            let resident = bench.backend.resident_versions();
            assert!(resident.contains(&adapters[7].version));
            let num_left = 20 - resident.len();
            assert!(
                if is_pinned { num_left == 0 } else { num_left >= 17 },
                "{num_left} have left; pinned ones never do"
            );
            assert_eq!(ask(&mut bench, prompt(25), None), 24);
            assert_eq!(ask(&mut bench, other_prompt(1), None), 0, "the oldest of the prefixes have gone, too");
        }
    }

    #[test]
    fn a_flood_without_adapters_does_not_keep_an_adapter_out() {
        let mut bench = Bench::new(SHARED);
        let mut tenant = 0;
        let mut flood = |bench: &mut Bench| {
            tenant += 1;
            let mut request = bench.request((tenant..tenant + 7).collect(), 4 + tenant % 9, None);
            request.fairness_key = tenant.to_string().into();
            bench.add(request);
        };
        for _ in 0..20 {
            flood(&mut bench);
        }
        bench.step();
        let adapter = host_adapter(1, 12 * BLOCK_BYTES);
        let request = bench.request(prompt(3), 2, Some(&adapter));
        let waits = bench.add(request);
        let mut steps = 0;
        while !bench.ended.contains(&waits) {
            bench.step().expect("work");
            flood(&mut bench);
            steps += 1;
            assert!(steps < 100, "12 of 20 blocks are never free by themselves");
        }
    }

    fn prompt(len: usize) -> Vec<u32> {
        (0..len as u32).map(|position| (7 * position + 1) % VOCAB_SIZE).collect()
    }

    #[test]
    fn a_long_prompt_is_prefilled_in_chunks_beside_decoding() {
        let mut bench = Bench::new(Limits { token_budget: 16, ..ROOMY });
        let first_request = bench.request(prompt(3), 20, None);
        let expected_first = expected_events(&first_request);
        let first = bench.add(first_request);
        bench.step();
        let second_request = bench.request(prompt(40), 1, None);
        let expected_second = expected_events(&second_request);
        let second = bench.add(second_request);
        let rows: Vec<Vec<u32>> = (0..3)
            .map(|_| bench.step().expect("work").sequences.iter().map(|rows| rows.num_rows).collect())
            .collect();
        assert_eq!(rows, [[1, 15], [1, 15], [1, 10]]);
        bench.run();
        assert_eq!(bench.events[&first], expected_first);
        assert_eq!(bench.events[&second], expected_second);
    }

    #[test]
    fn chunks_are_smaller_while_others_decode() {
        let mut bench = Bench::new(Limits {
            token_budget: 16,
            mixed_prefill: 5,
            ..ROOMY
        });
        bench.add(bench.request(prompt(3), 3, None));
        bench.step();
        bench.add(bench.request(prompt(40), 1, None));
        let rows: Vec<Vec<u32>> = (0..4)
            .map(|_| bench.step().expect("work").sequences.iter().map(|rows| rows.num_rows).collect())
            .collect();
        assert_eq!(rows, [vec![1, 5], vec![1, 5], vec![16], vec![14]]);
        bench.run();
    }

    #[test]
    fn rows_are_grouped_by_adapter_and_base_rows_are_in_no_segment() {
        let mut bench = Bench::new(ROOMY);
        let adapters = [host_adapter(1, 100), host_adapter(2, 100)];
        for adapter in [Some(0), None, Some(1), Some(0), None] {
            let request = bench.request(prompt(2), 4, adapter.map(|number: usize| &adapters[number]));
            bench.add(request);
        }
        let batch = bench.step().expect("work");
        let order: Vec<u64> = batch.sequences.iter().map(|rows| rows.request_id.0).collect();
        assert_eq!(order, [1, 4, 0, 3, 2]);
        let segments: Vec<(u32, u32)> = batch.lora_segments.iter().map(|segment| (segment.row_start, segment.num_rows)).collect();
        assert_eq!(segments, [(4, 4), (8, 2)]);
    }

    #[test]
    fn a_prefix_is_cached_for_its_own_version_alone() {
        let mut bench = Bench::new(ROOMY);
        let (old, new, other) = (host_adapter(1, 100), host_adapter(2, 100), host_adapter(3, 100));
        let run = |bench: &mut Bench, adapter: Option<&Arc<HostAdapter>>| {
            let request = bench.request(prompt(17), 3, adapter);
            let expected = expected_events(&request);
            let request_id = bench.add(request);
            bench.run();
            assert_eq!(without_cached_tokens(bench.events[&request_id].clone()), expected);
            bench.cached_tokens(request_id)
        };
        assert_eq!(run(&mut bench, Some(&old)), 0);
        assert_eq!(run(&mut bench, Some(&other)), 0, "never used by another adapter");
        assert_eq!(run(&mut bench, None), 0, "nor by the base model");
        assert_eq!(run(&mut bench, Some(&new)), 0, "nor by another version, though it has the same name here");
        for adapter in [Some(&old), Some(&other), None, Some(&new)] {
            assert_eq!(run(&mut bench, adapter), 16, "but by its own");
        }
        bench.scheduler.flush_cache();
        assert_eq!(run(&mut bench, Some(&old)), 0, "not after a flush");
    }

    #[test]
    fn a_prompt_asked_for_many_times_at_once_is_computed_once() {
        let mut bench = Bench::new(ROOMY);
        let long: Vec<RequestId> = (0..4)
            .map(|seed| {
                let mut request = bench.request(prompt(41), 5, None);
                request.sampling.temperature = 1.0;
                request.sampling.seed = seed;
                bench.add(request)
            })
            .collect();
        let rows: Vec<usize> = (0..2).map(|_| bench.step().expect("work").token_ids.len()).collect();
        assert_eq!(rows, [41, 1 + 3], "the first computes it, the others their last token");
        bench.run();
        let cached: Vec<u32> = long.iter().map(|request_id| bench.cached_tokens(*request_id)).collect();
        assert_eq!(cached, [0, 40, 40, 40]);
    }

    #[test]
    fn nobody_waits_for_a_prefix_that_will_not_come() {
        let mut bench = Bench::new(Limits { token_budget: 16, ..ROOMY });
        let requests: Vec<RequestId> = (0..2)
            .map(|_| {
                let request = bench.request(prompt(41), 5, None);
                bench.add(request)
            })
            .collect();
        bench.step();
        assert_eq!(bench.scheduler.num_waiting(), 1);
        assert!(bench.scheduler.remove(requests[0]));
        let batch = bench.step().expect("the second goes on by itself");
        assert_eq!(batch.positions[0], 16, "from what the first had computed before it was cancelled");
    }

    #[test]
    fn one_token_of_a_cached_prompt_is_always_computed() {
        let mut bench = Bench::new(ROOMY);
        for expected in [0, 12] {
            let request = bench.request(prompt(16), 2, None);
            let request_id = bench.add(request);
            bench.run();
            assert_eq!(bench.cached_tokens(request_id), expected, "the fourth block has the last token");
        }
    }

    #[test]
    fn output_is_cached_for_the_next_turn_of_a_conversation() {
        let mut bench = Bench::new(ROOMY);
        let request = bench.request(prompt(6), 11, None);
        let first = bench.add(request);
        bench.run();
        let mut next_prompt = prompt(6);
        next_prompt.extend(tokens(&bench.events[&first]));
        next_prompt.push(1);
        let request = bench.request(next_prompt, 2, None);
        let second = bench.add(request);
        bench.run();
        assert_eq!(bench.cached_tokens(second), 16, "6 + 11 tokens, of which the last was never an input");
    }

    #[test]
    fn prompt_log_probabilities_are_computed_where_a_cached_prefix_has_none() {
        let mut bench = Bench::new(ROOMY);
        for (start, expected_cached) in [(None, 0), (None, 16), (Some(0), 0), (Some(9), 8), (Some(8), 4), (Some(18), 16)] {
            let mut request = bench.request(prompt(18), 2, None);
            request.logprobs = LogprobsParams {
                output_top_k: Some(1),
                prompt: start.map(|start| PromptLogprobsParams { start, top_k: 2 }),
            };
            let expected = expected_events(&request);
            let request_id = bench.add(request);
            bench.run();
            assert_eq!(bench.cached_tokens(request_id), expected_cached, "start {start:?}");
            assert_eq!(without_cached_tokens(bench.events[&request_id].clone()), expected, "start {start:?}");
        }
    }

    #[test]
    fn a_request_for_no_tokens_gives_its_prompt_log_probabilities() {
        let mut bench = Bench::new(ROOMY);
        let mut request = bench.request(prompt(70), 0, None);
        request.logprobs.prompt = Some(PromptLogprobsParams { start: 1, top_k: 0 });
        let expected = expected_events(&request);
        assert!(matches!(&expected[0], TokenEvent::Started { prompt_logprobs, .. } if prompt_logprobs.len() == 69));
        let request_id = bench.add(request);
        bench.run();
        assert_eq!(bench.events[&request_id], expected);
    }

    #[test]
    fn preemption_changes_no_output_and_reports_nothing_twice() {
        let mut bench = Bench::new(Limits { num_blocks: 12, ..ROOMY });
        let mut expected = BTreeMap::new();
        for _ in 0..3 {
            let mut request = bench.request(prompt(9), 28, None);
            request.logprobs = LogprobsParams {
                output_top_k: Some(1),
                prompt: Some(PromptLogprobsParams { start: 2, top_k: 1 }),
            };
            request.sampling.frequency_penalty = 1.0;
            let events = expected_events(&request);
            expected.insert(bench.add(request), events);
        }
        bench.run();
        assert!(bench.preempted > 0, "three sequences of 10 blocks in 12");
        for (request_id, expected) in expected {
            assert_eq!(without_cached_tokens(bench.events[&request_id].clone()), expected);
        }
        assert_eq!(bench.scheduler.counters().preemptions, bench.preempted as u64);
    }

    #[test]
    fn a_request_whose_adapter_is_on_its_way_holds_nobody_up() {
        let mut bench = Bench::new(ROOMY);
        bench.backend.upload_polls = 5;
        let adapter = host_adapter(1, 100);
        let slow_request = bench.request(prompt(4), 1, Some(&adapter));
        let slow = bench.add(slow_request);
        let request = bench.request(prompt(4), 3, None);
        let base = bench.add(request);
        for _ in 0..3 {
            bench.step().expect("the base request runs");
        }
        assert!(bench.ended.contains(&base) && bench.events[&slow].is_empty());
        bench.run();
        assert_eq!(tokens(&bench.events[&slow]).len(), 1);
    }

    /// Four sequences decode. Prompts come at the first of each pair, each with an adapter of its own that is on the way for as long as the second
    /// says (in microseconds of what steps take on an H100). Gives back how many steps had several prompts, and how many of those a late one; and
    /// the most steps that began without a prompt whose adapter was there.
    fn run_late_prompts(arrivals: &[(u64, u64)]) -> [usize; 3] {
        const STEP: u64 = 5600;
        const PROMPT: u64 = 1700;
        let mut bench = Bench::new(Limits {
            num_blocks: 4096,
            token_budget: 512,
            mixed_prefill: 512,
            max_running: 32,
            max_loras: 32,
            ..ROOMY
        });
        bench.backend.upload_polls = usize::MAX;
        for first in 0..4 {
            let request = bench.request(vec![first, 1, 2], 2000, None);
            bench.add(request);
        }
        bench.pipelined_step();
        let (mut now, mut next) = (0, 0);
        let mut num_prompts_in_flight = 0;
        // Of those that have not begun: their adapters, when these are there, and the steps that began since.
        let mut waiting: BTreeMap<RequestId, (VersionId, u64, usize)> = BTreeMap::new();
        let mut late = BTreeSet::new();
        let [mut several, mut several_late, mut most_waited] = [0; 3];
        while next < arrivals.len() || !waiting.is_empty() {
            let many_wait = waiting.len() > FEW_WAITING;
            for (version, _, _) in waiting.values().filter(|(_, there_at, _)| *there_at <= now) {
                bench.backend.end_upload(*version);
            }
            // Scheduled while the one before runs.
            assert!(bench.pipelined_step(), "four decode");
            bench.scheduler.assert_consistent();
            let batch = &bench.in_flight.as_ref().expect("a step").batch;
            let prompts: Vec<RequestId> = batch
                .sequences
                .iter()
                .filter(|rows| rows.num_rows > 1)
                .map(|rows| rows.request_id)
                .collect();
            several += usize::from(prompts.len() > 1);
            let excused = |request_id: &RequestId| many_wait || waiting[request_id].2 >= MOST_YIELDS as usize;
            several_late += usize::from(prompts.len() > 1 && prompts.iter().any(|id| late.contains(id) && !excused(id)));
            for request_id in &prompts {
                let (_, _, steps) = waiting.remove(request_id).expect("it waited until now");
                most_waited = most_waited.max(steps);
            }
            for (request_id, (_, there_at, steps)) in &mut waiting {
                late.insert(*request_id);
                *steps += usize::from(*there_at <= now);
            }
            now += STEP + PROMPT * num_prompts_in_flight;
            num_prompts_in_flight = prompts.len() as u64;
            while let Some((arrival, upload)) = arrivals.get(next).filter(|(arrival, _)| *arrival <= now) {
                let adapter = host_adapter(next as u32, 100);
                let request = bench.request(prompt(32), 2, Some(&adapter));
                let request_id = bench.add(request);
                bench.prefetch(request_id).expect("there is room");
                waiting.insert(request_id, (adapter.version, arrival + upload, 0));
                next += 1;
            }
        }
        [several, several_late, most_waited]
    }

    #[test]
    fn a_prompt_that_its_adapter_made_late_meets_no_other_one_in_a_step() {
        let mut rng = Rng(5);
        let regular: Vec<(u64, u64)> = (0..300).map(|number| (number * 10_000, 0)).collect();
        assert_eq!(run_late_prompts(&regular), [0, 0, 0], "without uploads none meet");
        // One in three goes through a stage.
        let mut upload = || if rng.one_in(3) { 8_000 } else { 2_200 };
        let uploaded: Vec<(u64, u64)> = regular.iter().map(|(arrival, _)| (*arrival, upload())).collect();
        let [several, _, most_waited] = run_late_prompts(&uploaded);
        assert_eq!(several, 0, "nor with them");
        assert!((1..MOST_YIELDS as usize).contains(&most_waited), "some waited {most_waited} steps");
        let (mut random, mut at) = (Vec::new(), 0.0);
        for _ in 0..600 {
            at -= 10_000.0 * ((1 + rng.below(1 << 20)) as f64 / (1 << 20) as f64).ln();
            random.push((at as u64, if rng.one_in(3) { 8_000 } else { 2_200 }));
        }
        let [several, several_late, most_waited] = run_late_prompts(&random);
        assert!(several > 20, "prompts that come together are computed together: {several} times");
        assert_eq!(several_late, 0);
        assert!(most_waited <= MOST_YIELDS as usize, "one waited {most_waited} steps");
    }

    #[test]
    fn prompts_whose_adapters_had_to_be_read_meet_no_other_one_in_a_step() {
        let prompts_of_steps = |had_to_be_read: bool| {
            let mut bench = Bench::new(Limits { token_budget: 256, ..ROOMY });
            let decoding = bench.request(prompt(3), 30, None);
            bench.add(decoding);
            bench.step();
            let adapters: Vec<_> = (0..3).map(|number| host_adapter(number, 100)).collect();
            for adapter in &adapters {
                // On the device from here on.
                let first = bench.request(prompt(8), 1, Some(adapter));
                bench.add(first);
                bench.step();
            }
            for adapter in &adapters {
                let mut request = bench.request(prompt(8), 4, Some(adapter));
                if had_to_be_read {
                    request.adapter = request.adapter.map(AdapterLease::after_load);
                }
                bench.add(request);
            }
            let mut prompts = Vec::new();
            for _ in 0..4 {
                let batch = bench.step().expect("one decodes");
                prompts.push(batch.sequences.iter().filter(|rows| rows.num_rows > 1).count());
            }
            bench.run();
            prompts
        };
        assert_eq!(prompts_of_steps(false), [3, 0, 0, 0]);
        assert_eq!(prompts_of_steps(true), [1, 1, 1, 0]);
    }

    #[test]
    fn late_prompts_go_together_where_many_wait_or_nobody_decodes() {
        for (num_late, num_decoding, expected) in [(FEW_WAITING, 1, 1), (FEW_WAITING + 1, 1, FEW_WAITING + 1), (FEW_WAITING, 0, FEW_WAITING)] {
            let mut bench = Bench::new(Limits { token_budget: 256, ..ROOMY });
            bench.backend.upload_polls = 2;
            for _ in 0..num_decoding {
                let request = bench.request(prompt(3), 30, None);
                bench.add(request);
                bench.step();
            }
            for number in 0..num_late {
                let request = bench.request(prompt(8), 4, Some(&host_adapter(number as u32, 100)));
                bench.add(request);
            }
            let mut num_prompts = 0;
            for _ in 0..10 {
                let batch = bench.step();
                num_prompts = batch.map_or(0, |batch| batch.sequences.iter().filter(|rows| rows.num_rows > 1).count());
                if num_prompts > 0 {
                    break;
                }
            }
            assert_eq!(num_prompts, expected, "{num_late} late, {num_decoding} decoding");
            bench.run();
        }
    }

    #[test]
    fn an_adapter_that_never_fits_fails_its_request_alone() {
        let mut bench = Bench::new(Limits {
            adapter_bytes: 1000,
            ..ROOMY
        });
        let (large, small) = (host_adapter(1, 1001), host_adapter(2, 1000));
        let large_request = bench.request(prompt(4), 1, Some(&large));
        let failed = bench.add(large_request);
        let small_request = bench.request(prompt(4), 1, Some(&small));
        let served = bench.add(small_request);
        bench.run();
        assert!(matches!(&bench.events[&failed][..], [TokenEvent::Failed(RequestError::Adapter { .. })]));
        assert_eq!(bench.events[&served].len(), 3);
        assert_eq!(bench.leases.get(), 0);
    }

    #[test]
    fn more_running_adapters_than_a_step_may_have_take_turns() {
        let mut bench = Bench::new(Limits { max_loras: 3, ..ROOMY });
        let adapters: Vec<_> = (0..8).map(|number| host_adapter(number, 100)).collect();
        for adapter in &adapters {
            let request = bench.request(prompt(3), 30, Some(adapter));
            bench.add(request);
        }
        let request = bench.request(prompt(3), 30, None);
        bench.add(request);
        let mut last_turn: BTreeMap<RequestId, usize> = BTreeMap::new();
        for step in 0..60 {
            let batch = bench.step().expect("work");
            assert!(batch.lora_segments.len() == 3, "as many as may be");
            for rows in &batch.sequences {
                let waited = step - last_turn.insert(rows.request_id, step).unwrap_or(0);
                assert!(waited <= 3, "{:?} waited {waited} steps", rows.request_id);
            }
            let runs = |id: u64| batch.sequences.iter().any(|rows| rows.request_id.0 == id);
            assert!(step >= 30 || runs(8), "base rows are in every step");
        }
        assert_eq!(last_turn.len(), 9);
    }

    #[test]
    fn a_hot_adapter_does_not_starve_the_others() {
        let mut bench = Bench::new(Limits {
            max_running: 4,
            max_loras: 2,
            ..ROOMY
        });
        let hot = host_adapter(0, 100);
        let cold: Vec<_> = (1..6).map(|number| host_adapter(number, 100)).collect();
        for _ in 0..200 {
            let request = bench.request(prompt(3), 8, Some(&hot));
            bench.add(request);
        }
        bench.step();
        let cold: Vec<RequestId> = cold
            .iter()
            .map(|adapter| {
                let request = bench.request(prompt(3), 8, Some(adapter));
                bench.add(request)
            })
            .collect();
        let mut steps = 0;
        while !cold.iter().all(|request_id| bench.ended.contains(request_id)) {
            bench.step().expect("work");
            steps += 1;
            assert!(
                steps < 60,
                "200 hot requests take 400 steps and more, five cold ones should not wait for them"
            );
            // The hot adapter's queue never empties.
            let request = bench.request(prompt(3), 8, Some(&hot));
            bench.add(request);
        }
        assert!(bench.ended.len() > cold.len(), "and the hot one is served beside them");
    }

    #[test]
    fn an_adapter_s_prompts_fill_a_step_and_the_next_step_is_another_s() {
        let mut bench = Bench::new(Limits {
            token_budget: 16,
            prefix_caching: false,
            ..ROOMY
        });
        for number in [1, 2] {
            let adapter = host_adapter(number, 100);
            for _ in 0..8 {
                let request = bench.request(prompt(4), 1, Some(&adapter));
                bench.add(request);
            }
        }
        let mut admitted = |_| -> Vec<u64> {
            let batch = bench.step().expect("work");
            batch.sequences.iter().map(|rows| rows.request_id.0).collect()
        };
        // 16 tokens of prompts in a step; the four of output are taken off the next round, and so each has three requests in that.
        let steps: Vec<_> = (0..4).map(&mut admitted).collect();
        assert_eq!(steps[..2], [[0, 1, 2, 3], [8, 9, 10, 11]]);
        assert_eq!(steps[2..], [[4, 5, 6, 12], [7, 13, 14, 15]]);
    }

    #[test]
    fn more_waiting_adapters_than_a_step_may_have_get_the_same() {
        for num_adapters in [3, 12] {
            let mut bench = Bench::new(Limits {
                token_budget: 16,
                max_running: 4,
                max_loras: 2,
                prefix_caching: false,
                ..ROOMY
            });
            // 11 tokens each.
            let mut requests: Vec<Vec<RequestId>> = Vec::new();
            for number in 0..num_adapters {
                let adapter = host_adapter(number, 100);
                let ask = |_| {
                    let request = bench.request(prompt(3), 8, Some(&adapter));
                    bench.add(request)
                };
                requests.push((0..30).map(ask).collect());
            }
            let mut steps = 0;
            loop {
                bench.step();
                let waits = |request_id: &RequestId| {
                    let sequence = bench.scheduler.sequences.get(request_id);
                    sequence.is_some_and(|sequence| !bench.scheduler.is_running(sequence))
                };
                if requests.iter().any(|of_adapter| !of_adapter.iter().any(&waits)) {
                    break;
                }
                let served = |request_id: &RequestId| 3 + tokens(&bench.events[request_id]).len();
                let served = requests
                    .iter()
                    .map(|of_adapter| of_adapter.iter().filter(|id| !waits(id)).map(served).sum::<usize>());
                let (least, most) = served.fold((usize::MAX, 0), |(least, most), served| (least.min(served), most.max(served)));
                // The quantum, and four requests that run.
                assert!(
                    most < least + 16 + 4 * 11,
                    "{least} and {most} tokens of {num_adapters} adapters after {steps} steps"
                );
                steps += 1;
            }
            assert!(steps > 20 * num_adapters, "{steps} steps while all waited");
            bench.run();
        }
    }

    #[test]
    fn fresh_tenants_overtake_a_request_only_so_often_however_many_a_step_admits() {
        for num_before in 0..2 {
            let mut bench = Bench::new(Limits {
                max_running: 2,
                prefix_caching: false,
                ..ROOMY
            });
            let ask = |bench: &mut Bench, tenant: &str, len| {
                let mut request = bench.request(prompt(len), 1, None);
                request.fairness_key = tenant.into();
                bench.add(request)
            };
            // The number of those admitted is even at the beginning of each step, or odd.
            for _ in 0..num_before {
                ask(&mut bench, "before", 3);
                bench.run();
            }
            // More than a quantum.
            ask(&mut bench, "old", 70);
            bench.step();
            let old = ask(&mut bench, "old", 3);
            let mut num_fresh = 0;
            while !bench.ended.contains(&old) {
                for _ in 0..2 {
                    num_fresh += 1;
                    ask(&mut bench, &num_fresh.to_string(), 3);
                }
                bench.step();
                assert!(num_fresh <= 64 + 10, "{num_fresh} came and went");
            }
            assert!(num_fresh > 64, "it had its turn before it was overdue");
        }
    }

    #[test]
    fn a_device_too_small_for_all_adapters_serves_each_in_turn() {
        // Room for two of six adapters, and requests that never stop coming for two of them under ever new tenants.
        // Their lengths differ, so that neither is ever without a running sequence by itself.
        let mut bench = Bench::new(Limits {
            max_running: 6,
            adapter_bytes: 200,
            ..ROOMY
        });
        let adapters: Vec<_> = (0..6).map(|number| host_adapter(number, 100)).collect();
        let mut tenant = 0;
        let mut add_hot = |bench: &mut Bench| {
            tenant += 1;
            let mut request = bench.request(prompt(3), 2 + (tenant / 2 % 5) as u32, Some(&adapters[tenant % 2]));
            request.fairness_key = tenant.to_string().into();
            bench.add(request)
        };
        for _ in 0..8 {
            add_hot(&mut bench);
        }
        bench.step();
        let cold: Vec<RequestId> = (2..6)
            .map(|number| {
                let request = bench.request(prompt(3), 3, Some(&adapters[number]));
                bench.add(request)
            })
            .collect();
        let mut steps = 0;
        while !cold.iter().all(|request_id| bench.ended.contains(request_id)) {
            bench.step();
            add_hot(&mut bench);
            add_hot(&mut bench);
            steps += 1;
            assert!(steps < 200, "waited for {cold:?}, ended {:?}", bench.ended);
        }
    }

    #[test]
    fn one_step_ahead_wastes_no_row_when_the_end_is_known_and_one_when_it_is_not() {
        let mut stopped = 0;
        for first_token in 0..30 {
            let mut bench = Bench::new(ROOMY);
            let mut request = bench.request(vec![first_token, 1, 2], 40, None);
            request.sampling.ignore_eos = false;
            let expected = expected_events(&request);
            let request_id = bench.add(request);
            let mut rows = 0;
            while !bench.scheduler.sequences.is_empty() || bench.in_flight.is_some() {
                bench.pipelined_step();
                rows += bench.in_flight.as_ref().map_or(0, |step| step.batch.token_ids.len());
            }
            assert_eq!(bench.events[&request_id], expected);
            let needed = 3 + tokens(&expected).len() - 1;
            let is_stopped = tokens(&expected).last() == Some(&EOS) && tokens(&expected).len() < 40;
            stopped += usize::from(is_stopped);
            assert_eq!(rows, needed + usize::from(is_stopped));
        }
        assert!((1..30).contains(&stopped), "both kinds of end: {stopped}");
    }

    /// Arrivals, cancels, adapters, tiny pools, chunks, slow uploads, evictions; one step after another or one ahead.
    ///
    /// Gives back how often the border between blocks and adapters moved, and blocks because of it.
    fn random_run(seed: u64) -> [usize; 2] {
        let mut rng = Rng(seed);
        let block_size = 1 + rng.below(5);
        let max_len: usize = 24;
        let min_blocks = (2 * max_len).div_ceil(block_size);
        let token_budget = 4 + rng.below(28);
        let num_adapters = 1 + rng.below(6);
        // Small ones are those that bytes are kept ready for.
        let smallest = if rng.one_in(2) { 100 } else { 10 };
        let adapter_bytes: Vec<usize> = (0..num_adapters).map(|_| smallest + rng.below(2 * smallest)).collect();
        let mut bench = Bench::new(Limits {
            num_blocks: min_blocks + rng.below(2 * min_blocks),
            shared_but: (seed % 2 == 1).then_some(min_blocks),
            block_size,
            token_budget,
            mixed_prefill: 1 + rng.below(32),
            max_running: 1 + rng.below(token_budget.min(8)),
            max_loras: 1 + rng.below(3),
            adapter_bytes: 300 + rng.below(600),
            prefix_caching: !rng.one_in(4),
            min_awaited_tokens: 1 + rng.below(24),
        });
        bench.backend.upload_polls = rng.below(4);
        let is_pipelined = rng.one_in(2);
        let adapters: Vec<_> = adapter_bytes
            .iter()
            .enumerate()
            .map(|(number, bytes)| host_adapter(number as u32, *bytes))
            .collect();
        if rng.one_in(4) {
            bench.residency.set_pinned(vec![adapters[0].clone()]);
        }
        let mut expected = BTreeMap::new();
        let mut cancelled = BTreeSet::new();
        let num_requests = 10 + rng.below(40);
        let mut idle_steps = 0;
        while bench.next_id < num_requests as u64 || !bench.scheduler.sequences.is_empty() {
            while bench.next_id < num_requests as u64 && rng.one_in(3) {
                let adapter = rng.below(num_adapters + 1);
                let lease = adapters.get(adapter).map(|adapter| bench.leases.lease("adapter", adapter));
                let request = random_request(&mut rng, max_len, max_len, lease);
                let events = expected_events(&request);
                let request_id = bench.add(request);
                if rng.one_in(2) {
                    bench.prefetch(request_id);
                    bench.assert_memory_is_shared_out();
                }
                expected.insert(request_id, events);
            }
            if rng.one_in(10) && bench.next_id > 0 {
                let request_id = RequestId(rng.below(bench.next_id as usize) as u64);
                if bench.scheduler.remove(request_id) {
                    cancelled.insert(request_id);
                    bench.ended.insert(request_id);
                }
            }
            let ran = if is_pipelined { bench.pipelined_step() } else { bench.step().is_some() };
            bench.scheduler.assert_consistent();
            bench.assert_memory_is_shared_out();
            idle_steps = if ran { 0 } else { idle_steps + 1 };
            assert!(
                idle_steps < 50 || bench.scheduler.sequences.is_empty(),
                "{} requests wait and nothing runs",
                bench.scheduler.num_waiting()
            );
        }
        while bench.in_flight.is_some() {
            bench.pipelined_step();
        }
        for (request_id, expected) in expected {
            let events = without_cached_tokens(bench.events[&request_id].clone());
            if cancelled.contains(&request_id) {
                assert!(expected.starts_with(&events), "{request_id:?} until it was cancelled");
            } else if !matches!(events[..], [TokenEvent::Failed(RequestError::Adapter { .. })]) {
                assert_eq!(events, expected, "{request_id:?}");
            }
        }
        assert_eq!(bench.leases.get(), 0, "leases");
        assert_eq!(bench.scheduler.pool().num_used(), 0, "blocks");
        assert_eq!(bench.scheduler.num_running() + bench.scheduler.num_waiting(), 0);
        assert!(bench.scheduler.running_adapters.is_empty());
        assert!(bench.residency.used_bytes() <= bench.residency.capacity_bytes());
        [bench.backend.border_moves, bench.backend.block_moves]
    }

    #[test]
    fn long_random_runs_conserve_everything_and_every_request_gets_its_own_output_once() {
        let (first, runs) = match std::env::var("POLYLORA_SEED") {
            Ok(seed) => (seed.parse().expect("POLYLORA_SEED is a number"), 1),
            Err(_) => (0, 400),
        };
        let mut moves = [0, 0];
        for seed in first..first + runs {
            match std::panic::catch_unwind(|| random_run(seed)) {
                Ok(more) => moves = [moves[0] + more[0], moves[1] + more[1]],
                Err(panic) => {
                    eprintln!("failed with POLYLORA_SEED={seed}");
                    std::panic::resume_unwind(panic);
                }
            }
        }
        assert!(
            runs == 1 || moves[0] > 500 && moves[1] > 100,
            "the border moved {} times, blocks {}",
            moves[0],
            moves[1]
        );
    }
}
