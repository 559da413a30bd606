//! [`FakeBackend`] and what it should give: for tests of the scheduler, the worker and the engine.
//!
//! The fake's KV cache holds, for each slot, what a real one's content depends on: the weights it was written under, its position, and a
//! hash of every token before it, read from the cache itself. A slot that is stale, of another adapter, of another sequence or not
//! written at all is found when it is read, and would change every later token besides. Blocks move when the steps before have run, and
//! what lies above the border to the adapters' memory is gone then.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
        mpsc::{Receiver, Sender},
    },
};

use crate::{
    adapter::{AdapterLease, AlignedBytes, HostAdapter, PackedDtype, VersionId},
    backend::{Backend, BackendError, Capacity, Launched},
    batch::{AdapterHandle, SampleOutput, SampleRow, StepBatch, StepOutput, TokenCount},
    block_pool::BlockMove,
    request::{FinishReason, GenerationRequest, LogprobsParams, PromptLogprobsParams, SamplingParams, TokenEvent, TokenLogprobs},
};

pub const VOCAB_SIZE: u32 = 61;
pub const EOS: u32 = 3;

/// SplitMix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

fn combine(hash: u64, value: u64) -> u64 {
    mix(hash.rotate_left(7) ^ mix(value.wrapping_add(1)))
}

fn root_hash(version: Option<VersionId>) -> u64 {
    version.map_or(1, |version| version.0.iter().fold(2, |hash, byte| combine(hash, u64::from(*byte))))
}

/// A version that differs from others in its first bytes.
pub fn version(number: u32) -> VersionId {
    let mut bytes = [0; 32];
    bytes[..4].copy_from_slice(&number.to_be_bytes());
    VersionId(bytes)
}

pub fn host_adapter(number: u32, bytes: usize) -> Arc<HostAdapter> {
    Arc::new(HostAdapter {
        version: version(number),
        dtype: PackedDtype::F32,
        modules: Vec::new(),
        replaced: Vec::new(),
        token_rows: Vec::new(),
        resized_vocab: None,
        companion: None,
        blob: Arc::new(AlignedBytes::zeroed(bytes)),
        max_lora_rank: 8,
    })
}

/// Counts leases that live.
#[derive(Clone, Default)]
pub struct LeaseCount(Arc<AtomicUsize>);

impl LeaseCount {
    pub fn get(&self) -> usize {
        self.0.load(SeqCst)
    }

    pub fn lease(&self, name: &str, adapter: &Arc<HostAdapter>) -> AdapterLease {
        struct Hold(Arc<AtomicUsize>);
        impl Drop for Hold {
            fn drop(&mut self) {
                self.0.fetch_sub(1, SeqCst);
            }
        }
        self.0.fetch_add(1, SeqCst);
        AdapterLease::detached(name.into(), adapter.clone(), Some(Arc::new(Hold(self.0.clone()))))
    }
}

/// A greedy request for `max_tokens` tokens that end-of-sequence does not cut short.
pub fn request(prompt_tokens: Vec<u32>, max_tokens: u32, adapter: Option<AdapterLease>) -> GenerationRequest {
    GenerationRequest {
        prompt_tokens,
        sampling: SamplingParams {
            max_tokens,
            temperature: 0.0,
            ignore_eos: true,
            ..SamplingParams::default()
        },
        adapter,
        logprobs: LogprobsParams::default(),
        constraint: None,
        fairness_key: "".into(),
    }
}

/// A request with every setting that the engine itself acts on drawn at random.
pub fn random_request(rng: &mut Rng, max_prompt: usize, max_output: usize, adapter: Option<AdapterLease>) -> GenerationRequest {
    // Few distinct prefixes, so that the cache is hit.
    let family = rng.below(3) as u32;
    let prompt_len = 1 + rng.below(max_prompt);
    let common = rng.below(prompt_len + 1);
    let prompt_tokens = (0..prompt_len)
        .map(|position| match position < common {
            true => (family * 7 + position as u32) % VOCAB_SIZE,
            false => rng.below(VOCAB_SIZE as usize) as u32,
        })
        .collect();
    let max_tokens = rng.below(max_output + 1) as u32;
    let sampling = SamplingParams {
        max_tokens,
        min_tokens: if rng.one_in(3) { max_tokens / 2 } else { 0 },
        temperature: rng.below(2) as f32,
        frequency_penalty: if rng.one_in(4) { 0.5 } else { 0.0 },
        repetition_penalty: if rng.one_in(4) { 1.5 } else { 1.0 },
        stop_token_ids: if rng.one_in(3) { vec![5] } else { Vec::new() },
        ignore_eos: rng.one_in(2),
        seed: rng.next(),
        ..SamplingParams::default()
    };
    let logprobs = LogprobsParams {
        output_top_k: rng.one_in(3).then_some(2),
        prompt: rng.one_in(4).then(|| PromptLogprobsParams {
            start: rng.below(prompt_len + 1) as u32,
            top_k: 1,
        }),
    };
    GenerationRequest {
        prompt_tokens,
        sampling,
        adapter,
        logprobs,
        constraint: None,
        fairness_key: ["", "tenant a", "tenant b"][rng.below(3)].into(),
    }
}

fn logprobs(hash: u64, token_id: u32, top_k: u32) -> TokenLogprobs {
    let value = |number: u64| -((mix(hash ^ number) % 1000) as f32) / 100.0;
    TokenLogprobs {
        token_id,
        logprob: value(u64::from(token_id)),
        top: (0..top_k).map(|place| (place, value(1000 + u64::from(place)))).collect(),
    }
}

/// The fake model: a token from the hash of all tokens before and all that the request asks for.
fn choose(hash: u64, params: &SamplingParams, output_position: u32, counts: &[TokenCount], forbidden: &[u32], mask: Option<&[u32]>) -> Option<u32> {
    let mut hash = hash;
    if params.temperature > 0.0 {
        hash = combine(combine(hash, params.seed), u64::from(output_position));
    }
    let mut counts = counts.to_vec();
    counts.sort_unstable_by_key(|count| count.token_id);
    for count in counts {
        hash = combine(
            hash,
            u64::from(count.token_id) << 32 | u64::from(count.in_output) << 1 | u64::from(count.in_prompt),
        );
    }
    let allowed = |token: &u32| {
        let masked = mask.is_some_and(|mask| mask[*token as usize / 32] >> (token % 32) & 1 == 0);
        !masked && !forbidden.contains(token)
    };
    (0..VOCAB_SIZE)
        .map(|offset| (hash % u64::from(VOCAB_SIZE)) as u32 + offset)
        .map(|token| token % VOCAB_SIZE)
        .find(allowed)
}

/// Every event that a request without a constraint should have, but for how many tokens come from the cache: worked out from the
/// request alone, without an engine.
pub fn expected_events(request: &GenerationRequest) -> Vec<TokenEvent> {
    let sampling = &request.sampling;
    let version = request.adapter.as_ref().map(AdapterLease::version);
    let mut hash = root_hash(version);
    let mut prompt_logprobs = Vec::new();
    for (position, token) in request.prompt_tokens.iter().enumerate() {
        if let Some(prompt) = request.logprobs.prompt
            && position > 0
            && position >= prompt.start as usize
        {
            prompt_logprobs.push(logprobs(hash, *token, prompt.top_k));
        }
        hash = combine(hash, u64::from(*token));
    }
    let mut events = vec![TokenEvent::Started {
        cached_tokens: 0,
        prompt_logprobs,
    }];
    let has_penalty = sampling.repetition_penalty != 1.0 || sampling.frequency_penalty != 0.0 || sampling.presence_penalty != 0.0;
    let mut counts: BTreeMap<u32, TokenCount> = BTreeMap::new();
    let entry = |counts: &mut BTreeMap<u32, TokenCount>, token_id: u32, in_output: u32, in_prompt: bool| {
        let count = counts.entry(token_id).or_insert(TokenCount {
            token_id,
            in_output: 0,
            in_prompt: false,
        });
        count.in_output += in_output;
        count.in_prompt |= in_prompt;
    };
    if sampling.repetition_penalty != 1.0 {
        request.prompt_tokens.iter().for_each(|token| entry(&mut counts, *token, 0, true));
    }
    let mut reason = FinishReason::Length;
    for output_position in 0..sampling.max_tokens {
        let mut ends = sampling.stop_token_ids.clone();
        if !sampling.ignore_eos {
            ends.push(EOS);
        }
        let forbidden = if output_position < sampling.min_tokens { ends.as_slice() } else { &[] };
        let current: Vec<TokenCount> = counts.values().copied().collect();
        let token_id = choose(hash, sampling, output_position, &current, forbidden, None).expect("the vocabulary is larger than what is forbidden");
        let logprobs = request.logprobs.output_top_k.map(|top_k| logprobs(hash, token_id, top_k));
        events.push(TokenEvent::Token { token_id, logprobs });
        hash = combine(hash, u64::from(token_id));
        if has_penalty {
            entry(&mut counts, token_id, 1, false);
        }
        if ends.contains(&token_id) {
            reason = FinishReason::Stop { token_id };
            break;
        }
    }
    events.push(TokenEvent::Finished { reason });
    events
}

/// The same with `cached_tokens` set to 0, to be compared.
pub fn without_cached_tokens(mut events: Vec<TokenEvent>) -> Vec<TokenEvent> {
    for event in &mut events {
        if let TokenEvent::Started { cached_tokens, .. } = event {
            *cached_tokens = 0;
        }
    }
    events
}

/// The tokens among events.
pub fn tokens(events: &[TokenEvent]) -> Vec<u32> {
    let token = |event: &TokenEvent| match event {
        TokenEvent::Token { token_id, .. } => Some(*token_id),
        _ => None,
    };
    events.iter().filter_map(token).collect()
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    version: Option<VersionId>,
    position: u32,
    hash: u64,
}

struct Upload {
    version: VersionId,
    bytes: usize,
    polls_left: usize,
}

/// See the module.
pub struct FakeBackend {
    capacity: Capacity,
    slots: Vec<Option<Slot>>,
    adapters: HashMap<AdapterHandle, Upload>,
    next_handle: u32,
    /// Polls before an upload is ready.
    pub upload_polls: usize,
    /// How often the border to the adapters' memory moved.
    pub border_moves: usize,
    /// Blocks that moved because of it.
    pub block_moves: usize,
    /// Steps executed.
    pub steps: u64,
    /// This step fails.
    pub fail_at: Option<(u64, Failure)>,
    /// Steps are launched, and run when they are collected.
    pub is_pipelined: bool,
    /// Looks at a step in flight before it can be collected.
    pub busy_looks: usize,
    looks: usize,
    /// Told of each look.
    pub looked: Option<Sender<()>>,
    /// While it says so, no step in flight can be collected.
    pub is_busy: Arc<AtomicBool>,
    /// Told of uploads that begin.
    pub uploads_begun: Option<Sender<VersionId>>,
    /// Where the cache ends.
    pub num_blocks: usize,
    launched: VecDeque<Work>,
    /// Each step waits here for leave to go; when the other end is dropped, all may.
    pub gate: Option<Receiver<()>>,
    previous: Vec<SampleOutput>,
}

/// What is done in its turn.
enum Work {
    Step(StepBatch),
    Border { num_blocks: usize, moves: Vec<BlockMove> },
}

#[derive(Clone, Copy, Debug)]
pub enum Failure {
    Error,
    Panic,
    TooFewSamples,
}

impl FakeBackend {
    pub fn new(capacity: Capacity) -> Self {
        Self {
            slots: vec![None; capacity.num_blocks * capacity.block_size],
            num_blocks: capacity.num_blocks,
            capacity,
            adapters: HashMap::new(),
            next_handle: 0,
            upload_polls: 0,
            border_moves: 0,
            block_moves: 0,
            steps: 0,
            fail_at: None,
            is_pipelined: false,
            busy_looks: 0,
            looks: 0,
            looked: None,
            is_busy: Arc::default(),
            uploads_begun: None,
            launched: VecDeque::new(),
            gate: None,
            previous: Vec::new(),
        }
    }

    pub fn resident_versions(&self) -> BTreeSet<VersionId> {
        self.adapters.values().map(|upload| upload.version).collect()
    }

    /// An upload is done at the next look.
    pub fn end_upload(&mut self, version: VersionId) {
        let mut uploads = self.adapters.values_mut();
        uploads.find(|upload| upload.version == version).expect("it was begun").polls_left = 0;
    }

    fn used_bytes(&self) -> usize {
        self.adapters.values().map(|upload| upload.bytes).sum()
    }

    /// Everything up to the next step.
    fn run_borders(&mut self) {
        let block_size = self.capacity.block_size;
        while let Some(Work::Border { num_blocks, moves }) = self.launched.front() {
            for BlockMove { from, to } in moves {
                let from = from.0 as usize * block_size;
                self.slots.copy_within(from..from + block_size, to.0 as usize * block_size);
            }
            self.slots[num_blocks * block_size..].fill(None);
            self.launched.pop_front();
        }
    }

    fn num_launched(&self) -> usize {
        self.launched.iter().filter(|work| matches!(work, Work::Step(_))).count()
    }

    /// The version of each row.
    fn row_versions(&self, batch: &StepBatch) -> Vec<Option<VersionId>> {
        let mut versions = vec![None; batch.token_ids.len()];
        let mut end = 0;
        let mut seen = BTreeSet::new();
        for segment in &batch.lora_segments {
            assert!(segment.num_rows > 0 && segment.row_start >= end, "segments ascend and do not overlap");
            assert!(seen.insert(segment.adapter), "rows of one adapter are neighbours");
            end = segment.row_start + segment.num_rows;
            let upload = self.adapters.get(&segment.adapter).expect("a batch names resident adapters only");
            assert_eq!(upload.polls_left, 0, "a batch names adapters that are ready only");
            versions[segment.row_start as usize..end as usize].fill(Some(upload.version));
        }
        assert!(batch.lora_segments.len() <= self.capacity.max_adapters_per_batch, "distinct adapters");
        versions
    }

    fn write(&mut self, batch: &StepBatch, versions: &[Option<VersionId>]) {
        let block_size = self.capacity.block_size;
        let carried: HashMap<u32, u32> = batch.carried_tokens.iter().map(|carried| (carried.row, carried.sample_idx)).collect();
        let mut written = BTreeSet::new();
        let mut next_row = 0;
        for rows in &batch.sequences {
            assert_eq!(rows.row_start, next_row, "sequences cover all rows, in order");
            next_row += rows.num_rows;
            assert!(rows.num_rows > 0 && rows.context_len >= rows.num_rows);
            for row in rows.row_start..next_row {
                let row_idx = row as usize;
                let position = batch.positions[row_idx];
                assert_eq!(position, rows.context_len - (next_row - row), "positions end at context_len");
                assert_eq!(versions[row_idx], versions[rows.row_start as usize], "a sequence runs under one adapter");
                let slot = rows.block_table[position as usize / block_size] * block_size as u32 + position % block_size as u32;
                assert_eq!(batch.kv_slots[row_idx], slot, "kv_slots agree with the block table");
                assert!(written.insert(slot), "two rows write one slot");
                let token = match carried.get(&row) {
                    Some(sample_idx) => self.previous[*sample_idx as usize].token_id.expect("the carried token was chosen"),
                    None => batch.token_ids[row_idx],
                };
                let before = match position.checked_sub(1) {
                    None => root_hash(versions[row_idx]),
                    Some(previous) => self.read(&rows.block_table, previous, versions[row_idx]),
                };
                self.slots[slot as usize] = Some(Slot {
                    version: versions[row_idx],
                    position,
                    hash: combine(before, u64::from(token)),
                });
            }
        }
        assert_eq!(next_row as usize, batch.token_ids.len(), "sequences cover all rows");
        for rows in &batch.sequences {
            for position in 0..rows.context_len - rows.num_rows {
                let slot = rows.block_table[position as usize / block_size] * block_size as u32 + position % block_size as u32;
                assert!(!written.contains(&slot), "a slot that one sequence reads is written by another");
                self.read(&rows.block_table, position, versions[rows.row_start as usize]);
            }
        }
    }

    /// The hash in a sequence's slot for a position. Panics when that slot is not this sequence's kind.
    fn read(&self, block_table: &[u32], position: u32, version: Option<VersionId>) -> u64 {
        let block_size = self.capacity.block_size;
        let slot = block_table[position as usize / block_size] as usize * block_size + position as usize % block_size;
        let content = self.slots[slot].expect("a slot that is read was written");
        assert_eq!(content.version, version, "slot {slot} was written under another adapter");
        assert_eq!(content.position, position, "slot {slot} is stale");
        content.hash
    }

    fn sample(&self, batch: &StepBatch, row: &SampleRow) -> SampleOutput {
        let rows = batch
            .sequences
            .iter()
            .find(|rows| (rows.row_start..rows.row_start + rows.num_rows).contains(&row.row))
            .expect("a sample row is a sequence's row");
        assert_eq!(rows.request_id, row.request_id);
        let slot = batch.kv_slots[row.row as usize] as usize;
        let hash = self.slots[slot].expect("it was just written").hash;
        let chosen = row.choose.as_ref().map(|asked| {
            let mask = asked.mask.as_deref();
            choose(hash, &asked.params, asked.output_position, &asked.token_counts, &asked.forbidden, mask)
        });
        let token_id = chosen.flatten();
        let top_k = row.choose.as_ref().and_then(|asked| asked.top_k_logprobs);
        SampleOutput {
            token_id,
            logprobs: top_k.zip(token_id).map(|(top_k, token_id)| logprobs(hash, token_id, top_k)),
            prompt_logprobs: row.prompt_logprob.map(|(token_id, prompt)| logprobs(hash, token_id, prompt.top_k)),
            failure: (chosen == Some(None)).then_some(crate::batch::SampleFailure::NothingAllowed),
        }
    }
}

impl Backend for FakeBackend {
    fn capacity(&self) -> &Capacity {
        &self.capacity
    }

    fn begin_upload(&mut self, adapter: &Arc<HostAdapter>) -> Result<AdapterHandle, BackendError> {
        assert!(!self.resident_versions().contains(&adapter.version), "one copy of a version");
        let for_adapters = match self.capacity.is_shared() {
            false => self.capacity.adapter_bytes,
            true => self.capacity.shared_bytes - self.num_blocks * self.capacity.kv_block_bytes,
        };
        let available_bytes = for_adapters - self.used_bytes();
        if adapter.bytes() > available_bytes {
            return Err(BackendError::OutOfMemory {
                what: "an adapter".to_owned(),
                needed_bytes: adapter.bytes(),
                available_bytes,
            });
        }
        let handle = AdapterHandle(self.next_handle);
        self.next_handle += 1;
        let upload = Upload {
            version: adapter.version,
            bytes: adapter.bytes(),
            polls_left: self.upload_polls,
        };
        self.adapters.insert(handle, upload);
        if let Some(begun) = &self.uploads_begun {
            begun.send(adapter.version).ok();
        }
        Ok(handle)
    }

    fn set_kv_blocks(&mut self, num_blocks: usize, moves: &[BlockMove]) -> Result<usize, BackendError> {
        assert!(
            (self.capacity.min_blocks..=self.capacity.num_blocks).contains(&num_blocks),
            "{num_blocks} blocks"
        );
        for BlockMove { from, to } in moves {
            let is_down = (num_blocks..self.num_blocks).contains(&(from.0 as usize)) && (to.0 as usize) < num_blocks;
            assert!(is_down, "{from:?} to {to:?} below {num_blocks}");
        }
        let free_bytes = self.capacity.shared_bytes - self.used_bytes();
        self.num_blocks = num_blocks.min(free_bytes / self.capacity.kv_block_bytes);
        self.border_moves += 1;
        self.block_moves += moves.len();
        self.launched.push_back(Work::Border {
            num_blocks: self.num_blocks,
            moves: moves.to_vec(),
        });
        self.run_borders();
        Ok(self.num_blocks)
    }

    fn poll_upload(&mut self, handle: AdapterHandle) -> Result<bool, BackendError> {
        let upload = self.adapters.get_mut(&handle).expect("a handle that lives");
        let ready = upload.polls_left == 0;
        upload.polls_left = upload.polls_left.saturating_sub(1);
        Ok(ready)
    }

    fn free_adapter(&mut self, handle: AdapterHandle) {
        let names = |work: &Work| match work {
            Work::Step(batch) => batch.lora_segments.iter().any(|segment| segment.adapter == handle),
            Work::Border { .. } => false,
        };
        assert!(!self.launched.iter().any(names), "no step in flight names it");
        self.adapters.remove(&handle).expect("a handle that lives");
    }

    fn execute(&mut self, batch: &StepBatch) -> Result<StepOutput, BackendError> {
        self.steps += 1;
        if let Some(gate) = &self.gate {
            gate.recv().ok();
        }
        let failure = self.fail_at.filter(|(step, _)| *step == self.steps).map(|(_, failure)| failure);
        match failure {
            Some(Failure::Error) => return Err(BackendError::Device("it caught fire".to_owned())),
            Some(Failure::Panic) => panic!("the fake backend was told to panic"),
            Some(Failure::TooFewSamples) | None => {}
        }
        let num_rows = batch.token_ids.len();
        assert!((1..=self.capacity.max_batch_tokens).contains(&num_rows), "{num_rows} rows");
        assert_eq!((batch.positions.len(), batch.kv_slots.len()), (num_rows, num_rows));
        let versions = self.row_versions(batch);
        self.write(batch, &versions);
        let mut samples: Vec<SampleOutput> = batch.samples.iter().map(|row| self.sample(batch, row)).collect();
        self.previous = samples.clone();
        if matches!(failure, Some(Failure::TooFewSamples)) {
            samples.pop();
        }
        Ok(StepOutput { samples })
    }

    fn launch(&mut self, batch: &StepBatch) -> Result<Launched, BackendError> {
        if !self.is_pipelined {
            return self.execute(batch).map(Launched::Done);
        }
        self.launched.push_back(Work::Step(batch.clone()));
        assert!(self.num_launched() <= 2, "steps in flight");
        Ok(Launched::Running)
    }

    fn is_collectable(&mut self) -> Result<bool, BackendError> {
        self.looks += 1;
        if let Some(looked) = &self.looked {
            looked.send(()).ok();
        }
        Ok(!self.is_busy.load(SeqCst) && self.looks.is_multiple_of(self.busy_looks + 1))
    }

    fn collect(&mut self) -> Result<StepOutput, BackendError> {
        let Some(Work::Step(batch)) = self.launched.pop_front() else {
            panic!("a step was launched, and is the first that is to be done");
        };
        let output = self.execute(&batch);
        self.run_borders();
        output
    }
}
