//! [`Sequence`]: one stream of tokens, its KV blocks and its counters.

use std::{collections::HashMap, sync::Arc};

use crate::{
    adapter::{AdapterLease, VersionId},
    batch::{CarriedToken, ChooseToken, SampleRow, SequenceRows, StepBatch, TokenCount},
    block_pool::{BlockId, BlockKey, BlockPool},
    request::{Constraint, FinishReason, GenerationRequest, LogprobsParams, RequestId, SamplingParams, TokenLogprobs},
    residency::ResidentAdapter,
};

/// One request as the scheduler keeps it. Waiting: it holds no blocks and no place on the device. Running: it holds both.
///
/// Of its tokens (prompt, then output), positions `0..num_computed` have their KV in `blocks`; the next `num_in_flight` are rows of a
/// step that was scheduled and not yet committed. Between steps that run one after the other the latter is 0.
pub struct Sequence {
    /// Whose it is.
    pub request_id: RequestId,
    /// Order of arrival.
    pub arrival: u64,
    /// Whom it counts under.
    pub fairness_key: Arc<str>,
    /// Grows at each preemption: rows scheduled before one are not this sequence's any more.
    pub epoch: u32,
    /// Whether the residency of its adapter was already counted as a hit or a miss.
    pub counted_residency: bool,
    /// Whether it came later than it was asked for, since its adapter had to be read, or was passed over since that was on its way to the device; and
    /// has not been admitted since.
    pub is_late: bool,
    /// Steps that it left to others' prompts because of that.
    pub num_yields: u32,
    /// The engine thread's; away while a mask is worked out.
    pub constraint: Option<Box<dyn Constraint>>,
    is_constrained: bool,
    adapter: Option<AdapterLease>,
    resident: Option<Arc<ResidentAdapter>>,
    tokens: Vec<u32>,
    prompt_len: usize,
    sampling: Arc<SamplingParams>,
    logprobs: LogprobsParams,
    mask: Option<Arc<[u32]>>,
    penalties: Option<TokenCounts>,
    blocks: Vec<BlockId>,
    block_table: Arc<[u32]>,
    block_keys: Vec<BlockKey>,
    num_published_blocks: usize,
    num_computed: usize,
    num_in_flight: usize,
    awaited: Option<u32>,
    cached_tokens: usize,
    prompt_logprobs: Vec<TokenLogprobs>,
    started: bool,
}

impl Sequence {
    /// A waiting sequence. With a constraint, it waits for `set_mask` before each output token.
    pub fn new(request_id: RequestId, request: GenerationRequest) -> Self {
        let prompt_len = request.prompt_tokens.len();
        Self {
            request_id,
            arrival: 0,
            fairness_key: request.fairness_key,
            epoch: 0,
            counted_residency: false,
            is_late: request.adapter.as_ref().is_some_and(AdapterLease::waited_for_load),
            num_yields: 0,
            adapter: request.adapter,
            resident: None,
            penalties: TokenCounts::new(&request.sampling, &request.prompt_tokens),
            tokens: request.prompt_tokens,
            prompt_len,
            sampling: Arc::new(request.sampling),
            logprobs: request.logprobs,
            is_constrained: request.constraint.is_some(),
            constraint: request.constraint,
            mask: None,
            blocks: Vec::new(),
            block_table: Arc::from([]),
            block_keys: Vec::new(),
            num_published_blocks: 0,
            num_computed: 0,
            num_in_flight: 0,
            awaited: None,
            cached_tokens: 0,
            prompt_logprobs: Vec::new(),
            started: false,
        }
    }

    /// The adapter that it runs on.
    pub fn adapter(&self) -> Option<&AdapterLease> {
        self.adapter.as_ref()
    }

    /// The same, as identity.
    pub fn version(&self) -> Option<VersionId> {
        self.adapter.as_ref().map(AdapterLease::version)
    }

    /// Its adapter's place on the device; `None` for the base model, or when it waits.
    pub fn resident(&self) -> Option<&Arc<ResidentAdapter>> {
        self.resident.as_ref()
    }

    /// Tokens known: prompt and output.
    pub fn num_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Prompt tokens.
    pub fn prompt_len(&self) -> usize {
        self.prompt_len
    }

    /// Output tokens known.
    pub fn output_len(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Blocks held.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// The blocks, in order.
    pub fn block_ids(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.blocks.iter().copied()
    }

    /// Tokens whose KV is neither computed nor in flight; the one that a step in flight will choose is counted.
    pub fn num_uncomputed(&self) -> usize {
        self.tokens.len() + usize::from(self.awaited.is_some()) - self.num_computed - self.num_in_flight
    }

    /// Rows that the next step may have for it. 0 when the next token, not yet known, is needed on the host first or may not be wanted.
    pub fn num_schedulable(&self) -> usize {
        if self.awaited.is_none() {
            return self.num_uncomputed();
        }
        let wants_more = self.output_len() + 1 < self.sampling.max_tokens as usize;
        usize::from(wants_more && !self.must_see_token())
    }

    /// Whether its next row depends on the token in flight in a way that only the host knows.
    pub fn must_see_token(&self) -> bool {
        self.awaited.is_some() && (self.is_constrained || self.penalties.is_some())
    }

    /// Takes what the constraint allows as the next output token.
    pub fn set_mask(&mut self, mask: Arc<[u32]>) {
        self.mask = Some(mask);
    }

    /// Becomes a running sequence: takes what the prefix cache has and blocks for all other known tokens. Nothing is taken otherwise.
    /// At least one token is left to be computed.
    pub fn try_start(&mut self, pool: &mut BlockPool, resident: Option<&Arc<ResidentAdapter>>, rules: &StartRules) -> Start {
        let block_size = rules.block_size;
        assert!(
            self.blocks.is_empty() && self.num_computed == 0,
            "a waiting sequence holds no blocks and has computed nothing"
        );
        if rules.prefix_caching {
            let num_readable_blocks = self.max_cached_tokens() / block_size;
            self.extend_block_keys(self.tokens.len() / block_size, block_size);
            let readable = &self.block_keys[..num_readable_blocks];
            self.blocks.extend(readable.iter().map_while(|key| pool.try_share(key)));
            let num_promised = readable[self.blocks.len()..].iter().take_while(|key| pool.is_promised(key)).count();
            if num_promised > 0 && num_promised * block_size >= rules.min_awaited_tokens {
                pool.release_all(self.blocks.drain(..));
                return Start::PrefixInTheMaking;
            }
        }
        let num_shared = self.blocks.len();
        let num_missing = self.tokens.len().div_ceil(block_size) - num_shared;
        let missing = (num_missing + rules.reserve).saturating_sub(pool.num_available());
        if missing > 0 {
            pool.release_all(self.blocks.drain(..));
            return Start::TooFewBlocks { missing };
        }
        self.blocks.extend((0..num_missing).map_while(|_| pool.try_allocate()));
        for (block_id, key) in self.blocks.iter().zip(&self.block_keys).skip(num_shared) {
            pool.promise(*block_id, *key);
        }
        self.num_computed = num_shared * block_size;
        self.num_published_blocks = num_shared;
        if !self.started {
            self.cached_tokens = self.num_computed;
        }
        self.resident = resident.cloned();
        self.refresh_block_table();
        Start::Started
    }

    /// Takes the blocks that `num_rows` more rows need. `Err`, and nothing taken, when there are too few: how many more it takes.
    pub fn try_grow(&mut self, pool: &mut BlockPool, block_size: usize, num_rows: usize) -> Result<(), usize> {
        let num_needed = (self.num_computed + self.num_in_flight + num_rows).div_ceil(block_size);
        let num_missing = num_needed.saturating_sub(self.blocks.len());
        if num_missing == 0 {
            return Ok(());
        }
        let missing = num_missing.saturating_sub(pool.num_available());
        if missing > 0 {
            return Err(missing);
        }
        self.blocks.extend((0..num_missing).map_while(|_| pool.try_allocate()));
        self.refresh_block_table();
        Ok(())
    }

    /// Follows blocks to where they moved. Rows in flight have read and written their old places before.
    pub fn move_blocks(&mut self, moved: &HashMap<BlockId, BlockId>) {
        let mut has_moved = false;
        for block_id in &mut self.blocks {
            if let Some(to) = moved.get(block_id) {
                *block_id = *to;
                has_moved = true;
            }
        }
        if has_moved {
            self.refresh_block_table();
        }
    }

    /// Becomes a waiting sequence again (or none): gives blocks and the place on the device back. Tokens stay, their KV does not.
    pub fn release(&mut self, pool: &mut BlockPool) {
        pool.release_all(self.blocks.drain(..));
        self.block_table = Arc::from([]);
        self.resident = None;
        self.num_computed = 0;
        self.num_in_flight = 0;
        self.num_published_blocks = 0;
        self.awaited = None;
        self.epoch += 1;
    }

    /// Writes its next `num_rows` rows into `batch`; they are in flight from here on. The blocks are there: `try_start`, `try_grow`.
    pub fn append_rows(&mut self, num_rows: usize, block_size: usize, eos_token_ids: &[u32], batch: &mut StepBatch) -> AppendedRows {
        let start = self.num_computed + self.num_in_flight;
        let end = start + num_rows;
        assert!(num_rows > 0 && num_rows <= self.num_uncomputed(), "rows of tokens that exist");
        assert!(end <= self.blocks.len() * block_size, "rows past the sequence's blocks");
        let row_start = batch.token_ids.len() as u32;
        for position in start..end {
            let row = batch.token_ids.len() as u32;
            match self.tokens.get(position) {
                Some(token) => batch.token_ids.push(*token),
                None => {
                    let sample_idx = self.awaited.expect("the only unknown token is the awaited one");
                    batch.carried_tokens.push(CarriedToken { row, sample_idx });
                    batch.token_ids.push(0);
                }
            }
            batch.positions.push(position as u32);
            let block_id = self.blocks[position / block_size];
            batch.kv_slots.push(block_id.0 * block_size as u32 + (position % block_size) as u32);
        }
        batch.sequences.push(SequenceRows {
            request_id: self.request_id,
            row_start,
            num_rows: num_rows as u32,
            context_len: end as u32,
            block_table: self.block_table.clone(),
        });
        let sample_start = batch.samples.len();
        let num_known = self.tokens.len() + usize::from(self.awaited.is_some());
        let chooses = end == num_known && self.sampling.max_tokens > 0;
        for position in start..end {
            let choose = (chooses && position + 1 == end).then(|| self.choose_token(eos_token_ids));
            let prompt_logprob = self.prompt_logprob_at(position);
            if choose.is_some() || prompt_logprob.is_some() {
                batch.samples.push(SampleRow {
                    row: row_start + (position - start) as u32,
                    request_id: self.request_id,
                    choose,
                    prompt_logprob,
                });
            }
        }
        self.num_in_flight += num_rows;
        self.awaited = chooses.then(|| batch.samples.len() as u32 - 1);
        AppendedRows {
            request_id: self.request_id,
            epoch: self.epoch,
            num_rows,
            samples: sample_start..batch.samples.len(),
        }
    }

    /// Counts rows that a step has computed.
    pub fn commit_rows(&mut self, num_rows: usize) {
        assert!(num_rows <= self.num_in_flight, "only rows in flight are committed");
        self.num_in_flight -= num_rows;
        self.num_computed += num_rows;
    }

    /// Publishes every full computed block that is not yet.
    pub fn publish_blocks(&mut self, pool: &mut BlockPool, block_size: usize) {
        let num_full_blocks = self.num_computed / block_size;
        self.extend_block_keys(num_full_blocks, block_size);
        for block_idx in self.num_published_blocks..num_full_blocks {
            pool.publish(self.blocks[block_idx], self.block_keys[block_idx]);
        }
        self.num_published_blocks = num_full_blocks;
    }

    /// Takes the log-probability of the next prompt token.
    pub fn push_prompt_logprobs(&mut self, logprobs: TokenLogprobs) {
        self.prompt_logprobs.push(logprobs);
    }

    /// Once, when the whole prompt is computed: how many of its tokens came from the cache, and its log-probabilities.
    pub fn take_started(&mut self) -> Option<(usize, Vec<TokenLogprobs>)> {
        if self.started || self.num_computed < self.prompt_len {
            return None;
        }
        self.started = true;
        Some((self.cached_tokens, std::mem::take(&mut self.prompt_logprobs)))
    }

    /// Appends an output token that a step chose, and says whether the sequence ends with it.
    pub fn push_output(&mut self, token_id: u32, eos_token_ids: &[u32]) -> Option<FinishReason> {
        // The step after the one that chose this token may be in flight already and await the next one.
        if self.num_in_flight == 0 {
            self.awaited = None;
        }
        self.mask = None;
        self.tokens.push(token_id);
        if let Some(penalties) = &mut self.penalties {
            penalties.count_output(token_id);
        }
        let is_eos = !self.sampling.ignore_eos && eos_token_ids.contains(&token_id);
        if is_eos || self.sampling.stop_token_ids.contains(&token_id) {
            return Some(FinishReason::Stop { token_id });
        }
        self.is_at_max_tokens().then_some(FinishReason::Length)
    }

    /// Whether it has all the output that it may have; at once with `max_tokens` 0.
    pub fn is_at_max_tokens(&self) -> bool {
        self.output_len() >= self.sampling.max_tokens as usize
    }

    /// Log-probabilities wanted of each output token.
    pub fn output_top_k(&self) -> Option<u32> {
        self.logprobs.output_top_k
    }

    /// Whether a constraint must give a mask before the next output token.
    pub fn needs_mask(&self) -> bool {
        self.is_constrained && self.mask.is_none()
    }

    /// Most tokens that may come from the cache: one is always computed, for its logits; and those from which a prompt token's
    /// log-probability is still to be reported.
    fn max_cached_tokens(&self) -> usize {
        let all_but_one = self.tokens.len() - 1;
        match self.logprobs.prompt {
            Some(_) if !self.started => all_but_one.min(self.next_reported_position() - 1),
            _ => all_but_one,
        }
    }

    /// The next prompt position whose log-probability is to be reported; its logits are those of the row before it.
    fn next_reported_position(&self) -> usize {
        let start = self.logprobs.prompt.map_or(0, |prompt| prompt.start as usize);
        start.max(1) + self.prompt_logprobs.len()
    }

    fn prompt_logprob_at(&self, position: usize) -> Option<(u32, crate::request::PromptLogprobsParams)> {
        let prompt = self.logprobs.prompt.filter(|_| !self.started)?;
        let reported = position + 1;
        (reported < self.prompt_len && reported >= self.next_reported_position()).then(|| (self.tokens[reported], prompt))
    }

    fn choose_token(&self, eos_token_ids: &[u32]) -> ChooseToken {
        let output_position = self.output_len() + usize::from(self.awaited.is_some());
        let mut forbidden = Vec::new();
        if output_position < self.sampling.min_tokens as usize {
            forbidden.extend_from_slice(&self.sampling.stop_token_ids);
            if !self.sampling.ignore_eos {
                forbidden.extend_from_slice(eos_token_ids);
            }
        }
        ChooseToken {
            params: self.sampling.clone(),
            output_position: output_position as u32,
            token_counts: self.penalties.as_ref().map_or_else(Vec::new, |penalties| penalties.counts.clone()),
            forbidden,
            mask: self.mask.clone(),
            top_k_logprobs: self.logprobs.output_top_k,
        }
    }

    fn extend_block_keys(&mut self, num_blocks: usize, block_size: usize) {
        for block_idx in self.block_keys.len()..num_blocks {
            let parent = match block_idx.checked_sub(1) {
                Some(parent_idx) => self.block_keys[parent_idx],
                None => BlockKey::root(self.version()),
            };
            self.block_keys
                .push(parent.child(&self.tokens[block_idx * block_size..(block_idx + 1) * block_size]));
        }
    }

    fn refresh_block_table(&mut self) {
        self.block_table = self.blocks.iter().map(|block_id| block_id.0).collect();
    }
}

/// What `try_start` keeps to.
#[derive(Clone, Copy, Debug)]
pub struct StartRules {
    /// Positions per block.
    pub block_size: usize,
    /// Whether prefixes are cached.
    pub prefix_caching: bool,
    /// Blocks that stay available.
    pub reserve: usize,
    /// Prefix tokens that another sequence must be computing just now to be worth waiting for.
    pub min_awaited_tokens: usize,
}

/// What came of `try_start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// It runs.
    Started,
    /// Another sequence is computing a prefix of it, which will be in the cache.
    PrefixInTheMaking,
    /// Too few blocks are available.
    TooFewBlocks {
        /// How many more it takes.
        missing: usize,
    },
}

/// Which rows of a step are whose, for `Scheduler::commit`.
#[derive(Clone, Debug)]
pub struct AppendedRows {
    /// Whose.
    pub request_id: RequestId,
    /// The sequence's epoch then.
    pub epoch: u32,
    /// Rows.
    pub num_rows: usize,
    /// Its part of `StepBatch::samples`.
    pub samples: std::ops::Range<usize>,
}

/// How often each token has occurred, kept only for sequences with a penalty.
struct TokenCounts {
    counts: Vec<TokenCount>,
    index: HashMap<u32, usize>,
}

impl TokenCounts {
    fn new(sampling: &SamplingParams, prompt_tokens: &[u32]) -> Option<Self> {
        let repetition = sampling.repetition_penalty != 1.0;
        if !repetition && sampling.frequency_penalty == 0.0 && sampling.presence_penalty == 0.0 {
            return None;
        }
        let mut counts = Self {
            counts: Vec::new(),
            index: HashMap::new(),
        };
        // Only the repetition penalty looks at the prompt.
        for token_id in prompt_tokens.iter().filter(|_| repetition) {
            counts.entry(*token_id).in_prompt = true;
        }
        Some(counts)
    }

    fn count_output(&mut self, token_id: u32) {
        self.entry(token_id).in_output += 1;
    }

    fn entry(&mut self, token_id: u32) -> &mut TokenCount {
        let index = *self.index.entry(token_id).or_insert_with(|| {
            self.counts.push(TokenCount {
                token_id,
                in_output: 0,
                in_prompt: false,
            });
            self.counts.len() - 1
        });
        &mut self.counts[index]
    }
}
