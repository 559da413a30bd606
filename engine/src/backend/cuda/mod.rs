//! The backend on an NVIDIA GPU: the same decoder and the same meaning as on the CPU, in bf16 with f32 sums and an f32 residual stream.
//!
//! A step is: metadata written to pinned memory and copied in one go, the layers (a captured graph for decode steps, launches for steps
//! with chunks), logits and sampling of the sample rows, and the copy of what came of them. Nothing is allocated and nothing waits in
//! between: [`CudaBackend::launch`] returns while the device works, and the ids that a step chose stay on the device for the next one.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Instant,
};

use half::bf16;
use polylora_kernels::cuda::{
    CudaError, Device, DeviceBuffer, Event, Graph, Kernels, PinnedBuffer, Stream,
    attention_decode::AttentionDecode,
    attention_prefill::AttentionPrefill,
    gemm::{Gemm, Tuned},
    lora::LoraItem,
    own_logits::{LogitsCopy, TokenRowsItem},
    rope_kv::HeadShape,
    sampling::{MAX_TOP, SampleResult, SamplingArgs},
    tuning::Tuning,
};

pub use polylora_kernels::cuda::{DeviceInfo, devices};

mod adapters;
mod arena;
mod forward;
mod head;
mod host_memory;
mod ledger;
mod model;
mod plan;
mod region;
mod sampling;
mod staging;

use adapters::Adapters;
use arena::ALIGNMENT;
use forward::{Forward, HeadDeltasViews, HeadViews, StepViews, Workspace, WorkspaceSize};
use head::HeadChunk;
use host_memory::LockedMemory;
use model::Model;
use plan::{ForwardPlaces, StepPlan, StepShape};
use region::Region;
use sampling::{RowResult, SampleWork, needs_logits};
use staging::{Layout, Place, StageWriter, Staging};

use super::{
    Backend, BackendError, Capacity, Launched,
    check::{ModelLimits, check_batch},
    cpu::KvBudget,
};
use crate::{
    adapter::{HostAdapter, HostMemory, LoraFeatures, load::MAX_ADDED_TOKENS},
    batch::{AdapterHandle, ChooseToken, SampleRow, StepBatch, StepOutput},
    block_pool::BlockMove,
    decoder::{DecoderConfig, RopeTables},
    files::FileSource,
    weights::{ModelWeights, WeightsError},
};

/// Steps that may be launched and not collected.
const MAX_IN_FLIGHT: usize = 2;
/// Where the longest context would take all of the shared memory, adapters may have one part of so many.
const ADAPTERS_PART: usize = 4;
/// Sample rows whose logits are in memory at once.
const MAX_LOGITS_ROWS: usize = 256;

/// How a [`CudaBackend`] is made.
#[derive(Clone, Debug, PartialEq)]
pub struct CudaOptions {
    /// Which device.
    pub device: usize,
    /// Part of the device's memory that may be used, weights included.
    pub mem_fraction: f64,
    /// Bytes for KV blocks and adapters together; `None`: what weights and buffers leave of `mem_fraction`.
    pub shared_bytes: Option<usize>,
    /// `Some`: the KV cache has memory of its own, this much, and adapters have `adapter_bytes` beside it. `None`: they share.
    pub kv_cache: Option<KvBudget>,
    /// Positions per block, a power of two from 16 to 1024.
    pub block_size: usize,
    /// Most rows of one step.
    pub max_batch_tokens: usize,
    /// Most positions of a sequence; at most the model's own.
    pub max_context: usize,
    /// Most bytes of adapters that batches may name; of shared memory they always leave the KV cache a sequence of the longest context, or three
    /// quarters if that is less.
    pub adapter_bytes: usize,
    /// Most bytes of host memory for adapters that wait to be uploaded; until they are used they are address space.
    pub host_bytes: usize,
    /// Of these, about so many are kept page-locked beyond those in use, for adapters that are still to be read.
    pub host_reserve_bytes: usize,
    /// Distinct adapters of one step.
    pub max_adapters_per_batch: usize,
    /// Largest rank of an adapter's module.
    pub max_lora_rank: usize,
    /// Picks GEMM algorithms by measuring them at start; off, cuBLASLt's first proposal is taken.
    pub tune: bool,
    /// Where that is kept for the next start.
    pub tuning_directory: Option<PathBuf>,
    /// Captures decode steps in graphs; off, every kernel is launched by itself.
    pub graphs: bool,
}

impl Default for CudaOptions {
    /// Device 0, 90 % of its memory, 2048 rows, adapters of up to rank 64 in any memory that the KV cache can spare, 64 of them in a step; up to
    /// 64 GiB of them on the host, and no reserve.
    fn default() -> Self {
        Self {
            device: 0,
            mem_fraction: 0.9,
            shared_bytes: None,
            kv_cache: None,
            block_size: 16,
            max_batch_tokens: 2048,
            max_context: usize::MAX,
            adapter_bytes: usize::MAX,
            host_bytes: 64 << 30,
            host_reserve_bytes: 0,
            max_adapters_per_batch: 64,
            max_lora_rank: 64,
            tune: true,
            tuning_directory: None,
            graphs: true,
        }
    }
}

/// A model that cannot be brought to the device.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Its files.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The device, its driver, or a shape that the kernels don't cover.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// Not enough memory for at least one block of KV cache.
    #[error(
        "{budget_bytes} bytes are for KV cache and adapters, a block takes {block_bytes} (mem_fraction {mem_fraction} of {total_bytes}, of which \
         weights and buffers have {used_bytes})"
    )]
    NoRoom {
        /// For KV cache and adapters.
        budget_bytes: usize,
        /// A block's.
        block_bytes: usize,
        /// Taken.
        used_bytes: usize,
        /// The device's.
        total_bytes: usize,
        /// The setting.
        mem_fraction: f64,
    },
    /// Less memory than something needs in one piece.
    #[error("{what}: {needed_bytes} bytes of device memory are needed, {free_bytes} of {total_bytes} are free")]
    OutOfMemory {
        /// What it was for.
        what: MemoryUse,
        /// Asked for.
        needed_bytes: usize,
        /// There.
        free_bytes: usize,
        /// The device's.
        total_bytes: usize,
    },
    /// A setting out of its range.
    #[error("{option}: expected {expected}, got {got}")]
    Option {
        /// Field of [`CudaOptions`].
        option: &'static str,
        /// The range.
        expected: String,
        /// What was given.
        got: String,
    },
}

/// What device memory is taken for at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryUse {
    /// The base model's weights.
    Weights,
    /// Buffers for as many rows as a step may have.
    StepBuffers,
    /// KV blocks and adapters.
    CacheAndAdapters,
}

impl std::fmt::Display for MemoryUse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Weights => "weights",
            Self::StepBuffers => "buffers of a step",
            Self::CacheAndAdapters => "KV cache and adapters",
        })
    }
}

impl MemoryUse {
    /// Says of an error what the memory was for.
    fn name<E: Into<LoadError>>(self, device: &Device) -> impl FnOnce(E) -> LoadError {
        let total_bytes = device.info().total_bytes;
        move |error| match error.into() {
            LoadError::Cuda(CudaError::OutOfMemory { needed_bytes, free_bytes }) => LoadError::OutOfMemory {
                what: self,
                needed_bytes,
                free_bytes,
                total_bytes,
            },
            other => other,
        }
    }
}

fn device_error(error: CudaError) -> BackendError {
    BackendError::Device(error.to_string())
}

/// An NVIDIA GPU as a [`Backend`].
pub struct CudaBackend {
    // Dropped in this order: graphs before the modules that their kernels are of.
    graphs: HashMap<StepShape, Graph>,
    in_flight: VecDeque<InFlight>,
    /// As many as `in_flight` has, for other threads.
    steps: Arc<AtomicUsize>,
    host_memory: LockedMemory,
    stream: Stream,
    kernels: Kernels,
    gemm: Gemm,
    model: Model,
    cos_sin: DeviceBuffer<[f32; 2]>,
    workspace: Workspace,
    adapters: Adapters,
    forward_staging: Staging,
    block_staging: Staging,
    sample_staging: Staging,
    outputs: Outputs,
    config: DecoderConfig,
    shape: HeadShape,
    capacity: Capacity,
    limits: ModelLimits,
    use_graphs: bool,
    device: Arc<Device>,
}

/// A step that was launched.
struct InFlight {
    slot: usize,
    samples: Vec<SampleRow>,
}

/// What came of sample rows: on the device one step's, on the host one set for each step in flight.
struct Outputs {
    results: DeviceBuffer<SampleResult>,
    top_ids: DeviceBuffer<u32>,
    top_logprobs: DeviceBuffer<f32>,
    slots: Vec<OutputSlot>,
    turn: usize,
}

struct OutputSlot {
    results: PinnedBuffer<SampleResult>,
    top_ids: PinnedBuffer<u32>,
    top_logprobs: PinnedBuffer<f32>,
    /// Rows that want more than the kernel reports, by sample.
    logits: HashMap<usize, PinnedBuffer<f32>>,
    done: Event,
}

impl Outputs {
    fn new(device: &Arc<Device>, max_rows: usize) -> Result<Self, CudaError> {
        let slot = |_| {
            Ok(OutputSlot {
                results: PinnedBuffer::zeroed(device, max_rows)?,
                top_ids: PinnedBuffer::zeroed(device, max_rows * MAX_TOP)?,
                top_logprobs: PinnedBuffer::zeroed(device, max_rows * MAX_TOP)?,
                logits: HashMap::new(),
                done: Event::new(device, false)?,
            })
        };
        Ok(Self {
            results: DeviceBuffer::uninit(device, max_rows)?,
            top_ids: DeviceBuffer::uninit(device, max_rows * MAX_TOP)?,
            top_logprobs: DeviceBuffer::uninit(device, max_rows * MAX_TOP)?,
            slots: (0..MAX_IN_FLIGHT).map(slot).collect::<Result<_, CudaError>>()?,
            turn: 0,
        })
    }
}

impl CudaBackend {
    /// What it applies of an adapter beyond A and B: everything that there is.
    pub const LORA_FEATURES: LoraFeatures = LoraFeatures {
        output_terms: true,
        replaced_weights: true,
        own_tokens: true,
    };

    /// Loads the weights of a model folder.
    ///
    /// # Errors
    /// No device; weights that are missing, damaged or not those of `config`; not enough memory; an option out of its range.
    pub fn load(files: &FileSource, config: &DecoderConfig, options: &CudaOptions) -> Result<Self, LoadError> {
        Self::from_weights(&ModelWeights::open(files)?, config, options)
    }

    /// The same from weights that are open already.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn from_weights(weights: &ModelWeights, config: &DecoderConfig, options: &CudaOptions) -> Result<Self, LoadError> {
        Self::new(config, options, |stream, _| Model::load(stream, weights, config))
    }

    /// A model of this shape with random weights, made on the device.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn random(config: &DecoderConfig, seed: u64, options: &CudaOptions) -> Result<Self, LoadError> {
        Self::new(config, options, |stream, kernels| Model::random(stream, kernels, config, seed))
    }

    fn new(
        config: &DecoderConfig,
        options: &CudaOptions,
        load_model: impl FnOnce(&Stream, &Kernels) -> Result<Model, LoadError>,
    ) -> Result<Self, LoadError> {
        options.check()?;
        let shape = HeadShape {
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            block_size: options.block_size,
            block_stride: kv_block_bytes(config, options.block_size) / size_of::<bf16>(),
        };
        AttentionDecode::supports(&shape)?;
        let device = Device::open(options.device)?;
        let stream = Stream::new(&device)?;
        let kernels = Kernels::load(&device)?;
        let model = load_model(&stream, &kernels).map_err(MemoryUse::Weights.name(&device))?;
        let gemm = Gemm::new(&device).map_err(MemoryUse::StepBuffers.name(&device))?;
        let size = WorkspaceSize {
            max_rows: plan::bucket(options.max_batch_tokens),
            max_logits_rows: plan::bucket(options.max_batch_tokens.min(MAX_LOGITS_ROWS)),
            max_lora_rank: options.max_lora_rank,
        };
        let workspace = Workspace::new(&stream, config, &shape, size).map_err(MemoryUse::StepBuffers.name(&device))?;
        let outputs = Outputs::new(&device, size.max_rows).map_err(MemoryUse::StepBuffers.name(&device))?;
        let max_shrink_items = size.max_rows * (3 * options.max_lora_rank).div_ceil(16);
        let forward_bytes = ForwardPlaces::new(size.max_rows, max_shrink_items).1.bytes();
        let forward_staging = Staging::new(&device, forward_bytes, MAX_IN_FLIGHT)?;
        let sample_staging = Staging::new(&device, size.max_rows * 128, MAX_IN_FLIGHT)?;
        let max_context = options.max_context.min(config.max_position_embeddings);
        let block_staging = Staging::new(&device, max_context.div_ceil(options.block_size) * 4 * 64, MAX_IN_FLIGHT)?;

        let tables = RopeTables::new(config, max_context);
        let cos_sin: Vec<[f32; 2]> = tables.cos.iter().zip(&tables.sin).map(|(&cos, &sin)| [cos, sin]).collect();
        let cos_sin = stream.upload(&cos_sin)?;

        let total_bytes = device.info().total_bytes;
        let used_bytes = total_bytes.saturating_sub(device.free_bytes()?);
        let budget = ((total_bytes as f64 * options.mem_fraction) as usize).saturating_sub(used_bytes);
        let block_bytes = kv_block_bytes(config, options.block_size);
        let memory = MemoryPlan::new(options, block_bytes, max_context, budget).ok_or(LoadError::NoRoom {
            budget_bytes: options.shared_bytes.unwrap_or(budget),
            block_bytes,
            used_bytes,
            total_bytes,
            mem_fraction: options.mem_fraction,
        })?;
        let region = Region::new(&stream, memory.bytes, memory.block_bytes, memory.num_blocks).map_err(MemoryUse::CacheAndAdapters.name(&device))?;
        let steps = Arc::new(AtomicUsize::new(0));
        let host_memory = LockedMemory::new(&device, options.host_bytes, options.host_reserve_bytes, &steps)?;
        let adapters = Adapters::new(&device, region, (options.max_lora_rank, config.vocab_size + MAX_ADDED_TOKENS))?;
        stream.synchronize()?;
        let mut backend = Self {
            graphs: HashMap::new(),
            in_flight: VecDeque::new(),
            steps,
            host_memory,
            kernels,
            gemm,
            model,
            cos_sin,
            workspace,
            adapters,
            forward_staging,
            block_staging,
            sample_staging,
            outputs,
            config: config.clone(),
            shape,
            capacity: Capacity {
                num_blocks: memory.num_blocks,
                min_blocks: memory.min_blocks,
                block_size: options.block_size,
                kv_block_bytes: memory.block_bytes,
                max_batch_tokens: options.max_batch_tokens,
                adapter_bytes: memory.adapter_bytes,
                shared_bytes: memory.bytes,
                max_adapters_per_batch: options.max_adapters_per_batch,
            },
            limits: ModelLimits {
                vocab_size: config.vocab_size,
                max_positions: max_context.min(memory.min_blocks * options.block_size),
                num_blocks: memory.num_blocks,
            },
            use_graphs: options.graphs,
            stream,
            device,
        };
        if options.tune {
            backend.tune_or_remember(size.max_rows, options.tuning_directory.as_deref())?;
        }
        Ok(backend)
    }

    /// Files that can't be read or written cost the next start some time, nothing else.
    fn tune_or_remember(&mut self, max_rows: usize, directory: Option<&Path>) -> Result<(), CudaError> {
        let start = Instant::now();
        if let Some(directory) = directory {
            match Tuning::read(directory, self.gemm.tuned_for()) {
                Ok(tuning) => self.gemm.set_tuning(tuning),
                Err(error) => tracing::warn!(%error, "the GEMM algorithms are measured again"),
            }
        }
        let Tuned { measured, known } = self.tune(max_rows)?;
        tracing::info!(measured, known, seconds = start.elapsed().as_secs_f64(), "picked GEMM algorithms");
        if let Some(directory) = directory.filter(|_| measured > 0)
            && let Err(error) = self.gemm.tuning().write(directory, self.gemm.tuned_for())
        {
            tracing::warn!(%error, "the next start will measure GEMM algorithms again");
        }
        Ok(())
    }

    fn tune(&mut self, max_rows: usize) -> Result<Tuned, CudaError> {
        let Self {
            config,
            shape,
            kernels,
            gemm,
            model,
            adapters,
            cos_sin,
            workspace,
            stream,
            ..
        } = self;
        let forward = Forward {
            config,
            shape: *shape,
            kernels,
            model,
            kv_cache: adapters.kv_cache(),
            cos_sin,
            workspace,
            stream,
        };
        let chunks = [512, 1024, 2048, 4096, 8192].into_iter().filter(|&rows| rows <= max_rows);
        let buckets: Vec<usize> = plan::buckets(max_rows).collect();
        let mut tuned = Tuned::default();
        // The most rows first: fewer may get what was found for them.
        for rows in buckets.into_iter().rev().chain(chunks) {
            tuned += forward.tune(gemm, rows)?;
        }
        stream.synchronize()?;
        Ok(tuned)
    }

    /// `cuda:0 (NVIDIA H100 80GB HBM3)`, for logs.
    pub fn device_name(&self) -> String {
        let info = self.device.info();
        format!("cuda:{} ({})", info.ordinal, info.name)
    }

    /// Memory from which adapters are uploaded faster; `None` where there is to be none, or the system gives none.
    pub fn host_memory(&self) -> Option<Arc<dyn HostMemory>> {
        self.host_memory.memory()
    }

    /// Bytes of the base model's weights on the device.
    pub fn weight_bytes(&self) -> usize {
        self.model.bytes()
    }

    /// Enqueues a checked step.
    fn enqueue(&mut self, batch: &StepBatch) -> Result<InFlight, BackendError> {
        let plan = StepPlan::new(batch, &self.adapters, &self.config, AttentionPrefill::tile_rows(&self.shape));
        self.enqueue_layers(batch, &plan).map_err(device_error)?;
        self.enqueue_samples(batch).map_err(device_error)?;
        // What `collect` needs of the samples, without their lists.
        let samples = batch.samples.iter().map(|sample| SampleRow {
            row: sample.row,
            request_id: sample.request_id,
            choose: sample.choose.as_ref().map(|choose| ChooseToken {
                params: choose.params.clone(),
                output_position: choose.output_position,
                token_counts: Vec::new(),
                forbidden: Vec::new(),
                mask: None,
                top_k_logprobs: choose.top_k_logprobs,
            }),
            prompt_logprob: sample.prompt_logprob,
        });
        Ok(InFlight {
            slot: self.outputs.turn,
            samples: samples.collect(),
        })
    }

    fn enqueue_layers(&mut self, batch: &StepBatch, plan: &StepPlan) -> Result<(), CudaError> {
        let (places, layout) = ForwardPlaces::new(plan.shape.rows, plan.lora.shrink_items.len());
        plan.write(batch, &places, &mut self.forward_staging.begin()?);
        self.forward_staging.copy(&self.stream, layout.bytes())?;

        let mut layout = Layout::default();
        let block_tables = layout.place::<u32>(plan.block_tables.len());
        let prefill_tiles = layout.place(plan.prefill_tiles.len());
        if layout.bytes() > self.block_staging.capacity() {
            // Graphs know the old address.
            self.stream.synchronize()?;
            self.graphs.clear();
            self.block_staging.grow(layout.bytes())?;
        }
        let mut stage = self.block_staging.begin()?;
        stage.array(block_tables).copy_from_slice(&plan.block_tables);
        stage.array(prefill_tiles).copy_from_slice(&plan.prefill_tiles);
        self.block_staging.copy(&self.stream, layout.bytes())?;

        let Self {
            graphs,
            config,
            shape,
            kernels,
            gemm,
            model,
            adapters,
            cos_sin,
            workspace,
            stream,
            forward_staging,
            block_staging,
            use_graphs,
            ..
        } = self;
        let forward = Forward {
            config,
            shape: *shape,
            kernels,
            model,
            kv_cache: adapters.kv_cache(),
            cos_sin,
            workspace,
            stream,
        };
        let views = StepViews {
            forward: forward_staging,
            places,
            block_tables: block_staging.view(block_tables),
            prefill_tiles: block_staging.view(prefill_tiles),
        };
        if !*use_graphs || !plan.shape.is_decode() {
            return forward.layers(gemm, &plan.shape, &views);
        }
        let graph = match graphs.entry(plan.shape) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => match stream.capture(|| forward.layers(gemm, &plan.shape, &views)) {
                Ok(graph) => entry.insert(graph),
                // The driver drops a capture for what other threads do at the time; the next step of this shape tries again.
                Err(error) if error.is_lost_capture() => {
                    tracing::debug!(%error, "a step runs without a graph");
                    return forward.layers(gemm, &plan.shape, &views);
                }
                Err(error) => return Err(error),
            },
        };
        stream.launch_graph(graph)
    }

    /// Logits and sampling of the sample rows, as many at once as fit, and the copy of the results.
    fn enqueue_samples(&mut self, batch: &StepBatch) -> Result<(), CudaError> {
        let (config, num_samples) = (&self.config, batch.samples.len());
        let rows: Vec<u32> = batch.samples.iter().map(|sample| sample.row).collect();
        let chunks = head::chunks(&batch.samples, &batch.lora_segments, &self.adapters, config, self.workspace.logits_buffer);
        let work = SampleWork::new(&batch.samples, chunks.iter().flat_map(|chunk| &chunk.places));

        let mut layout = Layout::default();
        let places = (
            layout.place::<u32>(num_samples),
            layout.place(num_samples),
            layout.place(work.edits.len()),
            layout.place::<u32>(work.masks.len()),
        );
        let head_places: Vec<HeadPlaces> = chunks.iter().map(|chunk| HeadPlaces::new(chunk, &mut layout)).collect();
        if layout.bytes() > self.sample_staging.capacity() {
            self.stream.synchronize()?;
            self.sample_staging.grow(layout.bytes())?;
        }
        let mut stage = self.sample_staging.begin()?;
        stage.array(places.0).copy_from_slice(&rows);
        stage.array(places.1).copy_from_slice(&work.params);
        stage.array(places.2).copy_from_slice(&work.edits);
        stage.array(places.3).copy_from_slice(&work.masks);
        for (chunk, places) in chunks.iter().zip(&head_places) {
            places.write(chunk, &mut stage);
        }
        self.sample_staging.copy(&self.stream, layout.bytes())?;

        self.outputs.turn = (self.outputs.turn + 1) % self.outputs.slots.len();
        let staging = &self.sample_staging;
        for (chunk, head_places) in chunks.iter().zip(&head_places) {
            let range = chunk.rows.clone();
            let forward = Forward {
                config,
                shape: self.shape,
                kernels: &self.kernels,
                model: &self.model,
                kv_cache: self.adapters.kv_cache(),
                cos_sin: &self.cos_sin,
                workspace: &self.workspace,
                stream: &self.stream,
            };
            let rows = staging.view(places.0).slice(range.clone());
            forward.logits(&mut self.gemm, rows, chunk, &head_places.views(staging))?;
            let tops = range.start * MAX_TOP..range.end * MAX_TOP;
            self.kernels.sampling.launch(
                &self.stream,
                &SamplingArgs {
                    logits: self.workspace.logits.view(),
                    params: staging.view(places.1).slice(range.clone()),
                    edits: staging.view(places.2),
                    masks: staging.view(places.3),
                    results: self.outputs.results.view().slice(range.clone()),
                    top_ids: self.outputs.top_ids.view().slice(tops.clone()),
                    top_logprobs: self.outputs.top_logprobs.view().slice(tops),
                    chosen: self.workspace.chosen.view(),
                    rows: range.len(),
                },
            )?;
            let slot = &mut self.outputs.slots[self.outputs.turn];
            for (sample_idx, place) in range
                .zip(&chunk.places)
                .filter(|&(sample_idx, _)| needs_logits(&batch.samples[sample_idx]))
            {
                let mut to = PinnedBuffer::zeroed(&self.device, place.vocab)?;
                let from = self.workspace.logits.view().slice(place.range());
                self.stream.copy_to_pinned(&mut to, 0..place.vocab, from)?;
                slot.logits.insert(sample_idx, to);
            }
        }
        let slot = &mut self.outputs.slots[self.outputs.turn];
        self.stream
            .copy_to_pinned(&mut slot.results, 0..num_samples, self.outputs.results.view().first(num_samples))?;
        if work.wants_top {
            let tops = num_samples * MAX_TOP;
            self.stream
                .copy_to_pinned(&mut slot.top_ids, 0..tops, self.outputs.top_ids.view().first(tops))?;
            self.stream
                .copy_to_pinned(&mut slot.top_logprobs, 0..tops, self.outputs.top_logprobs.view().first(tops))?;
        }
        slot.done.record(&self.stream)
    }
}

/// Where the lists of a [`HeadChunk`] lie in the step's metadata.
struct HeadPlaces {
    copies: Place<LogitsCopy>,
    token_rows: Place<TokenRowsItem>,
    deltas: Vec<DeltasPlaces>,
}

struct DeltasPlaces {
    counts: Place<u32>,
    expand: Place<LoraItem>,
    shrink: Place<LoraItem>,
    output: Place<LoraItem>,
}

impl HeadPlaces {
    fn new(chunk: &HeadChunk<'_>, layout: &mut Layout) -> Self {
        Self {
            copies: layout.place(chunk.copies.len()),
            token_rows: layout.place(chunk.token_rows.len()),
            deltas: Vec::from_iter(chunk.deltas.iter().map(|deltas| DeltasPlaces {
                counts: layout.place(3),
                expand: layout.place(deltas.work.expand_items.len()),
                shrink: layout.place(deltas.work.shrink_items.len()),
                output: layout.place(deltas.work.output_items.len()),
            })),
        }
    }

    fn write(&self, chunk: &HeadChunk<'_>, stage: &mut StageWriter<'_>) {
        stage.array(self.copies).copy_from_slice(&chunk.copies);
        stage.array(self.token_rows).copy_from_slice(&chunk.token_rows);
        for (places, deltas) in self.deltas.iter().zip(&chunk.deltas) {
            let work = &deltas.work;
            let counts = [work.expand_items.len() as u32, work.num_shrink_items[0], work.output_items.len() as u32];
            stage.array(places.counts).copy_from_slice(&counts);
            stage.array(places.expand).copy_from_slice(&work.expand_items);
            stage.array(places.shrink).copy_from_slice(&work.shrink_items);
            stage.array(places.output).copy_from_slice(&work.output_items);
        }
    }

    fn views<'a>(&self, staging: &'a Staging) -> HeadViews<'a> {
        let deltas = self.deltas.iter().map(|places| HeadDeltasViews {
            counts: staging.view(places.counts),
            expand: staging.view(places.expand),
            shrink: staging.view(places.shrink),
            output: staging.view(places.output),
        });
        HeadViews {
            copies: staging.view(self.copies),
            token_rows: staging.view(self.token_rows),
            deltas: deltas.collect(),
        }
    }
}

/// Bytes of one KV block over all layers.
pub fn kv_block_bytes(config: &DecoderConfig, block_size: usize) -> usize {
    2 * config.num_layers * config.kv_size() * block_size * size_of::<bf16>()
}

/// How the memory beside weights and buffers is dealt out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MemoryPlan {
    /// Of KV blocks and adapters together.
    bytes: usize,
    block_bytes: usize,
    num_blocks: usize,
    /// As many as `num_blocks` if adapters don't share.
    min_blocks: usize,
    adapter_bytes: usize,
}

impl MemoryPlan {
    /// `None`: not one block fits. `budget` is what `mem_fraction` leaves.
    fn new(options: &CudaOptions, block_bytes: usize, max_context: usize, budget: usize) -> Option<Self> {
        // Slots are u32.
        let max_blocks = u32::MAX as usize / options.block_size - 1;
        let fixed = options.kv_cache.map(|kv_cache| match kv_cache {
            KvBudget::Blocks(blocks) => blocks,
            KvBudget::Bytes(bytes) => bytes / block_bytes,
        });
        let bytes = options.shared_bytes.unwrap_or(budget) / ALIGNMENT * ALIGNMENT;
        let num_blocks = fixed.unwrap_or(bytes / block_bytes).min(max_blocks);
        if num_blocks == 0 {
            return None;
        }
        let kv_bytes = num_blocks * block_bytes;
        if fixed.is_some() {
            let adapter_bytes = match options.adapter_bytes {
                usize::MAX => bytes.saturating_sub(kv_bytes),
                bytes => bytes,
            } / ALIGNMENT
                * ALIGNMENT;
            return Some(Self {
                bytes: kv_bytes + adapter_bytes,
                block_bytes,
                num_blocks,
                min_blocks: num_blocks,
                adapter_bytes,
            });
        }
        let beside_most_adapters = bytes.saturating_sub(options.adapter_bytes) / block_bytes;
        let most_kept = num_blocks - num_blocks / ADAPTERS_PART;
        let min_blocks = max_context
            .div_ceil(options.block_size)
            .min(most_kept)
            .max(beside_most_adapters.min(num_blocks));
        Some(Self {
            bytes,
            block_bytes,
            num_blocks,
            min_blocks,
            adapter_bytes: options.adapter_bytes.min(bytes - min_blocks * block_bytes),
        })
    }
}

impl CudaOptions {
    fn check(&self) -> Result<(), LoadError> {
        let check = |option, holds: bool, expected: &str, got: String| match holds {
            true => Ok(()),
            false => Err(LoadError::Option {
                option,
                expected: expected.to_owned(),
                got,
            }),
        };
        check(
            "mem_fraction",
            self.mem_fraction > 0.0 && self.mem_fraction < 1.0,
            "between 0 and 1",
            self.mem_fraction.to_string(),
        )?;
        let good_block = (16..=1024).contains(&self.block_size) && self.block_size.is_power_of_two();
        check("block_size", good_block, "a power of two from 16 to 1024", self.block_size.to_string())?;
        let rows = self.max_batch_tokens;
        check("max_batch_tokens", (1..=32768).contains(&rows), "from 1 to 32768", rows.to_string())?;
        check(
            "max_lora_rank",
            (1..=1024).contains(&self.max_lora_rank),
            "from 1 to 1024",
            self.max_lora_rank.to_string(),
        )?;
        check("max_context", self.max_context > 0, "at least 1", self.max_context.to_string())
    }
}

impl Backend for CudaBackend {
    fn capacity(&self) -> &Capacity {
        &self.capacity
    }

    fn adapter_bytes(&self, adapter: &HostAdapter) -> Result<usize, BackendError> {
        self.adapters.device_bytes(adapter, &self.config)
    }

    fn set_kv_blocks(&mut self, num_blocks: usize, moves: &[BlockMove]) -> Result<usize, BackendError> {
        self.device.bind().map_err(device_error)?;
        let reached = self.adapters.set_kv_blocks(num_blocks, moves, &self.stream).map_err(device_error)?;
        self.limits.num_blocks = reached;
        Ok(reached)
    }

    fn begin_upload(&mut self, adapter: &Arc<HostAdapter>) -> Result<AdapterHandle, BackendError> {
        self.device.bind().map_err(device_error)?;
        self.adapters.begin_upload(adapter, &self.config, &self.stream)
    }

    fn poll_upload(&mut self, handle: AdapterHandle) -> Result<bool, BackendError> {
        self.adapters.poll_upload(handle)
    }

    fn free_adapter(&mut self, handle: AdapterHandle) {
        self.adapters.free(handle);
    }

    fn execute(&mut self, batch: &StepBatch) -> Result<StepOutput, BackendError> {
        match self.launch(batch)? {
            Launched::Done(output) => Ok(output),
            Launched::Running => self.collect(),
        }
    }

    fn launch(&mut self, batch: &StepBatch) -> Result<Launched, BackendError> {
        if self.in_flight.len() >= MAX_IN_FLIGHT {
            return Err(BackendError::BadBatch(format!("{MAX_IN_FLIGHT} steps are in flight already")));
        }
        check_batch(batch, &self.capacity, self.limits, |handle| self.adapters.vocab_size(handle))?;
        if batch.token_ids.is_empty() {
            return Ok(Launched::Done(StepOutput::default()));
        }
        self.device.bind().map_err(device_error)?;
        // Before the launches: they are what is not to be held up.
        self.steps.store(self.in_flight.len() + 1, Relaxed);
        let launched = self.enqueue(batch).map(|in_flight| self.in_flight.push_back(in_flight));
        self.steps.store(self.in_flight.len(), Relaxed);
        launched.map(|()| Launched::Running)
    }

    fn is_collectable(&mut self) -> Result<bool, BackendError> {
        let Some(InFlight { slot, .. }) = self.in_flight.front() else {
            return Ok(true);
        };
        self.outputs.slots[*slot].done.is_done().map_err(device_error)
    }

    fn collect(&mut self) -> Result<StepOutput, BackendError> {
        let Some(InFlight { slot, samples }) = self.in_flight.pop_front() else {
            return Err(BackendError::BadBatch("no step is running".to_owned()));
        };
        let slot = &mut self.outputs.slots[slot];
        slot.done.synchronize().map_err(device_error)?;
        self.steps.store(self.in_flight.len(), Relaxed);
        let output = |(index, sample): (usize, &SampleRow)| {
            let tops = index * MAX_TOP..(index + 1) * MAX_TOP;
            RowResult {
                result: slot.results[index],
                top_ids: &slot.top_ids[tops.clone()],
                top_logprobs: &slot.top_logprobs[tops],
                logits: slot.logits.get(&index).map(|logits| &logits[..]),
            }
            .output(sample)
        };
        let samples = samples.iter().enumerate().map(output).collect();
        slot.logits.clear();
        Ok(StepOutput { samples })
    }
}

impl Drop for CudaBackend {
    fn drop(&mut self) {
        // What is enqueued still reads and writes the buffers. An error has nobody left to hear it.
        let _ = self.device.bind();
        let _ = self.stream.synchronize();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(options: CudaOptions, max_context: usize, budget: usize) -> Option<MemoryPlan> {
        MemoryPlan::new(&options, 1024, max_context, budget)
    }

    fn shares(plan: MemoryPlan) -> (usize, usize, usize, usize) {
        (plan.bytes, plan.num_blocks, plan.min_blocks, plan.adapter_bytes)
    }

    #[test]
    fn the_cache_keeps_a_sequence_of_the_longest_context_or_three_quarters() {
        let options = CudaOptions::default;
        assert_eq!(shares(plan(options(), 160, 100 << 10).unwrap()), (100 << 10, 100, 10, 90 << 10));
        assert_eq!(shares(plan(options(), 161, 100 << 10).unwrap()), (100 << 10, 100, 11, 89 << 10));
        assert_eq!(shares(plan(options(), 1 << 20, 100 << 10).unwrap()), (100 << 10, 100, 75, 25 << 10));
        // What is no whole block is for adapters, what is no whole run for nobody.
        assert_eq!(
            shares(plan(options(), 160, (100 << 10) + 700).unwrap()),
            ((100 << 10) + 512, 100, 10, (90 << 10) + 512)
        );
        let sized = CudaOptions {
            shared_bytes: Some(40 << 10),
            ..options()
        };
        assert_eq!(shares(plan(sized, 160, 100 << 10).unwrap()), (40 << 10, 40, 10, 30 << 10));
        assert_eq!(plan(options(), 160, 1000), None);
    }

    #[test]
    fn a_bound_on_adapters_leaves_the_cache_the_rest() {
        let bounded = |adapter_bytes| CudaOptions {
            adapter_bytes,
            ..CudaOptions::default()
        };
        assert_eq!(shares(plan(bounded(20 << 10), 160, 100 << 10).unwrap()), (100 << 10, 100, 80, 20 << 10));
        assert_eq!(shares(plan(bounded(0), 160, 100 << 10).unwrap()), (100 << 10, 100, 100, 0));
    }

    #[test]
    fn a_cache_of_a_given_size_shares_nothing() {
        let fixed = |kv_cache, adapter_bytes| CudaOptions {
            kv_cache: Some(kv_cache),
            adapter_bytes,
            ..CudaOptions::default()
        };
        let memory = plan(fixed(KvBudget::Blocks(7), 32 << 10), 160, 100 << 10).unwrap();
        assert_eq!(shares(memory), (39 << 10, 7, 7, 32 << 10));
        let memory = plan(fixed(KvBudget::Bytes(60 << 10), usize::MAX), 160, 100 << 10).unwrap();
        assert_eq!(shares(memory), (100 << 10, 60, 60, 40 << 10));
        assert_eq!(plan(fixed(KvBudget::Bytes(1000), 0), 160, 100 << 10), None);
    }
}
