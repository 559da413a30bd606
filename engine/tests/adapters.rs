//! Adapters of every kind that is applied, against what PEFT computes with the same files (`golden/make_adapters.py`), and of every key of their
//! configuration (`golden/make_corpus.py`).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use polylora_engine::{
    AdapterError,
    adapter::{
        HostAdapter, PackedDtype,
        combine::combine,
        load::{CoverageReport, LoraLimits},
    },
    backend::{
        Backend,
        conformance::{Outcome, Run, generate},
        cpu::{ComputeDtype, CpuBackend, CpuOptions, KvBudget},
    },
    batch::AdapterHandle,
};

mod peft;

use peft::{Answer, BaseModel, Case, Golden, adapter_folder, head64};

/// Log-probabilities in f32 against PEFT's in f32: sums of other order over two layers.
const TOLERANCE: f32 = 1e-4;
/// Two more than are compared: the fifth and the sixth may be closer than the tolerance.
const TOP_K: u32 = 7;

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/adapters.json")).unwrap()
}

struct Base {
    model: BaseModel,
    backend: CpuBackend,
}

fn base(name: &str, dtype: ComputeDtype) -> Base {
    let model = BaseModel::open(name);
    let options = CpuOptions {
        dtype,
        num_threads: 2,
        kv_cache: KvBudget::Blocks(64),
        block_size: 4,
        max_batch_tokens: 256,
        adapter_bytes: 16 << 20,
        max_adapters_per_batch: 64,
    };
    let backend = CpuBackend::load(&model.files, &model.decoder, &options).unwrap();
    Base { model, backend }
}

impl Base {
    fn load(&self, name: &str, dtype: PackedDtype) -> (HostAdapter, CoverageReport) {
        self.model.load(name, dtype, CpuBackend::LORA_FEATURES)
    }

    fn upload(&mut self, name: &str) -> AdapterHandle {
        let (adapter, _) = self.load(name, PackedDtype::F32);
        let handle = self.backend.begin_upload(&Arc::new(adapter)).unwrap();
        assert!(self.backend.poll_upload(handle).unwrap());
        handle
    }
}

/// The largest difference of any log-probability that PEFT reports.
fn check(name: &str, outcome: &Outcome, answer: &Answer) {
    assert_eq!(outcome.output_ids, answer.output_ids, "{name}");
    // The last prompt position's distribution is the first output token's.
    let got = outcome.prompt_logprobs.iter().chain(&outcome.output_logprobs);
    for (position, (got, expected)) in got.zip(&answer.top_logprobs).enumerate() {
        for (token, logprob) in expected {
            let found = got.top.iter().find(|(other, _)| other == token);
            let Some((_, found)) = found else {
                panic!("{name}: position {position}: token {token} is not among {:?}", got.top)
            };
            assert!(
                (found - logprob).abs() < TOLERANCE,
                "{name}: position {position}: token {token}: expected {logprob}, got {found}"
            );
        }
    }
    assert_eq!(outcome.prompt_logprobs.len() + outcome.output_logprobs.len(), answer.top_logprobs.len());
}

#[test]
fn every_kind_of_adapter_computes_what_peft_computes() {
    let (golden, head64) = (golden(), head64());
    assert!(golden.cases.len() >= 45 && head64.cases.len() >= 34);
    computes_what_peft_computes(&golden);
    computes_what_peft_computes(&head64);
}

fn computes_what_peft_computes(golden: &Golden) {
    for (base_name, base_answer) in &golden.bases {
        let mut base = base(base_name, ComputeDtype::Float32);
        let cases: Vec<&Case> = golden.cases_on(base_name).collect();
        let handles: Vec<AdapterHandle> = cases.iter().map(|case| base.upload(&case.name)).collect();
        // Alone.
        let alone: Vec<Outcome> = cases
            .iter()
            .zip(&handles)
            .map(|(case, handle)| {
                let outcome = generate(&mut base.backend, &[golden.run(case, *handle, TOP_K)]).unwrap().remove(0);
                check(&case.name, &outcome, &case.answer);
                outcome
            })
            .collect();
        // All in one batch, with a base row between: the same bits.
        let mut runs: Vec<Run> = cases
            .iter()
            .zip(&handles)
            .map(|(case, handle)| golden.run(case, *handle, TOP_K))
            .collect();
        runs.insert(cases.len() / 2, base_answer.run(&golden.prompt_ids, None, TOP_K));
        // As many as the cache holds at once.
        let mut together = Vec::new();
        for runs in runs.chunks(12) {
            together.extend(generate(&mut base.backend, runs).unwrap());
        }
        check(base_name, &together.remove(cases.len() / 2), base_answer);
        for ((case, alone), together) in cases.iter().zip(&alone).zip(&together) {
            assert_eq!(alone, together, "{}: alone and in a batch", case.name);
        }
    }
}

/// `golden/corpus.json`
#[derive(serde::Deserialize)]
struct Corpus {
    base: String,
    prompt_ids: Vec<u32>,
    peft_keys: Vec<String>,
    with_tensors: BTreeMap<String, String>,
    cases: Vec<OddKey>,
}

/// A plain adapter whose configuration has one key set to something else.
#[derive(serde::Deserialize)]
struct OddKey {
    key: String,
    value: serde_json::Value,
    /// Without one PEFT does not take it.
    #[serde(flatten)]
    answer: Option<Answer>,
}

fn read_config(folder: &std::path::Path) -> serde_json::Map<String, serde_json::Value> {
    serde_json::from_slice(&std::fs::read(folder.join("adapter_config.json")).unwrap()).unwrap()
}

#[test]
fn every_odd_key_computes_what_peft_computes_or_is_refused_by_its_name() {
    let corpus: Corpus = serde_json::from_str(include_str!("golden/corpus.json")).unwrap();
    let mut base = base(&corpus.base, ComputeDtype::Float32);
    let plain = read_config(&adapter_folder("corpus"));
    let folder = tempfile::tempdir().unwrap();
    let weights = "adapter_model.safetensors";
    std::fs::copy(adapter_folder("corpus").join(weights), folder.path().join(weights)).unwrap();
    let (mut computed, mut refused, mut answers) = (0, 0, BTreeSet::new());
    for case in &corpus.cases {
        let what = format!("{} = {}", case.key, case.value);
        let mut config = plain.clone();
        config.insert(case.key.clone(), case.value.clone());
        std::fs::write(folder.path().join("adapter_config.json"), serde_json::to_vec(&config).unwrap()).unwrap();
        match base.model.try_load(folder.path(), PackedDtype::F32, CpuBackend::LORA_FEATURES) {
            Ok((adapter, _)) => {
                let answer = case.answer.as_ref().unwrap_or_else(|| panic!("{what}: PEFT does not take it"));
                let handle = base.backend.begin_upload(&Arc::new(adapter)).unwrap();
                let run = answer.run(&corpus.prompt_ids, Some(handle), TOP_K);
                check(&what, &generate(&mut base.backend, &[run]).unwrap().remove(0), answer);
                base.backend.free_adapter(handle);
                computed += 1;
                answers.insert(format!("{:?}", answer.top_logprobs));
            }
            Err(AdapterError::Unsupported { key, .. }) => {
                assert_eq!(key, case.key, "{what}");
                refused += 1;
            }
            Err(error) => {
                assert!(error.to_string().contains(&format!("`{}`", case.key)), "{what}: {error}");
                refused += 1;
            }
        }
    }
    assert!(computed >= 30 && refused >= 18, "{computed} computed, {refused} refused");
    assert!(answers.len() >= 6, "only {} of them differ", answers.len());
    // No key of PEFT's is left out: those that come with tensors of their own have a case of their own.
    let golden = golden();
    for (key, name) in &corpus.with_tensors {
        assert_ne!(read_config(&adapter_folder(name))[key], plain[key], "{key} of {name}");
        assert!(golden.cases.iter().any(|case| case.name == *name), "{name}");
    }
    for key in &corpus.peft_keys {
        let is_odd = corpus.cases.iter().any(|case| case.key == *key && Some(&case.value) != plain.get(key));
        assert!(is_odd || corpus.with_tensors.contains_key(key), "{key}");
    }
}

#[test]
fn added_tokens_are_read_and_emitted_by_rows_of_their_adapter_alone() {
    let golden = golden();
    for (base_name, base_answer) in &golden.bases {
        let mut base = base(base_name, ComputeDtype::Float32);
        let base_vocab_size = base.model.decoder.vocab_size as u32;
        let cases: Vec<&Case> = golden
            .cases
            .iter()
            .filter(|case| case.base == *base_name && case.vocab_size.is_some())
            .collect();
        assert!(cases.len() >= 5, "{base_name}");
        for case in cases {
            let vocab_size = case.vocab_size.unwrap();
            let (adapter, report) = base.load(&case.name, PackedDtype::F32);
            assert_eq!(adapter.vocab_size(base_vocab_size as usize), vocab_size as usize, "{}", case.name);
            assert_eq!(report.resized_vocab, Some(vocab_size as usize));
            if vocab_size > base_vocab_size {
                let is_added = |id: &u32| *id >= base_vocab_size;
                assert!(case.answer.output_ids.iter().any(is_added), "{}: emits an added token", case.name);
                assert!(case.prompt_ids.as_ref().unwrap().iter().any(is_added), "{}: is asked with one", case.name);
            }
            let handle = base.backend.begin_upload(&Arc::new(adapter)).unwrap();
            let widest = |adapter, prompt: &[u32]| base_answer.run(prompt, adapter, 1000);
            let runs = [
                widest(None, &golden.prompt_ids),
                widest(Some(handle), &golden.prompt_ids),
                widest(None, &golden.prompt_ids),
            ];
            let outcomes = generate(&mut base.backend, &runs).unwrap();
            for (outcome, expected) in outcomes.iter().zip([base_vocab_size, vocab_size, base_vocab_size]) {
                for logprobs in outcome.prompt_logprobs.iter().chain(&outcome.output_logprobs) {
                    assert_eq!(
                        logprobs.top.len(),
                        expected as usize,
                        "{}: one for each token that the row has",
                        case.name
                    );
                    let total: f64 = logprobs.top.iter().map(|(_, logprob)| f64::from(*logprob).exp()).sum();
                    assert!((total - 1.0).abs() < 1e-4, "{}: {total}", case.name);
                }
            }
            assert_eq!(outcomes[0].output_ids, base_answer.output_ids, "{}: the base beside it", case.name);
            let beyond = [vocab_size];
            generate(&mut base.backend, &[widest(Some(handle), &beyond)]).expect_err("a token beyond the adapter's");
            if vocab_size > base_vocab_size {
                generate(&mut base.backend, &[widest(None, &[vocab_size - 1])]).expect_err("a token that the base has not");
            }
            base.backend.free_adapter(handle);
        }
    }
}

#[test]
fn rows_that_are_the_base_models_are_not_kept() {
    let mut llama = base("tiny-llama3", ComputeDtype::Float32);
    let row_bytes = llama.model.decoder.hidden_size * 4;
    let (untrained, report) = llama.load("tokens_untrained_rows", PackedDtype::F32);
    assert_eq!(report.token_rows.values().copied().collect::<Vec<_>>(), [3, 3], "{report:?}");
    assert!(untrained.replaced.is_empty());
    let pairs: usize = untrained
        .modules
        .iter()
        .map(|module| 4 * (module.lora_rank * (module.d_in + module.d_out)) as usize)
        .sum();
    assert!(
        (pairs + 6 * row_bytes..pairs + 7 * row_bytes).contains(&untrained.bytes()),
        "{} bytes",
        untrained.bytes()
    );
    let (trained, report) = llama.load("tokens_saved", PackedDtype::F32);
    assert_eq!(report.replaced_modules, ["model.embed_tokens", "lm_head"]);
    assert!(trained.bytes() > 2 * 261 * row_bytes, "{} bytes", trained.bytes());
    let (fewer, report) = llama.load("tokens_fewer", PackedDtype::F32);
    assert_eq!(
        (fewer.resized_vocab, report.token_rows.len()),
        (Some(240), 0),
        "what is left is the base model's"
    );
    // A tied pair of rows is kept once.
    let qwen = base("tiny-qwen2", ComputeDtype::Float32);
    let (tied, _) = qwen.load("tokens_tied_untrained_rows", PackedDtype::F32);
    assert_eq!(tied.token_rows[0].offset_bytes, tied.token_rows[1].offset_bytes);
    // All that a backend has of it is counted: the rows of the head are packed once more.
    let limit = untrained.bytes() + 3 * row_bytes;
    let untrained = Arc::new(untrained);
    llama.backend.begin_upload(&untrained).unwrap();
    let options = CpuOptions {
        adapter_bytes: limit - 1,
        max_batch_tokens: 4,
        kv_cache: KvBudget::Blocks(4),
        ..CpuOptions::default()
    };
    let mut small = CpuBackend::load(&llama.model.files, &llama.model.decoder, &options).unwrap();
    let error = small.begin_upload(&untrained).unwrap_err();
    assert!(error.to_string().contains(&format!("needs {limit} bytes")), "{error}");
}

#[test]
fn adapters_with_tokens_of_their_own_are_not_combined() {
    let base = base("tiny-llama3", ComputeDtype::Float32);
    let plain = base.load("plain_f16", PackedDtype::F32).0;
    for name in ["tokens_untrained_rows", "tokens_pairs", "tokens_fewer", "rows_embedding"] {
        let own = base.load(name, PackedDtype::F32).0;
        for parts in [vec![(&own, 1.0), (&plain, 1.0)], vec![(&own, 0.5)]] {
            let error = combine(&parts, &LoraLimits::new(PackedDtype::F32)).unwrap_err().to_string();
            assert!(
                error.contains("an adapter with tokens of its own can't be combined or weighted"),
                "{name}: {error}"
            );
        }
    }
}

#[test]
fn every_kind_of_adapter_runs_in_bfloat16() {
    let golden = golden();
    for base_name in golden.bases.keys() {
        let mut base = base(base_name, ComputeDtype::Bfloat16);
        for case in golden.cases_on(base_name) {
            let (adapter, _) = base.load(&case.name, PackedDtype::Bf16);
            let handle = base.backend.begin_upload(&Arc::new(adapter)).unwrap();
            let outcome = generate(&mut base.backend, &[golden.run(case, handle, TOP_K)]).unwrap().remove(0);
            base.backend.free_adapter(handle);
            // 8 bits of mantissa through two layers with large random deltas: near, not equal.
            for (position, (got, expected)) in outcome.prompt_logprobs.iter().zip(&case.answer.top_logprobs).enumerate() {
                let (token, logprob) = expected[0];
                let found = got.top.iter().find(|(other, _)| *other == token);
                assert!(
                    found.is_some_and(|(_, found)| (found - logprob).abs() < 0.35),
                    "{}: position {position}: expected {token} at {logprob}, got {:?}",
                    case.name,
                    got.top
                );
            }
        }
    }
}

#[test]
fn combinations_compute_the_sum_of_the_deltas() {
    let golden = golden();
    assert!(golden.combinations.len() >= 4);
    for combination in &golden.combinations {
        let mut base = base(&combination.base, ComputeDtype::Float32);
        let parts: Vec<(HostAdapter, f32)> = combination
            .weights
            .iter()
            .map(|(name, weight)| (base.load(name, PackedDtype::F32).0, *weight))
            .collect();
        let borrowed: Vec<(&HostAdapter, f32)> = parts.iter().map(|(adapter, weight)| (adapter, *weight)).collect();
        let combined = combine(&borrowed, &LoraLimits::new(PackedDtype::F32)).unwrap();
        let handle = base.backend.begin_upload(&Arc::new(combined)).unwrap();
        let outcome = generate(&mut base.backend, &[combination.answer.run(&golden.prompt_ids, Some(handle), TOP_K)])
            .unwrap()
            .remove(0);
        check(&format!("{:?}", combination.weights), &outcome, &combination.answer);
    }
}

#[test]
fn reports_say_what_is_covered() {
    let llama = base("tiny-llama3", ComputeDtype::Float32);
    let (_, report) = llama.load("rslora_patterns", PackedDtype::F32);
    assert_eq!(report.modules.len(), 14);
    let module = |name: &str| report.modules.iter().find(|module| module.module == name).unwrap();
    let up = module("model.layers.0.mlp.up_proj");
    assert_eq!((up.lora_rank, up.lora_alpha, up.scaling), (4, 11.0, 5.5));
    let down = module("model.layers.1.mlp.down_proj");
    assert_eq!((down.lora_rank, down.scaling), (7, (6.0 / 7f64.sqrt()) as f32));
    let (_, report) = llama.load("saved_both", PackedDtype::F32);
    assert_eq!(report.replaced_modules, ["model.embed_tokens", "lm_head"]);
    let (_, report) = llama.load("embedding_and_head", PackedDtype::F32);
    assert_eq!(report.tensors_without_effect.len(), 2, "{report:?}");
    let (_, report) = llama.load("one_layer", PackedDtype::F32);
    assert_eq!(report.layers, [1]);
    let (_, report) = llama.load("bias_all_without_biases", PackedDtype::F32);
    assert!(report.keys_without_effect.contains(&"bias".to_owned()), "{report:?}");
}
