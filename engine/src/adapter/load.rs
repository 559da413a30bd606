//! Adapter files to [`HostAdapter`](super::HostAdapter)s, checked against the base model.

/// What an adapter covers and how: shown by the load answer and by `polylora adapters inspect`.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct CoverageReport {
    /// One entry per module: path, rank, effective scaling.
    pub modules: Vec<ModuleCoverage>,
    /// Layers with at least one module, ascending.
    pub layers: Vec<u16>,
    /// Keys of the configuration that have no effect on inference.
    pub keys_without_effect: Vec<String>,
}

/// One covered module.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ModuleCoverage {
    /// `model.layers.0.self_attn.q_proj`, …
    pub module: String,
    /// Rows of A.
    pub lora_rank: u32,
    /// α as configured for this module.
    pub lora_alpha: f32,
    /// α/r or α/√r.
    pub scaling: f32,
}
