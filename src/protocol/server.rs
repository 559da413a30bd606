//! What routers and operators ask a server about itself.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// `/version`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// The server's version.
    #[schema(example = "0.1.0")]
    pub version: String,
}

/// `/load`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ServerLoad {
    /// Requests running and waiting.
    pub server_load: usize,
}

/// `/v1/loads`: one entry, as there is one engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Loads {
    /// Unix time.
    pub timestamp: f64,
    /// Always 1.
    pub dp_rank_count: u32,
    /// The engine's load.
    pub loads: Vec<EngineLoad>,
    /// Totals over `loads`.
    pub aggregate: AggregateLoad,
}

/// An engine's load.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EngineLoad {
    /// Always 0.
    pub dp_rank: u32,
    /// Requests in the batch.
    pub num_running_reqs: usize,
    /// Requests waiting.
    pub num_waiting_reqs: usize,
    /// Both.
    pub num_total_reqs: usize,
    /// KV positions in use.
    pub num_used_tokens: usize,
    /// KV positions.
    pub max_total_num_tokens: usize,
    /// Used KV over all, 0 to 1.
    pub token_usage: f64,
    /// Prompt tokens found in the cache over all prompt tokens, 0 to 1.
    pub cache_hit_rate: f64,
    /// Running requests over the most that may run, 0 to 1.
    pub utilization: f64,
    /// The most that may run.
    pub max_running_requests: usize,
    /// Tokens generated a second, of late.
    pub gen_throughput: f64,
    /// Adapters; absent without LoRA.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraLoad>,
}

/// The adapters of an engine's load.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LoraLoad {
    /// Distinct adapters of the running requests.
    pub slots_used: usize,
    /// Distinct adapters that one batch may have.
    pub slots_total: usize,
    /// The one over the other, 0 to 1.
    pub utilization: f64,
}

/// Totals.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AggregateLoad {
    /// Requests in the batch.
    pub total_running_reqs: usize,
    /// Requests waiting.
    pub total_waiting_reqs: usize,
    /// Both.
    pub total_reqs: usize,
    /// KV positions in use.
    pub total_tokens: usize,
}

/// `/model_info`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ModelInfo {
    /// Where the model was loaded from.
    pub model_path: String,
    /// Where the tokenizer was loaded from.
    pub tokenizer_path: String,
    /// Always true.
    pub is_generation: bool,
    /// What the model's generation_config.json recommends, as far as it is used.
    #[schema(value_type = Option<Object>)]
    pub preferred_sampling_params: Option<serde_json::Value>,
    /// Identifies the weights.
    pub weight_version: String,
    /// Always false.
    pub has_image_understanding: bool,
    /// Always false.
    pub has_audio_understanding: bool,
    /// The architecture's family.
    pub model_type: String,
    /// The architecture.
    pub architectures: Vec<String>,
}

/// `/server_info`: the model, the limits, the engine's state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ServerInfo {
    /// The first served name.
    pub model_id: String,
    /// Where the model was loaded from.
    pub model_path: String,
    /// The first served name.
    pub served_model_name: String,
    /// The server's version.
    pub version: String,
    /// `ready`, or `unhealthy`.
    pub status: String,
    /// Most tokens of prompt and output together.
    pub context_length: usize,
    /// KV positions.
    pub max_total_num_tokens: usize,
    /// The same under another name.
    pub max_total_tokens: usize,
    /// The most requests that may run.
    pub max_running_requests: usize,
    /// The most requests that may wait.
    pub max_queued_requests: usize,
    /// Always 1.
    pub tp_size: u32,
    /// Always 1.
    pub dp_size: u32,
    /// Always 1.
    pub pp_size: u32,
    /// Always `null`.
    pub disaggregation_mode: String,
    /// Always false.
    pub is_embedding: bool,
    /// Whether adapters may be used.
    pub enable_lora: bool,
    /// Distinct adapters of one step.
    pub max_loras_per_batch: usize,
    /// Adapters in host memory, if bounded.
    pub max_loaded_loras: Option<usize>,
    /// Largest rank that an adapter may have, if bounded.
    pub max_lora_rank: Option<u32>,
    /// Modules that adapters may change, if not all.
    pub lora_target_modules: Option<Vec<String>>,
    /// Adapters registered.
    pub num_loaded_loras: usize,
    /// `cpu`, `cuda:0 (…)`, …
    pub device: String,
    /// What is computed in.
    pub dtype: String,
    /// Identifies the weights.
    pub weight_version: String,
    /// The engine's counters.
    #[schema(value_type = Vec<Object>)]
    pub internal_states: Vec<serde_json::Value>,
}

/// A request for `/abort_request`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AbortRequest {
    /// End the request of this id, and the parts `rid_0`, `rid_1`, … that a batch of it has.
    pub rid: Option<String>,
    /// End every request.
    pub abort_all: Option<bool>,
}

/// What `/abort_request` did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AbortResponse {
    /// Sequences that were told to end; null for all.
    pub aborted: Option<usize>,
}
