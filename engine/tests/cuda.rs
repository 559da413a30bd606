//! The CUDA backend: the conformance suite, the CPU backend's answers, and PEFT's. With the feature and without a device these fail and say so.

#[cfg(feature = "cuda")]
mod peft;

#[cfg(feature = "cuda")]
mod cuda {
    use std::sync::Arc;

    use polylora_engine::{
        adapter::{
            HostAdapter, PackedDtype,
            combine::combine,
            load::{LoraLimits, MAX_ADDED_TOKENS},
        },
        backend::{
            Backend,
            conformance::{self, AdapterShape, Agreement, Extras, Outcome, Run, generate, random_adapter},
            cpu::{ComputeDtype, CpuBackend, CpuOptions, KvBudget},
            cuda::{CudaBackend, CudaOptions},
        },
        batch::AdapterHandle,
        decoder::DecoderConfig,
        weights::{Dtype, ModelWeights},
    };

    use crate::peft::{Answer, BaseModel, Case, head64};

    /// bf16 keeps 8 bits; GEMMs of other row counts sum in another order.
    const BF16: f32 = 0.1;

    fn options() -> CudaOptions {
        let capacity = conformance::capacity();
        CudaOptions {
            kv_cache: Some(KvBudget::Blocks(capacity.num_blocks)),
            block_size: capacity.block_size,
            max_batch_tokens: capacity.max_batch_tokens,
            adapter_bytes: capacity.adapter_bytes,
            max_adapters_per_batch: capacity.max_adapters_per_batch,
            max_lora_rank: 256,
            ..CudaOptions::default()
        }
    }

    fn backend(config: &DecoderConfig, options: CudaOptions) -> CudaBackend {
        // The same weights as the CPU's.
        CudaBackend::from_weights(&ModelWeights::random(11, Dtype::Bf16), config, &options).expect("these tests need a CUDA device")
    }

    fn cpu(config: &DecoderConfig) -> CpuBackend {
        cpu_with(config, conformance::capacity().adapter_bytes)
    }

    fn cpu_with(config: &DecoderConfig, adapter_bytes: usize) -> CpuBackend {
        let capacity = conformance::capacity();
        let options = CpuOptions {
            dtype: ComputeDtype::Float32,
            num_threads: 2,
            kv_cache: KvBudget::Blocks(capacity.num_blocks),
            block_size: capacity.block_size,
            max_batch_tokens: capacity.max_batch_tokens,
            adapter_bytes,
            max_adapters_per_batch: capacity.max_adapters_per_batch,
        };
        CpuBackend::from_weights(&ModelWeights::random(11, Dtype::Bf16), config, &options).expect("a good configuration")
    }

    #[test]
    #[ignore = "needs a GPU: --include-ignored"]
    fn conforms() {
        let config = conformance::config();
        conformance::run_all(&mut backend(&config, options()), Agreement::Within(BF16));
    }

    #[test]
    #[ignore = "needs a GPU: --include-ignored"]
    fn conforms_without_graphs() {
        let config = conformance::config();
        let options = CudaOptions {
            graphs: false,
            tune: false,
            ..options()
        };
        conformance::run_all(&mut backend(&config, options), Agreement::Within(BF16));
    }

    #[test]
    #[ignore = "needs a GPU: --include-ignored"]
    fn agrees_with_the_cpu() {
        let config = conformance::config();
        conformance::backends_agree(&mut backend(&config, options()), &mut cpu(&config), &config, BF16);
    }

    /// Memory of a few blocks and adapters more than the cases need, so that every change is in somebody's way.
    #[test]
    #[ignore = "needs a GPU: --include-ignored"]
    fn memory_is_shared() {
        let config = conformance::config();
        for graphs in [true, false] {
            let options = CudaOptions {
                kv_cache: None,
                shared_bytes: Some(4 << 20),
                adapter_bytes: usize::MAX,
                max_context: 256,
                tune: false,
                graphs,
                ..options()
            };
            conformance::shared_memory_is_moved_under_running_sequences(&mut backend(&config, options), &config);
        }
    }

    /// One random model of each family: what they differ in is there.
    #[test]
    #[ignore = "needs a GPU: --include-ignored"]
    fn every_family_agrees_with_the_cpu() {
        let families = [
            (
                "LlamaForCausalLM",
                serde_json::json!({"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": true}),
            ),
            (
                "Qwen2ForCausalLM",
                // A vocabulary that is no multiple of 8.
                serde_json::json!({"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e6, "vocab_size": 331}),
            ),
            (
                "Qwen3ForCausalLM",
                serde_json::json!({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}),
            ),
            (
                "MistralForCausalLM",
                serde_json::json!({"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "sliding_window": 24}),
            ),
        ];
        for (architecture, differs) in families {
            let mut json = serde_json::json!({
                "architectures": [architecture], "vocab_size": 336, "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2,
                "max_position_embeddings": 512, "tie_word_embeddings": false
            });
            let fields = json.as_object_mut().expect("an object");
            fields.extend(differs.as_object().expect("an object").clone());
            let config = DecoderConfig::from_json(json.to_string().as_bytes(), None).expect("a valid configuration");
            conformance::backends_agree(&mut backend(&config, options()), &mut cpu(&config), &config, BF16);
        }
    }

    /// Mean difference of log-probabilities. The deltas are random and as large as what they are added to, and activations are rounded to bf16
    /// in each of two layers: PEFT itself in bf16 is off by 0.03 to 0.2 here, single tokens by up to 0.7.
    const PEFT: f32 = 0.2;
    /// A token is another one only where the likeliest leads by less.
    const LEAD: f32 = 1.0;
    /// More than are compared: the fifth and those after it may change places. As many as any adapter here has tokens.
    const TOP_K: u32 = 272;

    /// The mean difference of the log-probabilities that PEFT reports, up to the first output token that is another one.
    fn difference(answer: &Answer, outcome: &Outcome) -> f32 {
        let num_prompt = outcome.prompt_logprobs.len();
        let same = outcome
            .output_ids
            .iter()
            .zip(&answer.output_ids)
            .take_while(|(got, expected)| got == expected);
        let compared = num_prompt + (same.count() + 1).min(answer.output_ids.len());
        let got = outcome.prompt_logprobs.iter().chain(&outcome.output_logprobs);
        let mut differences = Vec::new();
        for (got, expected) in got.zip(&answer.top_logprobs).take(compared) {
            for (token, logprob) in expected {
                let found = got.top.iter().find(|(other, _)| other == token);
                differences.push(found.map_or(f32::INFINITY, |(_, found)| (found - logprob).abs()));
            }
        }
        assert!(differences.len() >= 5 * num_prompt, "{} log-probabilities", differences.len());
        differences.iter().sum::<f32>() / differences.len() as f32
    }

    fn check(answer: &Answer, name: &str, outcome: &Outcome) {
        let difference = difference(answer, outcome);
        println!("{name}: {difference}");
        assert!(difference < PEFT, "{name}: log-probabilities differ by {difference}, at most {PEFT}");
        for (step, (got, expected)) in outcome.output_ids.iter().zip(&answer.output_ids).enumerate() {
            if got != expected {
                let top = &answer.top_logprobs[outcome.prompt_logprobs.len() + step];
                let lead = top[0].1 - top[1].1;
                assert!(lead < LEAD, "{name}: step {step}: token {got}, expected {expected} which leads by {lead}");
                return;
            }
        }
        assert_eq!(outcome.output_ids, answer.output_ids, "{name}");
    }

    struct Base {
        model: BaseModel,
        backend: CudaBackend,
    }

    impl Base {
        fn open(name: &str) -> Self {
            let model = BaseModel::open(name);
            let options = CudaOptions {
                max_adapters_per_batch: 64,
                tune: false,
                ..options()
            };
            let backend = CudaBackend::load(&model.files, &model.decoder, &options).expect("these tests need a CUDA device");
            Self { model, backend }
        }

        fn load(&self, name: &str, dtype: PackedDtype) -> HostAdapter {
            self.model.load(name, dtype, CudaBackend::LORA_FEATURES).0
        }

        fn upload(&mut self, adapter: HostAdapter) -> AdapterHandle {
            let handle = self.backend.begin_upload(&Arc::new(adapter)).expect("room");
            while !self.backend.poll_upload(handle).expect("an upload") {
                std::thread::yield_now();
            }
            handle
        }
    }

    /// Every kind of adapter, alone and all in one batch with a base row between, from host memory in bf16 and in f32.
    #[test]
    #[ignore = "needs a GPU: --include-ignored"]
    fn every_kind_of_adapter_computes_what_peft_computes() {
        let golden = head64();
        assert!(golden.cases.len() >= 34);
        for (base_name, base_answer) in &golden.bases {
            let mut base = Base::open(base_name);
            let cases: Vec<&Case> = golden.cases_on(base_name).collect();
            let mut runs = Vec::new();
            for (case, dtype) in cases.iter().zip([PackedDtype::Bf16, PackedDtype::F32].into_iter().cycle()) {
                let adapter = base.load(&case.name, dtype);
                let handle = base.upload(adapter);
                let run = golden.run(case, handle, TOP_K);
                let outcome = generate(&mut base.backend, std::slice::from_ref(&run)).unwrap().remove(0);
                check(&case.answer, &case.name, &outcome);
                let tokens = case.vocab_size.map_or(base.model.decoder.vocab_size, |size| size as usize);
                assert_eq!(outcome.prompt_logprobs[0].top.len(), tokens, "{}", case.name);
                // One that was asked with tokens of its own has nothing to be compared with.
                if case.vocab_size.is_none() {
                    let without = difference(base_answer, &outcome);
                    assert!(without > 2.0 * PEFT, "{}: the base's answer is as near: {without}", case.name);
                }
                runs.push(run);
            }
            runs.insert(runs.len() / 2, base_answer.run(&golden.prompt_ids, None, TOP_K));
            let mut together = generate(&mut base.backend, &runs).unwrap();
            check(base_answer, base_name, &together.remove(cases.len() / 2));
            for (case, outcome) in cases.iter().zip(&together) {
                check(&case.answer, &format!("{} in a batch", case.name), outcome);
            }
        }
    }

    #[test]
    #[ignore = "needs a GPU: --include-ignored"]
    fn combinations_compute_the_sum_of_the_deltas() {
        let golden = head64();
        assert!(!golden.combinations.is_empty());
        for combination in &golden.combinations {
            let mut base = Base::open(&combination.base);
            let load = |(name, weight): (&String, &f32)| (base.load(name, PackedDtype::Bf16), *weight);
            let parts: Vec<(HostAdapter, f32)> = combination.weights.iter().map(load).collect();
            let borrowed: Vec<(&HostAdapter, f32)> = parts.iter().map(|(adapter, weight)| (adapter, *weight)).collect();
            let handle = base.upload(combine(&borrowed, &LoraLimits::new(PackedDtype::Bf16)).unwrap());
            let run = combination.answer.run(&golden.prompt_ids, Some(handle), TOP_K);
            let outcome = generate(&mut base.backend, &[run]).unwrap().remove(0);
            check(&combination.answer, &format!("{:?}", combination.weights), &outcome);
        }
    }

    fn adding(num_tokens: i32) -> AdapterShape<'static> {
        AdapterShape {
            extras: Extras {
                added_tokens: num_tokens,
                embedding_rows: true,
                head_rows: true,
                ..Extras::NONE
            },
            ..conformance::SHAPES[0]
        }
    }

    /// As many tokens as may be added: only some rows' logits are in memory at once.
    #[test]
    #[ignore = "needs a GPU: --include-ignored"]
    fn the_largest_vocabulary_is_answered_a_few_rows_at_a_time() {
        let config = conformance::config();
        let options = CudaOptions {
            adapter_bytes: 64 << 20,
            tune: false,
            ..options()
        };
        let (mut gpu, mut cpu) = (backend(&config, options), cpu_with(&config, 256 << 20));
        let host = random_adapter(&config, &adding(MAX_ADDED_TOKENS as i32), 1, PackedDtype::Bf16);
        let mut prompt = conformance::prompt(&config, 2, 14);
        prompt[1] = (config.vocab_size + MAX_ADDED_TOKENS - 1) as u32;
        let answer = |backend: &mut dyn Backend| {
            let handle = backend.begin_upload(&host).expect("room");
            while !backend.poll_upload(handle).expect("an upload") {
                std::thread::yield_now();
            }
            let base = Run::greedy(&prompt[2..], None, 2);
            let runs = [base.clone(), Run::greedy(&prompt, Some(handle), 2), base];
            generate(backend, &runs).expect("rows of two vocabularies")
        };
        for (got, expected) in answer(&mut gpu).iter().zip(&answer(&mut cpu)) {
            conformance::check_same("the largest vocabulary", got, expected, Agreement::Within(BF16));
        }
        let host = random_adapter(&config, &adding(MAX_ADDED_TOKENS as i32 + 1), 1, PackedDtype::Bf16);
        let error = gpu.begin_upload(&host).expect_err("a token more").to_string();
        assert!(error.contains("66057 tokens, at most 66056 here"), "{error}");
    }

    #[test]
    #[ignore = "needs a GPU: --include-ignored"]
    fn too_small_a_fraction_is_named() {
        let options = CudaOptions {
            mem_fraction: 1e-6,
            kv_cache: None,
            ..options()
        };
        let result = CudaBackend::from_weights(&ModelWeights::random(11, Dtype::Bf16), &conformance::config(), &options);
        let message = result.err().expect("no room").to_string();
        assert!(message.contains("mem_fraction 0.000001"), "{message}");
        let mut backend = backend(&conformance::config(), self::options());
        assert!(matches!(backend.collect(), Err(polylora_engine::backend::BackendError::BadBatch(_))));
    }
}

/// So that a run without the feature says what it leaves out.
#[cfg(not(feature = "cuda"))]
#[test]
#[ignore = "needs --features cuda and a GPU"]
fn cuda_backend() {}
