//! One step's work as plain data: what the scheduler hands to a [`Backend`](crate::backend::Backend).

use std::sync::Arc;

use crate::request::{PromptLogprobsParams, RequestId, SamplingParams, TokenLogprobs};

/// A backend's name for an uploaded adapter version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterHandle(pub u32);

/// The rows of one step. Rows of one sequence are neighbours and in order of position; sequences of one adapter are neighbours.
#[derive(Clone, Debug, Default)]
pub struct StepBatch {
    /// `[num_tokens]` input token ids.
    pub token_ids: Vec<u32>,
    /// `[num_tokens]` position of each in its sequence, from 0.
    pub positions: Vec<u32>,
    /// `[num_tokens]` where its K and V are written: `block_id * block_size + offset`.
    pub kv_slots: Vec<u32>,
    /// The sequences, in row order; together they cover all rows.
    pub sequences: Vec<SequenceRows>,
    /// Rows that run under an adapter, ascending and disjoint; base rows are in none.
    pub lora_segments: Vec<LoraSegment>,
    /// Rows whose logits are wanted, ascending by `row`.
    pub samples: Vec<SampleRow>,
    /// Rows whose input token the host does not know yet, since the step before this one, still in flight, chooses it. Their
    /// `token_ids` are 0. Always empty for a backend that runs one step at a time.
    pub carried_tokens: Vec<CarriedToken>,
}

/// A row whose input token is the one that the step before chose at `samples[sample_idx]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CarriedToken {
    /// Row of this step.
    pub row: u32,
    /// Index into the step before's `samples`.
    pub sample_idx: u32,
}

/// The rows of one sequence in a step, and where its KV lies.
#[derive(Clone, Debug)]
pub struct SequenceRows {
    /// Whose they are.
    pub request_id: RequestId,
    /// First row.
    pub row_start: u32,
    /// Rows: 1 when decoding, a chunk when prefilling.
    pub num_rows: u32,
    /// Tokens in the KV cache after this step: `position of the last row + 1`.
    pub context_len: u32,
    /// Block ids in order; `block_table[p / block_size]` holds position `p`. Covers `context_len`.
    pub block_table: Arc<[u32]>,
}

/// Neighbouring rows with one adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoraSegment {
    /// The adapter, uploaded and ready.
    pub adapter: AdapterHandle,
    /// First row.
    pub row_start: u32,
    /// Rows, at least 1.
    pub num_rows: u32,
}

/// A row whose logits are wanted: to choose the next token, to report a prompt token's log-probability, or both.
#[derive(Clone, Debug)]
pub struct SampleRow {
    /// Row of `token_ids`.
    pub row: u32,
    /// Whose it is.
    pub request_id: RequestId,
    /// `Some`: choose a token here.
    pub choose: Option<ChooseToken>,
    /// `Some`: report the log-probability of this token (the prompt's next) and of the `top_k` likeliest.
    pub prompt_logprob: Option<(u32, PromptLogprobsParams)>,
}

/// Everything that choosing one token depends on.
#[derive(Clone, Debug)]
pub struct ChooseToken {
    /// Settings.
    pub params: Arc<SamplingParams>,
    /// Output tokens so far: the position in the random stream.
    pub output_position: u32,
    /// `(token id, times in the output so far, occurs in prompt)`; empty unless a penalty is on.
    pub token_counts: Vec<TokenCount>,
    /// Tokens forbidden here (end-of-sequence and stop tokens before `min_tokens`).
    pub forbidden: Vec<u32>,
    /// Allowed tokens, bit `t % 32` of word `t / 32`, from a constraint.
    pub mask: Option<Arc<[u32]>>,
    /// `Some(k)`: report the chosen token's log-probability and the `k` likeliest.
    pub top_k_logprobs: Option<u32>,
}

/// How often a token has occurred.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenCount {
    /// The token.
    pub token_id: u32,
    /// Times in the output.
    pub in_output: u32,
    /// Whether the prompt has it.
    pub in_prompt: bool,
}

/// What a step gave, in the order of `StepBatch::samples`.
#[derive(Clone, Debug, Default)]
pub struct StepOutput {
    /// One per sample row.
    pub samples: Vec<SampleOutput>,
}

/// What one sample row gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SampleOutput {
    /// The chosen token, if asked for. `None` with `choose` set: see `failure`.
    pub token_id: Option<u32>,
    /// Its log-probabilities, if asked for.
    pub logprobs: Option<TokenLogprobs>,
    /// The prompt token's, if asked for.
    pub prompt_logprobs: Option<TokenLogprobs>,
    /// Why nothing came of this row. It concerns its request alone, which is to end with an error; the step itself went well.
    pub failure: Option<SampleFailure>,
}

/// Why a row gave no token or no log-probabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleFailure {
    /// Mask and forbidden tokens left nothing that could be chosen.
    #[error("every token is forbidden")]
    NothingAllowed,
    /// A logit is NaN or +∞: a broken model, or an adapter whose deltas overflow.
    #[error("the model gave logits that are not finite")]
    NotFinite,
}
