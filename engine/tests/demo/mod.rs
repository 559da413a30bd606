//! The demo model, its adapters and its golden answers, for tests and benches of the whole engine.

// Each of them uses a part.
#![allow(dead_code)]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use futures::executor::block_on;
#[cfg(feature = "cuda")]
use polylora_engine::backend::cuda::{CudaBackend, CudaOptions, kv_block_bytes};
use polylora_engine::{
    AdapterLease, EngineConfig, EngineParts, EvictionPolicy, FileSource, FinishReason, GenerationRequest, InferenceEngine, LlmEngine, LoadRequest,
    LogprobsParams, LoraConfig, SamplingParams, TokenEvent, TokenStream, UnloadMode,
    adapter::{HostMemory, PackedDtype, load::LoraLimits, registry::AdapterRegistry},
    backend::{
        Backend,
        cpu::{ComputeDtype, CpuBackend, CpuOptions, KvBudget},
    },
    decoder::DecoderConfig,
};

/// Of a log-probability: in f32, and on the GPU in bf16, which keeps 8 bits.
fn tolerance(expected: f32) -> f32 {
    if on_cuda() { 0.1 + 0.02 * expected.abs() } else { 1e-3 }
}

pub fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo")
}

/// One golden answer.
#[derive(Clone)]
pub struct Case {
    pub adapter: Option<String>,
    pub prompt_tokens: Vec<u32>,
    pub output_tokens: Vec<u32>,
    pub ended_by_stop: bool,
    /// For the first steps, the likeliest tokens.
    pub top_logprobs: Vec<Vec<(u32, f32)>>,
}

pub fn adapter_names() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(demo().join("adapters"))
        .expect("the demo has adapters")
        .map(|entry| entry.expect("a readable folder").file_name().into_string().expect("UTF-8"))
        .collect();
    names.sort();
    assert!(names.len() >= 4, "{names:?}");
    names
}

pub fn goldens() -> Vec<Case> {
    let ids = |value: &serde_json::Value| -> Vec<u32> { serde_json::from_value(value.clone()).expect("token ids") };
    let mut cases = Vec::new();
    for name in adapter_names().into_iter().map(Some).chain([None]) {
        let file = demo().join(format!("golden/{}.json", name.as_deref().unwrap_or("base")));
        let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(file).expect("a golden file")).expect("JSON");
        for case in golden["cases"].as_array().expect("cases") {
            cases.push(Case {
                adapter: name.clone(),
                prompt_tokens: ids(&case["prompt_ids"]),
                output_tokens: ids(&case["output_ids"]),
                ended_by_stop: case["finish_reason"] == "stop",
                top_logprobs: serde_json::from_value(case["top_logprobs"].clone()).expect("pairs"),
            });
        }
    }
    assert!(cases.len() > 30, "{} cases", cases.len());
    cases
}

pub struct Limits {
    pub num_blocks: usize,
    pub block_size: usize,
    pub adapter_bytes: usize,
    /// Blocks and adapters have their bytes together, where the device can do that: on CUDA.
    pub is_shared: bool,
    pub max_running: usize,
    pub max_loras: usize,
    pub max_loaded: Option<usize>,
    pub max_loaded_bytes: Option<usize>,
    pub step_tokens: usize,
    /// Of the CPU backend.
    pub num_threads: usize,
}

/// Room for everything.
pub const ROOMY: Limits = Limits {
    num_blocks: 2048,
    block_size: 16,
    adapter_bytes: 1 << 28,
    is_shared: false,
    max_running: 128,
    max_loras: 16,
    max_loaded: None,
    max_loaded_bytes: None,
    step_tokens: 512,
    num_threads: 2,
};

/// What the engine is told of a device.
struct Device {
    name: String,
    dtype: &'static str,
    packed: PackedDtype,
    memory: Option<Arc<dyn HostMemory>>,
}

/// The demo model on the CPU in f32; with `POLYLORA_TEST_DEVICE=cuda` on the GPU, where blocks are of 16 positions at least.
fn backend(files: &FileSource, decoder: &DecoderConfig, limits: &Limits) -> (Box<dyn Backend>, Device) {
    #[cfg(feature = "cuda")]
    if on_cuda() {
        let block_size = limits.block_size.next_multiple_of(16);
        let num_blocks = (limits.num_blocks * limits.block_size).div_ceil(block_size) + 1;
        let options = CudaOptions {
            kv_cache: (!limits.is_shared).then_some(KvBudget::Blocks(num_blocks)),
            shared_bytes: Some(num_blocks * kv_block_bytes(decoder, block_size) + limits.adapter_bytes),
            block_size,
            max_batch_tokens: limits.step_tokens,
            max_context: if limits.is_shared { (num_blocks - 1) * block_size } else { usize::MAX },
            adapter_bytes: if limits.is_shared { usize::MAX } else { limits.adapter_bytes },
            max_adapters_per_batch: limits.max_loras,
            host_reserve_bytes: 16 << 20,
            ..CudaOptions::default()
        };
        let backend = CudaBackend::load(files, decoder, &options).expect("the demo model loads on a CUDA device");
        let device = Device {
            name: backend.device_name(),
            dtype: "bfloat16",
            packed: PackedDtype::Bf16,
            memory: backend.host_memory(),
        };
        return (Box::new(backend), device);
    }
    assert!(!on_cuda(), "POLYLORA_TEST_DEVICE=cuda needs --features cuda");
    let backend = CpuBackend::load(files, decoder, &cpu_options(limits)).expect("the demo model loads");
    let device = cpu_device(&backend);
    (Box::new(backend), device)
}

fn cpu_options(limits: &Limits) -> CpuOptions {
    CpuOptions {
        dtype: ComputeDtype::Float32,
        num_threads: limits.num_threads,
        kv_cache: KvBudget::Blocks(limits.num_blocks),
        block_size: limits.block_size,
        max_batch_tokens: limits.step_tokens,
        adapter_bytes: limits.adapter_bytes,
        max_adapters_per_batch: limits.max_loras,
    }
}

fn cpu_device(backend: &CpuBackend) -> Device {
    Device {
        name: backend.device_name(),
        dtype: backend.dtype().name(),
        packed: PackedDtype::F32,
        memory: None,
    }
}

fn on_cuda() -> bool {
    std::env::var("POLYLORA_TEST_DEVICE").is_ok_and(|device| device == "cuda")
}

pub fn start(limits: &Limits) -> Arc<LlmEngine> {
    let files = FileSource::Directory(demo().join("base"));
    let read = |name: &str| files.open(name).expect("a file of the demo model").to_vec();
    let decoder = Arc::new(DecoderConfig::from_json(&read("config.json"), Some(&read("generation_config.json"))).expect("a configuration"));
    let (backend, device) = backend(&files, &decoder, limits);
    engine(decoder, backend, device, limits)
}

/// An engine on the CPU in f32 over random weights of this shape.
pub fn start_random(decoder: DecoderConfig, limits: &Limits) -> Arc<LlmEngine> {
    let backend = CpuBackend::random(&decoder, 1, &cpu_options(limits)).expect("a shape that the CPU backend runs");
    let device = cpu_device(&backend);
    engine(Arc::new(decoder), Box::new(backend), device, limits)
}

fn engine(decoder: Arc<DecoderConfig>, backend: Box<dyn Backend>, device: Device, limits: &Limits) -> Arc<LlmEngine> {
    let lora = LoraConfig {
        max_loras_per_batch: limits.max_loras,
        max_loaded_loras: limits.max_loaded,
        max_loaded_bytes: limits.max_loaded_bytes,
        host_reserve_bytes: None,
        eviction: EvictionPolicy::Lru,
        max_lora_rank: None,
        target_modules: None,
    };
    let limits_of_device = LoraLimits {
        memory: device.memory,
        ..LoraLimits::new(device.packed)
    };
    let registry = AdapterRegistry::new(lora.registry_config(limits_of_device), decoder.clone());
    LlmEngine::start(EngineParts {
        device: device.name,
        dtype: device.dtype.to_owned(),
        backend,
        config: EngineConfig {
            context_length: decoder.max_position_embeddings,
            max_running_requests: limits.max_running,
            max_queued_requests: 4096,
            chunked_prefill_tokens: limits.step_tokens,
            mixed_prefill_tokens: limits.step_tokens,
            prefix_caching: true,
            lora: Some(lora),
        },
        decoder,
        adapters: Some(Arc::new(registry)),
    })
    .expect("limits that fit")
}

pub fn load_request(name: &str, adapter: &str) -> LoadRequest {
    LoadRequest {
        name: name.to_owned(),
        files: FileSource::Directory(demo().join("adapters").join(adapter)),
        source: format!("demo:{adapter}"),
        pinned: false,
        replace: false,
        expected_version: None,
    }
}

pub fn load_all(engine: &LlmEngine) {
    for name in adapter_names() {
        block_on(engine.load_adapter(load_request(&name, &name))).expect("a good adapter");
    }
}

/// Unloads and waits for those who use it.
pub fn unload(engine: &LlmEngine, name: &str) {
    block_on(engine.unload_adapter(name, UnloadMode::Drain).expect("it was loaded").drained());
}

pub fn lease(engine: &LlmEngine, name: &str) -> AdapterLease {
    block_on(engine.acquire_adapter(name)).expect("it is loaded")
}

pub fn request(case: &Case, adapter: Option<AdapterLease>) -> GenerationRequest {
    GenerationRequest {
        prompt_tokens: case.prompt_tokens.clone(),
        sampling: SamplingParams {
            temperature: 0.0,
            max_tokens: case.output_tokens.len() as u32,
            ..SamplingParams::default()
        },
        adapter,
        logprobs: LogprobsParams {
            output_top_k: Some(5),
            prompt: None,
        },
        constraint: None,
        fairness_key: "".into(),
    }
}

pub fn submit(engine: &LlmEngine, case: &Case) -> TokenStream {
    let adapter = case.adapter.as_deref().map(|name| lease(engine, name));
    engine.submit(request(case, adapter)).expect("there is room")
}

/// Reads a stream to its end and compares it with the golden answer.
pub fn check(case: &Case, mut stream: TokenStream) {
    check_events(case, std::iter::from_fn(|| stream.blocking_next()));
}

/// Compares all events of a stream with the golden answer.
pub fn check_events(case: &Case, events: impl IntoIterator<Item = TokenEvent>) {
    let mut output = Vec::new();
    let mut end = None;
    for event in events {
        assert!(end.is_none(), "nothing follows the end");
        match event {
            TokenEvent::Started { .. } => {}
            TokenEvent::Token { token_id, logprobs } => {
                if let Some(expected) = case.top_logprobs.get(output.len()) {
                    let logprobs = logprobs.expect("they were asked for");
                    assert_eq!(logprobs.token_id, token_id);
                    check_top(case, output.len(), &logprobs.top, expected);
                }
                output.push(token_id);
            }
            other => end = Some(other),
        }
    }
    assert_eq!(output, case.output_tokens, "{:?} on {:?}", case.adapter, case.prompt_tokens);
    let reason = match (end, case.ended_by_stop) {
        (Some(TokenEvent::Finished { reason }), _) => reason,
        (other, _) => panic!("{:?} ended with {other:?}", case.adapter),
    };
    assert_eq!(matches!(reason, FinishReason::Stop { .. }), case.ended_by_stop, "{:?}", case.adapter);
}

/// Tokens of nearly equal probability may change places.
fn check_top(case: &Case, step: usize, got: &[(u32, f32)], expected: &[(u32, f32)]) {
    assert_eq!(got.len(), expected.len());
    let of: BTreeMap<u32, f32> = expected.iter().copied().collect();
    for ((token_id, logprob), (_, at_this_place)) in got.iter().zip(expected) {
        let expected = of.get(token_id).copied().unwrap_or(*at_this_place);
        assert!(
            (logprob - expected).abs() < tolerance(expected),
            "{:?}, step {step}, token {token_id}: {logprob}, expected {expected}",
            case.adapter
        );
    }
}

/// SplitMix64.
pub fn random(state: &mut u64, bound: usize) -> usize {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let value = (*state ^ (*state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    ((value ^ (value >> 31)) % bound as u64) as usize
}

pub fn assert_nothing_is_held(engine: &LlmEngine) {
    let stats = engine.stats();
    assert_eq!((stats.running, stats.waiting, stats.used_blocks, stats.registry.leases), (0, 0, 0, 0));
}

/// Names by Zipf's law with exponent 1: name `i` is asked for in proportion to `1 / (i + 1)`.
pub struct Zipf(Vec<f64>);

impl Zipf {
    pub fn new(num_names: usize) -> Self {
        let mut sum = 0.0;
        Self(
            (1..=num_names)
                .map(|place| {
                    sum += 1.0 / place as f64;
                    sum
                })
                .collect(),
        )
    }

    pub fn draw(&self, state: &mut u64) -> usize {
        let total = self.0[self.0.len() - 1];
        let point = random(state, 1 << 30) as f64 / (1u64 << 30) as f64 * total;
        self.0.partition_point(|sum| *sum <= point).min(self.0.len() - 1)
    }
}
