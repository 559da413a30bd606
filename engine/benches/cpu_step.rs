//! Steps of the CPU backend, without an engine around it: what one decode step and one prefill cost.
//!
//!     cargo bench -p polylora-engine --bench cpu_step -- [MODEL_DIRECTORY]
//!
//! Without a folder: random weights of SmolLM2-135M's shape. Prints the median and the least time of a step; the rates are the median's.

use std::{path::PathBuf, sync::Arc, time::Instant};

use polylora_engine::{
    FileSource,
    adapter::{PackedDtype, Projection},
    backend::{
        Backend,
        conformance::{AdapterShape, Extras, random_adapter},
        cpu::{ComputeDtype, CpuBackend, CpuOptions, KvBudget},
    },
    batch::{AdapterHandle, ChooseToken, LoraSegment, SampleRow, SequenceRows, StepBatch},
    decoder::DecoderConfig,
    request::{RequestId, SamplingParams},
};

const CONTEXT: usize = 96;
const STEPS: usize = 30;

fn smollm2() -> DecoderConfig {
    let json = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rope_theta": 100000.0,
        "tie_word_embeddings": true
    });
    DecoderConfig::from_json(json.to_string().as_bytes(), None).expect("a valid configuration")
}

/// `rows_each` rows of each of `num_sequences` sequences, the last at position `CONTEXT - 1`; sequence `i` on `adapters[i]`.
fn batch(config: &DecoderConfig, num_sequences: usize, rows_each: usize, adapters: &[Option<AdapterHandle>], params: &SamplingParams) -> StepBatch {
    let context_len = CONTEXT.max(rows_each);
    let blocks_each = context_len.div_ceil(16);
    let mut batch = StepBatch::default();
    for sequence in 0..num_sequences {
        let row_start = batch.token_ids.len() as u32;
        let block_table: Arc<[u32]> = (0..blocks_each).map(|block| (sequence * blocks_each + block) as u32).collect();
        for position in context_len - rows_each..context_len {
            batch.token_ids.push((17 * position + 131 * sequence) as u32 % config.vocab_size as u32);
            batch.positions.push(position as u32);
            batch.kv_slots.push(block_table[position / 16] * 16 + position as u32 % 16);
        }
        let request_id = RequestId(sequence as u64);
        let choose = Some(ChooseToken {
            params: Arc::new(params.clone()),
            output_position: 0,
            token_counts: vec![],
            forbidden: vec![],
            mask: None,
            top_k_logprobs: None,
        });
        batch.samples.push(SampleRow {
            row: row_start + rows_each as u32 - 1,
            request_id,
            choose,
            prompt_logprob: None,
        });
        batch.sequences.push(SequenceRows {
            request_id,
            row_start,
            num_rows: rows_each as u32,
            context_len: context_len as u32,
            block_table,
        });
        if let Some(&Some(adapter)) = adapters.get(sequence) {
            batch.lora_segments.push(LoraSegment {
                adapter,
                row_start,
                num_rows: rows_each as u32,
            });
        }
    }
    batch
}

/// Median and least seconds of a step.
fn time(backend: &mut CpuBackend, batch: &StepBatch) -> (f64, f64) {
    let mut seconds: Vec<f64> = (0..STEPS)
        .map(|_| {
            let start = Instant::now();
            let output = backend.execute(batch).expect("a good batch");
            assert!(output.samples.iter().all(|sample| sample.token_id.is_some()));
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    (seconds[STEPS / 2], seconds[0])
}

fn main() {
    // `cargo bench` passes `--bench`.
    let directory = std::env::args().skip(1).find(|argument| !argument.starts_with("--")).map(PathBuf::from);
    for dtype in [ComputeDtype::Float32, ComputeDtype::Bfloat16] {
        let options = CpuOptions {
            dtype,
            kv_cache: KvBudget::Blocks(1024),
            max_adapters_per_batch: 16,
            ..Default::default()
        };
        let start = Instant::now();
        let (config, mut backend) = match &directory {
            Some(directory) => {
                let files = FileSource::Directory(directory.clone());
                let config = DecoderConfig::from_json(&files.open("config.json").expect("config.json"), None).expect("a decoder");
                let backend = CpuBackend::load(&files, &config, &options).expect("a model");
                (config, backend)
            }
            None => (smollm2(), CpuBackend::random(&smollm2(), 1, &options).expect("a model")),
        };
        let weight_bytes = backend.weight_bytes() as f64;
        println!(
            "{} {}: {:.0} MB of weights in {:.2} s",
            backend.device_name(),
            dtype.name(),
            weight_bytes / 1e6,
            start.elapsed().as_secs_f64()
        );
        let adapters: Vec<Option<AdapterHandle>> = [4, 8, 16, 32, 64, 128, 256]
            .into_iter()
            .map(|lora_rank| {
                let shape = AdapterShape {
                    lora_rank,
                    projections: &Projection::ALL,
                    layer_parity: None,
                    embed_and_head: false,
                    scaling: 0.1,
                    amplitude: 0.01,
                    extras: Extras::NONE,
                };
                Some(
                    backend
                        .begin_upload(&random_adapter(&config, &shape, u64::from(lora_rank), PackedDtype::F32))
                        .expect("room"),
                )
            })
            .chain([None])
            .collect();
        let greedy = SamplingParams {
            temperature: 0.0,
            ..Default::default()
        };
        let sampled = SamplingParams {
            temperature: 0.8,
            top_p: 0.95,
            ..Default::default()
        };
        let mut decode = |what: &str, rows: usize, adapters: &[Option<AdapterHandle>], params: &SamplingParams| {
            let (seconds, least) = time(&mut backend, &batch(&config, rows, 1, adapters, params));
            println!(
                "  decode  {rows:>3} rows {what:<22} {:>8.2} ms (least {:>8.2})  {:>7.1} tok/s  {:>5.1} GB/s of weights",
                seconds * 1e3,
                least * 1e3,
                rows as f64 / seconds,
                weight_bytes / seconds / 1e9
            );
        };
        for rows in [1, 2, 4, 8, 16, 32] {
            decode("base, greedy", rows, &[], &greedy);
        }
        decode("base, top_p 0.95", 8, &[], &sampled);
        decode("7 adapters and base", 8, &adapters, &greedy);
        decode("one adapter (rank 16)", 8, &[adapters[2]; 8], &greedy);
        for (rows, sequences) in [(64, 1), (256, 1), (64, 8)] {
            let (seconds, least) = time(&mut backend, &batch(&config, sequences, rows, &[], &greedy));
            let tokens = rows * sequences;
            println!(
                "  prefill {sequences} x {rows:<3}                          {:>8.2} ms (least {:>8.2})  {:>7.1} tok/s",
                seconds * 1e3,
                least * 1e3,
                tokens as f64 / seconds
            );
        }
    }
}
