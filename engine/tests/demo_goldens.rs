//! The whole engine over the demo model on the CPU, against what transformers + PEFT answered (`demo/golden`, made by
//! `demo/make_demo.py`): every adapter and the base model in one batch, in random company, preempted, and replaced under traffic.
//!
//! In f32 the greedy ids are equal. Log-probabilities are within 1e-3, which is some thirty times what summing in another order changes.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures::executor::block_on;
use polylora_engine::{
    AdapterError, AdapterLease, EngineConfig, EngineParts, EvictionPolicy, FileSource, FinishReason, GenerationRequest, InferenceEngine, LlmEngine,
    LoadRequest, LogprobsParams, LoraConfig, SamplingParams, TokenEvent, TokenStream,
    adapter::{AdapterState, PackedDtype, load::LoraLimits, registry::AdapterRegistry},
    backend::cpu::{ComputeDtype, CpuBackend, CpuOptions, KvBudget},
    decoder::DecoderConfig,
};

const TOLERANCE: f32 = 1e-3;

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo")
}

/// One golden answer.
#[derive(Clone)]
struct Case {
    adapter: Option<String>,
    prompt_tokens: Vec<u32>,
    output_tokens: Vec<u32>,
    ended_by_stop: bool,
    /// For the first steps, the likeliest tokens.
    top_logprobs: Vec<Vec<(u32, f32)>>,
}

fn adapter_names() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(demo().join("adapters"))
        .expect("the demo has adapters")
        .map(|entry| entry.expect("a readable folder").file_name().into_string().expect("UTF-8"))
        .collect();
    names.sort();
    assert!(names.len() >= 4, "{names:?}");
    names
}

fn goldens() -> Vec<Case> {
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

struct Limits {
    num_blocks: usize,
    block_size: usize,
    adapter_bytes: usize,
    max_running: usize,
    max_loras: usize,
    max_loaded: Option<usize>,
    step_tokens: usize,
}

/// Room for everything.
const ROOMY: Limits = Limits {
    num_blocks: 2048,
    block_size: 16,
    adapter_bytes: 1 << 28,
    max_running: 128,
    max_loras: 16,
    max_loaded: None,
    step_tokens: 512,
};

fn start(limits: &Limits) -> Arc<LlmEngine> {
    let files = FileSource::Directory(demo().join("base"));
    let read = |name: &str| files.open(name).expect("a file of the demo model").to_vec();
    let decoder = Arc::new(DecoderConfig::from_json(&read("config.json"), Some(&read("generation_config.json"))).expect("a configuration"));
    let options = CpuOptions {
        dtype: ComputeDtype::Float32,
        num_threads: 2,
        kv_cache: KvBudget::Blocks(limits.num_blocks),
        block_size: limits.block_size,
        max_batch_tokens: limits.step_tokens,
        adapter_bytes: limits.adapter_bytes,
        max_adapters_per_batch: limits.max_loras,
    };
    let backend = CpuBackend::load(&files, &decoder, &options).expect("the demo model loads");
    let lora = LoraConfig {
        max_loras_per_batch: limits.max_loras,
        max_loaded_loras: limits.max_loaded,
        eviction: EvictionPolicy::Lru,
        max_lora_rank: None,
        target_modules: None,
    };
    let registry = AdapterRegistry::new(lora.registry_config(LoraLimits::new(PackedDtype::F32)), decoder.clone());
    LlmEngine::start(EngineParts {
        device: backend.device_name(),
        dtype: backend.dtype().name().to_owned(),
        backend: Box::new(backend),
        config: EngineConfig {
            context_length: decoder.max_position_embeddings,
            max_running_requests: limits.max_running,
            max_queued_requests: 4096,
            chunked_prefill_tokens: limits.step_tokens,
            prefix_caching: true,
            lora: Some(lora),
        },
        decoder,
        adapters: Some(Arc::new(registry)),
    })
    .expect("limits that fit")
}

fn load_request(name: &str, adapter: &str) -> LoadRequest {
    LoadRequest {
        name: name.to_owned(),
        files: FileSource::Directory(demo().join("adapters").join(adapter)),
        source: format!("demo:{adapter}"),
        pinned: false,
        replace: false,
    }
}

fn load_all(engine: &LlmEngine) {
    for name in adapter_names() {
        block_on(engine.load_adapter(load_request(&name, &name))).expect("a good adapter");
    }
}

fn lease(engine: &LlmEngine, name: &str) -> AdapterLease {
    block_on(engine.acquire_adapter(name)).expect("it is loaded")
}

fn request(case: &Case, adapter: Option<AdapterLease>) -> GenerationRequest {
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

fn submit(engine: &LlmEngine, case: &Case) -> TokenStream {
    let adapter = case.adapter.as_deref().map(|name| lease(engine, name));
    engine.submit(request(case, adapter)).expect("there is room")
}

/// Reads a stream to its end and compares it with the golden answer.
fn check(case: &Case, mut stream: TokenStream) {
    let mut output = Vec::new();
    let mut end = None;
    while let Some(event) = stream.blocking_next() {
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
            (logprob - expected).abs() < TOLERANCE,
            "{:?}, step {step}, token {token_id}: {logprob}, expected {expected}",
            case.adapter
        );
    }
}

/// SplitMix64.
fn random(state: &mut u64, bound: usize) -> usize {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let value = (*state ^ (*state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    ((value ^ (value >> 31)) % bound as u64) as usize
}

fn assert_nothing_is_held(engine: &LlmEngine) {
    let stats = engine.stats();
    assert_eq!((stats.running, stats.waiting, stats.used_blocks, stats.registry.leases), (0, 0, 0, 0));
}

#[test]
fn every_adapter_and_the_base_model_in_one_batch_give_their_golden_answers() {
    let engine = start(&ROOMY);
    load_all(&engine);
    let cases = goldens();
    for round in 0..2 {
        let streams: Vec<TokenStream> = cases.iter().map(|case| submit(&engine, case)).collect();
        for (case, stream) in cases.iter().zip(streams) {
            check(case, stream);
        }
        let cached = engine.stats().cached_tokens_total;
        assert_eq!(cached > 0, round == 1, "the second time the prompts' first blocks are cached");
    }
    assert_nothing_is_held(&engine);
}

#[test]
fn each_alone_gives_the_same() {
    let engine = start(&ROOMY);
    load_all(&engine);
    goldens().iter().for_each(|case| check(case, submit(&engine, case)));
}

/// Few blocks, so that sequences are preempted; a small chunk; device and host room for three adapters; two a step.
#[test]
fn random_company_eviction_and_preemption_change_no_answer() {
    let adapter_bytes = {
        let engine = start(&ROOMY);
        load_all(&engine);
        engine.list_adapters().iter().map(|info| info.bytes).max().expect("there are adapters")
    };
    let cases = goldens();
    let longest = cases
        .iter()
        .map(|case| case.prompt_tokens.len() + case.output_tokens.len())
        .max()
        .expect("cases");
    let engine = start(&Limits {
        num_blocks: longest.div_ceil(4) + 4,
        block_size: 4,
        adapter_bytes: 3 * adapter_bytes,
        max_running: 12,
        max_loras: 2,
        max_loaded: None,
        step_tokens: 24,
    });
    load_all(&engine);
    for seed in 1..=4 {
        let mut state = seed;
        let chosen: Vec<&Case> = (0..40).map(|_| &cases[random(&mut state, cases.len())]).collect();
        let streams: Vec<TokenStream> = chosen.iter().map(|case| submit(&engine, case)).collect();
        for (case, stream) in chosen.into_iter().zip(streams) {
            // Every fifth is cancelled instead.
            if random(&mut state, 5) > 0 {
                check(case, stream);
            }
        }
    }
    while !block_on(engine.flush_cache()) {}
    assert_nothing_is_held(&engine);
    let stats = engine.stats();
    assert!(stats.preemptions_total > 0 && stats.device_evictions_total > 0, "{stats:?}");
}

#[test]
fn a_name_that_is_replaced_under_traffic_gives_each_request_the_version_it_began_with() {
    let engine = start(&ROOMY);
    let cases = goldens();
    let names = adapter_names();
    let of = |name: &str| -> Vec<Case> { cases.iter().filter(|case| case.adapter.as_deref() == Some(name)).cloned().collect() };
    let mut streams = Vec::new();
    for round in 0..3 {
        for adapter in &names {
            let request = LoadRequest {
                replace: true,
                ..load_request("changing", adapter)
            };
            block_on(engine.load_adapter(request)).expect("a good adapter");
            for case in of(adapter).into_iter().take(3) {
                let lease = lease(&engine, "changing");
                streams.push((case.clone(), engine.submit(self::request(&case, Some(lease))).expect("there is room")));
            }
        }
        assert!(streams.len() == 3 * names.len() * (round + 1));
    }
    let unloaded = block_on(async {
        let (report, ()) = futures::join!(engine.unload_adapter("changing"), async {
            let error = engine.acquire_adapter("changing").await.err();
            assert!(matches!(error, Some(AdapterError::Unknown { .. })), "forgotten at once: {error:?}");
        });
        report
    })
    .expect("it was loaded");
    assert!(unloaded.waited_for <= streams.len());
    for (case, stream) in streams {
        check(&case, stream);
    }
    assert_nothing_is_held(&engine);
}

#[test]
fn a_prefix_is_never_used_under_another_version_of_the_same_name() {
    let engine = start(&ROOMY);
    let cases = goldens();
    let names = adapter_names();
    // Two adapters with a golden answer to the same long prompt.
    let case_of = |name: &str| {
        let mut of: Vec<&Case> = cases.iter().filter(|case| case.adapter.as_deref() == Some(name)).collect();
        of.sort_by_key(|case| std::cmp::Reverse(case.prompt_tokens.len()));
        of[0]
    };
    let (first, second) = (case_of(&names[0]), case_of(&names[1]));
    let run = |case: &Case, adapter: Option<AdapterLease>| {
        let before = engine.stats().cached_tokens_total;
        check(case, engine.submit(request(case, adapter)).expect("there is room"));
        engine.stats().cached_tokens_total - before
    };
    block_on(engine.load_adapter(load_request("name", &names[0]))).expect("a good adapter");
    assert_eq!(run(first, Some(lease(&engine, "name"))), 0);
    assert!(run(first, Some(lease(&engine, "name"))) >= 16, "cached for its own version");
    block_on(engine.unload_adapter("name")).expect("it was loaded");
    block_on(engine.load_adapter(load_request("name", &names[1]))).expect("a good adapter");
    assert_eq!(run(second, Some(lease(&engine, "name"))), 0, "the same name, another version");
    block_on(engine.load_adapter(load_request("again", &names[0]))).expect("a good adapter");
    assert!(run(first, Some(lease(&engine, "again"))) >= 16, "another name, the version of before");
}

#[test]
fn a_pinned_adapter_is_on_the_device_before_anyone_asks_and_stays() {
    let engine = start(&Limits { max_loras: 2, ..ROOMY });
    let names = adapter_names();
    let state = |name: &str| engine.adapter_info(name).expect("it is registered").state;
    let pinned = LoadRequest {
        pinned: true,
        ..load_request("pinned", &names[0])
    };
    block_on(engine.load_adapter(pinned)).expect("a good adapter");
    // The engine thread answers after it has seen the pin.
    assert!(block_on(engine.flush_cache()));
    assert_eq!(state("pinned"), AdapterState::Device);
    let refused = engine.load_adapter(LoadRequest {
        pinned: true,
        ..load_request("another", &names[1])
    });
    let error = block_on(refused).expect_err("one pin of two adapters a batch");
    assert!(
        matches!(error, AdapterError::TooManyPinned { .. }) && error.to_string().contains("starvation"),
        "{error}"
    );
    block_on(engine.load_adapter(load_request("host", &names[1]))).expect("a good adapter");
    assert!(block_on(engine.flush_cache()));
    assert_eq!(state("host"), AdapterState::Host);
    block_on(engine.shutdown(Duration::ZERO));
    assert_eq!(state("pinned"), AdapterState::Host, "nothing is on a device that is gone");
}
