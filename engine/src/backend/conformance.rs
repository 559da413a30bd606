//! One suite of cases for every backend, and the means to run sequences on one without an engine.
//!
//! For tests: a failed case panics with what disagreed. [`run_all`] wants a backend over the model of [`config`].

use std::sync::Arc;

use half::bf16;

use super::{Backend, BackendError, Capacity, Launched};
use crate::{
    adapter::{AlignedBytes, HostAdapter, ModuleId, PackedDtype, PackedModule, Projection, ReplacedWeight, TokenRows, VersionId},
    batch::{AdapterHandle, CarriedToken, ChooseToken, LoraSegment, SampleFailure, SampleRow, SequenceRows, StepBatch, StepOutput, TokenCount},
    block_pool::{BlockId, BlockMove},
    decoder::DecoderConfig,
    request::{PromptLogprobsParams, RequestId, SamplingParams, TokenLogprobs},
};

/// One sequence to be generated.
#[derive(Clone, Debug)]
pub struct Run {
    /// Prompt token ids.
    pub prompt: Vec<u32>,
    /// Adapter, uploaded and ready.
    pub adapter: Option<AdapterHandle>,
    /// How tokens are chosen, and how many.
    pub params: SamplingParams,
    /// Most prompt rows of one step.
    pub chunk: usize,
    /// Log-probabilities of so many tokens at every position.
    pub top_k: u32,
}

impl Run {
    /// Greedy, unchunked, the five best log-probabilities.
    pub fn greedy(prompt: &[u32], adapter: Option<AdapterHandle>, max_tokens: u32) -> Self {
        let params = SamplingParams {
            temperature: 0.0,
            max_tokens,
            ..Default::default()
        };
        Self {
            prompt: prompt.to_vec(),
            adapter,
            params,
            chunk: usize::MAX,
            top_k: 5,
        }
    }
}

/// What came of a [`Run`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Output tokens.
    pub output_ids: Vec<u32>,
    /// One for each.
    pub output_logprobs: Vec<TokenLogprobs>,
    /// One for each prompt token but the first.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// Why it ended early.
    pub failure: Option<SampleFailure>,
}

/// Runs sequences together, from the first prompt token to the last output token: at each step every unfinished one has a chunk of its
/// prompt or one row. Blocks are dealt out in turn and backwards, so that no block table is in order.
///
/// # Errors
/// Those of the backend.
pub fn generate(backend: &mut dyn Backend, runs: &[Run]) -> Result<Vec<Outcome>, BackendError> {
    let num_blocks = backend.capacity().num_blocks;
    generate_in(backend, runs, num_blocks, |_, _, _| Ok(()))
}

/// The blocks of runs that are under way.
struct Blocks {
    free: Vec<u32>,
    /// By run.
    tables: Vec<Vec<u32>>,
}

/// The same in the first `num_blocks` blocks. `meanwhile` is called while each step is in flight, with its number.
fn generate_in(
    backend: &mut dyn Backend,
    runs: &[Run],
    num_blocks: usize,
    meanwhile: impl FnMut(&mut dyn Backend, usize, &mut Blocks) -> Result<(), BackendError>,
) -> Result<Vec<Outcome>, BackendError> {
    let blocks = Blocks {
        free: (0..num_blocks as u32).collect(),
        tables: vec![Vec::new(); runs.len()],
    };
    generate_from(backend, runs, blocks, vec![0; runs.len()], meanwhile)
}

/// The same with blocks in which so many positions of each run are computed already.
fn generate_from(
    backend: &mut dyn Backend,
    runs: &[Run],
    mut blocks: Blocks,
    mut computed: Vec<usize>,
    mut meanwhile: impl FnMut(&mut dyn Backend, usize, &mut Blocks) -> Result<(), BackendError>,
) -> Result<Vec<Outcome>, BackendError> {
    let Capacity {
        block_size,
        max_batch_tokens,
        ..
    } = *backend.capacity();
    // Rows of one adapter are neighbours.
    let mut order: Vec<usize> = (0..runs.len()).collect();
    order.sort_by_key(|&run_idx| runs[run_idx].adapter);
    let mut step = 0;
    let mut outcomes = vec![Outcome::default(); runs.len()];
    loop {
        let mut batch = StepBatch::default();
        let mut sampled = Vec::new();
        for &run_idx in &order {
            let (run, outcome) = (&runs[run_idx], &outcomes[run_idx]);
            let tokens: Vec<u32> = run.prompt.iter().chain(&outcome.output_ids).copied().collect();
            let room = max_batch_tokens - batch.token_ids.len();
            let rows = (tokens.len() - computed[run_idx]).min(run.chunk).min(room);
            let is_done = outcome.failure.is_some() || outcome.output_ids.len() >= run.params.max_tokens as usize;
            if rows == 0 || is_done {
                continue;
            }
            let context_len = computed[run_idx] + rows;
            let table = &mut blocks.tables[run_idx];
            while table.len() * block_size < context_len {
                table.push(blocks.free.pop().expect("the cases fit the cache"));
            }
            let row_start = batch.token_ids.len() as u32;
            for position in computed[run_idx]..context_len {
                let row = batch.token_ids.len() as u32;
                batch.token_ids.push(tokens[position]);
                batch.positions.push(position as u32);
                batch
                    .kv_slots
                    .push(table[position / block_size] * block_size as u32 + (position % block_size) as u32);
                let logprobs = PromptLogprobsParams { start: 0, top_k: run.top_k };
                let prompt_logprob = run.prompt.get(position + 1).map(|&token| (token, logprobs));
                let choose = (position + 1 == tokens.len()).then(|| choose_token(run, &outcome.output_ids));
                if prompt_logprob.is_some() || choose.is_some() {
                    batch.samples.push(SampleRow {
                        row,
                        request_id: RequestId(run_idx as u64),
                        choose,
                        prompt_logprob,
                    });
                    sampled.push(run_idx);
                }
            }
            batch.sequences.push(SequenceRows {
                request_id: RequestId(run_idx as u64),
                row_start,
                num_rows: rows as u32,
                context_len: context_len as u32,
                block_table: Arc::from(&table[..]),
            });
            push_segment(&mut batch.lora_segments, run.adapter, row_start, rows as u32);
            computed[run_idx] = context_len;
        }
        if batch.token_ids.is_empty() {
            return Ok(outcomes);
        }
        let launched = backend.launch(&batch)?;
        meanwhile(backend, step, &mut blocks)?;
        step += 1;
        let output = match launched {
            Launched::Done(output) => output,
            Launched::Running => backend.collect()?,
        };
        assert_eq!(output.samples.len(), batch.samples.len(), "one output for each sample row");
        for (run_idx, sample) in sampled.into_iter().zip(output.samples) {
            let outcome = &mut outcomes[run_idx];
            outcome.prompt_logprobs.extend(sample.prompt_logprobs);
            outcome.output_logprobs.extend(sample.logprobs);
            outcome.output_ids.extend(sample.token_id);
            outcome.failure = outcome.failure.or(sample.failure);
        }
    }
}

fn choose_token(run: &Run, output_ids: &[u32]) -> ChooseToken {
    let mut token_counts: Vec<TokenCount> = Vec::new();
    let params = &run.params;
    if params.repetition_penalty != 1.0 || params.frequency_penalty != 0.0 || params.presence_penalty != 0.0 {
        let with_origin = run.prompt.iter().map(|&id| (id, true)).chain(output_ids.iter().map(|&id| (id, false)));
        for (token_id, in_prompt) in with_origin {
            let index = token_counts.iter().position(|count| count.token_id == token_id).unwrap_or_else(|| {
                token_counts.push(TokenCount {
                    token_id,
                    in_output: 0,
                    in_prompt: false,
                });
                token_counts.len() - 1
            });
            token_counts[index].in_prompt |= in_prompt;
            token_counts[index].in_output += u32::from(!in_prompt);
        }
    }
    ChooseToken {
        params: Arc::new(params.clone()),
        output_position: output_ids.len() as u32,
        token_counts,
        forbidden: Vec::new(),
        mask: None,
        top_k_logprobs: Some(run.top_k),
    }
}

fn push_segment(segments: &mut Vec<LoraSegment>, adapter: Option<AdapterHandle>, row_start: u32, num_rows: u32) {
    let Some(adapter) = adapter else { return };
    match segments.last_mut() {
        Some(last) if last.adapter == adapter && last.row_start + last.num_rows == row_start => last.num_rows += num_rows,
        _ => segments.push(LoraSegment {
            adapter,
            row_start,
            num_rows,
        }),
    }
}

/// The model of the suite: [`crate::weights::ModelWeights::random`] of this shape.
pub fn config() -> DecoderConfig {
    let json = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 520, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512, "tie_word_embeddings": false
    });
    DecoderConfig::from_json(json.to_string().as_bytes(), None).expect("a valid configuration")
}

/// What the suite needs of a backend, at least.
pub fn capacity() -> Capacity {
    Capacity {
        num_blocks: 128,
        min_blocks: 128,
        block_size: 16,
        kv_block_bytes: 0,
        shared_bytes: 0,
        max_batch_tokens: 256,
        adapter_bytes: 16 << 20,
        max_adapters_per_batch: 6,
    }
}

/// How alike two results that should be the same must be.
#[derive(Clone, Copy, Debug)]
pub enum Agreement {
    /// Bit for bit.
    Bits,
    /// Log-probabilities of the same tokens within this; chosen tokens are compared up to the first step at which the two likeliest are closer.
    Within(f32),
}

/// Every case. `agreement` is between two runs on this backend that differ in how their rows were batched.
pub fn run_all(backend: &mut dyn Backend, agreement: Agreement) {
    let config = config();
    mixed_is_alone(backend, &config, agreement);
    chunked_is_unchunked(backend, &config, agreement);
    a_cached_prefix_is_a_computed_one(backend, &config, agreement);
    base_rows_are_unaffected(backend, &config, agreement);
    ranks_mix(backend, &config, agreement);
    adapters_matter(backend, &config);
    sampling_ignores_neighbours(backend, &config, agreement);
    pipelined_is_stepped(backend, &config);
    nothing_is_computed_for_an_empty_batch(backend);
    adapter_bytes_are_counted(backend, &config);
    bad_batches_are_refused(backend, &config);
    own_tokens_are_read_and_chosen(backend, &config);
}

/// Prompts of differing lengths on base and adapters of differing shapes, together and one by one.
pub fn mixed_is_alone(backend: &mut dyn Backend, config: &DecoderConfig, agreement: Agreement) {
    for hosts in adapter_sets(config) {
        let adapters = Uploaded::new(backend, &hosts);
        let runs = mixed_runs(config, &adapters);
        let together = generate(backend, &runs).expect("a mixed batch");
        for (run_idx, (run, together)) in runs.iter().zip(&together).enumerate() {
            let alone = generate(backend, std::slice::from_ref(run)).expect("a run alone");
            check_same(&format!("mixed is alone, run {run_idx}"), together, &alone[0], agreement);
        }
        adapters.free(backend);
    }
}

/// Chunks of 1, 7 and 16 rows against the whole prompt at once.
pub fn chunked_is_unchunked(backend: &mut dyn Backend, config: &DecoderConfig, agreement: Agreement) {
    let [plain, rich, own_tokens] = adapter_sets(config);
    let adapters = Uploaded::new(backend, &[plain[1].clone(), rich[2].clone(), own_tokens[1].clone()]);
    for adapter in [None, Some(0), Some(1), Some(2)] {
        let prompt = adapter.map_or_else(|| prompt(config, 3, 45), |adapter| adapters.prompt(config, adapter, 3, 45));
        let adapter = adapter.map(|adapter: usize| adapters.handles[adapter]);
        let whole = Run::greedy(&prompt, adapter, 6);
        let expected = generate(backend, std::slice::from_ref(&whole)).expect("a whole prompt");
        for chunk in [1, 7, 16] {
            let chunked = generate(backend, &[Run { chunk, ..whole.clone() }]).expect("a chunked prompt");
            check_same(&format!("chunks of {chunk}, {adapter:?}"), &chunked[0], &expected[0], agreement);
        }
    }
    adapters.free(backend);
}

/// Two sequences go on from the blocks that a third has left, both at once, against each computed from its beginning.
pub fn a_cached_prefix_is_a_computed_one(backend: &mut dyn Backend, config: &DecoderConfig, agreement: Agreement) {
    let [plain, rich, own_tokens] = adapter_sets(config);
    let adapters = Uploaded::new(backend, &[plain[1].clone(), rich[2].clone(), own_tokens[1].clone()]);
    let Capacity { block_size, num_blocks, .. } = *backend.capacity();
    for adapter in [None, Some(0), Some(1), Some(2)] {
        let prompt =
            |seed: u64, len: usize| adapter.map_or_else(|| prompt(config, seed, len), |adapter: usize| adapters.prompt(config, adapter, seed, len));
        let handle = adapter.map(|adapter| adapters.handles[adapter]);
        let prefix = prompt(5, 2 * block_size);
        let with_tail = |seed: u64, len: usize| Run::greedy(&[&prefix[..], &prompt(seed, len)].concat(), handle, 6);
        // A third block, too: the tables of the others are not simply its own.
        let first = with_tail(6, 9);
        let mut left = Vec::new();
        generate_in(backend, std::slice::from_ref(&first), 8, |_, _, blocks| {
            left.clone_from(&blocks.tables[0]);
            Ok(())
        })
        .expect("the first");
        assert_eq!(left.len(), 3);
        let runs = [with_tail(7, 1), with_tail(8, 21)];
        let blocks = Blocks {
            free: (0..num_blocks as u32).filter(|block| !left.contains(block)).collect(),
            tables: vec![left[..2].to_vec(); runs.len()],
        };
        let computed = vec![prefix.len(); runs.len()];
        let cached = generate_from(backend, &runs, blocks, computed, |_, _, _| Ok(())).expect("the others");
        for (run_idx, (run, cached)) in runs.iter().zip(&cached).enumerate() {
            let mut whole = generate(backend, std::slice::from_ref(run)).expect("a whole prompt").remove(0);
            // What was computed before gives no log-probabilities again.
            whole.prompt_logprobs.drain(..prefix.len());
            check_same(&format!("cached prefix, run {run_idx}, {adapter:?}"), cached, &whole, agreement);
        }
    }
    adapters.free(backend);
}

/// Base rows beside adapters get what they get on a backend that has never seen one.
pub fn base_rows_are_unaffected(backend: &mut dyn Backend, config: &DecoderConfig, agreement: Agreement) {
    let base: Vec<Run> = (0..3)
        .map(|seed| Run::greedy(&prompt(config, seed, 9 + 5 * seed as usize), None, 5))
        .collect();
    let expected = generate(backend, &base).expect("base rows");
    for hosts in adapter_sets(config) {
        let adapters = Uploaded::new(backend, &hosts);
        let mut runs = base.clone();
        let run = |adapter: usize| Run::greedy(&adapters.prompt(config, adapter, 8, 11), Some(adapters.handles[adapter]), 5);
        runs.extend((0..hosts.len()).map(run));
        let mixed = generate(backend, &runs).expect("base rows beside adapters");
        for (run_idx, (mixed, expected)) in mixed.iter().zip(&expected).enumerate() {
            check_same(&format!("base rows, run {run_idx}"), mixed, expected, agreement);
        }
        adapters.free(backend);
    }
}

/// Decode rows of every adapter in one step, several rows of some.
pub fn ranks_mix(backend: &mut dyn Backend, config: &DecoderConfig, agreement: Agreement) {
    let adapters = Uploaded::new(backend, &adapters(config));
    let handles = adapters.handles.iter().flat_map(|&handle| vec![handle; 1 + handle.0 as usize % 3]);
    let runs: Vec<Run> = handles
        .enumerate()
        .map(|(seed, handle)| Run::greedy(&prompt(config, seed as u64, 4), Some(handle), 8))
        .collect();
    let together = generate(backend, &runs).expect("a batch of decode rows");
    for (run, together) in runs.iter().zip(&together) {
        let alone = generate(backend, std::slice::from_ref(run)).expect("a run alone");
        check_same(&format!("ranks mix, {:?}", run.adapter), together, &alone[0], agreement);
    }
    adapters.free(backend);
}

/// Each adapter changes the answer, and each in its own way; an adapter of zeros does not.
pub fn adapters_matter(backend: &mut dyn Backend, config: &DecoderConfig) {
    // Of zeros, with scales of one, and without rows of its own, which are its very own also as zeros.
    let without_effect = [SHAPES[1], RICH_SHAPES[2], SHAPES[3]].map(|shape| AdapterShape { amplitude: 0.0, ..shape });
    for (mut hosts, zero) in adapter_sets(config).into_iter().zip(without_effect) {
        hosts[5] = random_adapter(config, &zero, 99, PackedDtype::F32);
        let adapters = Uploaded::new(backend, &hosts);
        let least_vocab = hosts.iter().map(|host| host.vocab_size(config.vocab_size)).min().expect("adapters");
        let base = Run::greedy(&own_prompt(config, least_vocab, 1, 12), None, 4);
        let mut runs = vec![base.clone()];
        runs.extend(adapters.handles.iter().map(|&handle| Run {
            adapter: Some(handle),
            ..base.clone()
        }));
        let outcomes = generate(backend, &runs).expect("one prompt on every adapter");
        let first = |outcome: &Outcome| outcome.output_logprobs[0].top[0].1;
        for (idx, outcome) in outcomes.iter().enumerate() {
            for (other_idx, other) in outcomes.iter().enumerate().take(idx) {
                let difference = (first(outcome) - first(other)).abs();
                let (is_zero, is_base) = (idx == outcomes.len() - 1, other_idx == 0);
                if is_zero && is_base {
                    assert!(difference < 1e-5, "an adapter of zeros changes the answer by {difference}");
                } else {
                    assert!(difference > 1e-3, "runs {other_idx} and {idx} differ by {difference} only");
                }
            }
        }
        adapters.free(backend);
    }
}

/// Seeded draws with every parameter, among others and alone.
pub fn sampling_ignores_neighbours(backend: &mut dyn Backend, config: &DecoderConfig, agreement: Agreement) {
    let base = Run::greedy(&prompt(config, 5, 10), None, 12);
    let with = |params: SamplingParams| Run {
        params: SamplingParams { max_tokens: 12, ..params },
        ..base.clone()
    };
    let mut runs = vec![
        with(SamplingParams {
            seed: 1,
            ..Default::default()
        }),
        with(SamplingParams {
            seed: 2,
            top_k: 7,
            temperature: 0.7,
            ..Default::default()
        }),
        with(SamplingParams {
            seed: 3,
            top_p: 0.6,
            ..Default::default()
        }),
        with(SamplingParams {
            seed: 4,
            min_p: 0.2,
            temperature: 1.5,
            ..Default::default()
        }),
        with(SamplingParams {
            seed: 5,
            frequency_penalty: 1.0,
            presence_penalty: 0.5,
            repetition_penalty: 1.3,
            ..Default::default()
        }),
        with(SamplingParams {
            temperature: 0.0,
            logit_bias: vec![(77, 50.0)],
            ..Default::default()
        }),
        with(SamplingParams {
            temperature: 0.0,
            repetition_penalty: 1.9,
            frequency_penalty: 2.0,
            ..Default::default()
        }),
    ];
    runs.push(runs[0].clone());
    let together = generate(backend, &runs).expect("sampled runs");
    assert_eq!(together[0], together[7], "equal requests, equal answers");
    assert_ne!(together[0].output_ids, together[2].output_ids);
    assert_eq!(together[5].output_ids, [77; 12], "a bias of 50");
    let distinct: std::collections::BTreeSet<u32> = together[6].output_ids.iter().copied().collect();
    assert!(
        distinct.len() >= 10,
        "penalties keep tokens from repeating, got {:?}",
        together[6].output_ids
    );
    for (run, together) in runs.iter().zip(&together) {
        // Where bits differ, so may the token that a draw falls on.
        if run.params.temperature > 0.0 && matches!(agreement, Agreement::Within(_)) {
            continue;
        }
        let alone = generate(backend, std::slice::from_ref(run)).expect("a run alone");
        check_same(&format!("sampling, {:?}", run.params), together, &alone[0], agreement);
    }
}

/// No rows, no samples; and rows without samples.
pub fn nothing_is_computed_for_an_empty_batch(backend: &mut dyn Backend) {
    assert!(backend.execute(&StepBatch::default()).expect("an empty batch").samples.is_empty());
    let mut batch = one_row();
    batch.samples.clear();
    assert!(backend.execute(&batch).expect("a batch without samples").samples.is_empty());
}

/// Adapters are refused when their bytes are spent, and fit again when others have gone.
pub fn adapter_bytes_are_counted(backend: &mut dyn Backend, config: &DecoderConfig) {
    let host = random_adapter(config, &SHAPES[3], 4, PackedDtype::F32);
    let needed = backend.adapter_bytes(&host).expect("a good adapter");
    let most = backend.capacity().adapter_bytes / needed;
    let mut handles = Vec::new();
    let error = loop {
        match backend.begin_upload(&host) {
            Ok(handle) => handles.push(handle),
            Err(error) => break error,
        }
        assert!(handles.len() <= most, "{} adapters of {needed} bytes were taken", handles.len());
    };
    assert!(
        matches!(&error, BackendError::OutOfMemory { needed_bytes, .. } if *needed_bytes == needed),
        "{error}"
    );
    assert!(!handles.is_empty());
    while !backend.poll_upload(handles[0]).expect("an upload") {
        std::thread::yield_now();
    }
    backend.free_adapter(handles.swap_remove(0));
    handles.push(backend.begin_upload(&host).expect("room again"));
    for handle in handles {
        while !backend.poll_upload(handle).expect("an upload") {
            std::thread::yield_now();
        }
        backend.free_adapter(handle);
    }
}

/// Adapters grow into KV blocks and go away again while sequences run whose blocks move because of it: no answer changes by a bit, nor does
/// that of an adapter that moved. For a backend whose adapters and blocks share their memory, none of which is in use.
pub fn shared_memory_is_moved_under_running_sequences(backend: &mut dyn Backend, config: &DecoderConfig) {
    let capacity = backend.capacity().clone();
    assert!(capacity.is_shared());
    let hosts: Vec<_> = (0..4)
        .map(|idx| random_adapter(config, &SHAPES[[1, 2, 1, 3][idx]], 70 + idx as u64, PackedDtype::Bf16))
        .collect();
    let bytes: Vec<usize> = hosts.iter().map(|host| backend.adapter_bytes(host).expect("a good adapter")).collect();
    let border = |backend: &mut dyn Backend, used: usize| {
        let num_blocks = capacity.blocks_beside(used);
        assert_eq!(backend.set_kv_blocks(num_blocks, &[]).expect("no failure"), num_blocks);
        num_blocks
    };
    let upload = |backend: &mut dyn Backend, idx: usize| Uploaded::new(backend, &hosts[idx..=idx]).handles[0];
    let probe = |backend: &mut dyn Backend, num_blocks: usize, handle: AdapterHandle| {
        let run = Run::greedy(&prompt(config, 9, 20), Some(handle), 6);
        generate_in(backend, &[run], num_blocks, |_, _, _| Ok(())).expect("a run alone").remove(0)
    };
    // What each adapter answers when nothing moves.
    let alone: Vec<Outcome> = (0..hosts.len())
        .map(|idx| {
            let num_blocks = border(backend, bytes[idx]);
            let handle = upload(backend, idx);
            let outcome = probe(backend, num_blocks, handle);
            backend.free_adapter(handle);
            outcome
        })
        .collect();
    assert!(alone.iter().all(|outcome| outcome.failure.is_none()) && alone[0] != alone[1]);

    // Runs on the base and on the first adapter, in the blocks just below the border.
    let num_blocks = border(backend, bytes[0]);
    let first = upload(backend, 0);
    let runs: Vec<Run> = (0..4)
        .map(|idx| Run {
            chunk: 24,
            ..Run::greedy(&prompt(config, 30 + idx, 40 + 9 * idx as usize), (idx % 2 == 1).then_some(first), 24)
        })
        .collect();
    let expected = generate_in(backend, &runs, num_blocks, |_, _, _| Ok(())).expect("nothing moves");
    let mut others: Vec<(usize, AdapterHandle)> = Vec::new();
    let mut num_moved = 0;
    let got = generate_in(backend, &runs, num_blocks, |backend, step, blocks| {
        let used = |others: &[(usize, AdapterHandle)]| bytes[0] + others.iter().map(|(idx, _)| bytes[*idx]).sum::<usize>();
        match step {
            // One more adapter, into the blocks that the runs have.
            3 | 6 | 9 => {
                let idx = step / 3;
                let num_blocks = capacity.blocks_beside(used(&others) + bytes[idx]) as u32;
                let mut moves = Vec::new();
                blocks.free.retain(|&block| block < num_blocks);
                for block in blocks.tables.iter_mut().flatten().filter(|block| **block >= num_blocks) {
                    let (from, to) = (BlockId(*block), BlockId(blocks.free.remove(0)));
                    moves.push(BlockMove { from, to });
                    *block = to.0;
                }
                num_moved += moves.len();
                assert_eq!(backend.set_kv_blocks(num_blocks as usize, &moves)?, num_blocks as usize);
                others.push((idx, backend.begin_upload(&hosts[idx])?));
            }
            // One goes, the uppermost of them at first: the rest closes up, and the cache has the bytes again.
            12 | 15 => {
                for (_, handle) in &others {
                    while !backend.poll_upload(*handle)? {
                        std::thread::yield_now();
                    }
                }
                let before = capacity.blocks_beside(used(&others)) as u32;
                backend.free_adapter(others.remove(0).1);
                let num_blocks = capacity.blocks_beside(used(&others));
                assert_eq!(backend.set_kv_blocks(num_blocks, &[])?, num_blocks);
                blocks.free.extend(before..num_blocks as u32);
            }
            _ => {}
        }
        Ok(())
    })
    .expect("everything moves");
    assert!(num_moved > 0, "blocks were in the way");
    assert_eq!(got, expected);
    let (last, handle) = others.remove(0);
    let num_blocks = capacity.blocks_beside(bytes[0] + bytes[last]);
    assert_eq!(probe(backend, num_blocks, first), alone[0], "an adapter that stayed");
    assert_eq!(probe(backend, num_blocks, handle), alone[last], "an adapter that moved");
    backend.free_adapter(handle);
    backend.free_adapter(first);
    assert_eq!(border(backend, 0), capacity.num_blocks);
    let mut beyond = one_row();
    assert_eq!(backend.set_kv_blocks(capacity.min_blocks, &[]).expect("no failure"), capacity.min_blocks);
    beyond.kv_slots[0] = (capacity.min_blocks * capacity.block_size) as u32;
    beyond.sequences[0].block_table = Arc::from([capacity.min_blocks as u32]);
    assert!(
        matches!(backend.execute(&beyond), Err(BackendError::BadBatch(_))),
        "that is adapters' memory now"
    );
}

/// A batch that breaks a rule is an error, and the backend goes on.
pub fn bad_batches_are_refused(backend: &mut dyn Backend, config: &DecoderConfig) {
    let refused = |backend: &mut dyn Backend, change: &dyn Fn(&mut StepBatch)| {
        let mut batch = one_row();
        change(&mut batch);
        let result = backend.execute(&batch);
        assert!(matches!(result, Err(BackendError::BadBatch(_))), "{batch:?}: {result:?}");
    };
    refused(backend, &|batch| batch.token_ids[0] = config.vocab_size as u32);
    refused(backend, &|batch| batch.kv_slots[0] += 1);
    refused(backend, &|batch| batch.sequences[0].block_table = Arc::from([u32::MAX]));
    refused(backend, &|batch| {
        batch.lora_segments.push(LoraSegment {
            adapter: AdapterHandle(u32::MAX),
            row_start: 0,
            num_rows: 1,
        })
    });
    let host = random_adapter(config, &SHAPES[0], 5, PackedDtype::F32);
    let freed = backend.begin_upload(&host).expect("an upload");
    while !backend.poll_upload(freed).expect("an upload") {
        std::thread::yield_now();
    }
    backend.free_adapter(freed);
    refused(backend, &|batch| {
        batch.lora_segments.push(LoraSegment {
            adapter: freed,
            row_start: 0,
            num_rows: 1,
        })
    });
    assert_eq!(backend.execute(&one_row()).expect("a good batch").samples.len(), 1);
}

/// Rows have the tokens of their adapter: an added one is read, biased, allowed by a mask and chosen; log-probabilities are of as many tokens
/// as the row has; and what another row has is refused.
pub fn own_tokens_are_read_and_chosen(backend: &mut dyn Backend, config: &DecoderConfig) {
    let hosts = adapters_of(config, &OWN_TOKENS_SHAPES);
    let adapters = Uploaded::new(backend, &hosts);
    // A base row before, between and after.
    let everything = |run: Run| Run { top_k: 2000, ..run };
    let base = everything(Run::greedy(&prompt(config, 30, 7), None, 3));
    let mut runs = vec![base.clone()];
    for (adapter, host) in hosts.iter().enumerate() {
        let prompt = adapters.prompt(config, adapter, 31, 7);
        let mut run = everything(Run::greedy(&prompt, Some(adapters.handles[adapter]), 3));
        // All alike and far below zero, but for the last one: what is not the row's would be likelier.
        let vocab = host.vocab_size(config.vocab_size) as u32;
        run.params.logit_bias = (0..vocab)
            .map(|token| (token, if token + 1 == vocab { -900.0 } else { -1000.0 }))
            .collect();
        runs.push(run);
        runs.push(base.clone());
    }
    let outcomes = generate(backend, &runs).expect("rows of many vocabularies");
    for (run_idx, outcome) in outcomes.iter().enumerate() {
        let host = (run_idx % 2 == 1).then(|| &hosts[run_idx / 2]);
        let vocab = host.map_or(config.vocab_size, |host| host.vocab_size(config.vocab_size));
        if host.is_some() {
            assert_eq!(outcome.output_ids, [vocab as u32 - 1; 3], "run {run_idx}");
        } else {
            assert_eq!(outcome.output_ids, outcomes[0].output_ids, "run {run_idx}: a base row");
        }
        assert_eq!(outcome.prompt_logprobs.len() + outcome.output_logprobs.len(), 9);
        for logprobs in outcome.prompt_logprobs.iter().chain(&outcome.output_logprobs) {
            assert_eq!(logprobs.top.len(), vocab, "run {run_idx}: one for each token that the row has");
            let total: f64 = logprobs.top.iter().map(|(_, logprob)| f64::from(*logprob).exp()).sum();
            assert!((total - 1.0).abs() < 1e-3, "run {run_idx}: probabilities add up to {total}");
            assert!(logprobs.top.contains(&(logprobs.token_id, logprobs.logprob)), "run {run_idx}");
        }
    }
    for (host, &handle) in hosts.iter().zip(&adapters.handles) {
        let last = host.vocab_size(config.vocab_size) as u32 - 1;
        let under_adapter = |token_id: u32| {
            let mut batch = one_row();
            batch.token_ids[0] = token_id;
            batch.lora_segments.push(LoraSegment {
                adapter: handle,
                row_start: 0,
                num_rows: 1,
            });
            batch
        };
        let mut masked = under_adapter(last);
        let mut mask = vec![0; last as usize / 32 + 1];
        mask[last as usize / 32] |= 1 << (last % 32);
        let choose = masked.samples[0].choose.as_mut().expect("a row that chooses");
        choose.mask = Some(Arc::from(&mask[..]));
        let output = backend.execute(&masked).expect("a masked row");
        assert_eq!(output.samples[0].token_id, Some(last), "what the mask allows");
        let choose = masked.samples[0].choose.as_mut().expect("a row that chooses");
        choose.forbidden = vec![last];
        let output = backend.execute(&masked).expect("a row with nothing allowed");
        assert_eq!(output.samples[0].failure, Some(SampleFailure::NothingAllowed));
        let mut refused = vec![under_adapter(last + 1)];
        if last as usize >= config.vocab_size {
            let mut base = under_adapter(last);
            base.lora_segments.clear();
            refused.push(base);
        }
        for batch in refused {
            let result = backend.execute(&batch);
            assert!(
                matches!(result, Err(BackendError::BadBatch(_))),
                "token {:?}: {result:?}",
                batch.token_ids
            );
        }
    }
    adapters.free(backend);
}

/// Decode steps launched one ahead, their input tokens carried on the device, give what steps that are waited for give. Passes for a
/// backend that runs one step at a time.
pub fn pipelined_is_stepped(backend: &mut dyn Backend, config: &DecoderConfig) {
    for hosts in adapter_sets(config) {
        let adapters = Uploaded::new(backend, &hosts);
        // Prompts of one length, so that both ways have the same rows in every step. Added tokens are chosen now and then.
        let mut runs = vec![Run::greedy(&prompt(config, 20, 9), None, 12)];
        for (adapter, host) in hosts.iter().enumerate() {
            let mut run = Run::greedy(
                &adapters.prompt(config, adapter, 21 + adapter as u64, 9),
                Some(adapters.handles[adapter]),
                12,
            );
            run.params.logit_bias = added_tokens(config, host).map(|token| (token, 2.5)).collect();
            runs.push(run);
        }
        let expected = generate(backend, &runs).expect("stepped runs");
        let got = generate_ahead(backend, &runs).expect("pipelined runs");
        for (got, expected) in got.iter().zip(&expected) {
            assert_eq!(got, &expected.output_ids);
        }
        let num_added = got.iter().flatten().filter(|token| **token as usize >= config.vocab_size).count();
        let adds_tokens = hosts.iter().any(|host| added_tokens(config, host).next().is_some());
        assert_eq!(num_added > 0, adds_tokens, "{num_added} added tokens were chosen and carried");
        adapters.free(backend);
    }
}

/// Runs of one prompt length and one number of output tokens, each step launched before the one before it is collected.
fn generate_ahead(backend: &mut dyn Backend, runs: &[Run]) -> Result<Vec<Vec<u32>>, BackendError> {
    let block_size = backend.capacity().block_size;
    let (prompt_len, max_tokens) = (runs[0].prompt.len(), runs[0].params.max_tokens as usize);
    let blocks_per_run = (prompt_len + max_tokens).div_ceil(block_size);
    let mut output_ids = vec![Vec::with_capacity(max_tokens); runs.len()];
    let take = |output_ids: &mut Vec<Vec<u32>>, output: StepOutput| {
        for (ids, sample) in output_ids.iter_mut().zip(output.samples) {
            ids.push(sample.token_id.expect("a token"));
        }
    };
    let mut is_running = false;
    for step in 0..max_tokens {
        let mut batch = StepBatch::default();
        let positions = if step == 0 {
            0..prompt_len
        } else {
            prompt_len + step - 1..prompt_len + step
        };
        for (run_idx, run) in runs.iter().enumerate() {
            let table: Vec<u32> = (0..blocks_per_run).map(|block| (run_idx * blocks_per_run + block) as u32).collect();
            let row_start = batch.token_ids.len() as u32;
            for position in positions.clone() {
                let token_id = match run.prompt.get(position) {
                    Some(&token_id) => token_id,
                    None if is_running => {
                        let (row, sample_idx) = (batch.token_ids.len() as u32, run_idx as u32);
                        batch.carried_tokens.push(CarriedToken { row, sample_idx });
                        0
                    }
                    None => *output_ids[run_idx].last().expect("a token of the step before"),
                };
                batch.token_ids.push(token_id);
                batch.positions.push(position as u32);
                let slot = table[position / block_size] as usize * block_size + position % block_size;
                batch.kv_slots.push(slot as u32);
            }
            let num_rows = positions.len() as u32;
            batch.samples.push(SampleRow {
                row: row_start + num_rows - 1,
                request_id: RequestId(run_idx as u64),
                choose: Some(choose_token(run, &vec![0; step])),
                prompt_logprob: None,
            });
            batch.sequences.push(SequenceRows {
                request_id: RequestId(run_idx as u64),
                row_start,
                num_rows,
                context_len: positions.end as u32,
                block_table: Arc::from(table),
            });
            push_segment(&mut batch.lora_segments, run.adapter, row_start, num_rows);
        }
        match backend.launch(&batch)? {
            Launched::Done(output) => take(&mut output_ids, output),
            Launched::Running => {
                if is_running {
                    take(&mut output_ids, backend.collect()?);
                }
                is_running = true;
            }
        }
    }
    if is_running {
        take(&mut output_ids, backend.collect()?);
    }
    Ok(output_ids)
}

/// Two backends over the same weights give the same log-probabilities within `tolerance`, for base and adapters in one batch, and choose
/// the same tokens wherever the likeliest leads by more.
pub fn backends_agree(backend: &mut dyn Backend, reference: &mut dyn Backend, config: &DecoderConfig, tolerance: f32) {
    for (set, hosts) in adapter_sets(config).into_iter().enumerate() {
        let on_backend = Uploaded::new(backend, &hosts);
        let on_reference = Uploaded::new(reference, &hosts);
        let got = generate(backend, &mixed_runs(config, &on_backend)).expect("the backend runs");
        let expected = generate(reference, &mixed_runs(config, &on_reference)).expect("the reference runs");
        for (run_idx, (got, expected)) in got.iter().zip(&expected).enumerate() {
            let case = format!("backends agree, adapters of set {set}, run {run_idx}");
            check_same(&case, got, expected, Agreement::Within(tolerance));
        }
        on_backend.free(backend);
        on_reference.free(reference);
    }
}

fn one_row() -> StepBatch {
    let choose = choose_token(&Run::greedy(&[3], None, 1), &[]);
    StepBatch {
        token_ids: vec![3],
        positions: vec![0],
        kv_slots: vec![0],
        sequences: vec![SequenceRows {
            request_id: RequestId(0),
            row_start: 0,
            num_rows: 1,
            context_len: 1,
            block_table: Arc::from([0]),
        }],
        carried_tokens: vec![],
        lora_segments: vec![],
        samples: vec![SampleRow {
            row: 0,
            request_id: RequestId(0),
            choose: Some(choose),
            prompt_logprob: None,
        }],
    }
}

/// Adapters on a backend; to be freed by hand, since a backend is borrowed only for a moment.
struct Uploaded {
    handles: Vec<AdapterHandle>,
    hosts: Vec<Arc<HostAdapter>>,
}

impl Uploaded {
    fn new(backend: &mut dyn Backend, hosts: &[Arc<HostAdapter>]) -> Self {
        let handles: Vec<AdapterHandle> = hosts.iter().map(|host| backend.begin_upload(host).expect("the adapters fit")).collect();
        for &handle in &handles {
            while !backend.poll_upload(handle).expect("an upload") {
                std::thread::yield_now();
            }
        }
        Self {
            handles,
            hosts: hosts.to_vec(),
        }
    }

    /// A prompt of the tokens that an adapter has.
    fn prompt(&self, config: &DecoderConfig, adapter: usize, seed: u64, len: usize) -> Vec<u32> {
        own_prompt(config, self.hosts[adapter].vocab_size(config.vocab_size), seed, len)
    }

    fn free(self, backend: &mut dyn Backend) {
        self.handles.into_iter().for_each(|handle| backend.free_adapter(handle));
    }
}

/// Base and every adapter, two runs each, of differing lengths and chunks.
fn mixed_runs(config: &DecoderConfig, adapters: &Uploaded) -> Vec<Run> {
    let run = |idx: usize| {
        let seed = idx as u64;
        let adapter = idx.checked_sub(1);
        let prompt = |seed, len| adapter.map_or_else(|| prompt(config, seed, len), |adapter| adapters.prompt(config, adapter, seed, len));
        let handle = adapter.map(|adapter| adapters.handles[adapter]);
        [
            Run::greedy(&prompt(seed, 1 + 3 * idx), handle, 7),
            Run {
                chunk: 5,
                ..Run::greedy(&prompt(50 + seed, 17 - idx), handle, 3 + idx as u32)
            },
        ]
    };
    (0..=adapters.handles.len()).flat_map(run).collect()
}

/// A prompt of random tokens.
pub fn prompt(config: &DecoderConfig, seed: u64, len: usize) -> Vec<u32> {
    own_prompt(config, config.vocab_size, seed, len)
}

/// The same of another vocabulary: every third token is one that the base model has not, if there are such.
fn own_prompt(config: &DecoderConfig, vocab_size: usize, seed: u64, len: usize) -> Vec<u32> {
    let (base, vocab) = (config.vocab_size as u64, vocab_size as u64);
    let token = |position| match random_bits(seed, position) {
        bits if vocab > base && position % 3 == 1 => base + bits % (vocab - base),
        bits => bits % base.min(vocab),
    };
    (0..len as u64).map(|position| token(position) as u32).collect()
}

/// Tokens that the base model has not.
fn added_tokens(config: &DecoderConfig, host: &HostAdapter) -> impl Iterator<Item = u32> + use<> {
    config.vocab_size as u32..host.vocab_size(config.vocab_size) as u32
}

/// Panics unless two outcomes are the same as far as `agreement` has it.
pub fn check_same(case: &str, got: &Outcome, expected: &Outcome, agreement: Agreement) {
    let tolerance = match agreement {
        Agreement::Bits => {
            assert_eq!(got, expected, "{case}");
            return;
        }
        Agreement::Within(tolerance) => tolerance,
    };
    let near = |what: &str, got: &TokenLogprobs, expected: &TokenLogprobs| {
        if got.token_id == expected.token_id {
            let (got, expected) = (got.logprob, expected.logprob);
            assert!((got - expected).abs() <= tolerance, "{case}: {what}: logprob {got}, expected {expected}");
        }
        for (token_id, expected) in &expected.top {
            // A token at the end of the list may have changed places with one that is not in it.
            if let Some((_, got)) = got.top.iter().find(|(other, _)| other == token_id) {
                assert!(
                    (got - expected).abs() <= tolerance,
                    "{case}: {what}: token {token_id}: {got}, expected {expected}"
                );
            }
        }
        let best = |logprobs: &TokenLogprobs| logprobs.top.first().map(|top| top.1);
        if let (Some(got), Some(expected)) = (best(got), best(expected)) {
            assert!(
                (got - expected).abs() <= tolerance,
                "{case}: {what}: likeliest {got}, expected {expected}"
            );
        }
    };
    assert_eq!(got.failure, expected.failure, "{case}");
    assert_eq!(got.prompt_logprobs.len(), expected.prompt_logprobs.len(), "{case}");
    for (position, (got, expected)) in got.prompt_logprobs.iter().zip(&expected.prompt_logprobs).enumerate() {
        near(&format!("prompt position {position}"), got, expected);
    }
    for (step, (got, expected)) in got.output_logprobs.iter().zip(&expected.output_logprobs).enumerate() {
        near(&format!("step {step}"), got, expected);
        if got.token_id != expected.token_id {
            let lead = expected.top[0].1 - expected.top[1].1;
            assert!(
                lead <= 2.0 * tolerance,
                "{case}: step {step}: token {}, expected {} which leads by {lead}",
                got.token_id,
                expected.token_id
            );
            return;
        }
    }
    assert_eq!(got.output_ids, expected.output_ids, "{case}");
}

/// The shape of an adapter made by [`random_adapter`].
#[derive(Clone, Copy, Debug)]
pub struct AdapterShape<'a> {
    /// Rows of A; the second half of the modules has half of it.
    pub lora_rank: u32,
    /// Projections that it changes.
    pub projections: &'a [Projection],
    /// Only layers whose index has this remainder by 2; `None` is all.
    pub layer_parity: Option<usize>,
    /// Whether it changes embedding and head.
    pub embed_and_head: bool,
    /// α/r.
    pub scaling: f32,
    /// Largest weight of A (B's are up to 1).
    pub amplitude: f32,
    /// What it has beyond A and B; grows with `amplitude`, too.
    pub extras: Extras,
}

/// What an adapter has beyond A and B.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extras {
    /// Scales on the outputs of its modules, near 1 (DoRA).
    pub scales: bool,
    /// Biases on them.
    pub biases: bool,
    /// An embedding of its own.
    pub embedding: bool,
    /// A head of its own.
    pub head: bool,
    /// Tokens that it has more than the base model, or fewer.
    pub added_tokens: i32,
    /// Rows of its own for every third token in the embedding, and for those that it adds.
    pub embedding_rows: bool,
    /// The same in the head.
    pub head_rows: bool,
}

impl Extras {
    /// A and B alone.
    pub const NONE: Self = Self {
        scales: false,
        biases: false,
        embedding: false,
        head: false,
        added_tokens: 0,
        embedding_rows: false,
        head_rows: false,
    };
}

/// Ranks 1 to 64, from two projections of every second layer to all modules there are.
pub const SHAPES: [AdapterShape<'static>; 6] = [
    shape(4, &[Projection::Q, Projection::V], None, false),
    shape(16, &Projection::ALL, None, false),
    shape(64, &Projection::ALL, None, false),
    shape(8, &Projection::ALL, None, true),
    shape(3, &[Projection::K, Projection::O, Projection::Up], Some(1), false),
    shape(1, &[Projection::Down, Projection::Gate], Some(0), false),
];

const fn shape<'a>(lora_rank: u32, projections: &'a [Projection], layer_parity: Option<usize>, embed_and_head: bool) -> AdapterShape<'a> {
    AdapterShape {
        lora_rank,
        projections,
        layer_parity,
        embed_and_head,
        scaling: 1.5 / lora_rank as f32,
        amplitude: 0.1,
        extras: Extras::NONE,
    }
}

/// Adapters that are more than A and B: DoRA, biases, both with embedding and head, whole embeddings and heads, and biases alone.
pub const RICH_SHAPES: [AdapterShape<'static>; 6] = [
    AdapterShape {
        extras: Extras {
            scales: true,
            ..Extras::NONE
        },
        ..shape(16, &Projection::ALL, None, false)
    },
    AdapterShape {
        extras: Extras {
            biases: true,
            ..Extras::NONE
        },
        ..shape(4, &[Projection::Q, Projection::V, Projection::Down], Some(0), false)
    },
    AdapterShape {
        extras: Extras {
            scales: true,
            biases: true,
            ..Extras::NONE
        },
        ..shape(24, &Projection::ALL, None, true)
    },
    AdapterShape {
        extras: Extras {
            embedding: true,
            head: true,
            ..Extras::NONE
        },
        ..shape(4, &[Projection::Q], None, false)
    },
    AdapterShape {
        extras: Extras {
            scales: true,
            head: true,
            ..Extras::NONE
        },
        ..shape(3, &[Projection::K, Projection::O, Projection::Up], Some(1), false)
    },
    AdapterShape {
        extras: Extras {
            biases: true,
            ..Extras::NONE
        },
        ..shape(0, &[Projection::O, Projection::Gate, Projection::Down], None, false)
    },
];

/// Adapters with tokens of their own: vocabularies that are a multiple of 8 and not, whole and by rows, with pairs, DoRA and biases on top;
/// fewer tokens; and rows for tokens that the base model has.
pub const OWN_TOKENS_SHAPES: [AdapterShape<'static>; 6] = [
    AdapterShape {
        extras: Extras {
            added_tokens: 5,
            embedding: true,
            head: true,
            ..Extras::NONE
        },
        ..shape(4, &[Projection::Q, Projection::V], None, false)
    },
    AdapterShape {
        extras: Extras {
            added_tokens: 8,
            embedding_rows: true,
            head_rows: true,
            ..Extras::NONE
        },
        ..shape(20, &Projection::ALL, None, true)
    },
    AdapterShape {
        extras: Extras {
            added_tokens: -7,
            scales: true,
            biases: true,
            ..Extras::NONE
        },
        ..shape(16, &[Projection::V, Projection::Down], None, true)
    },
    AdapterShape {
        extras: Extras {
            embedding_rows: true,
            head_rows: true,
            ..Extras::NONE
        },
        ..shape(4, &[Projection::O, Projection::Up], Some(0), false)
    },
    AdapterShape {
        extras: Extras {
            added_tokens: 3,
            scales: true,
            head: true,
            embedding_rows: true,
            ..Extras::NONE
        },
        ..shape(3, &[Projection::K], None, true)
    },
    AdapterShape {
        extras: Extras {
            head_rows: true,
            ..Extras::NONE
        },
        ..shape(1, &[Projection::Gate], Some(1), false)
    },
];

fn adapters_of(config: &DecoderConfig, shapes: &[AdapterShape<'_>]) -> Vec<Arc<HostAdapter>> {
    let dtype = |idx| if idx % 2 == 0 { PackedDtype::F32 } else { PackedDtype::Bf16 };
    let adapter = |(idx, shape)| random_adapter(config, shape, idx as u64, dtype(idx));
    shapes.iter().enumerate().map(adapter).collect()
}

fn adapters(config: &DecoderConfig) -> Vec<Arc<HostAdapter>> {
    adapters_of(config, &SHAPES)
}

/// Those of A and B alone, those that are more, and those with tokens of their own: as many as one step takes, each.
fn adapter_sets(config: &DecoderConfig) -> [Vec<Arc<HostAdapter>>; 3] {
    [
        adapters(config),
        adapters_of(config, &RICH_SHAPES),
        adapters_of(config, &OWN_TOKENS_SHAPES),
    ]
}

/// An adapter with random weights, a function of shape and seed.
pub fn random_adapter(config: &DecoderConfig, shape: &AdapterShape<'_>, seed: u64, dtype: PackedDtype) -> Arc<HostAdapter> {
    let base_vocab_size = config.vocab_size;
    let config = &DecoderConfig {
        vocab_size: base_vocab_size
            .checked_add_signed(shape.extras.added_tokens as isize)
            .expect("a shape has tokens"),
        ..config.clone()
    };
    let mut ids = Vec::new();
    for layer in (0..config.num_layers).filter(|layer| shape.layer_parity.is_none_or(|parity| layer % 2 == parity)) {
        let mut projections = shape.projections.to_vec();
        projections.sort_unstable();
        ids.extend(projections.into_iter().map(|projection| ModuleId::Layer {
            layer: layer as u16,
            projection,
        }));
    }
    if shape.embed_and_head {
        ids.extend([ModuleId::EmbedTokens, ModuleId::LmHead]);
    }
    let Extras {
        scales,
        biases,
        embedding,
        head,
        added_tokens,
        embedding_rows,
        head_rows,
    } = shape.extras;
    let mut modules = Vec::new();
    let mut end_bytes = 0;
    let mut place = |bytes: usize| {
        let start = end_bytes;
        end_bytes += bytes.next_multiple_of(64);
        start
    };
    let half = ids.len().div_ceil(2);
    for (idx, &id) in ids.iter().enumerate() {
        let (d_in, d_out) = super::cpu::module_shape(id, config);
        let lora_rank = if idx < half { shape.lora_rank } else { shape.lora_rank.div_ceil(2) };
        let pair_bytes = |width: usize| lora_rank as usize * width * dtype.size_bytes();
        modules.push(PackedModule {
            id,
            lora_rank,
            d_in: d_in as u32,
            d_out: d_out as u32,
            scaling: if lora_rank == 0 { 0.0 } else { shape.scaling },
            a_offset_bytes: place(pair_bytes(d_in)),
            b_t_offset_bytes: place(pair_bytes(d_out)),
            output_scale_offset_bytes: scales.then(|| place(4 * d_out)),
            output_bias_offset_bytes: biases.then(|| place(4 * d_out)),
        });
    }
    let replaced_ids = [(embedding, ModuleId::EmbedTokens), (head, ModuleId::LmHead)];
    let replaced_len = config.vocab_size * config.hidden_size;
    let replaced: Vec<ReplacedWeight> = replaced_ids
        .into_iter()
        .filter(|(is_replaced, _)| *is_replaced)
        .map(|(_, id)| ReplacedWeight {
            id,
            offset_bytes: place(replaced_len * dtype.size_bytes()),
        })
        .collect();
    let token_ids: Vec<u32> = (0..config.vocab_size as u32)
        .filter(|token| token % 3 == 0 || *token as usize >= base_vocab_size)
        .collect();
    let rows_len = token_ids.len() * config.hidden_size;
    let token_rows: Vec<TokenRows> = [(embedding_rows, ModuleId::EmbedTokens), (head_rows, ModuleId::LmHead)]
        .into_iter()
        .filter(|(has_rows, _)| *has_rows)
        .map(|(_, id)| TokenRows {
            id,
            token_ids: token_ids.clone(),
            offset_bytes: place(rows_len * dtype.size_bytes()),
        })
        .collect();
    let mut blob = AlignedBytes::zeroed(end_bytes);
    // `len` values within `amplitude` of `center`.
    let mut write = |offset: usize, len: usize, dtype: PackedDtype, center: f32, amplitude: f32, key: u64| {
        let bytes = &mut blob.as_bytes_mut()[offset..offset + len * dtype.size_bytes()];
        let values = (0..len as u64)
            .map(|i| (random_bits(key, i) >> 40) as f32 * (2.0 / (1 << 24) as f32) - 1.0)
            .map(|unit| center + amplitude * unit);
        match dtype {
            PackedDtype::F32 => bytemuck::cast_slice_mut(bytes)
                .iter_mut()
                .zip(values)
                .for_each(|(out, value)| *out = value),
            PackedDtype::Bf16 => {
                bytemuck::cast_slice_mut(bytes)
                    .iter_mut()
                    .zip(values)
                    .for_each(|(out, value)| *out = bf16::from_f32(value));
            }
        }
    };
    for (idx, module) in modules.iter().enumerate() {
        let key = random_bits(seed, idx as u64);
        let (rank, d_in, d_out) = (module.lora_rank as usize, module.d_in as usize, module.d_out as usize);
        write(module.a_offset_bytes, rank * d_in, dtype, 0.0, shape.amplitude, key);
        write(module.b_t_offset_bytes, rank * d_out, dtype, 0.0, 1.0, key ^ 1);
        if let Some(offset) = module.output_scale_offset_bytes {
            write(offset, d_out, PackedDtype::F32, 1.0, 5.0 * shape.amplitude, key ^ 2);
        }
        if let Some(offset) = module.output_bias_offset_bytes {
            write(offset, d_out, PackedDtype::F32, 0.0, 3.0 * shape.amplitude, key ^ 3);
        }
    }
    for (idx, weight) in replaced.iter().enumerate() {
        let key = random_bits(!seed, idx as u64);
        write(weight.offset_bytes, replaced_len, dtype, 0.0, 1.5 * shape.amplitude, key);
    }
    for (idx, rows) in token_rows.iter().enumerate() {
        let key = random_bits(!seed, 2 + idx as u64);
        write(rows.offset_bytes, rows_len, dtype, 0.0, 1.5 * shape.amplitude, key);
    }
    let mut version = [0; 32];
    for (word, bytes) in version.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *bytes = random_bits(seed ^ u64::from(shape.lora_rank) << 32, word as u64).to_le_bytes();
    }
    Arc::new(HostAdapter {
        version: VersionId(version),
        dtype,
        modules,
        blob: Arc::new(blob),
        max_lora_rank: shape.lora_rank,
        replaced,
        token_rows,
        resized_vocab: (added_tokens != 0).then_some(config.vocab_size as u32),
        companion: None,
    })
}

/// SplitMix64 at `index` of the stream `seed`.
fn random_bits(seed: u64, index: u64) -> u64 {
    let mut z = seed
        .wrapping_mul(0xd1b5_4a32_d192_ed03)
        .wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
