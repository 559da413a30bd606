//! `/v1/aliases`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What an alias shall stand for: one adapter, or several with weights.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"targets": [{"adapter": "json", "weight": 90}, {"adapter": "yaml", "weight": 10}]}))]
pub struct AliasRequest {
    /// One adapter. Either this or `targets`.
    pub adapter: Option<String>,
    /// Up to 16 adapters.
    pub targets: Option<Vec<AliasTargetRequest>>,
}

/// An adapter behind an alias.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AliasTargetRequest {
    /// Its name.
    pub adapter: String,
    /// Its part of the callers, relative to the others'.
    #[schema(minimum = 0.000001, maximum = 1000000, default = 1)]
    pub weight: Option<f64>,
}

/// An alias.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AliasCard {
    /// `alias`.
    #[schema(example = "alias")]
    pub object: String,
    /// Its name.
    #[schema(example = "support")]
    pub name: String,
    /// The adapters behind it.
    pub targets: Vec<AliasTargetCard>,
}

/// An adapter behind an alias.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AliasTargetCard {
    /// Its name.
    #[schema(example = "support-v1")]
    pub adapter: String,
    /// Its weight as it was given.
    pub weight: f64,
    /// Its part of all callers, in (0, 1].
    #[schema(example = 0.9)]
    pub share: f64,
    /// Requests that got it by this alias.
    pub requests_total: u64,
}

/// Every alias.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AliasList {
    /// `list`.
    #[schema(example = "list")]
    pub object: String,
    /// By name.
    pub data: Vec<AliasCard>,
}

/// An alias that is no more.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AliasDeleted {
    /// Its name.
    pub name: String,
    /// `true`.
    pub deleted: bool,
}
