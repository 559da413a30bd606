//! `/v1/models`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::aliases::AliasCard;

/// The base model and every adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ModelList {
    /// `list`.
    #[schema(example = "list")]
    pub object: String,
    /// The base model's names, then the adapters, then the aliases.
    pub data: Vec<ModelCard>,
}

/// A model or an adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ModelCard {
    /// What `model` of a request may be.
    #[schema(example = "sql")]
    pub id: String,
    /// `model`.
    #[schema(example = "model")]
    pub object: String,
    /// Unix time at which the server started or the adapter was listed first.
    pub created: u64,
    /// Who serves it.
    #[schema(example = "polylora")]
    pub owned_by: String,
    /// The path or Hub id that it was loaded from; of an alias, the adapters behind it.
    pub root: String,
    /// The base model's name, for an adapter or an alias.
    pub parent: Option<String>,
    /// Most tokens of prompt and output together, for the base model.
    pub max_model_len: Option<usize>,
    /// Extension. About an adapter.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub adapter: Option<AdapterCard>,
    /// Extension. About an alias.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub alias: Option<AliasCard>,
}

/// About an adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AdapterCard {
    /// Largest rank of its modules.
    pub lora_rank: u32,
    /// The modules that it changes.
    pub target_modules: Vec<String>,
    /// Whether it is never evicted.
    pub pinned: bool,
    /// `registered` (known by name), `host` (in memory) or `device` (usable at once).
    #[schema(example = "device")]
    pub state: String,
    /// Bytes of its weights.
    pub size_bytes: usize,
    /// A hash of its configuration and weights.
    pub version: Option<String>,
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
}
