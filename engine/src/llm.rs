//! [`LlmEngine`]: the engine over a [`Backend`](crate::backend::Backend).

use std::collections::BTreeSet;

/// Limits and policies of an engine. Built by the gateway from its flags, validated by `LlmEngine::start`.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Most tokens of prompt and output together; at most the model's own.
    pub context_length: usize,
    /// Sequences running at once.
    pub max_running_requests: usize,
    /// Requests waiting at once.
    pub max_queued_requests: usize,
    /// Most rows of one step (the token budget); a longer prompt is prefilled in chunks.
    pub chunked_prefill_tokens: usize,
    /// Whether prefixes are cached.
    pub prefix_caching: bool,
    /// `None`: adapters are refused.
    pub lora: Option<LoraConfig>,
}

/// Limits on adapters.
#[derive(Clone, Debug)]
pub struct LoraConfig {
    /// Distinct adapters of one step.
    pub max_loras_per_batch: usize,
    /// Adapters in host memory; `None` is unbounded.
    pub max_loaded_loras: Option<usize>,
    /// Which adapter leaves first.
    pub eviction: EvictionPolicy,
    /// Largest rank accepted; `None` accepts every rank.
    pub max_lora_rank: Option<u32>,
    /// Modules accepted (`q_proj`, …, `embed_tokens`, `lm_head`); `None` accepts all that the decoder has.
    pub target_modules: Option<BTreeSet<String>>,
}

/// Which adapter leaves first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EvictionPolicy {
    /// The one used longest ago.
    #[default]
    Lru,
    /// The one that came first.
    Fifo,
}

/// The engine over a backend.
pub struct LlmEngine {}
