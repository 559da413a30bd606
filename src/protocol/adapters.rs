//! Loading and unloading adapters: SGLang's, vLLM's, Dynamo's and polylora's forms.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::error::NativeErrorBody;

/// A request for `/load_lora_adapter`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"lora_name": "sql", "lora_path": "demo:sql", "pinned": false}))]
pub struct LoadAdapterRequest {
    /// The name to serve it under.
    pub lora_name: String,
    /// A folder in PEFT's format, `org/name[@revision]` on the Hub, or `demo:NAME`.
    pub lora_path: String,
    /// Never evicted.
    pub pinned: Option<bool>,
    /// Extension. Swap atomically if the name is taken: requests in flight end on the old adapter, later ones use the new.
    pub replace: Option<bool>,
    /// Extension. Only swap if the name has this version (hex) now; 409 otherwise.
    pub expected_version: Option<String>,
}

/// A request for `/pin_lora_adapter`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"lora_name": "sql", "pinned": true}))]
pub struct PinAdapterRequest {
    /// The name.
    pub lora_name: String,
    /// Whether it is never evicted.
    pub pinned: bool,
}

/// A request for `/unload_lora_adapter`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"lora_name": "sql"}))]
pub struct UnloadAdapterRequest {
    /// The name.
    pub lora_name: String,
    /// Extension. Requests that still run on it are ended; otherwise they go on to their ends.
    pub force: Option<bool>,
    /// Extension. How long to wait for them. Unset: as long as it takes.
    #[schema(minimum = 0)]
    pub timeout_seconds: Option<f64>,
}

/// The answer of both, good or bad.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AdapterResponse {
    /// Always null.
    pub rid: Option<String>,
    /// Whether it worked.
    pub success: bool,
    /// Why not; empty on success.
    pub error_message: String,
    /// Name and path of every adapter, afterwards.
    pub loaded_adapters: BTreeMap<String, String>,
    /// Extension. After a load what was read: modules and layers, rank and scale of each, configuration keys without effect. After an
    /// unload an `AdapterUnloaded`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(value_type = Option<Object>)]
    pub report: Option<serde_json::Value>,
}

/// What a failed load or unload answers with: about the adapter, or about the body.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum AdapterFailure {
    /// The adapter can't be had.
    Adapter(AdapterResponse),
    /// The body is wrong.
    Body(NativeErrorBody),
}

/// A request for `/v1/load_lora_adapter`, in vLLM's form.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VllmLoadRequest {
    /// The name to serve it under.
    pub lora_name: Option<String>,
    /// A folder in PEFT's format, `org/name[@revision]` on the Hub, or `demo:NAME`.
    pub lora_path: Option<String>,
    /// Swap atomically if the name is taken.
    pub load_inplace: Option<bool>,
    /// Only `false`: mixture-of-experts adapters in that format are not served.
    pub is_3d_lora_weight: Option<bool>,
}

/// A request for `/v1/unload_lora_adapter`, in vLLM's form.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VllmUnloadRequest {
    /// The name.
    pub lora_name: Option<String>,
    /// Not interpreted: adapters go by name.
    pub lora_int_id: Option<i64>,
}

/// A request for `POST /v1/loras`, in Dynamo's form.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DynamoLoadRequest {
    /// The name to serve it under.
    pub lora_name: String,
    /// Where it is.
    pub source: DynamoSource,
}

/// Where an adapter is.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct DynamoSource {
    /// A path, a `file://` URI, or `org/name` on the Hub.
    #[schema(example = "file:///adapters/sql")]
    pub uri: String,
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DynamoResponse {
    /// `success`.
    pub status: String,
    /// A sentence.
    pub message: String,
    /// The name.
    pub lora_name: String,
    /// A number made from the name.
    pub lora_id: u32,
}

/// Every adapter, in Dynamo's form.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DynamoList {
    /// `success`.
    pub status: String,
    /// Name and number of each.
    pub loras: BTreeMap<String, u32>,
    /// How many.
    pub count: usize,
}

/// An adapter with all that is known of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AdapterEntry {
    /// `adapter`.
    #[schema(example = "adapter")]
    pub object: String,
    /// Its name.
    #[schema(example = "sql")]
    pub name: String,
    /// The path or Hub id that it was loaded from; `pushed:…` if its files were sent.
    pub source: String,
    /// `loading` (for the first time: requests for it are told to come again, and nothing else is known), `registered` (known by name), `host`
    /// (in memory) or `device` (usable at once).
    #[schema(example = "device")]
    pub state: String,
    /// A hash of its configuration and weights; null before it is read.
    pub version: Option<String>,
    /// Largest rank of its modules.
    pub lora_rank: u32,
    /// The modules that it changes.
    pub target_modules: Vec<String>,
    /// Bytes of its weights.
    pub size_bytes: usize,
    /// Bytes of host memory that its own tokenizer and chat template take, estimated; what it shares with other adapters included.
    pub tokenizer_bytes: usize,
    /// Whether it is never evicted.
    pub pinned: bool,
    /// Requests that use it now.
    pub leases: usize,
    /// Requests that asked for it since it was loaded.
    pub requests_total: u64,
    /// Of those, the ones that found it in memory.
    pub hits_total: u64,
    /// Unix time of the last of them, in seconds.
    pub last_used: Option<f64>,
    /// Why its last load failed, until one succeeds; requests are told the same.
    pub last_error: Option<String>,
    /// Aliases that point at it.
    pub aliases: Vec<String>,
}

/// Every adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AdapterEntryList {
    /// `list`.
    #[schema(example = "list")]
    pub object: String,
    /// Those that are being loaded for the first time, then the others, last used last.
    pub data: Vec<AdapterEntry>,
}

/// How an adapter is pushed.
#[derive(Clone, Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct PushQuery {
    /// Never evicted. Unset: as the adapter whose place it takes.
    pub pinned: Option<bool>,
    /// Whether a name that is taken gets the new version (the default) or is refused.
    pub replace: Option<bool>,
    /// Only if the name has this version (hex) now; 409 otherwise.
    pub expected_version: Option<String>,
}

/// The files of an adapter: `config` and `weights`, or `config`, `index` and all `shard`s.
#[derive(ToSchema)]
#[expect(dead_code, reason = "read part by part; this describes it")]
pub struct PushBody {
    /// `adapter_config.json`.
    #[schema(value_type = String, format = Binary)]
    config: Vec<u8>,
    /// `adapter_model.safetensors`.
    #[schema(value_type = Option<String>, format = Binary)]
    weights: Option<Vec<u8>>,
    /// Of weights that were split: `adapter_model.safetensors.index.json`.
    #[schema(value_type = Option<String>, format = Binary)]
    index: Option<Vec<u8>>,
    /// Of weights that were split: each file that the index names, under its name as the part's `filename`.
    #[schema(value_type = Option<Vec<String>>, format = Binary)]
    shard: Option<Vec<Vec<u8>>>,
    /// `tokenizer.json`, of an adapter with tokens of its own.
    #[schema(value_type = Option<String>, format = Binary)]
    tokenizer: Option<Vec<u8>>,
    /// `tokenizer_config.json`.
    #[schema(value_type = Option<String>, format = Binary)]
    tokenizer_config: Option<Vec<u8>>,
    /// `special_tokens_map.json`.
    #[schema(value_type = Option<String>, format = Binary)]
    special_tokens_map: Option<Vec<u8>>,
    /// `added_tokens.json`.
    #[schema(value_type = Option<String>, format = Binary)]
    added_tokens: Option<Vec<u8>>,
    /// `chat_template.jinja`.
    #[schema(value_type = Option<String>, format = Binary)]
    chat_template: Option<Vec<u8>>,
}

/// A pushed adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AdapterPushed {
    /// As it is served now.
    pub adapter: AdapterEntry,
    /// What was read: modules and layers, rank and scale of each, configuration keys without effect.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(value_type = Option<Object>)]
    pub report: Option<serde_json::Value>,
}

/// How an adapter is unloaded.
#[derive(Clone, Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct UnloadQuery {
    /// Requests that still run on it are ended; otherwise they go on to their ends.
    pub force: Option<bool>,
    /// How long to wait for them. Unset: as long as it takes.
    #[param(minimum = 0)]
    pub timeout_seconds: Option<f64>,
}

/// What became of an unload. The name is unknown from its beginning on, however it ends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AdapterUnloaded {
    /// The name.
    #[schema(example = "sql")]
    pub name: String,
    /// Requests that ran on it when its name was forgotten.
    pub waited_for: usize,
    /// Of those, the ones that still run: the time was up.
    pub still_running: usize,
    /// Whether they were told to end.
    pub aborted: bool,
    /// From the unload to the answer.
    pub waited_seconds: f64,
}

impl From<polylora_engine::UnloadReport> for AdapterUnloaded {
    fn from(report: polylora_engine::UnloadReport) -> Self {
        Self {
            name: report.name,
            waited_for: report.waited_for,
            still_running: report.still_running,
            aborted: report.aborted,
            waited_seconds: report.waited.as_secs_f64(),
        }
    }
}
