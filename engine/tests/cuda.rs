//! The CUDA backend: the conformance suite, and the CPU backend's answers. With the feature and without a device these fail and say so.

#[cfg(feature = "cuda")]
mod cuda {
    use polylora_engine::{
        backend::{
            Backend,
            conformance::{self, Agreement},
            cpu::{ComputeDtype, CpuBackend, CpuOptions, KvBudget},
            cuda::{CudaBackend, CudaOptions},
        },
        decoder::DecoderConfig,
        weights::{Dtype, ModelWeights},
    };

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
        let capacity = conformance::capacity();
        let options = CpuOptions {
            dtype: ComputeDtype::Float32,
            num_threads: 2,
            kv_cache: KvBudget::Blocks(capacity.num_blocks),
            block_size: capacity.block_size,
            max_batch_tokens: capacity.max_batch_tokens,
            adapter_bytes: capacity.adapter_bytes,
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
                serde_json::json!({"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e6}),
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
