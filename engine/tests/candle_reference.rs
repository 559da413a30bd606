//! The CPU backend against the same decoder written again in candle's tensors, with adapters merged into the weights (W + s·B·A).
//!
//! No paging, no cache, no batching, no segments: every prompt whole, one matrix product after another. Another author's products and
//! another order of summation, so that a fault of the kernels or of the batch can't hide in both.

use std::sync::Arc;

use candle_core::{D, DType, Device, Result, Tensor};
use polylora_engine::{
    adapter::{HostAdapter, ModuleId, PackedDtype, Projection},
    backend::{
        Backend,
        conformance::{self, Run, SHAPES, generate, random_adapter},
        cpu::{CpuBackend, CpuOptions},
    },
    decoder::{Activation, DecoderConfig, DecoderTensor, LayerTensor},
    weights::{Dtype, ModelWeights},
};

const SEED: u64 = 7;
/// Both sides sum in f32 over at most 384 terms a product; seen here are differences below 2e-5.
const TOLERANCE: f32 = 5e-4;

struct Reference<'a> {
    config: &'a DecoderConfig,
    weights: ModelWeights,
    adapter: Option<&'a HostAdapter>,
}

impl Reference<'_> {
    fn tensor(&self, tensor: DecoderTensor) -> Result<Tensor> {
        self.weights
            .tensor(tensor, self.config)
            .expect("random weights have every tensor")
            .to_candle()?
            .to_dtype(DType::F32)
    }

    /// `s·B·A` of a module, `[d_out, d_in]`; `None` if the adapter does not change it.
    fn delta(&self, id: ModuleId) -> Result<Option<Tensor>> {
        let Some((adapter, module)) = self.adapter.and_then(|adapter| Some((adapter, adapter.module(id)?))) else {
            return Ok(None);
        };
        let (rank, d_in, d_out) = (module.lora_rank as usize, module.d_in as usize, module.d_out as usize);
        let a = Tensor::from_slice(adapter.a_f32(module), rank * d_in, &Device::Cpu)?;
        // The embedding's A is stored token by token.
        let a = if id == ModuleId::EmbedTokens {
            a.reshape((d_in, rank))?.t()?
        } else {
            a.reshape((rank, d_in))?
        };
        let b_t = Tensor::from_slice(adapter.b_t_f32(module), (rank, d_out), &Device::Cpu)?;
        Ok(Some((b_t.t()?.contiguous()?.matmul(&a.contiguous()?)? * f64::from(module.scaling))?))
    }

    /// `[d_out, d_in]`, the adapter merged in.
    fn projection(&self, layer: usize, tensor: LayerTensor, projection: Projection) -> Result<Tensor> {
        let weight = self.tensor(DecoderTensor::Layer(layer, tensor))?;
        match self.delta(ModuleId::Layer {
            layer: layer as u16,
            projection,
        })? {
            Some(delta) => weight + delta,
            None => Ok(weight),
        }
    }

    fn linear(&self, x: &Tensor, layer: usize, tensor: LayerTensor, bias: LayerTensor, projection: Projection) -> Result<Tensor> {
        let y = x.matmul(&self.projection(layer, tensor, projection)?.t()?)?;
        if bias.is_in(self.config) {
            y.broadcast_add(&self.tensor(DecoderTensor::Layer(layer, bias))?)
        } else {
            Ok(y)
        }
    }

    fn norm(&self, x: &Tensor, weight: DecoderTensor) -> Result<Tensor> {
        let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
        x.broadcast_div(&(mean_square + f64::from(self.config.rms_norm_eps))?.sqrt()?)?
            .broadcast_mul(&self.tensor(weight)?)
    }

    /// `[heads, rows, head_dim]`, rotated.
    fn heads(&self, x: &Tensor, layer: usize, num_heads: usize, norm: Option<LayerTensor>) -> Result<Tensor> {
        let (rows, head_dim) = (x.dim(0)?, self.config.head_dim);
        let mut x = x.reshape((rows, num_heads, head_dim))?;
        if let Some(norm) = norm.filter(|norm| norm.is_in(self.config)) {
            x = self.norm(&x, DecoderTensor::Layer(layer, norm))?;
        }
        let x = x.transpose(0, 1)?.contiguous()?;
        let half = head_dim / 2;
        let angles: Vec<f32> = (0..rows)
            .flat_map(|position| (0..half).map(move |i| (position as f64 / self.config.rope_theta.powf(2.0 * i as f64 / head_dim as f64)) as f32))
            .collect();
        let angles = Tensor::from_vec(angles, (rows, half), &Device::Cpu)?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let (low, high) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
        let rotated_low = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
        let rotated_high = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
        Tensor::cat(&[rotated_low, rotated_high], D::Minus1)
    }

    fn attention(&self, x: &Tensor, layer: usize) -> Result<Tensor> {
        use LayerTensor as T;
        let (rows, config) = (x.dim(0)?, self.config);
        let q = self.linear(x, layer, T::Q, T::QBias, Projection::Q)?;
        let k = self.linear(x, layer, T::K, T::KBias, Projection::K)?;
        let v = self.linear(x, layer, T::V, T::VBias, Projection::V)?;
        let q = self.heads(&q, layer, config.num_heads, Some(T::QNorm))?;
        let k = self.heads(&k, layer, config.num_kv_heads, Some(T::KNorm))?;
        let v = v.reshape((rows, config.num_kv_heads, config.head_dim))?.transpose(0, 1)?.contiguous()?;
        let mask: Vec<f32> = (0..rows)
            .flat_map(|row| {
                let seen = move |position: usize| position <= row && config.sliding_window.is_none_or(|window| position + window > row);
                (0..rows).map(move |position| if seen(position) { 0.0 } else { f32::NEG_INFINITY })
            })
            .collect();
        let mask = Tensor::from_vec(mask, (rows, rows), &Device::Cpu)?;
        let group = config.num_heads / config.num_kv_heads;
        let outputs = (0..config.num_heads)
            .map(|head| {
                let scores = (q.get(head)?.matmul(&k.get(head / group)?.t()?)? / (config.head_dim as f64).sqrt())?.add(&mask)?;
                let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
                weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?.matmul(&v.get(head / group)?)
            })
            .collect::<Result<Vec<_>>>()?;
        self.linear(&Tensor::cat(&outputs, D::Minus1)?, layer, T::O, T::OBias, Projection::O)
    }

    fn mlp(&self, x: &Tensor, layer: usize) -> Result<Tensor> {
        use LayerTensor as T;
        let gate = self.linear(x, layer, T::Gate, T::GateBias, Projection::Gate)?;
        let up = self.linear(x, layer, T::Up, T::UpBias, Projection::Up)?;
        let gate = match self.config.activation {
            Activation::Silu => gate.silu()?,
            Activation::GeluTanh => gate.gelu()?,
        };
        self.linear(&(gate * up)?, layer, T::Down, T::DownBias, Projection::Down)
    }

    /// Log-probabilities at every position, `[rows][vocab]`.
    fn logprobs(&self, prompt: &[u32]) -> Result<Vec<Vec<f32>>> {
        let mut embedding = self.tensor(DecoderTensor::EmbedTokens)?;
        let head = if self.config.tie_word_embeddings {
            embedding.clone()
        } else {
            self.tensor(DecoderTensor::LmHead)?
        };
        if let Some(delta) = self.delta(ModuleId::EmbedTokens)? {
            embedding = (embedding + delta.t()?)?;
        }
        let head = match self.delta(ModuleId::LmHead)? {
            Some(delta) => (head + delta)?,
            None => head,
        };
        let mut x = embedding.index_select(&Tensor::new(prompt, &Device::Cpu)?, 0)?;
        for layer in 0..self.config.num_layers {
            let normed = self.norm(&x, DecoderTensor::Layer(layer, LayerTensor::InputNorm))?;
            x = (x + self.attention(&normed, layer)?)?;
            let normed = self.norm(&x, DecoderTensor::Layer(layer, LayerTensor::PostAttentionNorm))?;
            x = (x + self.mlp(&normed, layer)?)?;
        }
        let logits = self.norm(&x, DecoderTensor::FinalNorm)?.matmul(&head.t()?)?;
        let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?)?;
        shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)?.to_vec2()
    }
}

fn check(what: &str, change: impl FnOnce(&mut DecoderConfig)) {
    let mut config = conformance::config();
    change(&mut config);
    let mut backend = CpuBackend::random(&config, SEED, &CpuOptions::default()).unwrap();
    let adapters: Vec<Arc<HostAdapter>> = SHAPES
        .iter()
        .zip(0..)
        .map(|(shape, seed)| random_adapter(&config, shape, seed, PackedDtype::F32))
        .collect();
    let handles: Vec<_> = adapters.iter().map(|adapter| backend.begin_upload(adapter).unwrap()).collect();
    let choices = || std::iter::once((None, None)).chain(adapters.iter().zip(&handles).map(|(adapter, &handle)| (Some(&**adapter), Some(handle))));
    let prompts: Vec<Vec<u32>> = choices()
        .zip(0..)
        .map(|(_, idx)| conformance::prompt(&config, idx, 20 + 9 * idx as usize))
        .collect();
    // All of them in one batch, in chunks.
    let runs: Vec<Run> = choices()
        .zip(&prompts)
        .map(|((_, handle), prompt)| Run {
            chunk: 16,
            ..Run::greedy(prompt, handle, 1)
        })
        .collect();
    let outcomes = generate(&mut backend, &runs).unwrap();
    for (((adapter, _), prompt), outcome) in choices().zip(&prompts).zip(&outcomes) {
        let reference = Reference {
            config: &config,
            weights: ModelWeights::random(SEED, Dtype::F32),
            adapter,
        };
        let expected = reference.logprobs(prompt).unwrap();
        let got = outcome.prompt_logprobs.iter().chain(&outcome.output_logprobs);
        assert_eq!(got.clone().count(), prompt.len(), "one a position");
        for (position, (got, expected)) in got.zip(&expected).enumerate() {
            for &(token_id, logprob) in &got.top {
                let expected = expected[token_id as usize];
                assert!(
                    (logprob - expected).abs() < TOLERANCE,
                    "{what}, {adapter:?}, position {position}, token {token_id}: {logprob}, expected {expected}"
                );
            }
            let likeliest = expected.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert!(
                (got.top[0].1 - likeliest).abs() < TOLERANCE,
                "{what}, position {position}: {:?}, expected {likeliest}",
                got.top[0]
            );
        }
    }
}

#[test]
fn llama() {
    check("llama", |_| {});
}

#[test]
fn biases_and_tied_embedding() {
    check("biases", |config| {
        (config.qkv_bias, config.o_bias, config.mlp_bias, config.tie_word_embeddings) = (true, true, true, true);
    });
}

#[test]
fn norms_of_q_and_k() {
    check("qk_norm", |config| config.qk_norm = true);
}

#[test]
fn sliding_window_and_gelu() {
    check("window", |config| {
        config.sliding_window = Some(11);
        config.activation = Activation::GeluTanh;
    });
}
