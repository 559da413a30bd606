//! From settings to a running engine: memory, device, limits.

use std::{collections::BTreeSet, sync::Arc};

use anyhow::{Context, anyhow, ensure};
use polylora_engine::{
    EngineConfig, EngineParts, FileSource, LlmEngine, LoraConfig, StartError,
    adapter::{
        LoraLimits, PackedDtype,
        load::{checkpoint_opener, inspect_config},
        registry::{AdapterRegistry, RegistryConfig},
    },
    backend::{
        Backend,
        cpu::{ComputeDtype, CpuBackend, CpuOptions, KvBudget, LoadError, kv_block_bytes},
    },
    decoder::DecoderConfig,
    weights::{Dtype as StoredDtype, ModelWeights},
};

#[cfg(feature = "cuda")]
mod cuda;

use super::bench::BenchArgs;
use crate::config::{Dtype, EngineSettings, LoadFormat, LoraPath, LoraSettings, MemoryBudget, TargetModules};
use crate::text_side::BaseText;

/// An engine and what is worth saying about it.
pub(super) struct BuiltEngine {
    pub engine: Arc<LlmEngine>,
    pub decoder: Arc<DecoderConfig>,
    pub memory: MemoryPlan,
    pub weight_bytes: usize,
}

/// What an engine is built from.
pub(super) struct EngineInputs<'a> {
    pub weights: &'a ModelWeights,
    /// Where the weights come from, for adapters that need to look at them (DoRA); none for random ones.
    pub files: Option<FileSource>,
    pub decoder: DecoderConfig,
    pub dtype: Dtype,
    pub context_length: Option<usize>,
    pub settings: &'a EngineSettings,
    pub lora: Option<LoraConfig>,
    /// No adapter may have these names.
    pub base_names: Vec<String>,
    /// The base model's way with text, for adapters that come with a tokenizer.
    pub text: Option<Arc<BaseText>>,
}

/// Bytes for the KV cache and for adapters that batches use, each at most: on some devices they share them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MemoryPlan {
    pub kv_bytes: usize,
    pub adapter_bytes: usize,
}

/// Sequences at once on the CPU, unless set.
const CPU_RUNNING_REQUESTS: usize = 64;
/// Tokens of a step on the CPU, unless set.
const CPU_CHUNKED_PREFILL: usize = 512;
/// Prompt tokens of a step that also decodes on the CPU, unless set: a matrix is computed as fast in pieces of this size.
const CPU_MIXED_PREFILL: usize = 128;
/// Most bytes of KV cache on the CPU, unless set.
const CPU_KV_BYTES: u64 = 4 << 30;

/// The engine of `polylora serve`.
pub(super) fn build(inputs: EngineInputs<'_>) -> anyhow::Result<BuiltEngine> {
    #[cfg(feature = "cuda")]
    if cuda::is_chosen(inputs.settings.device)? {
        return cuda::start(inputs);
    }
    #[cfg(not(feature = "cuda"))]
    refuse_cuda(inputs.settings.device)?;
    let compute = compute_dtype(inputs.dtype, inputs.weights.dtype(&inputs.decoder)?);
    let needs = MemoryNeeds {
        weight_bytes: weight_bytes(&inputs.decoder, compute),
        block_bytes: kv_block_bytes(&inputs.decoder, inputs.settings.block_size),
        block_size: inputs.settings.block_size,
        useful_tokens: inputs.settings.max_running_requests.unwrap_or(CPU_RUNNING_REQUESTS)
            * inputs.context_length.unwrap_or(inputs.decoder.max_position_embeddings),
        lora: inputs.lora.is_some(),
    };
    let plan = MemoryPlan::of(inputs.settings.memory, &needs, &HostMemory::read())?;
    start_on_cpu(inputs, compute, plan)
}

/// The engine of `polylora bench`.
pub(super) fn for_bench(args: &BenchArgs, num_adapters: usize) -> anyhow::Result<BuiltEngine> {
    #[cfg(not(feature = "cuda"))]
    refuse_cuda(args.device)?;
    let decoder = match &args.model_path {
        Some(folder) => super::adapters::read_decoder_config(&FileSource::Directory(folder.clone()))
            .with_context(|| format!("--model-path {}", folder.display()))?,
        None => DecoderConfig::from_json(&serde_json::to_vec(&args.shape.config_json())?, None)?,
    };
    let stored = if args.dtype == Dtype::Bfloat16 {
        StoredDtype::Bf16
    } else {
        StoredDtype::F32
    };
    let folder = args.model_path.clone().filter(|_| args.load_format == LoadFormat::Auto);
    let files = folder.map(FileSource::Directory);
    let weights = match &files {
        Some(files) => ModelWeights::open(files).context("--model-path (its config.json is enough with --load-format dummy)")?,
        None => ModelWeights::random(args.seed, stored),
    };
    let max_batch = args.batch_size.iter().copied().max().unwrap_or(1);
    let settings = EngineSettings {
        device: args.device,
        num_threads: args.num_threads,
        memory: args.mem_fraction_static,
        max_running_requests: Some(max_batch),
        max_queued_requests: max_batch,
        chunked_prefill_size: Some(args.chunked_prefill_size.max(max_batch)),
        mixed_prefill_size: Some(args.chunked_prefill_size.max(max_batch)),
        block_size: 16,
        prefix_caching: false,
        cuda_graph_max_bs: None,
        gemm_tuning_dir: None,
    };
    let compute = compute_dtype(args.dtype, weights.dtype(&decoder)?);
    let blocks = max_batch * (args.prompt_tokens + args.output_tokens).div_ceil(settings.block_size);
    let exact = MemoryPlan {
        kv_bytes: blocks * kv_block_bytes(&decoder, settings.block_size),
        // As many as are made: residency is not what is measured.
        adapter_bytes: isize::MAX as usize,
    };
    let lora = (num_adapters > 0).then_some(LoraConfig {
        max_loras_per_batch: num_adapters,
        max_loaded_loras: None,
        max_loaded_bytes: Some(usize::MAX),
        host_reserve_bytes: Some(0),
        eviction: polylora_engine::EvictionPolicy::Lru,
        // What the device's buffers are made for.
        max_lora_rank: args.lora_rank.iter().copied().max(),
        target_modules: None,
    });
    let inputs = EngineInputs {
        weights: &weights,
        files,
        decoder,
        dtype: args.dtype,
        context_length: Some(args.prompt_tokens + args.output_tokens),
        settings: &settings,
        lora,
        base_names: Vec::new(),
        text: None,
    };
    #[cfg(feature = "cuda")]
    if cuda::is_chosen(args.device)? {
        return cuda::start(inputs);
    }
    match args.mem_fraction_static {
        None => start_on_cpu(inputs, compute, exact),
        Some(_) => build(inputs),
    }
}

impl LoraSettings {
    /// The engine's view of them. `given` are the adapters of `--lora-paths` and their files.
    ///
    /// A limit that is not set is inferred from them, as in SGLang: what was given at start fits, what is larger is refused. Where there
    /// is nothing to infer from, or where `--lora-dir` says that others will come, there is no limit but the device's.
    pub(super) fn engine_config(&self, given: &[(LoraPath, FileSource)], decoder: &DecoderConfig) -> anyhow::Result<LoraConfig> {
        let mut inferred = None;
        if self.directories.is_empty() && (self.max_lora_rank.is_none() || self.target_modules == TargetModules::Inferred) {
            for (path, files) in given {
                let resolution = inspect_config(files, decoder).with_context(|| path.flag())?;
                let (max_lora_rank, modules) = inferred.get_or_insert_with(|| (0, BTreeSet::new()));
                *max_lora_rank = resolution.max_lora_rank().max(*max_lora_rank);
                modules.extend(resolution.module_names().into_iter().map(str::to_owned));
            }
        }
        let (inferred_rank, inferred_modules) = inferred.unzip();
        Ok(LoraConfig {
            max_loras_per_batch: self.max_loras_per_batch,
            max_loaded_loras: self.max_loaded_loras,
            max_loaded_bytes: self.max_loaded_bytes,
            host_reserve_bytes: self.host_reserve_bytes,
            eviction: self.eviction,
            max_lora_rank: self.max_lora_rank.or(inferred_rank),
            target_modules: match &self.target_modules {
                TargetModules::Inferred => inferred_modules,
                TargetModules::All => None,
                TargetModules::Only(modules) => Some(modules.clone()),
            },
        })
    }
}

#[cfg(not(feature = "cuda"))]
fn refuse_cuda(device: crate::config::Device) -> anyhow::Result<()> {
    use crate::config::Device::{Auto, Cpu, Cuda};
    match device {
        Cuda => anyhow::bail!("--device cuda: this binary was built without the `cuda` feature"),
        Auto => tracing::info!("running on the CPU: this binary was built without the `cuda` feature"),
        Cpu => {}
    }
    Ok(())
}

fn compute_dtype(asked: Dtype, stored: StoredDtype) -> ComputeDtype {
    let asked = match asked {
        Dtype::Auto => None,
        Dtype::Float32 => Some(StoredDtype::F32),
        Dtype::Bfloat16 => Some(StoredDtype::Bf16),
    };
    let (compute, note) = ComputeDtype::on_cpu(asked, stored);
    if let Some(note) = note {
        tracing::info!("{note}");
    }
    compute
}

fn weight_bytes(decoder: &DecoderConfig, compute: ComputeDtype) -> usize {
    let size = match compute {
        ComputeDtype::Float32 => 4,
        ComputeDtype::Bfloat16 => 2,
    };
    decoder.num_parameters() * size
}

fn start_on_cpu(inputs: EngineInputs<'_>, compute: ComputeDtype, memory: MemoryPlan) -> anyhow::Result<BuiltEngine> {
    let (settings, lora) = (inputs.settings, &inputs.lora);
    let limits = StepLimits::of(settings, CPU_RUNNING_REQUESTS, CPU_CHUNKED_PREFILL, CPU_MIXED_PREFILL);
    let options = CpuOptions {
        dtype: compute,
        num_threads: settings.num_threads.unwrap_or(CpuOptions::default().num_threads),
        kv_cache: KvBudget::Bytes(memory.kv_bytes),
        block_size: settings.block_size,
        max_batch_tokens: limits.tokens,
        adapter_bytes: memory.adapter_bytes,
        max_adapters_per_batch: lora.as_ref().map_or(1, |lora| lora.max_loras_per_batch),
    };
    let backend = CpuBackend::from_weights(inputs.weights, &inputs.decoder, &options).map_err(option_by_flag)?;
    let device = DeviceFacts {
        name: backend.device_name(),
        dtype: compute.name(),
        weight_bytes: backend.weight_bytes(),
        limits,
        lora_limits: LoraLimits {
            features: CpuBackend::LORA_FEATURES,
            ..LoraLimits::new(match compute {
                ComputeDtype::Float32 => PackedDtype::F32,
                ComputeDtype::Bfloat16 => PackedDtype::Bf16,
            })
        },
    };
    start(inputs, Box::new(backend), device)
}

/// Bounds on a step; what is not set depends on the device.
#[derive(Clone, Copy)]
struct StepLimits {
    running_requests: usize,
    tokens: usize,
    mixed_prefill: usize,
}

impl StepLimits {
    fn of(settings: &EngineSettings, running_requests: usize, tokens: usize, mixed_prefill: usize) -> Self {
        // Each running sequence has a row in a step.
        let fitting = running_requests.min(settings.chunked_prefill_size.unwrap_or(usize::MAX));
        let running_requests = settings.max_running_requests.unwrap_or(fitting);
        Self {
            running_requests,
            tokens: settings.chunked_prefill_size.unwrap_or(tokens.max(running_requests)),
            mixed_prefill: settings.mixed_prefill_size.unwrap_or(mixed_prefill),
        }
    }
}

/// What a device says of itself once the model is on it.
struct DeviceFacts {
    name: String,
    dtype: &'static str,
    weight_bytes: usize,
    limits: StepLimits,
    lora_limits: LoraLimits,
}

/// Starts the engine over a device that holds the model.
fn start(inputs: EngineInputs<'_>, backend: Box<dyn Backend>, device: DeviceFacts) -> anyhow::Result<BuiltEngine> {
    let EngineInputs {
        files,
        decoder,
        context_length,
        settings,
        mut lora,
        base_names,
        text,
        ..
    } = inputs;
    if let Some(lora) = &mut lora
        && lora.max_loaded_bytes.is_none()
    {
        // Beside the model, which is loaded by now. Without a bound thousands of adapters would take what there is, and the system end the process.
        lora.max_loaded_bytes = HostMemory::read().available.map(|bytes| usize::try_from(bytes / 2).unwrap_or(usize::MAX));
        tracing::info!(
            bytes = lora.max_loaded_bytes,
            "adapters may have half of the host memory that is free; --max-loaded-lora-bytes sets another bound"
        );
    }
    let capacity = backend.capacity();
    let kv_tokens = capacity.min_blocks * capacity.block_size;
    let memory = MemoryPlan {
        kv_bytes: capacity.num_blocks * capacity.kv_block_bytes,
        adapter_bytes: capacity.adapter_bytes,
    };
    let context_length = fit_context(context_length, &decoder, kv_tokens)?;
    let decoder = Arc::new(decoder);
    let adapters = lora.as_ref().map(|lora| {
        let limits = LoraLimits {
            base: files.map(|files| checkpoint_opener(files, Arc::clone(&decoder))),
            max_packed_bytes: Some(memory.adapter_bytes),
            companion: text.map(|text| text.reader(&decoder)),
            ..device.lora_limits
        };
        let config = RegistryConfig {
            base_names,
            ..lora.registry_config(limits)
        };
        Arc::new(AdapterRegistry::new(config, Arc::clone(&decoder)))
    });
    let engine = LlmEngine::start(EngineParts {
        backend,
        decoder: Arc::clone(&decoder),
        device: device.name,
        dtype: device.dtype.to_owned(),
        config: EngineConfig {
            context_length,
            max_running_requests: device.limits.running_requests,
            max_queued_requests: settings.max_queued_requests,
            chunked_prefill_tokens: device.limits.tokens,
            mixed_prefill_tokens: device.limits.mixed_prefill,
            prefix_caching: settings.prefix_caching,
            lora,
        },
        adapters,
    })
    .map_err(by_flag)?;
    Ok(BuiltEngine {
        engine,
        decoder,
        memory,
        weight_bytes: device.weight_bytes,
    })
}

/// The context that is served: what was asked for, or as much of the model's as the KV cache holds.
fn fit_context(asked: Option<usize>, decoder: &DecoderConfig, kv_tokens: usize) -> anyhow::Result<usize> {
    let own = decoder.max_position_embeddings;
    match asked {
        Some(asked) => {
            ensure!(asked <= own, "--context-length {asked}: the model was made for {own} tokens");
            ensure!(
                asked <= kv_tokens,
                "--context-length {asked}: the KV cache holds {kv_tokens} tokens for sure; raise --mem-fraction-static"
            );
            Ok(asked)
        }
        None if own > kv_tokens => {
            tracing::info!(
                kv_tokens,
                model = own,
                "the context is cut to what the KV cache holds; --mem-fraction-static raises it"
            );
            Ok(kv_tokens)
        }
        None => Ok(own),
    }
}

/// A CPU backend's refusal in the words of the command line.
fn option_by_flag(error: LoadError) -> anyhow::Error {
    match error {
        LoadError::Option { option, expected, got } => {
            let flag = match option {
                "num_threads" => "--num-threads",
                "block_size" => "--block-size",
                "max_batch_tokens" => "--chunked-prefill-size",
                "kv_cache blocks" | "kv_cache bytes" => "--mem-fraction-static",
                other => other,
            };
            anyhow!("{flag}: expected {expected}, got {got}")
        }
        other => other.into(),
    }
}

/// An engine's refusal in the words of the command line.
fn by_flag(error: StartError) -> anyhow::Error {
    match error {
        StartError::Invalid { field, expected, got } => {
            let flag = match field {
                "context_length" => "--context-length",
                "max_running_requests" => "--max-running-requests",
                "chunked_prefill_tokens" => "--chunked-prefill-size",
                "max_loras_per_batch" => "--max-loras-per-batch",
                "max_loaded_loras" => "--max-loaded-loras",
                other => other,
            };
            anyhow!("{flag} must be {expected}, got {got}")
        }
        other => other.into(),
    }
}

/// What a memory plan depends on.
struct MemoryNeeds {
    weight_bytes: usize,
    block_bytes: usize,
    block_size: usize,
    /// More KV than this is never used.
    useful_tokens: usize,
    lora: bool,
}

/// The machine's memory, as far as this process may have it.
#[derive(Clone, Copy, Debug)]
struct HostMemory {
    total: Option<u64>,
    available: Option<u64>,
}

impl HostMemory {
    /// From `/proc` and the control group; unknown elsewhere.
    fn read() -> Self {
        let text = |path: &str| std::fs::read_to_string(path).ok();
        let first = |paths: [&str; 2]| paths.into_iter().find_map(text).unwrap_or_default();
        const GROUP: &str = "/sys/fs/cgroup";
        let of_group = |name: &str, old_name: &str| first([&format!("{GROUP}/{name}"), &format!("{GROUP}/memory/{old_name}")]);
        Self::parse(
            &text("/proc/meminfo").unwrap_or_default(),
            [
                &of_group("memory.max", "memory.limit_in_bytes"),
                &of_group("memory.current", "memory.usage_in_bytes"),
                &of_group("memory.stat", "memory.stat"),
            ],
        )
    }

    /// From what these files say.
    fn parse(meminfo: &str, [limit, used, stat]: [&str; 3]) -> Self {
        let field = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? * 1024)
        };
        let number = |text: &str| text.trim().parse::<u64>().ok();
        // What was read of files counts as used until somebody needs it: after a model's files were read that is most of what there is.
        let files = ["inactive_file ", "active_file "].into_iter().filter_map(|name| {
            let line = stat.lines().find_map(|line| line.strip_prefix(name))?;
            number(line)
        });
        let used = number(used).unwrap_or(0).saturating_sub(files.sum());
        let limit = number(limit);
        let at_most = |value: Option<u64>, bound: Option<u64>| match (value, bound) {
            (Some(value), Some(bound)) => Some(value.min(bound)),
            (value, bound) => value.or(bound),
        };
        Self {
            total: at_most(field("MemTotal:"), limit),
            available: at_most(field("MemAvailable:"), limit.map(|limit| limit.saturating_sub(used))),
        }
    }
}

impl MemoryPlan {
    fn of(budget: Option<MemoryBudget>, needs: &MemoryNeeds, memory: &HostMemory) -> anyhow::Result<Self> {
        let useful_kv = (needs.useful_tokens.div_ceil(needs.block_size) as u64).saturating_mul(needs.block_bytes as u64);
        let adapters_of = |bytes: u64| if needs.lora { bytes / 4 } else { 0 };
        let (kv_bytes, adapter_bytes) = match budget {
            None => {
                let free = memory.available.map(|available| available.saturating_sub(needs.weight_bytes as u64));
                let quarter = free.map_or(CPU_KV_BYTES, |free| free / 4);
                (useful_kv.min(quarter).min(CPU_KV_BYTES), adapters_of(4 * quarter))
            }
            Some(MemoryBudget::Bytes(bytes)) => (bytes - adapters_of(bytes), adapters_of(bytes)),
            Some(MemoryBudget::Fraction(fraction)) => {
                let total = memory
                    .total
                    .context("--mem-fraction-static: this machine's memory is not known; give a size (8GiB)")?;
                let budget = (total as f64 * fraction) as u64;
                let bytes = budget.saturating_sub(needs.weight_bytes as u64);
                (bytes - adapters_of(bytes), adapters_of(bytes))
            }
        };
        ensure!(
            kv_bytes >= needs.block_bytes as u64,
            "--mem-fraction-static: {kv_bytes} bytes are left for the KV cache beside {} of weights, a block of {} tokens takes {}",
            needs.weight_bytes,
            needs.block_size,
            needs.block_bytes
        );
        // More than is ever used would only be asked of the system for nothing.
        Ok(Self {
            kv_bytes: usize::try_from(kv_bytes.min(useful_kv))?,
            adapter_bytes: usize::try_from(adapter_bytes)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDS: MemoryNeeds = MemoryNeeds {
        weight_bytes: 1000,
        block_bytes: 16,
        block_size: 16,
        useful_tokens: 4096,
        lora: true,
    };

    fn memory(available: u64) -> HostMemory {
        HostMemory {
            total: Some(10_000),
            available: Some(available),
        }
    }

    fn plan(budget: Option<MemoryBudget>, available: u64) -> (usize, usize) {
        let plan = MemoryPlan::of(budget, &NEEDS, &memory(available)).unwrap();
        (plan.kv_bytes, plan.adapter_bytes)
    }

    #[test]
    fn what_a_control_group_has_read_of_files_is_free() {
        let meminfo = "MemTotal:       1000 kB\nMemFree:  1 kB\nMemAvailable:    900 kB\n";
        let stat = "anon 100000\nfile 350000\ninactive_file 200000\nactive_file 100000\nworkingset_refault_file 7\n";
        let memory = |group| {
            let memory = HostMemory::parse(meminfo, group);
            (memory.total, memory.available)
        };
        assert_eq!(memory(["500000\n", "490000\n", stat]), (Some(500_000), Some(310_000)));
        assert_eq!(memory(["500000\n", "490000\n", ""]), (Some(500_000), Some(10_000)));
        for no_limit in ["max\n", "", "9223372036854771712\n"] {
            assert_eq!(memory([no_limit, "490000\n", stat]), (Some(1000 << 10), Some(900 << 10)));
        }
        let unknown = HostMemory::parse("", [""; 3]);
        assert_eq!((unknown.total, unknown.available), (None, None));
    }

    #[test]
    fn unset_takes_what_is_useful_and_at_most_a_quarter_of_what_is_free() {
        assert_eq!(plan(None, 1_000_000), (4096, 249_750));
        assert_eq!(plan(None, 9000), (2000, 2000));
    }

    #[test]
    fn a_size_is_without_the_weights_and_a_fraction_with_them() {
        assert_eq!(plan(Some(MemoryBudget::Bytes(4000)), 0), (3000, 1000));
        assert_eq!(plan(Some(MemoryBudget::Fraction(0.5)), 0), (3000, 1000));
        let without_lora = MemoryNeeds { lora: false, ..NEEDS };
        let plan = MemoryPlan::of(Some(MemoryBudget::Bytes(4000)), &without_lora, &memory(0)).unwrap();
        assert_eq!((plan.kv_bytes, plan.adapter_bytes), (4000, 0));
    }

    #[test]
    fn a_budget_that_holds_no_block_is_refused() {
        for budget in [MemoryBudget::Bytes(10), MemoryBudget::Fraction(0.1)] {
            let error = MemoryPlan::of(Some(budget), &NEEDS, &memory(0)).unwrap_err();
            assert!(error.to_string().starts_with("--mem-fraction-static"), "{error}");
        }
    }
}
