//! The CPU kernels against this machine's memory and arithmetic, on the shapes of SmolLM2-135M.
//!
//! `cargo bench -p polylora-kernels --bench cpu [-- FILTER] [--threads N]`
//!
//! Every case first compares its result with `reference`, then is timed: median, p10 and p90 of repeated runs on random data. The GEMM
//! cases walk all 30 layers' own weights, so that each matrix is as cold as in a decode step. Shares are of what this program measures
//! first: reading memory on all threads, and independent fused multiply-adds in registers.

use std::hint::black_box;
use std::time::{Duration, Instant};

use half::bf16;
use polylora_kernels::cpu::{
    AttentionSequence, AttentionShape, HugeBuffer, LoraElement, LoraJob, PackedMatrix, ThreadPool, WeightDtype, add_rms_norm, gelu_tanh_mul, gemm,
    instruction_set, lora, paged_attention, rms_norm, rope, silu_mul, write_kv,
};
use polylora_kernels::reference;

const HIDDEN: usize = 576;
const FFN: usize = 1536;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const LAYERS: usize = 30;
const VOCAB: usize = 49152;

fn main() {
    let mut filter = String::new();
    let mut num_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--bench" => {}
            "--threads" => num_threads = arguments.next().and_then(|value| value.parse().ok()).expect("--threads N"),
            _ => filter = argument,
        }
    }
    let pool = ThreadPool::new(num_threads);
    println!("{} threads, {}", pool.num_threads(), instruction_set());
    let roof = Roof::measure(&pool);
    println!(
        "roof: reading memory {:.1} GB/s, f32 {:.0} GFLOP/s, bf16 {:.0} GFLOP/s\n",
        roof.gigabytes, roof.f32_gigaflops, roof.bf16_gigaflops
    );
    type Family = (&'static str, fn(&ThreadPool, &Roof));
    let families: [Family; 6] = [
        ("step", bench_step),
        ("pool", bench_pool),
        ("gemm", bench_gemm),
        ("lora", bench_lora),
        ("attention", bench_attention),
        ("elementwise", bench_elementwise),
    ];
    for (name, bench) in families {
        if name.contains(&filter) {
            println!("{name}");
            bench(&pool, &roof);
            println!();
        }
    }
}

/// What the machine can do.
struct Roof {
    gigabytes: f64,
    f32_gigaflops: f64,
    bf16_gigaflops: f64,
}

impl Roof {
    fn measure(pool: &ThreadPool) -> Self {
        const CHUNK: usize = 1 << 16;
        let mut memory = HugeBuffer::<u64>::zeroed(64 << 20);
        memory.fill(1);
        let chunks: Vec<&[u64]> = memory.chunks(CHUNK).collect();
        let reading = time(|| {
            pool.run(chunks.len(), &|idx| {
                black_box(chunks[idx].iter().fold(0_u64, |sum, value| sum ^ value));
            });
        });
        let flops = |kernel: fn() -> f64| {
            let mut flops = 0.0;
            let time = time(|| {
                let per_task = std::sync::Mutex::new(0.0);
                pool.run(pool.num_threads(), &|_| {
                    let done = kernel();
                    *per_task.lock().expect("no task panics") += done;
                });
                flops = per_task.into_inner().expect("no task panics");
            });
            flops / time.p10.as_nanos() as f64
        };
        Self {
            gigabytes: (memory.len() * 8) as f64 / reading.median.as_nanos() as f64,
            f32_gigaflops: flops(peak::f32_multiply_adds),
            bf16_gigaflops: flops(peak::bf16_multiply_adds),
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod peak {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    const ROUNDS: usize = 20_000;

    pub fn f32_multiply_adds() -> f64 {
        #[target_feature(enable = "avx512f")]
        fn avx512() -> f64 {
            let mut sums = [_mm512_set1_ps(1.0); 16];
            let factor = black_box(_mm512_set1_ps(0.999));
            for _ in 0..ROUNDS {
                sums.iter_mut().for_each(|sum| *sum = _mm512_fmadd_ps(*sum, factor, factor));
            }
            black_box(sums);
            (ROUNDS * 16 * 16 * 2) as f64
        }
        #[target_feature(enable = "avx2,fma")]
        fn avx2() -> f64 {
            let mut sums = [_mm256_set1_ps(1.0); 12];
            let factor = black_box(_mm256_set1_ps(0.999));
            for _ in 0..ROUNDS {
                sums.iter_mut().for_each(|sum| *sum = _mm256_fmadd_ps(*sum, factor, factor));
            }
            black_box(sums);
            (ROUNDS * 12 * 8 * 2) as f64
        }
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: detected.
            unsafe { avx512() }
        } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: detected.
            unsafe { avx2() }
        } else {
            f64::NAN
        }
    }

    pub fn bf16_multiply_adds() -> f64 {
        #[target_feature(enable = "avx512f,avx512bf16")]
        fn avx512() -> f64 {
            let mut sums = [_mm512_set1_ps(1.0); 16];
            // SAFETY: both are 64 bytes of any content.
            let factor: __m512bh = unsafe { std::mem::transmute(black_box(_mm512_set1_epi32(0x3f00_3f00))) };
            for _ in 0..ROUNDS {
                sums.iter_mut().for_each(|sum| *sum = _mm512_dpbf16_ps(*sum, factor, factor));
            }
            black_box(sums);
            (ROUNDS * 16 * 32 * 2) as f64
        }
        if is_x86_feature_detected!("avx512bf16") {
            // SAFETY: detected.
            unsafe { avx512() }
        } else {
            f32_multiply_adds()
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod peak {
    pub fn f32_multiply_adds() -> f64 {
        f64::NAN
    }
    pub fn bf16_multiply_adds() -> f64 {
        f64::NAN
    }
}

struct Times {
    median: Duration,
    p10: Duration,
    p90: Duration,
}

/// Repeats `run` for about half a second, after two rounds of warming up.
fn time(mut run: impl FnMut()) -> Times {
    run();
    run();
    let started = Instant::now();
    let mut times = Vec::new();
    while times.len() < 10 || (started.elapsed() < Duration::from_millis(500) && times.len() < 10_000) {
        let start = Instant::now();
        run();
        times.push(start.elapsed());
    }
    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    Times {
        median: at(0.5),
        p10: at(0.1),
        p90: at(0.9),
    }
}

fn report(case: &str, times: &Times, bytes: f64, flops: f64, roof: &Roof, peak: f64) {
    let nanoseconds = times.median.as_nanos() as f64;
    let (gigabytes, gigaflops) = (bytes / nanoseconds, flops / nanoseconds);
    println!(
        "  {case:<44} {:>9.1} µs [{:.1} {:.1}]  {gigabytes:>6.1} GB/s ({:>3.0} %)  {gigaflops:>6.1} GFLOP/s ({:>3.0} %)",
        micros(times.median),
        micros(times.p10),
        micros(times.p90),
        100.0 * gigabytes / roof.gigabytes,
        100.0 * gigaflops / peak,
    );
}

fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1000.0
}

/// `len` values in -1..1, a function of `seed` alone (SplitMix64).
fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn check(case: &str, got: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(got.len(), expected.len(), "{case}");
    for (idx, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!(
            (got - expected).abs() <= tolerance * expected.abs().max(1.0),
            "{case}: element {idx} is {got}, not {expected}"
        );
    }
}

fn bench_pool(pool: &ThreadPool, _roof: &Roof) {
    let sections = time(|| (0..100).for_each(|_| pool.run(pool.num_threads(), &|idx| _ = black_box(idx))));
    println!(
        "  one section of {} empty tasks {:>31.2} µs [{:.2} {:.2}]",
        pool.num_threads(),
        micros(sections.median) / 100.0,
        micros(sections.p10) / 100.0,
        micros(sections.p90) / 100.0
    );
}

/// The weight matrices of one pass, each layer's own.
struct Weights {
    layers: Vec<[PackedMatrix; 4]>,
    head: PackedMatrix,
}

impl Weights {
    const SHAPES: [(usize, usize); 4] = [
        ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
        (HIDDEN, HEADS * HEAD_DIM),
        (2 * FFN, HIDDEN),
        (HIDDEN, FFN),
    ];

    fn new(pool: &ThreadPool, dtype: WeightDtype) -> Self {
        let pack = |n: usize, k: usize, seed: u64| {
            PackedMatrix::pack(pool, n, k, dtype, &|row, out| out.copy_from_slice(&random(k, seed << 32 | row as u64)))
        };
        let layer = |layer: usize| std::array::from_fn(|idx| pack(Self::SHAPES[idx].0, Self::SHAPES[idx].1, (layer * 4 + idx) as u64));
        Self {
            layers: (0..LAYERS).map(layer).collect(),
            head: pack(VOCAB, HIDDEN, 1000),
        }
    }

    fn check(&self, pool: &ThreadPool) {
        for w in &self.layers[LAYERS - 1] {
            let (m, n, k) = (13, w.n(), w.k());
            let mut rows = vec![0.0; n * k];
            rows.chunks_exact_mut(k).enumerate().for_each(|(row, out)| w.unpack_row(row, out));
            // Values that bf16 holds exactly, so that both dtypes compare with one reference.
            let x: Vec<f32> = random(m * k, 7).iter().map(|&value| bf16::from_f32(value).to_f32()).collect();
            let mut y = vec![0.0; m * n];
            gemm(pool, &x, m, w, None, &mut y);
            check("gemm", &y, &reference::gemm(&x, m, &rows, n, k, None), 2e-4);
        }
    }

    fn bytes(&self) -> usize {
        self.layers.iter().flatten().map(PackedMatrix::bytes).sum::<usize>() + self.head.bytes()
    }
}

fn bench_gemm(pool: &ThreadPool, roof: &Roof) {
    for (dtype, peak) in [(WeightDtype::F32, roof.f32_gigaflops), (WeightDtype::Bf16, roof.bf16_gigaflops)] {
        let weights = Weights::new(pool, dtype);
        weights.check(pool);
        for m in [1, 8, 64] {
            let (x, mut y) = (random(m * FFN, 1), vec![0.0; m * VOCAB]);
            // A prefill wants the logits of its last row only.
            let head_rows = if m == 64 { 1 } else { m };
            let times = time(|| {
                for w in weights.layers.iter().flatten() {
                    gemm(pool, &x[..m * w.k()], m, w, None, &mut y[..m * w.n()]);
                }
                gemm(
                    pool,
                    &x[..head_rows * HIDDEN],
                    head_rows,
                    &weights.head,
                    None,
                    &mut y[..head_rows * VOCAB],
                );
            });
            let layer_weights: usize = Weights::SHAPES.iter().map(|(n, k)| n * k).sum();
            let flops = 2 * (LAYERS * layer_weights * m + HIDDEN * VOCAB * head_rows);
            report(
                &format!("{dtype:?}, all GEMMs of a step, {m} rows"),
                &times,
                weights.bytes() as f64,
                flops as f64,
                roof,
                peak,
            );
        }
        let names = ["qkv [960, 576]", "o [576, 576]", "gate_up [3072, 576]", "down [576, 1536]"];
        for m in [1, 2, 4, 8, 16, 64, 512] {
            for (idx, name) in names.iter().enumerate() {
                let (n, k) = Weights::SHAPES[idx];
                let (x, mut y) = (random(m * k, 1), vec![0.0; m * n]);
                let mut layer = 0;
                let times = time(|| {
                    gemm(pool, &x, m, &weights.layers[layer][idx], None, &mut y);
                    layer = (layer + 1) % LAYERS;
                });
                let bytes = weights.layers[0][idx].bytes() as f64;
                report(&format!("{dtype:?} {name}, {m} rows"), &times, bytes, (2 * m * n * k) as f64, roof, peak);
            }
        }
    }
}

/// A decoder's step from the embedded rows to the logits, as the engine calls the kernels: everything but sampling.
struct Decoder {
    weights: Weights,
    norm: Vec<f32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
    shape: AttentionShape,
    kv: Vec<[HugeBuffer<f32>; 2]>,
    normed: Vec<f32>,
    residual: Vec<f32>,
    wide: Vec<f32>,
    narrow: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    logits: Vec<f32>,
}

impl Decoder {
    const BLOCKS_EACH: usize = 8;

    fn new(pool: &ThreadPool, dtype: WeightDtype, max_rows: usize) -> Self {
        let shape = AttentionShape {
            num_heads: HEADS,
            num_kv_heads: KV_HEADS,
            head_dim: HEAD_DIM,
            block_size: 16,
            scale: 0.125,
            window: None,
        };
        let angles = random(128 * HEAD_DIM / 2, 4);
        let cache = || HugeBuffer::zeroed(8 * Self::BLOCKS_EACH * shape.block_len());
        let rows = |width: usize| vec![0.0; max_rows * width];
        Self {
            weights: Weights::new(pool, dtype),
            norm: random(HIDDEN, 5),
            cos: angles.iter().map(|angle| angle.cos()).collect(),
            sin: angles.iter().map(|angle| angle.sin()).collect(),
            shape,
            kv: (0..LAYERS).map(|_| [cache(), cache()]).collect(),
            normed: rows(HIDDEN),
            residual: random(max_rows * HIDDEN, 6),
            wide: rows(2 * FFN),
            narrow: rows(FFN),
            q: rows(HIDDEN),
            k: rows(KV_HEADS * HEAD_DIM),
            v: rows(KV_HEADS * HEAD_DIM),
            logits: vec![0.0; 8 * VOCAB],
        }
    }

    /// `sequences` of `rows` each, the last at position `context_len - 1`.
    fn step(&mut self, pool: &ThreadPool, sequences: usize, rows: usize, context_len: usize) {
        let m = sequences * rows;
        let blocks: Vec<u32> = (0..(8 * Self::BLOCKS_EACH) as u32).collect();
        let tables: Vec<&[u32]> = blocks.chunks(Self::BLOCKS_EACH).collect();
        let positions: Vec<u32> = (0..m).map(|row| (context_len - rows + row % rows) as u32).collect();
        let slot = |(row, position): (usize, &u32)| (row / rows * Self::BLOCKS_EACH * 16) as u32 + position;
        let slots: Vec<u32> = positions.iter().enumerate().map(slot).collect();
        let sequence = |idx: usize| AttentionSequence {
            row_start: idx * rows,
            num_rows: rows,
            context_len,
            block_table: tables[idx],
        };
        let sequences: Vec<AttentionSequence<'_>> = (0..sequences).map(sequence).collect();
        let (kv_width, qkv_width) = (KV_HEADS * HEAD_DIM, HIDDEN + 2 * KV_HEADS * HEAD_DIM);
        let (normed, residual) = (&mut self.normed[..m * HIDDEN], &mut self.residual[..m * HIDDEN]);
        let (cos, sin, shape) = (&self.cos[..], &self.sin[..], &self.shape);
        rms_norm(residual, &self.norm, 1e-5, normed);
        for ([qkv_w, o_w, gate_up_w, down_w], [k_cache, v_cache]) in self.weights.layers.iter().zip(&mut self.kv) {
            let qkv = &mut self.wide[..m * qkv_width];
            gemm(pool, normed, m, qkv_w, None, qkv);
            for (first, width, rotate, out) in [
                (0, HIDDEN, true, &mut self.q),
                (HIDDEN, kv_width, true, &mut self.k),
                (HIDDEN + kv_width, kv_width, false, &mut self.v),
            ] {
                pool.for_rows(&mut out[..m * width], width, 8, |first_row, out| {
                    let rows = qkv[first_row * qkv_width..].chunks_exact(qkv_width);
                    out.chunks_exact_mut(width)
                        .zip(rows)
                        .for_each(|(out, row)| out.copy_from_slice(&row[first..][..width]));
                    if rotate {
                        let positions = &positions[first_row..][..out.len() / width];
                        rope(out, width / HEAD_DIM, HEAD_DIM, positions, cos, sin);
                    }
                });
            }
            write_kv(shape, &self.k[..m * kv_width], &self.v[..m * kv_width], &slots, k_cache, v_cache);
            let out = &mut self.narrow[..m * HIDDEN];
            paged_attention(pool, shape, &self.q[..m * HIDDEN], k_cache, v_cache, &sequences, out);
            gemm(pool, out, m, o_w, None, normed);
            let block_out = &mut self.wide[..m * HIDDEN];
            block_out.copy_from_slice(normed);
            add_rms_norm(residual, block_out, &self.norm, 1e-5, normed);
            let gate_up = &mut self.wide[..m * 2 * FFN];
            gemm(pool, normed, m, gate_up_w, None, gate_up);
            pool.for_rows(&mut self.narrow[..m * FFN], FFN, 8, |first_row, out| {
                silu_mul(&gate_up[first_row * 2 * FFN..][..2 * out.len()], FFN, out);
            });
            let block_out = &mut self.wide[..m * HIDDEN];
            gemm(pool, &self.narrow[..m * FFN], m, down_w, None, block_out);
            add_rms_norm(residual, block_out, &self.norm, 1e-5, normed);
        }
        // A prefill wants the logits of its last row only.
        let head_rows = sequences.len();
        let x = &normed[(m - head_rows) * HIDDEN..];
        gemm(pool, x, head_rows, &self.weights.head, None, &mut self.logits[..head_rows * VOCAB]);
        // Keeps random weights from growing without bound.
        residual.iter_mut().for_each(|value| *value = value.clamp(-1.0, 1.0));
    }
}

fn bench_step(pool: &ThreadPool, roof: &Roof) {
    // Tokens a second of llama.cpp on two cores of an EPYC (Zen 4), for the scale.
    let peers = [(WeightDtype::F32, [57.0, 155.0, 504.0]), (WeightDtype::Bf16, [97.0, 225.0, 978.0])];
    for (dtype, peers) in peers {
        let peak = if dtype == WeightDtype::F32 {
            roof.f32_gigaflops
        } else {
            roof.bf16_gigaflops
        };
        let mut decoder = Decoder::new(pool, dtype, 64);
        for ((sequences, rows), peer) in [(1, 1), (8, 1), (1, 64)].into_iter().zip(peers) {
            let times = time(|| decoder.step(pool, sequences, rows, if rows == 1 { 96 } else { rows }));
            let m = sequences * rows;
            let layer_weights: usize = Weights::SHAPES.iter().map(|(n, k)| n * k).sum();
            let flops = 2 * (LAYERS * layer_weights * m + HIDDEN * VOCAB * sequences);
            report(
                &format!("{dtype:?}, whole step, {sequences} x {rows} rows"),
                &times,
                decoder.weights.bytes() as f64,
                flops as f64,
                roof,
                peak,
            );
            let tokens = |time: Duration| m as f64 / time.as_secs_f64();
            let (median, best) = (tokens(times.median), tokens(times.p10));
            println!("  {:<44} {median:>9.1} tokens/s [{best:.1} in the best tenth]; llama.cpp: {peer}", "");
        }
    }
}

fn bench_lora(pool: &ThreadPool, roof: &Roof) {
    let mixed = [4, 8, 16, 32, 64, 128, 256];
    bench_lora_case(pool, roof, "f32, 7 adapters of rank 4..256, 1 row each", &mixed, 1, |value| value);
    bench_lora_case(pool, roof, "bf16, 7 adapters of rank 4..256, 1 row each", &mixed, 1, bf16::from_f32);
    bench_lora_case(pool, roof, "f32, 64 adapters of rank 4, 1 row each", &[4; 64], 1, |value| value);
    bench_lora_case(pool, roof, "bf16, 64 adapters of rank 16, 1 row each", &[16; 64], 1, bf16::from_f32);
    bench_lora_case(pool, roof, "f32, 1 adapter of rank 16, 1 row", &[16], 1, |value| value);
    bench_lora_case(pool, roof, "f32, 1 adapter of rank 64, 64 rows", &[64], 64, |value| value);
    bench_lora_case(pool, roof, "bf16, 1 adapter of rank 64, 64 rows", &[64], 64, bf16::from_f32);
    bench_lora_case(pool, roof, "f32, 4 adapters of rank 16, 128 rows each", &[16; 4], 128, |value| value);
}

/// q, k, v of all layers in turn, so that adapters are as cold as in a step.
fn bench_lora_case<T>(pool: &ThreadPool, roof: &Roof, case: &str, ranks: &[usize], rows_each: usize, convert: impl Fn(f32) -> T)
where
    T: LoraElement + bytemuck::Pod,
    f32: From<T>,
{
    let d_outs = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM];
    let y_stride: usize = d_outs.iter().sum();
    let m = ranks.len() * rows_each;
    let x = random(m * HIDDEN, 1);
    let weights_per_layer: usize = ranks.iter().map(|rank| rank * (3 * HIDDEN + y_stride)).sum();
    let mut weights = HugeBuffer::<T>::zeroed(LAYERS * weights_per_layer);
    weights
        .iter_mut()
        .zip(random(LAYERS * weights_per_layer, 2))
        .for_each(|(weight, value)| *weight = convert(value));
    let mut rest = &weights[..];
    let mut take = |len: usize| rest.split_off(..len).expect("as many as were counted");
    let mut layers: Vec<Vec<LoraJob<'_, T>>> = Vec::new();
    for _ in 0..LAYERS {
        let mut jobs = Vec::new();
        for (idx, &lora_rank) in ranks.iter().enumerate() {
            let mut y_offset = 0;
            for d_out in d_outs {
                jobs.push(LoraJob {
                    row_start: idx * rows_each,
                    num_rows: rows_each,
                    a: take(lora_rank * HIDDEN),
                    b_t: take(lora_rank * d_out),
                    lora_rank,
                    d_out,
                    y_offset,
                    scaling: 0.01,
                });
                y_offset += d_out;
            }
        }
        layers.push(jobs);
    }
    let mut scratch = Vec::new();
    let mut y = vec![0.0; m * y_stride];
    lora(pool, &x, HIDDEN, &layers[0], &mut y, y_stride, &mut scratch);
    let mut expected = vec![0.0; m * y_stride];
    let widen = |values: &[T]| values.iter().map(|&value| f32::from(value)).collect::<Vec<f32>>();
    for job in &layers[0] {
        let v = reference::lora_shrink(
            &x[job.row_start * HIDDEN..][..job.num_rows * HIDDEN],
            HIDDEN,
            &widen(job.a),
            job.lora_rank,
        );
        let b_t = widen(job.b_t);
        let mut b = Vec::with_capacity(b_t.len());
        (0..job.d_out).for_each(|column| b.extend(b_t.iter().skip(column).step_by(job.d_out)));
        let rows = &mut expected[job.row_start * y_stride..][..job.num_rows * y_stride];
        reference::lora_expand(&v, job.lora_rank, &b, job.d_out, job.scaling, rows, y_stride, job.y_offset);
    }
    check(case, &y, &expected, 1e-4);
    let mut layer = 0;
    let times = time(|| {
        lora(pool, &x, HIDDEN, &layers[layer], &mut y, y_stride, &mut scratch);
        layer = (layer + 1) % LAYERS;
    });
    let flops = 2 * weights_per_layer * rows_each;
    report(
        case,
        &times,
        (weights_per_layer * size_of::<T>()) as f64,
        flops as f64,
        roof,
        roof.f32_gigaflops,
    );
}

fn bench_attention(pool: &ThreadPool, roof: &Roof) {
    let small = AttentionShape {
        num_heads: HEADS,
        num_kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        block_size: 16,
        scale: 0.125,
        window: None,
    };
    let large = AttentionShape {
        num_heads: 32,
        num_kv_heads: 8,
        head_dim: 128,
        block_size: 16,
        scale: 0.088,
        window: None,
    };
    bench_attention_case(pool, roof, "9/3 heads of 64, 1 row at 128", small, &[(1, 128)]);
    bench_attention_case(pool, roof, "9/3 heads of 64, 8 rows at 128", small, &[(1, 128); 8]);
    bench_attention_case(pool, roof, "9/3 heads of 64, 1 row at 4096", small, &[(1, 4096)]);
    bench_attention_case(pool, roof, "9/3 heads of 64, 8 rows at 2048", small, &[(1, 2048); 8]);
    bench_attention_case(pool, roof, "9/3 heads of 64, chunk of 64 at 64", small, &[(64, 64)]);
    bench_attention_case(pool, roof, "9/3 heads of 64, chunk of 512 at 512", small, &[(512, 512)]);
    bench_attention_case(pool, roof, "9/3 heads of 64, chunk of 512 at 4096", small, &[(512, 4096)]);
    bench_attention_case(pool, roof, "32/8 heads of 128, 8 rows at 2048", large, &[(1, 2048); 8]);
    bench_attention_case(pool, roof, "32/8 heads of 128, chunk of 512 at 512", large, &[(512, 512)]);
}

fn bench_attention_case(pool: &ThreadPool, roof: &Roof, case: &str, shape: AttentionShape, sequences: &[(usize, usize)]) {
    let kv_len = shape.num_kv_heads * shape.head_dim;
    let row_len = shape.num_heads * shape.head_dim;
    let num_blocks: usize = sequences.iter().map(|(_, context)| context.div_ceil(shape.block_size)).sum();
    let (mut k_cache, mut v_cache) = (vec![0.0; num_blocks * shape.block_len()], vec![0.0; num_blocks * shape.block_len()]);
    let mut tables: Vec<Vec<u32>> = Vec::new();
    let mut next_block = 0;
    let mut first_kv = None;
    for (idx, &(_, context)) in sequences.iter().enumerate() {
        let (k, v) = (random(context * kv_len, idx as u64), random(context * kv_len, 1000 + idx as u64));
        let first_slot = next_block * shape.block_size;
        let slots: Vec<u32> = (0..context).map(|position| (first_slot + position) as u32).collect();
        write_kv(&shape, &k, &v, &slots, &mut k_cache, &mut v_cache);
        let end_block = next_block + context.div_ceil(shape.block_size);
        tables.push((next_block as u32..end_block as u32).collect());
        next_block = end_block;
        first_kv.get_or_insert((k, v));
    }
    let num_rows: usize = sequences.iter().map(|(rows, _)| rows).sum();
    let (q, mut out) = (random(num_rows * row_len, 3), vec![0.0; num_rows * row_len]);
    let mut row_start = 0;
    let mut attention_sequences = Vec::new();
    for (&(num_rows, context_len), block_table) in sequences.iter().zip(&tables) {
        attention_sequences.push(AttentionSequence {
            row_start,
            num_rows,
            context_len,
            block_table,
        });
        row_start += num_rows;
    }
    let run = |out: &mut [f32]| paged_attention(pool, &shape, &q, &k_cache, &v_cache, &attention_sequences, out);
    run(&mut out);
    let (k, v) = first_kv.expect("a sequence");
    // The last rows of the first sequence: the reference is slow.
    let checked = sequences[0].0.min(4);
    let end = sequences[0].0 * row_len;
    let rows = end - checked * row_len..end;
    let expected = reference::attention(
        &q[rows.clone()],
        &k,
        &v,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.scale,
        None,
    );
    check(case, &out[rows], &expected, 1e-4);
    let times = time(|| run(&mut out));
    let visible: usize = sequences
        .iter()
        .map(|(rows, context)| (context - rows + 1..=*context).sum::<usize>())
        .sum();
    let positions: usize = sequences.iter().map(|(_, context)| context).sum();
    report(
        case,
        &times,
        (positions * kv_len * 8) as f64,
        (4 * visible * row_len) as f64,
        roof,
        roof.f32_gigaflops,
    );
}

fn bench_elementwise(_pool: &ThreadPool, roof: &Roof) {
    let m = 64;
    let (x, weight) = (random(m * HIDDEN, 1), random(HIDDEN, 2));
    let mut out = vec![0.0; m * HIDDEN];
    let case = |name: &str, times: &Times, elements: usize, bytes: usize| {
        report(
            &format!("{name}, {m} rows, one thread"),
            times,
            bytes as f64,
            f64::NAN,
            roof,
            roof.f32_gigaflops,
        );
        println!("  {:<44} {:>9.2} elements/ns", "", elements as f64 / times.median.as_nanos() as f64);
    };
    rms_norm(&x, &weight, 1e-5, &mut out);
    check("rms_norm", &out, &reference::rms_norm(&x, &weight, 1e-5), 1e-5);
    case(
        "rms_norm [576]",
        &time(|| rms_norm(&x, &weight, 1e-5, black_box(&mut out))),
        x.len(),
        x.len() * 8,
    );
    let mut residual = random(m * HIDDEN, 3);
    case(
        "add_rms_norm [576]",
        &time(|| add_rms_norm(&mut residual, &x, &weight, 1e-5, black_box(&mut out))),
        x.len(),
        x.len() * 16,
    );

    let positions: Vec<u32> = (0..m as u32).collect();
    let angles: Vec<f32> = random(m * HEAD_DIM / 2, 4).iter().map(|angle| angle * 3.0).collect();
    let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|angle| (angle.cos(), angle.sin())).unzip();
    let mut q = random(m * HEADS * HEAD_DIM, 5);
    let expected = reference::rope(&q, HEADS, HEAD_DIM, &positions, &cos, &sin);
    rope(&mut q, HEADS, HEAD_DIM, &positions, &cos, &sin);
    check("rope", &q, &expected, 1e-5);
    case(
        "rope 9 heads of 64",
        &time(|| rope(black_box(&mut q), HEADS, HEAD_DIM, &positions, &cos, &sin)),
        m * HIDDEN,
        m * HIDDEN * 8,
    );

    let gate_up = random(m * 2 * FFN, 6);
    let mut out = vec![0.0; m * FFN];
    gelu_tanh_mul(&gate_up, FFN, &mut out);
    check("gelu_tanh_mul", &out, &reference::gelu_tanh_mul(&gate_up, FFN), 1e-5);
    case(
        "gelu_tanh_mul [1536]",
        &time(|| gelu_tanh_mul(&gate_up, FFN, black_box(&mut out))),
        m * FFN,
        m * FFN * 12,
    );
    silu_mul(&gate_up, FFN, &mut out);
    check("silu_mul", &out, &reference::silu_mul(&gate_up, FFN), 1e-5);
    case(
        "silu_mul [1536]",
        &time(|| silu_mul(&gate_up, FFN, black_box(&mut out))),
        m * FFN,
        m * FFN * 12,
    );
}
