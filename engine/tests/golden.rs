//! The CPU backend against transformers + PEFT: prompt ids to greedy ids exactly, log-probabilities within 1e-3 in f32.
//!
//! The golden files are made by `tests/fixtures/make_fixtures.py` (tiny random models of every architecture), `demo/make_demo.py` (the demo
//! model and its adapters) and, outside the repository, `benches/real_models.py`.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use polylora_engine::{
    FileSource,
    adapter::{HostAdapter, LoraLimits, PackedDtype, load_adapter},
    backend::{
        Backend,
        conformance::{Outcome, Run, generate},
        cpu::{ComputeDtype, CpuBackend, CpuOptions, KvBudget},
    },
    batch::AdapterHandle,
    decoder::DecoderConfig,
    request::TokenLogprobs,
};
use serde::Deserialize;

/// Both sides sum in f32, in another order: seen here are differences below 1e-5.
const TOLERANCE: f32 = 1e-3;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> T {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A model folder on the CPU.
struct Model {
    config: DecoderConfig,
    backend: CpuBackend,
}

impl Model {
    fn open(directory: &Path, dtype: ComputeDtype) -> Self {
        let files = FileSource::Directory(directory.to_owned());
        let generation_config = files.open("generation_config.json").ok();
        let config = DecoderConfig::from_json(&files.open("config.json").unwrap(), generation_config.as_deref()).unwrap();
        let options = CpuOptions {
            dtype,
            num_threads: 2,
            kv_cache: KvBudget::Blocks(1024),
            max_adapters_per_batch: 16,
            ..Default::default()
        };
        let backend = CpuBackend::load(&files, &config, &options).unwrap();
        Self { config, backend }
    }

    fn adapter(&mut self, directory: &Path, dtype: PackedDtype) -> AdapterHandle {
        let files = FileSource::Directory(directory.to_owned());
        let (adapter, _report) = load_adapter(&files, &self.config, &LoraLimits::new(dtype)).unwrap();
        let adapter: Arc<HostAdapter> = Arc::new(adapter);
        self.backend.begin_upload(&adapter).unwrap()
    }
}

fn check_top(what: &str, got: &TokenLogprobs, expected: &[(u32, f32)]) {
    assert_eq!(got.top.len(), expected.len(), "{what}");
    for (rank, (got, expected)) in got.top.iter().zip(expected).enumerate() {
        let difference = (got.1 - expected.1).abs();
        assert!(difference < TOLERANCE, "{what}, rank {rank}: expected {expected:?}, got {got:?}");
    }
    // Ids, too, except where two neighbours are so close that they may have changed places.
    for (rank, &(token_id, logprob)) in expected.iter().enumerate() {
        let neighbours = [rank.checked_sub(1), Some(rank + 1)].map(|rank| rank.and_then(|rank| expected.get(rank)));
        if neighbours.iter().flatten().all(|other| (other.1 - logprob).abs() > 2.0 * TOLERANCE) && rank + 1 < expected.len() {
            assert_eq!(got.top[rank].0, token_id, "{what}, rank {rank}");
        }
    }
}

#[derive(Deserialize)]
struct Fixture {
    prompt_ids: Vec<u32>,
    base: FixtureAnswers,
    adapter: FixtureAnswers,
}

#[derive(Deserialize)]
struct FixtureAnswers {
    output_ids: Vec<u32>,
    /// One a prompt token; the first has none.
    prompt_logprobs: Vec<Option<f32>>,
    /// At each prompt position, of the token that follows.
    top_logprobs: Vec<Vec<(u32, f32)>>,
}

impl FixtureAnswers {
    fn check(&self, what: &str, outcome: &Outcome) {
        assert_eq!(outcome.output_ids, self.output_ids, "{what}");
        assert_eq!(outcome.prompt_logprobs.len() + 1, self.prompt_logprobs.len(), "{what}");
        for (position, (got, expected)) in outcome.prompt_logprobs.iter().zip(&self.prompt_logprobs[1..]).enumerate() {
            let expected = expected.expect("only the first prompt token has no log-probability");
            assert!(
                (got.logprob - expected).abs() < TOLERANCE,
                "{what}, prompt token {}: expected {expected}, got {got:?}",
                position + 1
            );
        }
        let at_each_position = outcome.prompt_logprobs.iter().chain(&outcome.output_logprobs[..1]);
        assert_eq!(at_each_position.clone().count(), self.top_logprobs.len(), "{what}");
        for (position, (got, expected)) in at_each_position.zip(&self.top_logprobs).enumerate() {
            check_top(&format!("{what}, position {position}"), got, expected);
        }
    }
}

/// Base and adapter, each alone, both in one batch, and both with the prompt in chunks.
fn check_fixture(name: &str) {
    let directory = repository().join("tests/fixtures").join(name);
    let fixture: Fixture = read_json(&directory.join("golden.json"));
    let mut model = Model::open(&directory, ComputeDtype::Float32);
    let adapter = model.adapter(&directory.join("adapter"), PackedDtype::F32);
    let run = |adapter| Run::greedy(&fixture.prompt_ids, adapter, fixture.base.output_ids.len() as u32);
    let (base, adapted) = (run(None), run(Some(adapter)));
    assert_ne!(fixture.base.output_ids, fixture.adapter.output_ids, "the adapter matters");

    let mut outcomes = |runs: &[Run]| generate(&mut model.backend, runs).unwrap();
    let base_alone = outcomes(std::slice::from_ref(&base)).remove(0);
    let adapted_alone = outcomes(std::slice::from_ref(&adapted)).remove(0);
    fixture.base.check(&format!("{name}, base"), &base_alone);
    fixture.adapter.check(&format!("{name}, adapter"), &adapted_alone);

    let chunked = |run: &Run, chunk| Run { chunk, ..run.clone() };
    let mixed = outcomes(&[
        base.clone(),
        adapted.clone(),
        chunked(&adapted, 7),
        chunked(&base, 3),
        chunked(&adapted, 1),
    ]);
    for (index, outcome) in mixed.iter().enumerate() {
        let expected = if index == 0 || index == 3 { &base_alone } else { &adapted_alone };
        assert_eq!(outcome, expected, "{name}: run {index} of a mixed batch is bit for bit what it is alone");
    }
}

#[test]
fn tiny_llama3() {
    check_fixture("tiny-llama3");
}

#[test]
fn tiny_mistral() {
    check_fixture("tiny-mistral");
}

#[test]
fn tiny_qwen2() {
    check_fixture("tiny-qwen2");
}

#[test]
fn tiny_qwen3() {
    check_fixture("tiny-qwen3");
}

#[test]
fn tiny_llama_head64() {
    check_fixture("tiny-llama-head64");
}

#[test]
fn tiny_qwen2_head64() {
    check_fixture("tiny-qwen2-head64");
}

#[derive(Deserialize)]
struct DemoFile {
    adapter: Option<String>,
    cases: Vec<DemoCase>,
}

#[derive(Deserialize)]
struct DemoCase {
    prompt_ids: Vec<u32>,
    output_ids: Vec<u32>,
    /// Of the first steps.
    top_logprobs: Vec<Vec<(u32, f32)>>,
}

/// The demo model with every adapter: a name for messages, the case, and how to run it.
fn demo(dtype: ComputeDtype, adapter_dtype: PackedDtype) -> (Model, Vec<(String, DemoCase, Run)>) {
    let directory = repository().join("demo");
    let mut model = Model::open(&directory.join("base"), dtype);
    let mut paths: Vec<PathBuf> = std::fs::read_dir(directory.join("golden"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        // Sums of adapters: asked for over HTTP (tests/serve_demo.rs).
        .filter(|path| !path.ends_with("combinations.json"))
        .collect();
    paths.sort();
    let mut runs = Vec::new();
    for path in &paths {
        let file: DemoFile = read_json(path);
        let adapter = file
            .adapter
            .as_ref()
            .map(|name| model.adapter(&directory.join("adapters").join(name), adapter_dtype));
        for (index, case) in file.cases.into_iter().enumerate() {
            let run = Run::greedy(&case.prompt_ids, adapter, case.output_ids.len() as u32);
            let name = format!("{}, case {index}", file.adapter.as_deref().unwrap_or("base"));
            runs.push((name, case, run));
        }
    }
    assert!(paths.len() >= 5, "the base and at least four adapters, found {paths:?}");
    (model, runs)
}

#[test]
fn demo_in_float32() {
    let (mut model, cases) = demo(ComputeDtype::Float32, PackedDtype::F32);
    let runs: Vec<Run> = cases.iter().map(|(_, _, run)| run.clone()).collect();
    let together = generate(&mut model.backend, &runs).unwrap();
    for ((name, case, run), together) in cases.iter().zip(&together) {
        let alone = generate(&mut model.backend, std::slice::from_ref(run)).unwrap().remove(0);
        assert_eq!(alone.output_ids, case.output_ids, "{name}");
        assert!(!case.top_logprobs.is_empty(), "{name}");
        for (step, (got, expected)) in alone.output_logprobs.iter().zip(&case.top_logprobs).enumerate() {
            check_top(&format!("{name}, step {step}"), got, expected);
        }
        assert_eq!(together, &alone, "{name}: all cases in one batch, bit for bit");
    }
}

#[test]
fn demo_in_bfloat16() {
    for adapter_dtype in [PackedDtype::F32, PackedDtype::Bf16] {
        let (mut model, cases) = demo(ComputeDtype::Bfloat16, adapter_dtype);
        let runs: Vec<Run> = cases.iter().map(|(_, _, run)| run.clone()).collect();
        let together = generate(&mut model.backend, &runs).unwrap();
        for ((name, case, _), together) in cases.iter().zip(&together) {
            assert_eq!(together.output_ids, case.output_ids, "{name}, adapters in {adapter_dtype:?}");
        }
    }
}

#[derive(Deserialize)]
struct RealFile {
    cases: Vec<RealCase>,
}

#[derive(Deserialize)]
struct RealCase {
    adapter: Option<String>,
    prompt_ids: Vec<u32>,
    output_ids: Vec<u32>,
    /// Of the first step.
    first_top_logprobs: Vec<(u32, f32)>,
    /// Between the two likeliest tokens, over all steps.
    least_margin: f32,
}

/// Models made by `benches/real_models.py`, in f32: every case of a model in one batch.
#[test]
#[ignore = "needs POLYLORA_TEST_MODELS, a folder made by benches/real_models.py"]
fn real_models_in_float32() {
    let root = PathBuf::from(std::env::var_os("POLYLORA_TEST_MODELS").expect("POLYLORA_TEST_MODELS is set"));
    let mut num_models = 0;
    for entry in std::fs::read_dir(root.join("goldens")).unwrap() {
        let golden = entry.unwrap().path();
        let name = golden.file_stem().unwrap().to_string_lossy().into_owned();
        let file: RealFile = read_json(&golden);
        let mut model = Model::open(&root.join(&name), ComputeDtype::Float32);
        let family = name.split('-').next().unwrap();
        let mut handles = std::collections::BTreeMap::new();
        for adapter in file.cases.iter().filter_map(|case| case.adapter.as_ref()) {
            if !handles.contains_key(adapter) {
                let directory = root.join(format!("{family}-adapters")).join(adapter);
                handles.insert(adapter.clone(), model.adapter(&directory, PackedDtype::F32));
            }
        }
        let run = |case: &RealCase| {
            let adapter = case.adapter.as_ref().map(|adapter| handles[adapter]);
            Run::greedy(&case.prompt_ids, adapter, case.output_ids.len() as u32)
        };
        let runs: Vec<Run> = file.cases.iter().map(run).collect();
        let outcomes = generate(&mut model.backend, &runs).unwrap();
        let mut num_ids = 0;
        for (index, (case, outcome)) in file.cases.iter().zip(&outcomes).enumerate() {
            let what = format!("{name}, {:?}, case {index}", case.adapter);
            check_top(&what, &outcome.output_logprobs[0], &case.first_top_logprobs);
            assert!(
                outcome.output_ids == case.output_ids || case.least_margin < 2.0 * TOLERANCE,
                "{what}: expected {:?}, got {:?}",
                case.output_ids,
                outcome.output_ids
            );
            num_ids += case.output_ids.len();
        }
        println!("{name}: {} cases, {num_ids} tokens", outcomes.len());
        num_models += 1;
    }
    assert!(num_models > 0, "no golden files in {}", root.display());
}
