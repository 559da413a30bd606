//! [`DecoderConfig`]: what differs between the models of the Llama family.

/// The shape and the switches of a decoder, read from HF `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// `LlamaForCausalLM`, …
    pub architecture: String,
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of gate and up.
    pub intermediate_size: usize,
    /// Layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Added under the root of RMSNorm.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How the frequencies are stretched.
    pub rope_scaling: RopeScaling,
    /// Of the MLP.
    pub activation: Activation,
    /// q, k, v have biases.
    pub qkv_bias: bool,
    /// o has a bias.
    pub o_bias: bool,
    /// gate, up, down have biases.
    pub mlp_bias: bool,
    /// RMSNorm over each head of q and k before rope.
    pub qk_norm: bool,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// Attend to the last so many positions only, on every layer.
    pub sliding_window: Option<usize>,
    /// The context that the model was made for.
    pub max_position_embeddings: usize,
    /// From `config.json`; `generation_config.json` may name more.
    pub eos_token_ids: Vec<u32>,
    /// Beginning-of-sequence token.
    pub bos_token_id: Option<u32>,
}

/// How rotary frequencies are stretched.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1's: low frequencies divided, high ones kept, a smooth ramp between.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// Start of the ramp.
        low_freq_factor: f64,
        /// End of the ramp.
        high_freq_factor: f64,
        /// Context before stretching.
        original_max_position_embeddings: f64,
    },
}

/// Activation of the gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// GELU by tanh.
    GeluTanh,
}
