//! `polylora bench`: throughput and step times of the engine itself, without HTTP and text.
//!
//! Each run submits a whole batch at once and records when every token comes. Prefill is measured until the last sequence has its
//! first token; decode, and the times between tokens, from then on, when every step has one row of each sequence. With `--num-requests`
//! sequences follow one another, prefill and decode mix, and only the whole is measured.

use std::{
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use futures::{StreamExt, TryStreamExt};
use polylora_engine::{
    AdapterLease, FileSource, GenerationRequest, InferenceEngine, LoadRequest, LogprobsParams, SamplingParams, TokenEvent, adapter::Projection,
    decoder::DecoderConfig,
};
use serde_json::{Value, json};

use super::adapters::Table;
use crate::config::{Device, Dtype, LoadFormat, MemoryBudget};

/// `polylora bench …`
#[derive(Args, Debug)]
pub struct BenchArgs {
    /// A model's folder. Unset: --shape.
    #[arg(long, alias = "model", value_name = "DIR", conflicts_with = "shape")]
    pub model_path: Option<PathBuf>,
    /// What the weights of --model-path are read from; `dummy`: they are random, and no more of it is needed than its config.json.
    #[arg(long, value_enum, default_value_t = LoadFormat::Auto, requires = "model_path", value_name = "FORMAT")]
    pub load_format: LoadFormat,
    /// A model of random weights in the shape of a known one.
    #[arg(long, value_enum, default_value_t = Shape::Smollm2_135m)]
    pub shape: Shape,
    /// Sequences at once; several sizes are run one after another.
    #[arg(long, num_args = 1.., default_values_t = [1, 8], value_name = "N")]
    pub batch_size: Vec<usize>,
    /// Sequences in all, for each batch size: as one ends the next begins, as with a load generator of that concurrency. Unset: one batch, which
    /// begins at once, so that prefill and decode can be told apart.
    #[arg(long, value_name = "N")]
    pub num_requests: Option<usize>,
    /// Prompt tokens of each sequence.
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub prompt_tokens: usize,
    /// Output tokens of each sequence.
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub output_tokens: usize,
    /// Adapters, of random weights on all seven projections.
    #[arg(long, default_value_t = 8, value_name = "N")]
    pub num_adapters: usize,
    /// Their ranks, in turn.
    #[arg(long, num_args = 1.., default_values_t = [16], value_name = "RANK")]
    pub lora_rank: Vec<u32>,
    /// Which sequence runs on which adapter.
    #[arg(long, value_enum, default_value_t = Workload::Distinct)]
    pub workload: Workload,
    /// Sequences of each batch that run on the base model, whatever the workload.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub base_rows: usize,
    /// What is computed and stored in.
    #[arg(long, value_enum, default_value_t = Dtype::Float32)]
    pub dtype: Dtype,
    /// Where it runs.
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    pub device: Device,
    /// CPU threads. Unset: one per core.
    #[arg(long, value_name = "N")]
    pub num_threads: Option<usize>,
    /// Memory for KV and adapters: a fraction or a size. Unset: what the largest batch needs.
    #[arg(long, value_name = "FRACTION|SIZE")]
    pub mem_fraction_static: Option<MemoryBudget>,
    /// Most tokens computed in one step.
    #[arg(long, default_value_t = 512, value_name = "TOKENS")]
    pub chunked_prefill_size: usize,
    /// Measured runs of each batch size, after one that is not; the median is reported.
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub repeat: usize,
    /// Seed of prompts, weights and the workload.
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    pub seed: u64,
    /// Write the results as JSON to this file (`-` for standard output, instead of the table).
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// A model whose shape is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// 30 layers, hidden 576: SmolLM2-135M.
    #[value(name = "smollm2-135m")]
    Smollm2_135m,
    /// 24 layers, hidden 896: Qwen2.5-0.5B.
    #[value(name = "qwen2.5-0.5b")]
    Qwen25_05b,
    /// 16 layers, hidden 2048: Llama-3.2-1B.
    #[value(name = "llama-3.2-1b")]
    Llama32_1b,
    /// 32 layers, hidden 4096: Llama-3.1-8B.
    #[value(name = "llama-3.1-8b")]
    Llama31_8b,
}

impl Shape {
    /// Its `config.json`.
    pub(super) fn config_json(self) -> Value {
        let llama = |layers: u32, hidden: u32, ffn: u32, heads: u32, kv_heads: u32, vocab: u32, tied: bool, theta: f64| {
            json!({
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden,
                "intermediate_size": ffn, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
                "tie_word_embeddings": tied, "rope_theta": theta, "rms_norm_eps": 1e-5, "hidden_act": "silu",
                "max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2,
            })
        };
        match self {
            Self::Smollm2_135m => llama(30, 576, 1536, 9, 3, 49152, true, 1e5),
            Self::Llama32_1b => llama(16, 2048, 8192, 32, 8, 128_256, true, 5e5),
            Self::Llama31_8b => llama(32, 4096, 14336, 32, 8, 128_256, false, 5e5),
            Self::Qwen25_05b => {
                let mut config = llama(24, 896, 4864, 14, 2, 151_936, true, 1e6);
                config["architectures"] = json!(["Qwen2ForCausalLM"]);
                config["model_type"] = "qwen2".into();
                config
            }
        }
    }
}

/// Which sequence runs on which adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Workload {
    /// Each on another, in turn.
    Distinct,
    /// All on one.
    Identical,
    /// Each on one drawn evenly.
    Uniform,
    /// Each on one drawn by Zipf's law with exponent 1.
    Zipf,
    /// All on the base model.
    None,
}

impl Workload {
    /// The adapter of each row; the last `base_rows` have none.
    fn assign(self, rows: usize, base_rows: usize, num_adapters: usize, random: &mut Random) -> Vec<Option<usize>> {
        let weights: Vec<f64> = (1..=num_adapters).map(|rank| 1.0 / rank as f64).collect();
        let lora_rows = if num_adapters == 0 { 0 } else { rows.saturating_sub(base_rows) };
        let mut adapter = |row: usize| match self {
            Self::Distinct => Some(row % num_adapters),
            Self::Identical => Some(0),
            Self::Uniform => Some((random.unit() * num_adapters as f64) as usize),
            Self::Zipf => {
                let mut left = random.unit() * weights.iter().sum::<f64>();
                let drawn = weights.iter().position(|weight| {
                    left -= weight;
                    left < 0.0
                });
                Some(drawn.unwrap_or(num_adapters - 1))
            }
            Self::None => None,
        };
        (0..rows).map(|row| if row < lora_rows { adapter(row) } else { None }).collect()
    }
}

/// SplitMix64: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In [0, 1).
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Runs the measurement and prints it.
///
/// # Errors
/// Bad settings, or an engine that fails.
pub fn run(args: &BenchArgs) -> anyhow::Result<()> {
    for (flag, value) in [
        ("--batch-size", args.batch_size.iter().copied().min().unwrap_or(0)),
        ("--prompt-tokens", args.prompt_tokens),
        ("--repeat", args.repeat),
    ] {
        ensure!(value > 0, "{flag} must be at least 1");
    }
    if let (Some(requests), Some(batch)) = (args.num_requests, args.batch_size.iter().max()) {
        ensure!(requests >= *batch, "--num-requests {requests} is less than --batch-size {batch}");
    }
    ensure!(args.output_tokens > 1, "--output-tokens must be at least 2: the first comes from prefill");
    ensure!(
        args.num_adapters > 0 || args.workload == Workload::None,
        "--num-adapters 0 goes with --workload none only"
    );
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let results = runtime.block_on(measure(args))?;
    let to_stdout = args.json.as_deref() == Some(Path::new("-"));
    if !to_stdout {
        write!(std::io::stdout(), "{}", results.table())?;
    }
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&results.json(args))? + "\n";
        if to_stdout {
            write!(std::io::stdout(), "{text}")?;
        } else {
            std::fs::write(path, text).with_context(|| format!("--json {}", path.display()))?;
        }
    }
    Ok(())
}

async fn measure(args: &BenchArgs) -> anyhow::Result<Results> {
    let num_adapters = if args.workload == Workload::None { 0 } else { args.num_adapters };
    let engine = super::engine::for_bench(args, num_adapters)?;
    let decoder = &engine.decoder;
    let leases = load_random_adapters(engine.engine.as_ref(), decoder, num_adapters, &args.lora_rank, args.seed).await?;
    let mut results = Results {
        device: engine.engine.describe().device.clone(),
        dtype: engine.engine.describe().dtype.clone(),
        rows: Vec::new(),
    };
    let mut random = Random(args.seed);
    for &batch in &args.batch_size {
        let num_requests = args.num_requests.unwrap_or(batch);
        let mut adapters = Vec::new();
        while adapters.len() < num_requests {
            adapters.extend(args.workload.assign(batch, args.base_rows, num_adapters, &mut random));
        }
        adapters.truncate(num_requests);
        let mut runs = Vec::new();
        for repeat in 0..=args.repeat {
            let leases = adapters.iter().map(|adapter| adapter.map(|index| leases[index].clone())).collect();
            let run = run_requests(engine.engine.as_ref(), args, leases, batch, decoder.vocab_size, &mut random).await?;
            // The first run also uploads the adapters and warms the caches.
            if repeat > 0 {
                runs.push(run);
            }
        }
        let distinct = adapters.iter().flatten().collect::<std::collections::BTreeSet<_>>().len();
        results.rows.push(Row::of(batch, distinct, &runs));
    }
    engine.engine.shutdown(Duration::from_secs(5)).await;
    Ok(results)
}

/// Registers adapters of random weights and takes a lease on each.
async fn load_random_adapters(
    engine: &dyn InferenceEngine,
    decoder: &DecoderConfig,
    num_adapters: usize,
    ranks: &[u32],
    seed: u64,
) -> anyhow::Result<Vec<AdapterLease>> {
    let folder = tempfile::tempdir().context("a folder for the random adapters")?;
    let mut leases = Vec::with_capacity(num_adapters);
    for index in 0..num_adapters {
        let name = format!("bench-{index}");
        let directory = folder.path().join(&name);
        write_random_adapter(&directory, decoder, ranks[index % ranks.len()], seed ^ (index as u64 + 1))?;
        engine
            .load_adapter(LoadRequest {
                name: name.clone(),
                files: FileSource::Directory(directory.clone()),
                source: directory.display().to_string(),
                pinned: false,
                replace: false,
                expected_version: None,
            })
            .await?;
        leases.push(engine.acquire_adapter(&name).await?);
        std::fs::remove_dir_all(&directory)?;
    }
    Ok(leases)
}

/// Writes a PEFT adapter of `rank` on all seven projections, in bf16.
fn write_random_adapter(directory: &Path, decoder: &DecoderConfig, rank: u32, seed: u64) -> anyhow::Result<()> {
    use safetensors::{Dtype as Stored, tensor::TensorView};

    std::fs::create_dir_all(directory)?;
    let rank = rank as usize;
    let mut random = Random(seed);
    let mut weights = |len: usize, scale: f64| -> Vec<u8> {
        let values = (0..len).map(|_| half::bf16::from_f64((random.unit() * 2.0 - 1.0) * scale));
        values.flat_map(|value| value.to_le_bytes()).collect()
    };
    let mut tensors = Vec::new();
    for layer in 0..decoder.num_layers {
        for projection in Projection::ALL {
            let (d_in, d_out) = projection_shape(decoder, projection);
            let module = format!(
                "base_model.model.model.layers.{layer}.{}.{}",
                projection.parent(),
                projection.module_name()
            );
            // Small enough that the outputs stay finite, large enough that nothing is zero.
            tensors.push((
                format!("{module}.lora_A.weight"),
                vec![rank, d_in],
                weights(rank * d_in, (d_in as f64).sqrt().recip()),
            ));
            tensors.push((format!("{module}.lora_B.weight"), vec![d_out, rank], weights(d_out * rank, 0.01)));
        }
    }
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((name.as_str(), TensorView::new(Stored::BF16, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    safetensors::serialize_to_file(views, None, &directory.join("adapter_model.safetensors"))?;
    let config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none",
        "target_modules": Projection::ALL.map(Projection::module_name),
    });
    std::fs::write(directory.join("adapter_config.json"), config.to_string())?;
    Ok(())
}

fn projection_shape(decoder: &DecoderConfig, projection: Projection) -> (usize, usize) {
    let (hidden, ffn) = (decoder.hidden_size, decoder.intermediate_size);
    let (q, kv) = (decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim);
    match projection {
        Projection::Q => (hidden, q),
        Projection::K | Projection::V => (hidden, kv),
        Projection::O => (q, hidden),
        Projection::Gate | Projection::Up => (hidden, ffn),
        Projection::Down => (ffn, hidden),
    }
}

/// What one batch took.
struct BatchRun {
    /// From the begin to the last token.
    output_tokens_per_second: f64,
    /// If all began at once.
    split: Option<Split>,
    /// Between the tokens of a sequence, once all decode.
    gaps: Vec<Duration>,
}

/// Before and after the last sequence's first token.
struct Split {
    prefill_tokens_per_second: f64,
    decode_tokens_per_second: f64,
}

async fn run_requests(
    engine: &dyn InferenceEngine,
    args: &BenchArgs,
    leases: Vec<Option<AdapterLease>>,
    at_once: usize,
    vocab_size: usize,
    random: &mut Random,
) -> anyhow::Result<BatchRun> {
    let num_requests = leases.len();
    let requests: Vec<GenerationRequest> = leases
        .into_iter()
        .map(|adapter| GenerationRequest {
            // Another prompt each time, so that nothing comes from a cache.
            prompt_tokens: (0..args.prompt_tokens).map(|_| (random.unit() * vocab_size as f64) as u32).collect(),
            sampling: SamplingParams {
                max_tokens: args.output_tokens as u32,
                temperature: 0.0,
                ignore_eos: true,
                ..SamplingParams::default()
            },
            adapter,
            logprobs: LogprobsParams::default(),
            constraint: None,
            fairness_key: Arc::from(""),
        })
        .collect();
    let start = Instant::now();
    let run = async |request| token_times(engine.submit(request)?).await;
    let times: Vec<_> = futures::stream::iter(requests.into_iter().map(run))
        .buffer_unordered(at_once)
        .try_collect()
        .await?;
    let all_at_once = num_requests <= at_once;
    BatchRun::of(start, &times, all_at_once.then_some(args.prompt_tokens * num_requests))
}

/// When each token of a stream came.
async fn token_times(mut stream: polylora_engine::TokenStream) -> anyhow::Result<Vec<Instant>> {
    let mut times = Vec::new();
    while let Some(event) = stream.next().await {
        match event {
            TokenEvent::Started { .. } => {}
            TokenEvent::Token { .. } => times.push(Instant::now()),
            TokenEvent::Finished { .. } => return Ok(times),
            TokenEvent::Failed(error) => bail!("a request failed: {error}"),
        }
    }
    bail!("a stream ended without an end")
}

impl BatchRun {
    /// `prompt_tokens` of all sequences, if all began at `start`.
    fn of(start: Instant, times: &[Vec<Instant>], prompt_tokens: Option<usize>) -> anyhow::Result<Self> {
        let firsts = times.iter().filter_map(|times| times.first());
        let prefilled = *firsts.max().context("no token came")?;
        let end = *times.iter().flatten().max().expect("there is a first token, so there is a last");
        let decoded = times.iter().flatten().filter(|&&time| time > prefilled).count();
        let gaps = times.iter().flat_map(|times| {
            let pairs = times.windows(2).filter(|pair| prompt_tokens.is_none() || pair[0] >= prefilled);
            pairs.map(|pair| pair[1] - pair[0])
        });
        Ok(Self {
            output_tokens_per_second: times.iter().map(Vec::len).sum::<usize>() as f64 / (end - start).as_secs_f64(),
            split: prompt_tokens.map(|prompt_tokens| Split {
                prefill_tokens_per_second: prompt_tokens as f64 / (prefilled - start).as_secs_f64(),
                decode_tokens_per_second: decoded as f64 / (end - prefilled).as_secs_f64(),
            }),
            gaps: gaps.collect(),
        })
    }
}

/// What was measured.
struct Results {
    device: String,
    dtype: String,
    rows: Vec<Row>,
}

/// One batch size.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Row {
    batch: usize,
    distinct_adapters: usize,
    output_tokens_per_second: f64,
    /// Unless sequences followed one another.
    prefill_tokens_per_second: Option<f64>,
    decode_tokens_per_second: Option<f64>,
    step_ms_median: f64,
    step_ms_p10: f64,
    step_ms_p90: f64,
}

impl Row {
    fn of(batch: usize, distinct_adapters: usize, runs: &[BatchRun]) -> Self {
        let gaps: Vec<f64> = runs.iter().flat_map(|run| &run.gaps).map(|gap| gap.as_secs_f64() * 1e3).collect();
        let median = |of: fn(&BatchRun) -> Option<f64>| {
            let values: Vec<f64> = runs.iter().filter_map(of).collect();
            (!values.is_empty()).then(|| quantile(values, 0.5))
        };
        Self {
            batch,
            distinct_adapters,
            output_tokens_per_second: median(|run| Some(run.output_tokens_per_second)).unwrap_or(0.0),
            prefill_tokens_per_second: median(|run| run.split.as_ref().map(|split| split.prefill_tokens_per_second)),
            decode_tokens_per_second: median(|run| run.split.as_ref().map(|split| split.decode_tokens_per_second)),
            step_ms_median: quantile(gaps.clone(), 0.5),
            step_ms_p10: quantile(gaps.clone(), 0.1),
            step_ms_p90: quantile(gaps, 0.9),
        }
    }
}

/// The value below which a share `q` lies (nearest rank); 0 of nothing.
fn quantile(mut values: Vec<f64>, q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    values.get((q * last as f64).round() as usize).copied().unwrap_or(0.0)
}

impl Results {
    fn table(&self) -> String {
        let mut table = Table::new(&[
            "batch",
            "adapters",
            "output tok/s",
            "prefill tok/s",
            "decode tok/s",
            "step ms median",
            "p10",
            "p90",
        ]);
        let rate = |value: Option<f64>, digits| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"));
        for row in &self.rows {
            table.row([
                row.batch.to_string(),
                row.distinct_adapters.to_string(),
                rate(Some(row.output_tokens_per_second), 1),
                rate(row.prefill_tokens_per_second, 0),
                rate(row.decode_tokens_per_second, 1),
                format!("{:.2}", row.step_ms_median),
                format!("{:.2}", row.step_ms_p10),
                format!("{:.2}", row.step_ms_p90),
            ]);
        }
        format!("{}, {}\n\n{table}", self.device, self.dtype)
    }

    fn json(&self, args: &BenchArgs) -> Value {
        let name = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "device": self.device,
            "dtype": self.dtype,
            "model": args.model_path.as_ref().map_or_else(|| name(&args.shape), |path| path.display().to_string()),
            "prompt_tokens": args.prompt_tokens,
            "output_tokens": args.output_tokens,
            "num_requests": args.num_requests,
            "workload": name(&args.workload),
            "lora_ranks": args.lora_rank,
            "base_rows": args.base_rows,
            "repeat": args.repeat,
            "seed": args.seed,
            "results": self.rows.iter().map(|row| json!({
                "batch": row.batch,
                "distinct_adapters": row.distinct_adapters,
                "output_tokens_per_second": row.output_tokens_per_second,
                "prefill_tokens_per_second": row.prefill_tokens_per_second,
                "decode_tokens_per_second": row.decode_tokens_per_second,
                "step_ms": {"median": row.step_ms_median, "p10": row.step_ms_p10, "p90": row.step_ms_p90},
            })).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assigned(workload: Workload, rows: usize, base_rows: usize, num_adapters: usize) -> Vec<Option<usize>> {
        workload.assign(rows, base_rows, num_adapters, &mut Random(7))
    }

    #[test]
    fn workloads_assign_as_they_say() {
        assert_eq!(assigned(Workload::Distinct, 4, 1, 3), [Some(0), Some(1), Some(2), None]);
        assert_eq!(assigned(Workload::Distinct, 3, 0, 2), [Some(0), Some(1), Some(0)]);
        assert_eq!(assigned(Workload::Identical, 2, 0, 5), [Some(0), Some(0)]);
        assert_eq!(assigned(Workload::None, 2, 0, 5), [None, None]);
        assert_eq!(assigned(Workload::Distinct, 2, 9, 5), [None, None]);
        let share_of_first = |workload| {
            let rows = assigned(workload, 10_000, 0, 10);
            rows.iter().filter(|&&adapter| adapter == Some(0)).count() as f64 / 10_000.0
        };
        assert!((share_of_first(Workload::Uniform) - 0.1).abs() < 0.02);
        // 1 / (1 + 1/2 + … + 1/10)
        assert!((share_of_first(Workload::Zipf) - 0.341).abs() < 0.02);
    }

    #[test]
    fn prefill_and_decode_are_told_apart() {
        let start = Instant::now();
        let at = |millis: u64| start + Duration::from_millis(millis);
        // The second sequence has its first token at 100 ms; the first one's second token comes with it.
        let times = [vec![at(50), at(100), at(110), at(120)], vec![at(100), at(110), at(120)]];
        let run = BatchRun::of(start, &times, Some(40)).unwrap();
        let split = run.split.unwrap();
        assert!((split.prefill_tokens_per_second - 400.0).abs() < 1e-6);
        assert!((split.decode_tokens_per_second - 200.0).abs() < 1e-6);
        assert!((run.output_tokens_per_second - 7.0 / 0.12).abs() < 1e-6);
        assert_eq!(run.gaps, vec![Duration::from_millis(10); 4]);
        // Sequences that follow one another have no such border.
        let run = BatchRun::of(start, &times, None).unwrap();
        assert!(run.split.is_none());
        assert_eq!(run.gaps.len(), 5);
    }

    #[test]
    fn quantiles() {
        let values = vec![5.0, 1.0, 3.0, 2.0, 4.0];
        assert_eq!([0.0, 0.5, 0.9, 1.0].map(|q| quantile(values.clone(), q)), [1.0, 3.0, 5.0, 5.0]);
        assert_eq!(quantile(Vec::new(), 0.5), 0.0);
    }

    #[test]
    fn every_shape_is_one_that_the_decoder_knows() {
        for shape in Shape::value_variants() {
            let config = serde_json::to_vec(&shape.config_json()).unwrap();
            DecoderConfig::from_json(&config, None).unwrap();
        }
    }
}
