//! Steps of the CUDA backend on the shape of Llama-3.1-8B, random weights and adapters, against the floor of memory bandwidth.
//!
//! `cargo bench -p polylora-engine --features cuda --bench cuda [-- decode|prefill [BATCH:ADAPTERS]...]`
//!
//! Decode: prompts of 128 random tokens, then 128 greedy steps, each launched while the one before it runs, as the engine does. A step's time
//! is that from one collected output to the next; median, p10 and p90 are printed, and the floor: weights, distinct adapters and the KV of an
//! average context of 192, read once at 3.02 TB/s (a copy on an H100 80GB HBM3).

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use polylora_engine::{
    adapter::{AlignedBytes, HostAdapter, HostMemory, ModuleId, PackedDtype, PackedModule, Projection, VersionId},
    backend::{
        Backend, Launched,
        cuda::{CudaBackend, CudaOptions},
    },
    batch::{AdapterHandle, CarriedToken, ChooseToken, LoraSegment, SampleRow, SequenceRows, StepBatch},
    decoder::DecoderConfig,
    request::{RequestId, SamplingParams},
};

const BYTES_PER_SECOND: f64 = 3.02e12;
const PROMPT: usize = 128;
const OUTPUT: usize = 128;
const BLOCK_SIZE: usize = 16;

fn llama_8b() -> DecoderConfig {
    let json = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
        "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": false
    });
    DecoderConfig::from_json(json.to_string().as_bytes(), None).expect("a valid configuration")
}

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let filter = arguments.next().unwrap_or_default();
    let only: Vec<(usize, usize)> = arguments
        .map(|row| {
            let (batch, adapters) = row.split_once(':').expect("rows are named BATCH:ADAPTERS");
            (batch.parse().expect("a number"), adapters.parse().expect("a number"))
        })
        .collect();
    let config = llama_8b();
    let options = CudaOptions {
        block_size: BLOCK_SIZE,
        max_batch_tokens: 2048,
        max_context: 8192,
        adapter_bytes: 24 << 30,
        max_adapters_per_batch: 256,
        ..CudaOptions::default()
    };
    let started = Instant::now();
    let mut backend = CudaBackend::random(&config, 1, &options).expect("this bench needs a CUDA device of 80 GB");
    // Room for all adapters at once: no scheduler moves the border here.
    let num_blocks = backend.capacity().min_blocks;
    backend.set_kv_blocks(num_blocks, &[]).expect("the device works");
    println!(
        "{}; {:.2} GB of weights, {} KV blocks; ready in {:.2} s",
        backend.device_name(),
        backend.weight_bytes() as f64 / 1e9,
        num_blocks,
        started.elapsed().as_secs_f64()
    );
    let mut bench = Bench {
        backend,
        config,
        hosts: Vec::new(),
    };
    if "decode".contains(&filter) {
        bench.decode(&only);
    }
    if "prefill".contains(&filter) {
        bench.prefill();
    }
}

struct Bench {
    backend: CudaBackend,
    config: DecoderConfig,
    /// Those of the last row that had some.
    hosts: Vec<Arc<HostAdapter>>,
}

/// One line of a table.
struct Row {
    batch: usize,
    /// Ranks of the distinct adapters; row `i` runs under adapter `i % len`.
    ranks: Vec<usize>,
    /// Scales on every output.
    dora: bool,
}

impl Bench {
    fn decode(&mut self, only: &[(usize, usize)]) {
        println!("decode: batch, adapters: ms a step (p10, p90), floor, share; host time of a launch");
        let same = |batch: usize, adapters: usize, rank: usize| Row {
            batch,
            ranks: vec![rank; adapters],
            dora: false,
        };
        let mut rows: Vec<Row> = [
            (1, 0),
            (1, 1),
            (8, 8),
            (32, 0),
            (32, 1),
            (32, 32),
            (64, 0),
            (64, 1),
            (64, 64),
            (128, 0),
            (128, 8),
            (128, 64),
            (256, 0),
            (256, 8),
            (256, 64),
        ]
        .map(|(batch, adapters)| same(batch, adapters, 16))
        .into();
        rows.push(same(32, 32, 64));
        rows.push(Row {
            batch: 32,
            ranks: (0..32).map(|adapter| [8, 16, 32, 64][adapter % 4]).collect(),
            dora: false,
        });
        rows.extend([(1, 1), (64, 1), (64, 64)].map(|(batch, adapters)| Row {
            dora: true,
            ..same(batch, adapters, 16)
        }));
        rows.retain(|row| only.is_empty() || only.contains(&(row.batch, row.ranks.len())));
        for row in rows {
            let handles = self.upload(&row.ranks, row.dora);
            let times = self.decode_steps(row.batch, &handles);
            let adapter_bytes: usize = row.ranks.iter().map(|&rank| adapter_bytes(&self.config, rank)).sum();
            let context = PROMPT + OUTPUT / 2;
            let kv_bytes = row.batch * context * 2 * self.config.num_layers * self.config.kv_size() * 2;
            let floor = (self.backend.weight_bytes() + adapter_bytes + kv_bytes) as f64 / BYTES_PER_SECOND * 1e3;
            let [median, p10, p90] = quantiles(times.steps);
            let [launch, ..] = quantiles(times.launches);
            let mut ranks = row.ranks.clone();
            ranks.dedup();
            println!(
                "  {:4} {:4} rank {ranks:?}{}: {median:.3} ({p10:.3}, {p90:.3}), floor {floor:.2}, {:.0} %; launch {:.0} us; first {:.1} ms",
                row.batch,
                row.ranks.len(),
                if row.dora { ", DoRA" } else { "" },
                floor / median * 100.0,
                launch * 1e3,
                times.first
            );
            self.free(handles);
        }
    }

    /// Chunks of 2048 rows, one sequence each, back to back.
    fn prefill(&mut self) {
        println!("prefill: 2048 rows in one chunk");
        for (adapters, rank, sequences) in [(0, 16, 1), (1, 16, 1), (8, 16, 8), (8, 64, 8)] {
            let handles = self.upload(&vec![rank; adapters], false);
            let rows = 2048 / sequences;
            let mut last = Instant::now();
            let mut times = Vec::new();
            for round in 0..8 {
                let mut batch = StepBatch::default();
                for sequence in 0..sequences {
                    let adapter = (!handles.is_empty()).then(|| handles[sequence % handles.len()]);
                    let tokens: Vec<u32> = (0..rows)
                        .map(|position| random_token(&self.config, round * 99 + sequence, position))
                        .collect();
                    push_rows(&mut batch, sequence, &tokens, 0, rows.div_ceil(BLOCK_SIZE), adapter, Some(0));
                }
                assert!(matches!(self.backend.launch(&batch).expect("a step"), Launched::Running));
                if round > 0 {
                    self.backend.collect().expect("a step");
                    times.push(last.elapsed());
                    last = Instant::now();
                }
            }
            self.backend.collect().expect("a step");
            let [median, p10, p90] = quantiles(times.split_off(2));
            println!("  {sequences} sequences of {rows} rows, {adapters} adapters of rank {rank}: {median:.2} ms ({p10:.2}, {p90:.2})");
            self.free(handles);
        }
    }

    fn upload(&mut self, ranks: &[usize], dora: bool) -> Vec<AdapterHandle> {
        if ranks.is_empty() {
            return Vec::new();
        }
        let config = &self.config;
        let memory = self.backend.host_memory();
        let memory = memory.as_deref();
        let hosts: Vec<Arc<HostAdapter>> = std::thread::scope(|scope| {
            let made: Vec<_> = (ranks.iter().enumerate())
                .map(|(seed, &rank)| scope.spawn(move || Arc::new(random_adapter(config, memory, rank, dora, seed as u64))))
                .collect();
            made.into_iter().map(|host| host.join().expect("an adapter")).collect()
        });
        // Unlocked and locked by another thread: not beside the steps that are timed.
        self.hosts.clear();
        while memory.is_some() && hosts.iter().any(|host| !host.blob.is_locked()) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let started = Instant::now();
        let bytes: usize = hosts.iter().map(|host| host.bytes()).sum();
        let handles: Vec<AdapterHandle> = hosts.iter().map(|host| self.backend.begin_upload(host).expect("room")).collect();
        for &handle in &handles {
            while !self.backend.poll_upload(handle).expect("an upload") {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        println!(
            "  (uploaded {} adapters, {:.2} GB, at {:.1} GB/s)",
            handles.len(),
            bytes as f64 / 1e9,
            bytes as f64 / seconds / 1e9
        );
        self.hosts = hosts;
        handles
    }

    fn free(&mut self, handles: Vec<AdapterHandle>) {
        handles.into_iter().for_each(|handle| self.backend.free_adapter(handle));
    }

    fn decode_steps(&mut self, batch: usize, adapters: &[AdapterHandle]) -> Times {
        let blocks = (PROMPT + OUTPUT).div_ceil(BLOCK_SIZE);
        // Rows of one adapter are neighbours.
        let adapter_of = |row: usize| (!adapters.is_empty()).then(|| adapters[row * adapters.len() / batch.max(adapters.len())]);
        let started = Instant::now();
        for first in (0..batch).step_by(2048 / PROMPT) {
            let mut step = StepBatch::default();
            for sequence in first..batch.min(first + 2048 / PROMPT) {
                let tokens: Vec<u32> = (0..PROMPT).map(|position| random_token(&self.config, sequence, position)).collect();
                push_rows(&mut step, sequence, &tokens, 0, blocks, adapter_of(sequence), Some(0));
            }
            self.backend.execute(&step).expect("a prefill step");
        }
        let first = started.elapsed().as_secs_f64() * 1e3;
        let mut times = Times {
            steps: Vec::new(),
            launches: Vec::new(),
            first,
        };
        let mut last = Instant::now();
        for position in PROMPT..PROMPT + OUTPUT {
            let mut step = StepBatch::default();
            for sequence in 0..batch {
                let token = [random_token(&self.config, sequence, 7)];
                let output_position = (position - PROMPT) as u32 + 1;
                push_rows(&mut step, sequence, &token, position, blocks, adapter_of(sequence), Some(output_position));
            }
            if position > PROMPT {
                let carried = |row| CarriedToken { row, sample_idx: row };
                step.carried_tokens = (0..batch as u32).map(carried).collect();
            }
            let launched = Instant::now();
            assert!(matches!(self.backend.launch(&step).expect("a step"), Launched::Running));
            times.launches.push(launched.elapsed());
            if position > PROMPT {
                self.backend.collect().expect("a step");
                times.steps.push(last.elapsed());
                last = Instant::now();
            }
        }
        self.backend.collect().expect("a step");
        // The first steps capture a graph.
        times.steps.drain(..8);
        times.launches.drain(..8);
        times
    }
}

struct Times {
    steps: Vec<Duration>,
    launches: Vec<Duration>,
    /// Milliseconds of all prompts.
    first: f64,
}

/// Appends a sequence's rows from `position` on; its blocks are its own.
fn push_rows(
    batch: &mut StepBatch,
    sequence: usize,
    tokens: &[u32],
    position: usize,
    blocks: usize,
    adapter: Option<AdapterHandle>,
    choose: Option<u32>,
) {
    let row_start = batch.token_ids.len() as u32;
    let table: Vec<u32> = (0..blocks).map(|block| (sequence * blocks + block) as u32).collect();
    for (offset, &token) in tokens.iter().enumerate() {
        let position = position + offset;
        batch.token_ids.push(token);
        batch.positions.push(position as u32);
        batch
            .kv_slots
            .push(table[position / BLOCK_SIZE] * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32);
    }
    let num_rows = tokens.len() as u32;
    if let Some(output_position) = choose {
        batch.samples.push(SampleRow {
            row: row_start + num_rows - 1,
            request_id: RequestId(sequence as u64),
            choose: Some(ChooseToken {
                params: Arc::new(SamplingParams {
                    temperature: 0.0,
                    ..SamplingParams::default()
                }),
                output_position,
                token_counts: Vec::new(),
                forbidden: Vec::new(),
                mask: None,
                top_k_logprobs: None,
            }),
            prompt_logprob: None,
        });
    }
    batch.sequences.push(SequenceRows {
        request_id: RequestId(sequence as u64),
        row_start,
        num_rows,
        context_len: (position + tokens.len()) as u32,
        block_table: Arc::from(table),
    });
    if let Some(adapter) = adapter {
        match batch.lora_segments.last_mut() {
            Some(last) if last.adapter == adapter => last.num_rows += num_rows,
            _ => batch.lora_segments.push(LoraSegment {
                adapter,
                row_start,
                num_rows,
            }),
        }
    }
}

fn quantiles(mut times: Vec<Duration>) -> [f64; 3] {
    times.sort();
    let at = |tenths: usize| times[(times.len() * tenths / 10).min(times.len() - 1)].as_secs_f64() * 1e3;
    [at(5), at(1), at(9)]
}

fn random_token(config: &DecoderConfig, sequence: usize, position: usize) -> u32 {
    let mixed = (sequence as u64 * 1_000_003 + position as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed >> 33) % config.vocab_size as u64) as u32
}

fn widths(config: &DecoderConfig, projection: Projection) -> (usize, usize) {
    let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
    match projection {
        Projection::Q => (hidden, config.q_size()),
        Projection::K | Projection::V => (hidden, config.kv_size()),
        Projection::O => (config.q_size(), hidden),
        Projection::Gate | Projection::Up => (hidden, ffn),
        Projection::Down => (ffn, hidden),
    }
}

fn adapter_bytes(config: &DecoderConfig, rank: usize) -> usize {
    let of_layer = Projection::ALL.iter().map(|&projection| {
        let (d_in, d_out) = widths(config, projection);
        2 * rank * (d_in + d_out)
    });
    config.num_layers * of_layer.sum::<usize>()
}

/// All seven projections of every layer, packed as `load.rs` packs them: per group of projections the A's, then the B's.
fn random_adapter(config: &DecoderConfig, memory: Option<&dyn HostMemory>, rank: usize, dora: bool, seed: u64) -> HostAdapter {
    use Projection::{Down, Gate, K, O, Q, Up, V};
    let mut modules = Vec::new();
    let mut bytes = 0;
    let mut place = |elements: usize| {
        let offset = bytes;
        bytes = (offset + 2 * elements).next_multiple_of(64);
        offset
    };
    for layer in 0..config.num_layers as u16 {
        for group in [&[Q, K, V][..], &[O], &[Gate, Up], &[Down]] {
            let a: Vec<usize> = group.iter().map(|&projection| place(rank * widths(config, projection).0)).collect();
            for (&projection, a_offset_bytes) in group.iter().zip(a) {
                let (d_in, d_out) = widths(config, projection);
                modules.push(PackedModule {
                    id: ModuleId::Layer { layer, projection },
                    lora_rank: rank as u32,
                    d_in: d_in as u32,
                    d_out: d_out as u32,
                    scaling: 1.0,
                    a_offset_bytes,
                    b_t_offset_bytes: place(rank * d_out),
                    // In f32, each as long as two rows of Bᵀ.
                    output_scale_offset_bytes: dora.then(|| place(2 * d_out)),
                    output_bias_offset_bytes: None,
                });
            }
        }
    }
    let mut blob = AlignedBytes::of_any_content(bytes, memory);
    let values: &mut [u32] = bytemuck::cast_slice_mut(blob.as_bytes_mut());
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for pair in values {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Two bf16 of either sign between 2⁻⁷ and 2⁻⁶.
        *pair = (state as u32 & 0x807f_807f) | 0x3c00_3c00;
    }
    blob.filled();
    modules.sort_by_key(|module| module.id);
    HostAdapter {
        version: VersionId(std::array::from_fn(|byte| (seed >> (8 * (byte % 8))) as u8)),
        dtype: PackedDtype::Bf16,
        modules,
        blob: Arc::new(blob),
        max_lora_rank: rank as u32,
        replaced: Vec::new(),
        token_rows: Vec::new(),
        resized_vocab: None,
        companion: None,
    }
}
