//! Loading and unloading adapters: SGLang's, vLLM's and Dynamo's forms.

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
    /// Extension, after a load. What was read: modules and layers, rank and scale of each, configuration keys without effect.
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
