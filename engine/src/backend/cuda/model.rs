//! The base model's weights in device memory, bf16, stacked as the GEMMs read them.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use half::bf16;
use polylora_kernels::cuda::{CudaError, Device, DeviceBuffer, Event, Kernels, PinnedBuffer, Stream, View};

use super::LoadError;
use crate::{
    decoder::{DecoderConfig, DecoderTensor, LayerTensor},
    weights::{Dtype, ModelWeights, Tensor},
};

/// Bytes that one thread moves at a time.
const CHUNK_BYTES: usize = 8 << 20;
/// Threads that move weights: more than one, since one alone copies from the page cache slower than PCIe takes it.
const MAX_THREADS: usize = 8;

/// A projection or a stack of them: `[n, k]`, with a bias in the dtype of its output.
pub(super) struct Linear<B> {
    pub weight: DeviceBuffer<bf16>,
    pub bias: Option<DeviceBuffer<B>>,
    pub n: usize,
    pub k: usize,
}

pub(super) struct Layer {
    pub input_norm: DeviceBuffer<bf16>,
    pub qkv: Linear<bf16>,
    pub qk_norm: Option<(DeviceBuffer<bf16>, DeviceBuffer<bf16>)>,
    /// Added to the residual stream, which is f32.
    pub o: Linear<f32>,
    pub post_attention_norm: DeviceBuffer<bf16>,
    pub gate_up: Linear<bf16>,
    pub down: Linear<f32>,
}

pub(super) struct Model {
    pub embedding: DeviceBuffer<bf16>,
    pub layers: Vec<Layer>,
    pub final_norm: DeviceBuffer<bf16>,
    /// `None`: the embedding.
    pub head: Option<DeviceBuffer<bf16>>,
}

impl Model {
    /// From a checkpoint; other dtypes are rounded to bf16.
    pub fn load(stream: &Stream, weights: &ModelWeights, config: &DecoderConfig) -> Result<Self, LoadError> {
        let mut loader = Loader {
            stream,
            config,
            source: Source::Checkpoint(weights),
            copies: Vec::new(),
        };
        let model = loader.model()?;
        copy_all(stream.device(), &loader.copies)?;
        Ok(model)
    }

    /// Random weights of this shape, made on the device: matrices uniform with the variance `1 / in`, norms near 1, biases near 0.
    pub fn random(stream: &Stream, kernels: &Kernels, config: &DecoderConfig, seed: u64) -> Result<Self, LoadError> {
        let mut loader = Loader {
            stream,
            config,
            source: Source::Random { kernels, seed },
            copies: Vec::new(),
        };
        let model = loader.model()?;
        stream.synchronize()?;
        Ok(model)
    }

    pub fn head(&self) -> View<'_, bf16> {
        self.head.as_ref().unwrap_or(&self.embedding).view()
    }

    pub fn bytes(&self) -> usize {
        let of_layer = |layer: &Layer| layer.qkv.weight.len() + layer.o.weight.len() + layer.gate_up.weight.len() + layer.down.weight.len();
        let head = self.head.as_ref().map_or(0, DeviceBuffer::len);
        2 * (self.embedding.len() + head + self.layers.iter().map(of_layer).sum::<usize>())
    }
}

enum Source<'a> {
    Checkpoint(&'a ModelWeights),
    Random { kernels: &'a Kernels, seed: u64 },
}

/// A tensor on its way to an address: a part of a buffer of the model that is being made, long enough for the tensor's elements.
struct TensorCopy<'a> {
    tensor: Tensor<'a>,
    address: u64,
}

struct Loader<'a> {
    stream: &'a Stream,
    config: &'a DecoderConfig,
    source: Source<'a>,
    copies: Vec<TensorCopy<'a>>,
}

impl Loader<'_> {
    fn model(&mut self) -> Result<Model, LoadError> {
        Ok(Model {
            embedding: self.stacked(&[DecoderTensor::EmbedTokens])?,
            layers: (0..self.config.num_layers).map(|layer| self.layer(layer)).collect::<Result<_, _>>()?,
            final_norm: self.stacked(&[DecoderTensor::FinalNorm])?,
            head: match self.config.tie_word_embeddings {
                true => None,
                false => Some(self.stacked(&[DecoderTensor::LmHead])?),
            },
        })
    }

    fn layer(&mut self, layer: usize) -> Result<Layer, LoadError> {
        use LayerTensor as T;
        let config = self.config;
        let qk_norm = match (self.optional(layer, &[T::QNorm])?, self.optional(layer, &[T::KNorm])?) {
            (Some(q_norm), Some(k_norm)) => Some((q_norm, k_norm)),
            _ => None,
        };
        Ok(Layer {
            input_norm: self.required(layer, &[T::InputNorm])?,
            qkv: Linear {
                weight: self.required(layer, &[T::Q, T::K, T::V])?,
                bias: self.optional(layer, &[T::QBias, T::KBias, T::VBias])?,
                n: config.q_size() + 2 * config.kv_size(),
                k: config.hidden_size,
            },
            qk_norm,
            o: Linear {
                weight: self.required(layer, &[T::O])?,
                bias: self.f32_bias(layer, T::OBias)?,
                n: config.hidden_size,
                k: config.q_size(),
            },
            post_attention_norm: self.required(layer, &[T::PostAttentionNorm])?,
            gate_up: Linear {
                weight: self.required(layer, &[T::Gate, T::Up])?,
                bias: self.optional(layer, &[T::GateBias, T::UpBias])?,
                n: 2 * config.intermediate_size,
                k: config.hidden_size,
            },
            down: Linear {
                weight: self.required(layer, &[T::Down])?,
                bias: self.f32_bias(layer, T::DownBias)?,
                n: config.hidden_size,
                k: config.intermediate_size,
            },
        })
    }

    fn required(&mut self, layer: usize, tensors: &[LayerTensor]) -> Result<DeviceBuffer<bf16>, LoadError> {
        let tensors: Vec<_> = tensors.iter().map(|&tensor| DecoderTensor::Layer(layer, tensor)).collect();
        self.stacked(&tensors)
    }

    /// `None` unless the decoder has all of them.
    fn optional(&mut self, layer: usize, tensors: &[LayerTensor]) -> Result<Option<DeviceBuffer<bf16>>, LoadError> {
        match tensors.iter().all(|tensor| tensor.is_in(self.config)) {
            true => self.required(layer, tensors).map(Some),
            false => Ok(None),
        }
    }

    /// Tensors one after another in one buffer.
    fn stacked(&mut self, tensors: &[DecoderTensor]) -> Result<DeviceBuffer<bf16>, LoadError> {
        let len = |tensor: &DecoderTensor| tensor.shape(self.config).iter().product::<usize>();
        let buffer = DeviceBuffer::uninit(self.stream.device(), tensors.iter().map(len).sum())?;
        let mut offset = 0;
        for tensor in tensors {
            let part = buffer.view().slice(offset..offset + len(tensor));
            offset += part.len();
            match &self.source {
                Source::Checkpoint(weights) => self.copies.push(TensorCopy {
                    tensor: weights.tensor(*tensor, self.config)?,
                    address: part.address(),
                }),
                Source::Random { kernels, seed } => {
                    let shape = tensor.shape(self.config);
                    let (center, half_width) = match &shape[..] {
                        [_, columns] => (0.0, (3.0 / *columns as f32).sqrt()),
                        _ => (if is_norm(*tensor) { 1.0 } else { 0.0 }, 0.1),
                    };
                    let seed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(part.address());
                    kernels.random_fill.launch(self.stream, part, seed, center, half_width)?;
                }
            }
        }
        Ok(buffer)
    }

    fn f32_bias(&self, layer: usize, which: LayerTensor) -> Result<Option<DeviceBuffer<f32>>, LoadError> {
        if !which.is_in(self.config) {
            return Ok(None);
        }
        let tensor = DecoderTensor::Layer(layer, which);
        let values = match &self.source {
            Source::Checkpoint(weights) => weights.tensor(tensor, self.config)?.to_f32(),
            Source::Random { .. } => vec![0.0; tensor.shape(self.config).iter().product()],
        };
        Ok(Some(self.stream.upload(&values)?))
    }
}

fn is_norm(tensor: DecoderTensor) -> bool {
    use LayerTensor as T;
    matches!(
        tensor,
        DecoderTensor::FinalNorm | DecoderTensor::Layer(_, T::InputNorm | T::PostAttentionNorm | T::QNorm | T::KNorm)
    )
}

/// Moves the tensors through pinned memory, by several threads.
fn copy_all(device: &Arc<Device>, copies: &[TensorCopy<'_>]) -> Result<(), CudaError> {
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let mut mover = Mover::new(device)?;
                    while let Some(copy) = copies.get(next.fetch_add(1, Relaxed)) {
                        mover.copy(copy)?;
                    }
                    mover.stream.synchronize()
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("a mover does not panic"))
    })
}

/// One thread's stream and its two buffers: one is filled while the other is copied.
struct Mover {
    stream: Stream,
    buffers: [PinnedBuffer<bf16>; 2],
    copied: [Event; 2],
    turn: usize,
}

impl Mover {
    fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        device.bind()?;
        let buffer = || PinnedBuffer::zeroed(device, CHUNK_BYTES / 2);
        let event = || Event::new(device, false);
        Ok(Self {
            stream: Stream::new(device)?,
            buffers: [buffer()?, buffer()?],
            copied: [event()?, event()?],
            turn: 0,
        })
    }

    fn copy(&mut self, copy: &TensorCopy<'_>) -> Result<(), CudaError> {
        let bytes = copy.tensor.bytes();
        let element_bytes = copy.tensor.dtype().size_bytes();
        let mut address = copy.address;
        for chunk in bytes.chunks(CHUNK_BYTES / 2 * element_bytes) {
            let len = chunk.len() / element_bytes;
            self.copied[self.turn].synchronize()?;
            round(copy.tensor.dtype(), chunk, &mut self.buffers[self.turn][..len]);
            let to = View::from_address(address, len);
            self.stream.copy_to_device(to, &self.buffers[self.turn][..len])?;
            self.copied[self.turn].record(&self.stream)?;
            self.turn ^= 1;
            address += 2 * len as u64;
        }
        Ok(())
    }
}

/// Little-endian elements to bf16; a file need not align them.
fn round(dtype: Dtype, from: &[u8], to: &mut [bf16]) {
    match dtype {
        Dtype::Bf16 => bytemuck::cast_slice_mut(to).copy_from_slice(from),
        Dtype::F16 => {
            let values = from.as_chunks::<2>().0.iter().map(|bytes| half::f16::from_le_bytes(*bytes).to_f32());
            to.iter_mut().zip(values).for_each(|(to, value)| *to = bf16::from_f32(value));
        }
        Dtype::F32 => {
            let values = from.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
            to.iter_mut().zip(values).for_each(|(to, value)| *to = bf16::from_f32(value));
        }
    }
}
