//! What a caller asks of the engine, and the events that it gets back.
//!
//! Token ids in, token ids out: text, chat templates and stop strings are the gateway's.

use std::{fmt::Display, sync::Arc};

use crate::adapter::AdapterLease;

/// Identity of one request, unique within a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// One stream of output tokens to be generated. `n > 1` is `n` requests that share a prompt (and, by the prefix cache, its KV).
pub struct GenerationRequest {
    /// Prompt token ids, at least one, each below the vocabulary size: the adapter's own, where it has one.
    pub prompt_tokens: Vec<u32>,
    /// How to choose and when to stop.
    pub sampling: SamplingParams,
    /// The adapter that this request runs on; `None` is the base model.
    pub adapter: Option<AdapterLease>,
    /// Which log-probabilities to report.
    pub logprobs: LogprobsParams,
    /// A grammar, as something that allows and forbids tokens.
    pub constraint: Option<Box<dyn Constraint>>,
    /// Whom this request is counted under for fairness (an API key or tenant); empty for nobody in particular.
    pub fairness_key: Arc<str>,
}

/// Sampling settings, already validated by [`SamplingParams::validate`].
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Most output tokens.
    pub max_tokens: u32,
    /// End-of-sequence and stop tokens are forbidden before so many output tokens.
    pub min_tokens: u32,
    /// 0 is greedy.
    pub temperature: f32,
    /// Only the `top_k` likeliest tokens; 0 is all.
    pub top_k: u32,
    /// Smallest set of likeliest tokens whose probabilities sum to at least `top_p`; in (0, 1].
    pub top_p: f32,
    /// Tokens with at least `min_p` times the likeliest one's probability; in [0, 1].
    pub min_p: f32,
    /// Subtracted from a token's logit for each time that it occurs in the output; in [-2, 2].
    pub frequency_penalty: f32,
    /// Subtracted once from the logit of each token that occurs in the output; in [-2, 2].
    pub presence_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens that occur in prompt or output; in (0, 2].
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Generation ends with any of these (the token is reported).
    pub stop_token_ids: Vec<u32>,
    /// The model's own end-of-sequence tokens do not end generation.
    pub ignore_eos: bool,
    /// Random stream. The draw for output position `i` depends on `(seed, i)` alone.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            max_tokens: 128,
            min_tokens: 0,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            seed: 0,
        }
    }
}

/// Which log-probabilities to report; natural logarithms of the raw model distribution (before penalties, bias and temperature).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogprobsParams {
    /// `Some(k)`: for each output token its own and the `k` likeliest.
    pub output_top_k: Option<u32>,
    /// `Some`: for prompt tokens from `start` on (position 0 has none), each given token's own and the `top_k` likeliest.
    pub prompt: Option<PromptLogprobsParams>,
}

/// See [`LogprobsParams::prompt`]. Asking for these turns off prefix-cache reads before `start`'s block for this request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptLogprobsParams {
    /// First prompt position reported.
    pub start: u32,
    /// How many likeliest tokens per position.
    pub top_k: u32,
}

/// One token's log-probability and the likeliest alternatives, likeliest first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenLogprobs {
    /// The token.
    pub token_id: u32,
    /// Its natural log-probability.
    pub logprob: f32,
    /// `(token id, log-probability)`, likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// Why a sequence ended well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-sequence or stop token was generated.
    Stop {
        /// That token.
        token_id: u32,
    },
    /// `max_tokens` were generated, or the context is full.
    Length,
    /// The constraint is complete and allows no further token.
    ConstraintDone,
    /// Ended by `abort`, or by shutdown.
    Aborted,
    /// Its adapter was unloaded by force.
    AdapterUnloaded,
}

/// Why a request failed after it was admitted. The engine itself goes on unless it says otherwise.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum RequestError {
    /// Needs more KV blocks than there are, even alone.
    #[error("the request needs {needed_tokens} tokens of KV cache, there are {capacity_tokens}")]
    KvCapacity {
        /// Tokens needed.
        needed_tokens: usize,
        /// Tokens that fit.
        capacity_tokens: usize,
    },
    /// The adapter could not be made usable.
    #[error("adapter {adapter}: {reason}")]
    Adapter {
        /// Its name.
        adapter: String,
        /// What failed.
        reason: String,
    },
    /// The constraint failed or forbids every token.
    #[error("constraint: {0}")]
    Constraint(String),
    /// The model's logits are NaN or infinite: broken weights, or an adapter whose deltas overflow. Other requests go on.
    #[error("the model gave logits that are not finite")]
    NotFinite,
    /// The device failed; the engine is unhealthy.
    #[error("engine failed: {0}")]
    Engine(String),
    /// The engine is shutting down.
    #[error("the server is shutting down")]
    ShuttingDown,
}

/// What happens to a request, in order: `Started`, `Token`*, then exactly one of `Finished` and `Failed`.
#[derive(Clone, Debug, PartialEq)]
pub enum TokenEvent {
    /// The prompt is computed.
    Started {
        /// Prompt tokens whose KV came from the prefix cache.
        cached_tokens: u32,
        /// One per reported prompt position, in order; empty unless asked for.
        prompt_logprobs: Vec<TokenLogprobs>,
    },
    /// One output token (a stop token included).
    Token {
        /// Its id.
        token_id: u32,
        /// Present when asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// The end.
    Finished {
        /// Why.
        reason: FinishReason,
    },
    /// The end, badly.
    Failed(RequestError),
}

impl TokenEvent {
    /// True for the one event that ends a stream.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Finished { .. } | Self::Failed(_))
    }
}

/// A refusal by `submit`: nothing was queued.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
pub enum SubmitError {
    /// Too many requests wait.
    #[error("the queue is full: {waiting} requests wait, at most {limit} may")]
    QueueFull {
        /// Waiting now.
        waiting: usize,
        /// The bound.
        limit: usize,
    },
    /// No prompt tokens.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// A token id outside the vocabulary.
    #[error("token id {got} is outside the vocabulary of {vocab_size}")]
    TokenOutOfRange {
        /// The id.
        got: u32,
        /// The vocabulary size.
        vocab_size: usize,
    },
    /// The prompt alone fills the context.
    #[error("The input ({got} tokens) is longer than the model's context length ({context_length} tokens).")]
    PromptTooLong {
        /// Prompt length.
        got: usize,
        /// Context length.
        context_length: usize,
    },
    /// A sampling parameter outside its range.
    #[error("{field} must be {expected}, got {got}")]
    InvalidParam {
        /// Field name.
        field: &'static str,
        /// The allowed range, in words.
        expected: &'static str,
        /// What was given.
        got: String,
    },
    /// The request could never fit the KV cache.
    #[error("the request needs {needed_tokens} tokens of KV cache, there are {capacity_tokens}")]
    KvCapacity {
        /// Tokens needed.
        needed_tokens: usize,
        /// Tokens that fit.
        capacity_tokens: usize,
    },
    /// The engine no longer takes requests.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// The engine has failed.
    #[error("the engine failed: {0}")]
    Unhealthy(String),
}

impl GenerationRequest {
    /// Tokens that it may have and that its logits are over, on a base model that has `base_vocab_size`.
    pub fn vocab_size(&self, base_vocab_size: usize) -> usize {
        self.adapter.as_ref().map_or(base_vocab_size, |lease| lease.vocab_size(base_vocab_size))
    }
}

impl SamplingParams {
    /// Checks every range (see the fields) and finiteness.
    ///
    /// # Errors
    /// `InvalidParam` naming the field, the allowed range and what was given.
    pub fn validate(&self, vocab_size: usize) -> Result<(), SubmitError> {
        let range = |ok: bool, field, expected, got: &dyn Display| {
            if ok {
                Ok(())
            } else {
                let got = got.to_string();
                Err(SubmitError::InvalidParam { field, expected, got })
            }
        };
        range(
            self.temperature.is_finite() && self.temperature >= 0.0,
            "temperature",
            "a finite number of at least 0",
            &self.temperature,
        )?;
        range(self.top_p > 0.0 && self.top_p <= 1.0, "top_p", "in (0, 1]", &self.top_p)?;
        range((0.0..=1.0).contains(&self.min_p), "min_p", "in [0, 1]", &self.min_p)?;
        range(
            (-2.0..=2.0).contains(&self.frequency_penalty),
            "frequency_penalty",
            "in [-2, 2]",
            &self.frequency_penalty,
        )?;
        range(
            (-2.0..=2.0).contains(&self.presence_penalty),
            "presence_penalty",
            "in [-2, 2]",
            &self.presence_penalty,
        )?;
        range(
            self.repetition_penalty > 0.0 && self.repetition_penalty <= 2.0,
            "repetition_penalty",
            "in (0, 2]",
            &self.repetition_penalty,
        )?;
        range(self.min_tokens <= self.max_tokens, "min_tokens", "at most max_tokens", &self.min_tokens)?;
        for &(token, bias) in &self.logit_bias {
            range(
                (token as usize) < vocab_size,
                "logit_bias",
                "keyed by token ids of the vocabulary",
                &token,
            )?;
            range(bias.is_finite(), "logit_bias", "finite", &bias)?;
        }
        for &token in &self.stop_token_ids {
            range((token as usize) < vocab_size, "stop_token_ids", "token ids of the vocabulary", &token)?;
        }
        Ok(())
    }
}

/// A grammar as the engine sees it: it masks tokens. Implemented by the gateway.
///
/// Called beside the engine thread, in this order: `fill_mask` for the next position, then `commit` with the token chosen there. One that
/// takes long holds up its own request alone.
pub trait Constraint: Send {
    /// Clears the bits of `mask` (bit `t % 32` of word `t / 32`) for tokens that may not come next. `mask` arrives all ones.
    /// `Ok(false)`: the grammar is complete and nothing may follow.
    ///
    /// # Errors
    /// A sentence for the client.
    fn fill_mask(&mut self, mask: &mut [u32]) -> Result<bool, String>;
    /// Takes the chosen token.
    ///
    /// # Errors
    /// A sentence for the client.
    fn commit(&mut self, token_id: u32) -> Result<(), String>;
}
