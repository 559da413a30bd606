//! The reference backend, on the CPU.
//!
//! Weights are packed once at load, in f32 or bf16; activations, sums and the KV cache are f32. A row's result does not depend on the
//! rows beside it: a sequence gets the same bits alone, in any mixed batch, chunked, and from a cached prefix.

use std::sync::Arc;

use parking_lot::Mutex;
use polylora_kernels::cpu::{AttentionShape, HugeBuffer, ThreadPool, WeightDtype};

use super::{
    Backend, BackendError, Capacity,
    check::{ModelLimits, check_batch},
};
use crate::{
    adapter::{HostAdapter, LoraFeatures},
    batch::{AdapterHandle, SampleOutput, StepBatch, StepOutput},
    decoder::{DecoderConfig, RopeTables},
    files::FileSource,
    sampling::{SamplingScratch, sample_row},
    weights::{Dtype, ModelWeights, WeightsError},
};

mod adapters;
mod forward;
mod model;

pub(super) use adapters::module_shape;
use adapters::{Adapters, LoraBuffers, Segment};
use forward::{Forward, Workspace};
use model::Model;

/// What a backend computes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ComputeDtype {
    /// f32 throughout.
    Float32,
    /// bf16 weights and, where the CPU multiplies bf16, bf16 inputs of each matrix product; sums and everything else in f32.
    Bfloat16,
}

impl ComputeDtype {
    /// `float32`, `bfloat16`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::Bfloat16 => "bfloat16",
        }
    }

    /// What the CPU computes in when `requested` is asked for (`None`: what the checkpoint is stored in) of a checkpoint in `stored`.
    ///
    /// CPUs do not multiply f16: such weights are widened to f32, which holds each of them exactly. Where that is not what was asked for,
    /// the second value says so in a sentence for the log.
    pub fn on_cpu(requested: Option<Dtype>, stored: Dtype) -> (Self, Option<&'static str>) {
        match (requested, stored) {
            (Some(Dtype::F16), _) => (
                Self::Float32,
                Some("float16 was asked for; the CPU computes in float32, which holds every float16 value"),
            ),
            (Some(Dtype::Bf16), _) | (None, Dtype::Bf16) => (Self::Bfloat16, None),
            (Some(Dtype::F32), _) | (None, Dtype::F32 | Dtype::F16) => (Self::Float32, None),
        }
    }
}

/// How large the KV cache is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvBudget {
    /// So many blocks.
    Blocks(usize),
    /// As many blocks as fit in so many bytes.
    Bytes(usize),
}

/// How a [`CpuBackend`] is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuOptions {
    /// What is computed in.
    pub dtype: ComputeDtype,
    /// Threads that compute, the engine's own counted.
    pub num_threads: usize,
    /// How large the KV cache is.
    pub kv_cache: KvBudget,
    /// Positions per block.
    pub block_size: usize,
    /// Most rows of one step.
    pub max_batch_tokens: usize,
    /// Most bytes of adapters that batches may name.
    pub adapter_bytes: usize,
    /// Distinct adapters of one step.
    pub max_adapters_per_batch: usize,
}

impl Default for CpuOptions {
    /// f32 on every CPU of the machine; 1 GiB of KV cache and 1 GiB of adapters; 512 rows, 8 adapters a step.
    fn default() -> Self {
        Self {
            dtype: ComputeDtype::Float32,
            num_threads: std::thread::available_parallelism().map_or(1, usize::from),
            kv_cache: KvBudget::Bytes(1 << 30),
            block_size: 16,
            max_batch_tokens: 512,
            adapter_bytes: 1 << 30,
            max_adapters_per_batch: 8,
        }
    }
}

/// A model that cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Its files.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A setting out of its range.
    #[error("{option}: expected {expected}, got {got}")]
    Option {
        /// Field of [`CpuOptions`].
        option: &'static str,
        /// The range.
        expected: String,
        /// What was given.
        got: usize,
    },
}

/// The CPU as a [`Backend`].
pub struct CpuBackend {
    config: DecoderConfig,
    capacity: Capacity,
    limits: ModelLimits,
    dtype: ComputeDtype,
    pool: ThreadPool,
    model: Model,
    rope: RopeTables,
    attention: AttentionShape,
    kv_cache: Vec<LayerKv>,
    adapters: Adapters,
    workspace: Workspace,
    /// One for each run of rows that is sampled at once.
    sampling_scratch: Mutex<Vec<SamplingScratch>>,
}

/// Keys and values of one layer, `num_blocks * AttentionShape::block_len` each, laid out as the kernels like it.
struct LayerKv {
    k: HugeBuffer<f32>,
    v: HugeBuffer<f32>,
}

impl CpuBackend {
    /// What it applies of an adapter beyond A and B: everything that there is.
    pub const LORA_FEATURES: LoraFeatures = LoraFeatures {
        output_terms: true,
        replaced_weights: true,
        own_tokens: true,
    };

    /// Loads the weights of a model folder.
    ///
    /// # Errors
    /// Weights that are missing, damaged or not those of `config`; an option out of its range.
    pub fn load(files: &FileSource, config: &DecoderConfig, options: &CpuOptions) -> Result<Self, LoadError> {
        Self::from_weights(&ModelWeights::open(files)?, config, options)
    }

    /// A model of this shape with random weights, for benchmarks and tests.
    ///
    /// # Errors
    /// An option out of its range.
    pub fn random(config: &DecoderConfig, seed: u64, options: &CpuOptions) -> Result<Self, LoadError> {
        let dtype = match options.dtype {
            ComputeDtype::Float32 => Dtype::F32,
            ComputeDtype::Bfloat16 => Dtype::Bf16,
        };
        Self::from_weights(&ModelWeights::random(seed, dtype), config, options)
    }

    /// The same from weights that are open already.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn from_weights(weights: &ModelWeights, config: &DecoderConfig, options: &CpuOptions) -> Result<Self, LoadError> {
        let capacity = capacity(config, options)?;
        let pool = ThreadPool::new(options.num_threads);
        let weight_dtype = match options.dtype {
            ComputeDtype::Float32 => WeightDtype::F32,
            ComputeDtype::Bfloat16 => WeightDtype::Bf16,
        };
        let model = Model::pack(&pool, weights, config, weight_dtype)?;
        // No sequence can be longer than the whole cache.
        let max_positions = config.max_position_embeddings.min(capacity.num_blocks * capacity.block_size);
        // Zeroed memory costs nothing until it is touched.
        let cache_len = capacity.num_blocks * config.kv_size() * capacity.block_size;
        let layer_kv = |_| LayerKv {
            k: HugeBuffer::zeroed(cache_len),
            v: HugeBuffer::zeroed(cache_len),
        };
        Ok(Self {
            limits: ModelLimits {
                vocab_size: config.vocab_size,
                max_positions,
                num_blocks: capacity.num_blocks,
            },
            dtype: options.dtype,
            model,
            rope: RopeTables::new(config, max_positions),
            attention: AttentionShape {
                num_heads: config.num_heads,
                num_kv_heads: config.num_kv_heads,
                head_dim: config.head_dim,
                block_size: capacity.block_size,
                scale: 1.0 / (config.head_dim as f32).sqrt(),
                window: config.sliding_window,
            },
            kv_cache: (0..config.num_layers).map(layer_kv).collect(),
            adapters: Adapters::new(capacity.adapter_bytes),
            workspace: Workspace::new(config, capacity.max_batch_tokens),
            sampling_scratch: Mutex::default(),
            config: config.clone(),
            capacity,
            pool,
        })
    }

    /// What it computes in.
    pub fn dtype(&self) -> ComputeDtype {
        self.dtype
    }

    /// Device and instruction set, for logs.
    pub fn device_name(&self) -> String {
        format!("cpu ({}, {} threads)", polylora_kernels::cpu::instruction_set(), self.pool.num_threads())
    }

    /// Bytes of the base model's weights in memory.
    pub fn weight_bytes(&self) -> usize {
        self.model.bytes()
    }

    /// Logits of the sample rows, a few rows at a time, and what comes of them.
    fn sample(&mut self, batch: &StepBatch, segments_of_samples: impl Fn(&Adapters) -> Vec<Segment<'_>>) -> Vec<SampleOutput> {
        let mut outputs = vec![SampleOutput::default(); batch.samples.len()];
        let Self {
            config,
            pool,
            model,
            adapters,
            workspace,
            sampling_scratch,
            ..
        } = self;
        let hidden = config.hidden_size;
        let segments = segments_of_samples(adapters);
        let mut first = 0;
        while first < outputs.len() {
            let (num_alike, vocab) = forward::rows_of_one_vocab(&segments, first, outputs.len(), config.vocab_size);
            // An adapter's vocabulary may be larger than the one that the buffer was made for.
            if workspace.logits.len() < vocab {
                workspace.logits.resize(vocab, 0.0);
            }
            let num_rows = num_alike.min(workspace.logits.len() / vocab);
            let outputs = &mut outputs[first..first + num_rows];
            let samples = &batch.samples[first..first + num_rows];
            let buffers = LoraBuffers {
                x: &workspace.normed[first * hidden..(first + num_rows) * hidden],
                d_in: hidden,
                y: &mut workspace.logits[..num_rows * vocab],
                y_stride: vocab,
                scratch: &mut workspace.lora,
            };
            adapters::head_logits(pool, &model.head, &forward::within(&segments, first, num_rows), buffers);
            first += num_rows;
            let logits = &workspace.logits;
            pool.for_rows(outputs, 1, 1, |first, outputs| {
                let mut scratch = sampling_scratch.lock().pop().unwrap_or_default();
                for (idx, output) in outputs.iter_mut().enumerate() {
                    let row = first + idx;
                    *output = sample_row(&logits[row * vocab..(row + 1) * vocab], &samples[row], &mut scratch);
                }
                sampling_scratch.lock().push(scratch);
            });
        }
        outputs
    }
}

/// The capacity that the options ask for.
fn capacity(config: &DecoderConfig, options: &CpuOptions) -> Result<Capacity, LoadError> {
    let in_range = |option, got: usize, min: usize, max: usize| match (min..=max).contains(&got) {
        true => Ok(got),
        false => Err(LoadError::Option {
            option,
            expected: format!("from {min} to {max}"),
            got,
        }),
    };
    in_range("num_threads", options.num_threads, 1, 1024)?;
    let block_size = in_range("block_size", options.block_size, 1, 1024)?;
    let block_bytes = kv_block_bytes(config, block_size);
    // Slots are u32; what all blocks take must be addressable.
    let max_blocks = (u32::MAX as usize / block_size).min(isize::MAX as usize / block_bytes);
    let num_blocks = match options.kv_cache {
        KvBudget::Blocks(blocks) => in_range("kv_cache blocks", blocks, 1, max_blocks)?,
        KvBudget::Bytes(bytes) => in_range("kv_cache bytes", bytes, block_bytes, isize::MAX as usize)? / block_bytes,
    }
    .min(max_blocks);
    Ok(Capacity {
        num_blocks,
        min_blocks: num_blocks,
        block_size,
        kv_block_bytes: block_bytes,
        max_batch_tokens: in_range("max_batch_tokens", options.max_batch_tokens, 1, 1 << 20)?,
        adapter_bytes: options.adapter_bytes,
        shared_bytes: 0,
        max_adapters_per_batch: options.max_adapters_per_batch,
    })
}

/// Bytes of one KV block over all layers.
pub fn kv_block_bytes(config: &DecoderConfig, block_size: usize) -> usize {
    2 * config.num_layers * config.kv_size() * block_size * size_of::<f32>()
}

impl Backend for CpuBackend {
    fn capacity(&self) -> &Capacity {
        &self.capacity
    }

    fn adapter_bytes(&self, adapter: &HostAdapter) -> Result<usize, BackendError> {
        Ok(adapters::resident_bytes(adapter, &self.config))
    }

    /// Keeps the host's buffer: nothing is copied, but for a head of the adapter's own, which is packed.
    fn begin_upload(&mut self, adapter: &Arc<HostAdapter>) -> Result<AdapterHandle, BackendError> {
        self.adapters.insert(&self.pool, adapter, &self.config)
    }

    fn poll_upload(&mut self, _handle: AdapterHandle) -> Result<bool, BackendError> {
        Ok(true)
    }

    fn free_adapter(&mut self, handle: AdapterHandle) {
        self.adapters.remove(handle);
    }

    fn execute(&mut self, batch: &StepBatch) -> Result<StepOutput, BackendError> {
        check_batch(batch, &self.capacity, self.limits, |handle| self.adapters.vocab_size(handle))?;
        if !batch.carried_tokens.is_empty() {
            return Err(BackendError::BadBatch("carried tokens, and no step is in flight".to_owned()));
        }
        if batch.token_ids.is_empty() {
            return Ok(StepOutput::default());
        }
        let Self {
            config,
            pool,
            model,
            rope,
            attention,
            kv_cache,
            adapters,
            workspace,
            ..
        } = self;
        let forward = Forward::new(config, pool, model, rope, attention, batch, adapters.segments(&batch.lora_segments));
        forward.run(kv_cache, workspace);
        let samples = self.sample(batch, |adapters| {
            forward::of_samples(&adapters.segments(&batch.lora_segments), &batch.samples)
        });
        Ok(StepOutput { samples })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        adapter::{Companion, HostPart},
        backend::conformance::{self, Agreement},
        testing,
    };

    fn options(dtype: ComputeDtype, num_threads: usize) -> CpuOptions {
        let capacity = conformance::capacity();
        CpuOptions {
            dtype,
            num_threads,
            kv_cache: KvBudget::Blocks(capacity.num_blocks),
            block_size: capacity.block_size,
            max_batch_tokens: capacity.max_batch_tokens,
            adapter_bytes: capacity.adapter_bytes,
            max_adapters_per_batch: capacity.max_adapters_per_batch,
        }
    }

    fn backend(dtype: ComputeDtype, num_threads: usize) -> CpuBackend {
        CpuBackend::random(&conformance::config(), 11, &options(dtype, num_threads)).unwrap()
    }

    #[test]
    fn conforms_in_float32() {
        conformance::run_all(&mut backend(ComputeDtype::Float32, 2), Agreement::Bits);
    }

    #[test]
    fn a_resident_adapter_keeps_no_tokenizer() {
        struct Tokenizer;
        impl Companion for Tokenizer {
            fn digest(&self) -> [u8; 32] {
                [7; 32]
            }
            fn parts(&self) -> Vec<HostPart> {
                Vec::new()
            }
        }
        let mut backend = backend(ComputeDtype::Float32, 1);
        let tokenizer: Arc<dyn Companion> = Arc::new(Tokenizer);
        let mut adapter = Arc::into_inner(testing::host_adapter(1, 64)).unwrap();
        adapter.companion = Some(tokenizer.clone());
        let (adapter, weights) = (Arc::new(adapter), testing::host_adapter(2, 64));
        let handles = [&adapter, &weights].map(|adapter| backend.begin_upload(adapter).unwrap());
        assert_eq!(Arc::strong_count(&weights), 2, "without a tokenizer nothing is copied");
        drop(adapter);
        assert_eq!(
            Arc::strong_count(&tokenizer),
            1,
            "the host has let go of it, and the device has it no more"
        );
        handles.into_iter().for_each(|handle| backend.free_adapter(handle));
        assert_eq!(Arc::strong_count(&weights), 1);
    }

    #[test]
    fn conforms_in_bfloat16() {
        conformance::run_all(&mut backend(ComputeDtype::Bfloat16, 2), Agreement::Bits);
    }

    #[test]
    fn threads_and_dtypes_agree() {
        let config = conformance::config();
        let mut reference = backend(ComputeDtype::Float32, 1);
        conformance::backends_agree(&mut backend(ComputeDtype::Float32, 3), &mut reference, &config, 0.0);
        // bf16 keeps 8 bits: 3 layers of it against f32.
        conformance::backends_agree(&mut backend(ComputeDtype::Bfloat16, 2), &mut reference, &config, 0.1);
    }

    #[test]
    fn options_out_of_range_are_named() {
        let check = |options: CpuOptions, name: &str| match CpuBackend::random(&conformance::config(), 1, &options) {
            Err(LoadError::Option { option, .. }) => assert_eq!(option, name),
            Err(other) => panic!("{name}: {other}"),
            Ok(_) => panic!("{name} was taken"),
        };
        let good = options(ComputeDtype::Float32, 1);
        check(CpuOptions { num_threads: 0, ..good }, "num_threads");
        check(CpuOptions { block_size: 0, ..good }, "block_size");
        check(CpuOptions { max_batch_tokens: 0, ..good }, "max_batch_tokens");
        check(
            CpuOptions {
                kv_cache: KvBudget::Blocks(0),
                ..good
            },
            "kv_cache blocks",
        );
        check(
            CpuOptions {
                kv_cache: KvBudget::Blocks(usize::MAX),
                ..good
            },
            "kv_cache blocks",
        );
        check(
            CpuOptions {
                kv_cache: KvBudget::Bytes(1000),
                ..good
            },
            "kv_cache bytes",
        );
        // 3 layers, k and v, 2 heads of 64, 16 positions, 4 bytes.
        assert_eq!(kv_block_bytes(&conformance::config(), 16), 3 * 2 * 2 * 64 * 16 * 4);
    }

    #[test]
    fn float16_is_computed_in_float32_and_says_so() {
        assert_eq!(ComputeDtype::on_cpu(None, Dtype::F16), (ComputeDtype::Float32, None));
        assert_eq!(ComputeDtype::on_cpu(None, Dtype::Bf16), (ComputeDtype::Bfloat16, None));
        assert_eq!(ComputeDtype::on_cpu(Some(Dtype::F32), Dtype::Bf16), (ComputeDtype::Float32, None));
        let (dtype, note) = ComputeDtype::on_cpu(Some(Dtype::F16), Dtype::F16);
        assert!(dtype == ComputeDtype::Float32 && note.unwrap().contains("float32"));
    }
}
