//! The tensors of a decoder: names as in HF checkpoints, and shapes.

use super::DecoderConfig;

/// A tensor of the decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DecoderTensor {
    /// `model.embed_tokens.weight [vocab, hidden]`
    EmbedTokens,
    /// A tensor of layer `.0`.
    Layer(usize, LayerTensor),
    /// `model.norm.weight [hidden]`
    FinalNorm,
    /// `lm_head.weight [vocab, hidden]`; absent when tied.
    LmHead,
}

/// A tensor of one layer; see [`LayerTensor::TABLE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the table below says it all")]
pub enum LayerTensor {
    InputNorm,
    Q,
    K,
    V,
    QBias,
    KBias,
    VBias,
    QNorm,
    KNorm,
    O,
    OBias,
    PostAttentionNorm,
    Gate,
    Up,
    GateBias,
    UpBias,
    Down,
    DownBias,
}

/// A dimension of a tensor.
#[derive(Clone, Copy)]
enum Dim {
    Hidden,
    Q,
    Kv,
    Head,
    Intermediate,
}

/// Which decoders have a tensor.
#[derive(Clone, Copy)]
enum When {
    Always,
    QkvBias,
    OBias,
    MlpBias,
    QkNorm,
}

/// One line of [`LayerTensor::TABLE`].
pub struct LayerTensorRow {
    tensor: LayerTensor,
    /// Below `model.layers.N.`.
    name: &'static str,
    shape: &'static [Dim],
    when: When,
}

const fn row(tensor: LayerTensor, name: &'static str, shape: &'static [Dim], when: When) -> LayerTensorRow {
    LayerTensorRow { tensor, name, shape, when }
}

impl LayerTensor {
    /// Tensor, name below `model.layers.N.`, shape (weights are `[out, in]`), and which decoders have it; in the enum's order.
    pub const TABLE: [LayerTensorRow; 18] = [
        row(Self::InputNorm, "input_layernorm.weight", &[Dim::Hidden], When::Always),
        row(Self::Q, "self_attn.q_proj.weight", &[Dim::Q, Dim::Hidden], When::Always),
        row(Self::K, "self_attn.k_proj.weight", &[Dim::Kv, Dim::Hidden], When::Always),
        row(Self::V, "self_attn.v_proj.weight", &[Dim::Kv, Dim::Hidden], When::Always),
        row(Self::QBias, "self_attn.q_proj.bias", &[Dim::Q], When::QkvBias),
        row(Self::KBias, "self_attn.k_proj.bias", &[Dim::Kv], When::QkvBias),
        row(Self::VBias, "self_attn.v_proj.bias", &[Dim::Kv], When::QkvBias),
        row(Self::QNorm, "self_attn.q_norm.weight", &[Dim::Head], When::QkNorm),
        row(Self::KNorm, "self_attn.k_norm.weight", &[Dim::Head], When::QkNorm),
        row(Self::O, "self_attn.o_proj.weight", &[Dim::Hidden, Dim::Q], When::Always),
        row(Self::OBias, "self_attn.o_proj.bias", &[Dim::Hidden], When::OBias),
        row(Self::PostAttentionNorm, "post_attention_layernorm.weight", &[Dim::Hidden], When::Always),
        row(Self::Gate, "mlp.gate_proj.weight", &[Dim::Intermediate, Dim::Hidden], When::Always),
        row(Self::Up, "mlp.up_proj.weight", &[Dim::Intermediate, Dim::Hidden], When::Always),
        row(Self::GateBias, "mlp.gate_proj.bias", &[Dim::Intermediate], When::MlpBias),
        row(Self::UpBias, "mlp.up_proj.bias", &[Dim::Intermediate], When::MlpBias),
        row(Self::Down, "mlp.down_proj.weight", &[Dim::Hidden, Dim::Intermediate], When::Always),
        row(Self::DownBias, "mlp.down_proj.bias", &[Dim::Hidden], When::MlpBias),
    ];

    fn row(self) -> &'static LayerTensorRow {
        &Self::TABLE[self as usize]
    }

    /// Whether a decoder of this configuration has it.
    pub fn is_in(self, config: &DecoderConfig) -> bool {
        match self.row().when {
            When::Always => true,
            When::QkvBias => config.qkv_bias,
            When::OBias => config.o_bias,
            When::MlpBias => config.mlp_bias,
            When::QkNorm => config.qk_norm,
        }
    }
}

impl DecoderTensor {
    /// Its name in an HF checkpoint.
    pub fn name(self) -> String {
        match self {
            Self::EmbedTokens => "model.embed_tokens.weight".to_owned(),
            Self::Layer(layer, tensor) => format!("model.layers.{layer}.{}", tensor.row().name),
            Self::FinalNorm => "model.norm.weight".to_owned(),
            Self::LmHead => "lm_head.weight".to_owned(),
        }
    }

    /// Its shape, outermost first.
    pub fn shape(self, config: &DecoderConfig) -> Vec<usize> {
        match self {
            Self::EmbedTokens | Self::LmHead => vec![config.vocab_size, config.hidden_size],
            Self::FinalNorm => vec![config.hidden_size],
            Self::Layer(_, tensor) => {
                let size = |dim: &Dim| match dim {
                    Dim::Hidden => config.hidden_size,
                    Dim::Q => config.q_size(),
                    Dim::Kv => config.kv_size(),
                    Dim::Head => config.head_dim,
                    Dim::Intermediate => config.intermediate_size,
                };
                tensor.row().shape.iter().map(size).collect()
            }
        }
    }

    /// Every tensor that a checkpoint of this decoder must hold.
    pub fn all(config: &DecoderConfig) -> Vec<Self> {
        let layers = (0..config.num_layers).flat_map(|layer| {
            let rows = LayerTensor::TABLE.iter().filter(|row| row.tensor.is_in(config));
            rows.map(move |row| Self::Layer(layer, row.tensor))
        });
        let head = (!config.tie_word_embeddings).then_some(Self::LmHead);
        std::iter::once(Self::EmbedTokens)
            .chain(layers)
            .chain([Self::FinalNorm])
            .chain(head)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_in_the_enums_order() {
        for (index, row) in LayerTensor::TABLE.iter().enumerate() {
            assert_eq!(row.tensor as usize, index, "{}", row.name);
        }
    }
}
