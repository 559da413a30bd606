//! The base model's weights, packed for the kernels.

use half::bf16;
use polylora_kernels::cpu::{PackedMatrix, ThreadPool, WeightDtype};

use crate::{
    decoder::{DecoderConfig, DecoderTensor, LayerTensor},
    weights::{ModelWeights, Tensor, WeightsError},
};

/// A matrix and perhaps a bias; several projections of one input are stacked in it.
pub(super) struct Linear {
    pub weight: PackedMatrix,
    pub bias: Option<Vec<f32>>,
}

pub(super) struct Layer {
    pub input_norm: Vec<f32>,
    /// q, k and v, stacked.
    pub qkv: Linear,
    /// Of q and of k, `[head_dim]` each.
    pub qk_norm: Option<(Vec<f32>, Vec<f32>)>,
    pub o: Linear,
    pub post_attention_norm: Vec<f32>,
    /// gate and up, stacked.
    pub gate_up: Linear,
    pub down: Linear,
}

enum Embedding {
    /// Read from the head's matrix.
    Tied,
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

pub(super) struct Model {
    vocab_size: usize,
    embedding: Embedding,
    pub layers: Vec<Layer>,
    pub final_norm: Vec<f32>,
    pub head: PackedMatrix,
}

impl Model {
    pub fn pack(pool: &ThreadPool, weights: &ModelWeights, config: &DecoderConfig, dtype: WeightDtype) -> Result<Self, WeightsError> {
        weights.check(config)?;
        let packer = Packer {
            pool,
            weights,
            config,
            dtype,
        };
        let embedding = if config.tie_word_embeddings {
            Embedding::Tied
        } else {
            packer.embedding()?
        };
        let head = if config.tie_word_embeddings {
            DecoderTensor::EmbedTokens
        } else {
            DecoderTensor::LmHead
        };
        Ok(Self {
            vocab_size: config.vocab_size,
            embedding,
            layers: (0..config.num_layers).map(|layer| packer.layer(layer)).collect::<Result<_, _>>()?,
            final_norm: packer.vector(DecoderTensor::FinalNorm)?,
            head: packer.matrix(&[head])?,
        })
    }

    /// The embedding of a token, `[hidden]`; zeros for one that the model has not, which an adapter then writes.
    pub fn embed(&self, token_id: u32, out: &mut [f32]) {
        if token_id as usize >= self.vocab_size {
            return out.fill(0.0);
        }
        let range = token_id as usize * out.len()..(token_id as usize + 1) * out.len();
        match &self.embedding {
            Embedding::Tied => self.head.unpack_row(token_id as usize, out),
            Embedding::F32(values) => out.copy_from_slice(&values[range]),
            Embedding::Bf16(values) => out.iter_mut().zip(&values[range]).for_each(|(out, value)| *out = value.to_f32()),
        }
    }

    /// Bytes of the weights in memory.
    pub fn bytes(&self) -> usize {
        let linears = self.layers.iter().flat_map(|layer| [&layer.qkv, &layer.o, &layer.gate_up, &layer.down]);
        let embedding = match &self.embedding {
            Embedding::Tied => 0,
            Embedding::F32(values) => size_of_val(&values[..]),
            Embedding::Bf16(values) => size_of_val(&values[..]),
        };
        embedding + self.head.bytes() + linears.map(|linear| linear.weight.bytes()).sum::<usize>()
    }
}

struct Packer<'a> {
    pool: &'a ThreadPool,
    weights: &'a ModelWeights,
    config: &'a DecoderConfig,
    dtype: WeightDtype,
}

impl Packer<'_> {
    fn tensor(&self, tensor: DecoderTensor) -> Result<Tensor<'_>, WeightsError> {
        self.weights.tensor(tensor, self.config)
    }

    fn vector(&self, tensor: DecoderTensor) -> Result<Vec<f32>, WeightsError> {
        Ok(self.tensor(tensor)?.to_f32())
    }

    /// Matrices with one width, stacked.
    fn matrix(&self, stacked: &[DecoderTensor]) -> Result<PackedMatrix, WeightsError> {
        let tensors = stacked.iter().map(|&tensor| self.tensor(tensor)).collect::<Result<Vec<_>, _>>()?;
        let n = tensors.iter().map(|tensor| tensor.shape()[0]).sum();
        let read_row = |mut row: usize, out: &mut [f32]| {
            for tensor in &tensors {
                if row < tensor.shape()[0] {
                    return tensor.read_row(row, out);
                }
                row -= tensor.shape()[0];
            }
        };
        Ok(PackedMatrix::pack(self.pool, n, tensors[0].row_len(), self.dtype, &read_row))
    }

    fn linear(&self, layer: usize, weights: &[LayerTensor], biases: &[LayerTensor]) -> Result<Linear, WeightsError> {
        let of_layer = |tensors: &[LayerTensor]| tensors.iter().map(|&tensor| DecoderTensor::Layer(layer, tensor)).collect::<Vec<_>>();
        let bias = if biases.iter().all(|bias| bias.is_in(self.config)) {
            Some(
                of_layer(biases)
                    .into_iter()
                    .map(|bias| self.vector(bias))
                    .collect::<Result<Vec<_>, _>>()?
                    .concat(),
            )
        } else {
            None
        };
        Ok(Linear {
            weight: self.matrix(&of_layer(weights))?,
            bias,
        })
    }

    fn layer(&self, layer: usize) -> Result<Layer, WeightsError> {
        use LayerTensor as T;
        let vector = |tensor| self.vector(DecoderTensor::Layer(layer, tensor));
        Ok(Layer {
            input_norm: vector(T::InputNorm)?,
            qkv: self.linear(layer, &[T::Q, T::K, T::V], &[T::QBias, T::KBias, T::VBias])?,
            qk_norm: if self.config.qk_norm {
                Some((vector(T::QNorm)?, vector(T::KNorm)?))
            } else {
                None
            },
            o: self.linear(layer, &[T::O], &[T::OBias])?,
            post_attention_norm: vector(T::PostAttentionNorm)?,
            gate_up: self.linear(layer, &[T::Gate, T::Up], &[T::GateBias, T::UpBias])?,
            down: self.linear(layer, &[T::Down], &[T::DownBias])?,
        })
    }

    fn embedding(&self) -> Result<Embedding, WeightsError> {
        let tensor = self.tensor(DecoderTensor::EmbedTokens)?;
        let (num_rows, row_len) = (tensor.shape()[0], tensor.row_len());
        // Row by row: the whole table in f32 beside the one that is kept may be gigabytes.
        Ok(match self.dtype {
            WeightDtype::F32 => {
                let mut values = vec![0.0; num_rows * row_len];
                values
                    .chunks_exact_mut(row_len)
                    .enumerate()
                    .for_each(|(row, out)| tensor.read_row(row, out));
                Embedding::F32(values)
            }
            WeightDtype::Bf16 => {
                let mut values = Vec::with_capacity(num_rows * row_len);
                let mut wide = vec![0.0; row_len];
                for row in 0..num_rows {
                    tensor.read_row(row, &mut wide);
                    values.extend(wide.iter().copied().map(bf16::from_f32));
                }
                Embedding::Bf16(values)
            }
        })
    }
}
