//! The CUDA kernels on the shapes of Llama-3.1-8B, each against the roof that its header names.
//!
//! `cargo bench -p polylora-kernels --features cuda --bench cuda [-- FILTER]`
//!
//! What is timed are graphs of all 32 layers, each with its own weights, cache and adapters: every byte is as cold as in a decode step.
//! Median, p10 and p90 of repeated replays on random data; correctness is `tests/cuda`'s. Shares are of a copy and of a large GEMM, measured
//! first by this program.

use std::sync::Arc;

use bytemuck::{Pod, bytes_of};
use half::bf16;
use polylora_kernels::cuda::{
    CudaError, Device, DeviceBuffer, Event, Kernels, Stream, View,
    activation::Gate,
    attention_decode::{AttentionDecode, AttentionDecodeArgs},
    attention_prefill::{AttentionPrefill, AttentionPrefillArgs, PrefillTile},
    embedding::{EmbeddingAdapter, EmbeddingArgs},
    gemm::{Gemm, GemmArgs, GemmOutput},
    lora::{ExpandInto, ItemRows, Lora, LoraDescriptor, LoraItem, LoraItems, RANK_TILE, ShrinkInput, Shrunk},
    lora_output::{LoraOutput, OutputInto, OutputTerms},
    own_logits::{LogitsCopy, MAX_ITEM_ROWS, TokenRowsItem},
    rms_norm::RmsNormArgs,
    rope_kv::{HeadShape, RopeKvArgs},
    sampling::{MAX_TOP, SampleEdit, SampleParams, SampleResult, SamplingArgs, flags},
};

const HIDDEN: usize = 4096;
const FFN: usize = 14336;
const LAYERS: usize = 32;
const VOCAB: usize = 128_256;
const SHAPE: HeadShape = HeadShape {
    num_heads: 32,
    num_kv_heads: 8,
    head_dim: 128,
    block_size: 16,
    block_stride: LAYERS * 2 * 8 * 16 * 128,
};

/// A group of projections that share their input.
struct Group {
    name: &'static str,
    d_in: usize,
    d_out: &'static [usize],
    f32_output: bool,
}

const GROUPS: [Group; 4] = [
    Group {
        name: "qkv",
        d_in: HIDDEN,
        d_out: &[4096, 1024, 1024],
        f32_output: false,
    },
    Group {
        name: "o",
        d_in: 4096,
        d_out: &[HIDDEN],
        f32_output: true,
    },
    Group {
        name: "gate_up",
        d_in: HIDDEN,
        d_out: &[FFN, FFN],
        f32_output: false,
    },
    Group {
        name: "down",
        d_in: FFN,
        d_out: &[HIDDEN],
        f32_output: true,
    },
];

impl Group {
    fn width(&self) -> usize {
        self.d_out.iter().sum()
    }
}

/// Input and outputs of a group's GEMM over `m` rows.
struct GroupBuffers {
    m: usize,
    x: DeviceBuffer<bf16>,
    y16: DeviceBuffer<bf16>,
    y32: DeviceBuffer<f32>,
}

impl GroupBuffers {
    fn args<'a>(&'a self, group: &Group, w: View<'a, bf16>) -> GemmArgs<'a> {
        GemmArgs {
            x: self.x.view(),
            w,
            bias: None,
            y: match group.f32_output {
                true => GemmOutput::AddF32(self.y32.view()),
                false => GemmOutput::Bf16(self.y16.view()),
            },
            m: self.m,
            n: group.width(),
            k: group.d_in,
        }
    }
}

/// K and V of a layer in a cache whose blocks have all layers, as the engine's.
fn layer_kv(cache: &DeviceBuffer<bf16>, layer: usize) -> [View<'_, bf16>; 2] {
    [0, 1].map(|kv| cache.view().slice((2 * layer + kv) * SHAPE.block_len()..cache.len()))
}

struct Bench {
    device: Arc<Device>,
    stream: Stream,
    kernels: Kernels,
    copy_bytes_per_second: f64,
}

fn main() {
    let filter = std::env::args().skip(1).find(|argument| argument != "--bench").unwrap_or_default();
    let device = Device::open(0).expect("this bench needs a CUDA device");
    let stream = Stream::new(&device).expect("a stream");
    let kernels = Kernels::load(&device).expect("the kernels load");
    let mut bench = Bench {
        device,
        stream,
        kernels,
        copy_bytes_per_second: 0.0,
    };
    bench.copy_bytes_per_second = bench.copy_roof();
    println!("{}, copy {:.2} TB/s", bench.device.info().name, bench.copy_bytes_per_second / 1e12);
    type Family = (&'static str, fn(&Bench));
    let families: [Family; 11] = [
        ("embedding", Bench::embedding),
        ("gemm", Bench::gemm),
        ("cuts", Bench::gemm_cuts),
        ("lora", Bench::lora),
        ("outputs", Bench::lora_output),
        ("decode", Bench::attention_decode),
        ("prefill", Bench::attention_prefill),
        ("elementwise", Bench::elementwise),
        ("sampling", Bench::sampling),
        ("own tokens", Bench::own_logits),
        ("fill", Bench::random_fill),
    ];
    for (name, run) in families {
        if name.contains(&filter) {
            println!("{name}");
            run(&bench);
        }
    }
}

impl Bench {
    fn random(&self, len: usize, seed: u64, half_width: f32) -> DeviceBuffer<bf16> {
        let buffer = DeviceBuffer::uninit(&self.device, len).expect("memory");
        self.kernels
            .random_fill
            .launch(&self.stream, buffer.view(), seed, 0.0, half_width)
            .expect("fill");
        buffer
    }

    fn zeros<T: Pod>(&self, len: usize) -> DeviceBuffer<T> {
        DeviceBuffer::zeroed(&self.stream, len).expect("memory")
    }

    /// Milliseconds of one replay of what `enqueue` puts on the stream: median, p10, p90.
    fn time(&self, enqueue: impl FnMut() -> Result<(), CudaError>) -> [f64; 3] {
        self.time_repeats(30, enqueue)
    }

    fn time_repeats(&self, repeats: usize, enqueue: impl FnMut() -> Result<(), CudaError>) -> [f64; 3] {
        let graph = self.stream.capture(enqueue).expect("capture");
        let events: Vec<Event> = (0..=repeats).map(|_| Event::new(&self.device, true).expect("event")).collect();
        for _ in 0..3 {
            self.stream.launch_graph(&graph).expect("launch");
        }
        for event in &events {
            event.record(&self.stream).expect("record");
            self.stream.launch_graph(&graph).expect("launch");
        }
        self.stream.synchronize().expect("no kernel fails");
        let mut times: Vec<f64> = events
            .windows(2)
            .map(|pair| f64::from(pair[1].milliseconds_since(&pair[0]).expect("done")))
            .collect();
        times.sort_by(f64::total_cmp);
        [times[times.len() / 2], times[times.len() / 10], times[times.len() * 9 / 10]]
    }

    fn copy_roof(&self) -> f64 {
        let len = 1usize << 30;
        let (from, to) = (self.random(len, 1, 1.0), self.zeros::<bf16>(len));
        let [ms, ..] = self.time_repeats(10, || self.stream.copy_on_device(to.view(), from.view()));
        4.0 * len as f64 / (ms / 1e3)
    }

    /// A line: time, bytes moved, share of the copy roof.
    fn report(&self, what: &str, [ms, p10, p90]: [f64; 3], bytes: f64) {
        let floor = bytes / self.copy_bytes_per_second * 1e3;
        println!(
            "  {what:<44} {ms:8.4} ms (p10 {p10:.4}, p90 {p90:.4})  {:7.1} MB  {:6.0} GB/s  {:5.1} % of copy",
            bytes / 1e6,
            bytes / ms / 1e6,
            floor / ms * 100.0
        );
    }

    /// Weights of a group, each layer's own.
    fn weights(&self, group: &Group) -> Vec<DeviceBuffer<bf16>> {
        let weight = |layer| self.random(group.width() * group.d_in, layer as u64, 0.02);
        (0..LAYERS).map(weight).collect()
    }

    fn group_buffers(&self, group: &Group, m: usize) -> GroupBuffers {
        GroupBuffers {
            m,
            x: self.random(m * group.d_in, 5, 1.0),
            y16: self.zeros(m * group.width()),
            y32: self.zeros(m * group.width()),
        }
    }

    /// The own kernels' cuts of each shape, the fastest of them, beside cuBLASLt's first choice.
    fn gemm_cuts(&self) {
        for group in &GROUPS {
            let weights = self.weights(group);
            let views: Vec<View<'_, bf16>> = weights.iter().map(DeviceBuffer::view).collect();
            let (k, n) = (group.d_in, group.width());
            for m in [64, 128, 256] {
                let mut gemm = Gemm::new(&self.device).expect("cuBLASLt");
                let buffers = self.group_buffers(group, m);
                let args = |w| buffers.args(group, w);
                let bytes = (LAYERS * (n * k + m * k + m * n) * 2) as f64;
                gemm.launch(&self.stream, &args(views[0])).expect("cuBLASLt");
                let times = self.time_repeats(3, || views.iter().try_for_each(|w| gemm.launch(&self.stream, &args(*w))));
                self.report(&format!("{} m={m}, cuBLASLt's first", group.name), times, bytes);
                self.cuts(&gemm, &args, &views, bytes);
                if group.name == "gate_up" {
                    let activated = self.zeros::<bf16>(m * FFN);
                    let times = self.time_repeats(3, || {
                        views.iter().try_for_each(|w| {
                            gemm.launch(&self.stream, &args(*w))?;
                            let activation = &self.kernels.activation;
                            activation.launch(&self.stream, Gate::Silu, buffers.y16.view(), activated.view(), m, FFN)
                        })
                    });
                    let bytes = (LAYERS * (n * k + m * k + m * FFN) * 2) as f64;
                    self.report(&format!("gate_up and activation m={m}, cuBLASLt's first"), times, bytes);
                    let gated = |w| GemmArgs {
                        y: GemmOutput::Gated(activated.view(), Gate::Silu),
                        ..args(w)
                    };
                    self.cuts(&gemm, &gated, &views, bytes);
                }
            }
        }
    }

    fn cuts<'a>(&self, gemm: &Gemm, args: &impl Fn(View<'a, bf16>) -> GemmArgs<'a>, weights: &[View<'a, bf16>], bytes: f64) {
        const SHOWN: usize = 6;
        let mut cuts: Vec<_> = gemm
            .own_candidates(&args(weights[0]))
            .into_iter()
            .map(|own| {
                gemm.launch_own(&self.stream, &args(weights[0]), own).expect("an own kernel");
                let times = self.time_repeats(3, || weights.iter().try_for_each(|w| gemm.launch_own(&self.stream, &args(*w), own)));
                (times, own)
            })
            .collect();
        cuts.sort_by(|(a, _), (b, _)| a[0].total_cmp(&b[0]));
        println!("    {} cuts", cuts.len());
        for (times, own) in cuts.into_iter().take(SHOWN) {
            self.report(&format!("{own:?}").replace("num_", ""), times, bytes);
        }
    }

    /// cuBLASLt with tuned algorithms, every layer's own weights: what the engine can hope for.
    fn gemm(&self) {
        let weights: Vec<Vec<DeviceBuffer<bf16>>> = GROUPS.iter().map(|group| self.weights(group)).collect();
        let head = self.random(VOCAB * HIDDEN, 99, 0.02);
        for m in [1, 8, 32, 64, 128, 256, 2048] {
            let mut gemm = Gemm::new(&self.device).expect("cuBLASLt");
            let mut total = 0.0;
            for (group, weights) in GROUPS.iter().zip(&weights) {
                let (k, n) = (group.d_in, group.width());
                let buffers = self.group_buffers(group, m);
                let args = |w| buffers.args(group, w);
                let views: Vec<View<'_, bf16>> = weights.iter().map(DeviceBuffer::view).collect();
                gemm.tune(&self.stream, &args(views[0]), &views, || Ok(())).expect("tune");
                let times = self.time_repeats(10, || views.iter().try_for_each(|w| gemm.launch(&self.stream, &args(*w))));
                total += times[0];
                let bytes = (LAYERS * (n * k + m * k + m * n) * 2) as f64;
                let flops = (LAYERS * 2 * m * n * k) as f64;
                self.report(&format!("{} m={m} ({:.0} TFLOP/s)", group.name, flops / times[0] / 1e9), times, bytes);
                if let Some(own) = gemm.chosen(&args(views[0])) {
                    println!("    by {own:?}");
                }
            }
            let x = self.random(m.min(256) * HIDDEN, 5, 1.0);
            let rows = m.min(256);
            let y = self.zeros::<f32>(rows * VOCAB);
            let args = GemmArgs {
                x: x.view(),
                w: head.view(),
                bias: None,
                y: GemmOutput::F32(y.view()),
                m: rows,
                n: VOCAB,
                k: HIDDEN,
            };
            gemm.tune(&self.stream, &args, &[head.view()], || Ok(())).expect("tune");
            let times = self.time_repeats(10, || gemm.launch(&self.stream, &args));
            total += times[0];
            self.report(&format!("lm_head m={rows}"), times, (VOCAB * HIDDEN * 2 + rows * VOCAB * 4) as f64);
            if let Some(own) = gemm.chosen(&args) {
                println!("    by {own:?}");
            }
            println!("  all GEMMs of a step, m={m}: {total:.3} ms");
        }
    }

    fn lora(&self) {
        self.lora_case("64 rows, an adapter each", 64, 64, 16, ItemRows::UpTo8);
        self.lora_case("64 rows sharing one", 64, 1, 16, ItemRows::UpTo8);
        self.lora_case("1 row", 1, 1, 16, ItemRows::UpTo8);
        self.lora_case("8 rows, an adapter each", 8, 8, 16, ItemRows::UpTo8);
        self.lora_case("256 rows over 64", 256, 64, 16, ItemRows::UpTo8);
        self.lora_case("256 rows over 8", 256, 8, 16, ItemRows::UpTo8);
        self.lora_case("32 rows, an adapter each, rank 64", 32, 32, 64, ItemRows::UpTo8);
        self.lora_case("2048 prefill rows over 8", 2048, 8, 16, ItemRows::UpTo64);
        self.lora_case("2048 prefill rows over 8, rank 64", 2048, 8, 64, ItemRows::UpTo64);
        self.lora_case("64 rows, an adapter each, naive", 64, 64, 16, ItemRows::Naive);
    }

    /// Scales on the outputs of every projection, an adapter each; o and down with the rows set aside and brought back.
    fn lora_output(&self) {
        for rows in [1, 64] {
            for group in &GROUPS {
                let adapters: Vec<(DeviceBuffer<f32>, DeviceBuffer<OutputTerms>)> = (0..rows)
                    .map(|_| {
                        let scale = self.stream.upload(&vec![1.25f32; group.width()]).expect("memory");
                        let mut terms = OutputTerms::default();
                        let mut address = scale.view().address();
                        for (slice, d_out) in group.d_out.iter().enumerate() {
                            terms.scale[slice] = address;
                            address += 4 * *d_out as u64;
                        }
                        (scale, self.stream.upload(&[terms]).expect("memory"))
                    })
                    .collect();
                let item = |(row, (_, terms)): (usize, &(_, DeviceBuffer<OutputTerms>))| LoraItem {
                    descriptors: terms.view().address(),
                    row_start: row as u32,
                    num_rows: 1,
                    rank_tile: 0,
                };
                let items: Vec<LoraItem> = adapters.iter().enumerate().map(item).collect();
                let (items, counts) = (
                    self.stream.upload(&items).expect("memory"),
                    self.stream.upload(&[rows as u32]).expect("memory"),
                );
                let work = LoraItems {
                    items: items.view(),
                    num_items: counts.view(),
                    rows: ItemRows::UpTo64,
                    descriptor_offset: 0,
                    grid: ((rows * LoraOutput::column_tiles(group.d_out)) as u32).min(16 * self.device.num_multiprocessors()),
                };
                let y16 = self.random(rows * group.width(), 1, 1.0);
                let (y32, saved) = (self.zeros::<f32>(rows * HIDDEN), self.zeros::<f32>(rows * HIDDEN));
                let kernels = &self.kernels.lora_output;
                let times = self.time(|| {
                    (0..LAYERS).try_for_each(|_| {
                        if !group.f32_output {
                            return kernels.launch(&self.stream, work, OutputInto::Bf16(y16.view()), group.d_out);
                        }
                        let (y, saved) = (y32.view(), saved.view());
                        kernels.launch_set_aside(&self.stream, work, y, saved, HIDDEN)?;
                        kernels.launch(&self.stream, work, OutputInto::Residual { y, saved }, group.d_out)
                    })
                });
                let y_bytes = if group.f32_output { 24 } else { 4 };
                self.report(
                    &format!("{} {rows} rows x {LAYERS}", group.name),
                    times,
                    (LAYERS * rows * group.width() * (4 + y_bytes)) as f64,
                );
            }
        }
    }

    fn lora_case(&self, what: &str, rows: usize, num_adapters: usize, rank: usize, variant: ItemRows) {
        // Adapters as an engine has them: one block of memory each, with a table of descriptors per layer and group.
        let table_len = LAYERS * GROUPS.len();
        let len: usize = GROUPS
            .iter()
            .map(|group| LAYERS * rank * (group.d_out.len() * group.d_in + group.width()))
            .sum();
        let adapters: Vec<(DeviceBuffer<bf16>, DeviceBuffer<LoraDescriptor>)> = (0..num_adapters)
            .map(|adapter| {
                let weights = self.random(len, adapter as u64, 0.05);
                let mut table = vec![LoraDescriptor::default(); table_len];
                let mut address = weights.view().address();
                for (index, descriptor) in table.iter_mut().enumerate() {
                    let group = &GROUPS[index % GROUPS.len()];
                    descriptor.a = address;
                    address += (group.d_out.len() * rank * group.d_in * 2) as u64;
                    for (slice, d_out) in group.d_out.iter().enumerate() {
                        descriptor.b_t[slice] = address;
                        descriptor.lora_rank[slice] = rank as u16;
                        descriptor.scaling[slice] = 1.0;
                        address += (rank * d_out * 2) as u64;
                    }
                    descriptor.rank_total = (group.d_out.len() * rank) as u16;
                }
                (weights, self.stream.upload(&table).expect("memory"))
            })
            .collect();
        let segment = rows / num_adapters;
        let tile = variant.max_rows().min(segment);
        let expand_items: Vec<LoraItem> = (0..rows)
            .step_by(tile)
            .map(|row| LoraItem {
                descriptors: adapters[row / segment].1.view().address(),
                row_start: row as u32,
                num_rows: tile.min(segment - row % segment) as u16,
                rank_tile: 0,
            })
            .collect();
        let expand = self.stream.upload(&expand_items).expect("memory");
        let num_expand = self.stream.upload(&[expand_items.len() as u32]).expect("memory");
        let shrinks: Vec<(DeviceBuffer<LoraItem>, DeviceBuffer<u32>, usize)> = GROUPS
            .iter()
            .map(|group| {
                let tiles = (group.d_out.len() * rank).div_ceil(RANK_TILE);
                let items: Vec<LoraItem> = expand_items
                    .iter()
                    .flat_map(|item| {
                        (0..tiles).map(|rank_tile| LoraItem {
                            rank_tile: rank_tile as u16,
                            ..*item
                        })
                    })
                    .collect();
                (
                    self.stream.upload(&items).expect("memory"),
                    self.stream.upload(&[items.len() as u32]).expect("memory"),
                    items.len(),
                )
            })
            .collect();
        let v_stride = 3 * rank;
        let (v, partial) = (self.zeros::<bf16>(rows * v_stride), self.zeros::<f32>(14 * rows * v_stride));
        let counters = self.zeros::<u32>(rows * v_stride / RANK_TILE);
        let xs: Vec<DeviceBuffer<bf16>> = GROUPS.iter().map(|group| self.random(rows * group.d_in, 3, 1.0)).collect();
        let y16 = self.zeros::<bf16>(rows * 2 * FFN);
        let y32 = self.zeros::<f32>(rows * HIDDEN);
        let max_splits = if variant == ItemRows::UpTo64 { 8 } else { 14 };
        let one = |group_idx: usize, layer: usize, shrink: bool, widen: bool| -> Result<(), CudaError> {
            let group = &GROUPS[group_idx];
            let shrunk = Shrunk {
                v: v.view(),
                partial: partial.view(),
                counters: counters.view(),
                num_splits: Lora::num_splits(group.d_in, max_splits),
                rows,
                v_stride,
            };
            let descriptor_offset = ((layer * GROUPS.len() + group_idx) * 64) as u32;
            let most = 16 * self.device.num_multiprocessors();
            if shrink {
                let (items, num_items, count) = &shrinks[group_idx];
                let grid = ((count * shrunk.num_splits) as u32).min(most);
                let work = LoraItems {
                    items: items.view(),
                    num_items: num_items.view(),
                    rows: variant,
                    descriptor_offset,
                    grid,
                };
                let input = ShrinkInput {
                    x: xs[group_idx].view(),
                    d_in: group.d_in,
                    is_ready: false,
                };
                self.kernels.lora.launch_shrink(&self.stream, work, input, shrunk)?;
            }
            if widen {
                let grid = ((expand_items.len() * Lora::column_tiles(group.d_out)) as u32).min(most);
                let work = LoraItems {
                    items: expand.view(),
                    num_items: num_expand.view(),
                    rows: variant,
                    descriptor_offset,
                    grid,
                };
                let y = if group.f32_output {
                    ExpandInto::F32(y32.view())
                } else {
                    ExpandInto::Bf16(y16.view())
                };
                self.kernels.lora.launch_expand(&self.stream, work, shrunk, y, group.d_out)?;
            }
            Ok(())
        };
        let bytes_of_group = |group: &Group, shrink: bool, widen: bool| {
            let weights = num_adapters * rank * 2;
            let y_bytes = if group.f32_output { 8 } else { 4 };
            let shrink_bytes = weights * group.d_out.len() * group.d_in + rows * group.d_in * 2;
            let expand_bytes = weights * group.width() + rows * group.width() * y_bytes;
            (LAYERS * (usize::from(shrink) * shrink_bytes + usize::from(widen) * expand_bytes)) as f64
        };
        println!("  {what}");
        let repeats = if variant == ItemRows::Naive { 3 } else { 30 };
        for (group_idx, group) in GROUPS.iter().enumerate() {
            for (name, shrink, widen) in [("shrink", true, false), ("expand", false, true)] {
                let times = self.time_repeats(repeats, || (0..LAYERS).try_for_each(|layer| one(group_idx, layer, shrink, widen)));
                self.report(
                    &format!("  {name} {} x {LAYERS}", group.name),
                    times,
                    bytes_of_group(group, shrink, widen),
                );
                if variant == ItemRows::UpTo64 {
                    let weights: Vec<View<'_, bf16>> = adapters.iter().map(|(weights, _)| weights.view()).collect();
                    let by_segments = self.gemm_of_segments(group, shrink, segment, rank, &weights, xs[group_idx].view());
                    println!(
                        "    cuBLASLt, a GEMM a segment: {by_segments:.4} ms, {:.0} % of its rate",
                        by_segments / times[0] * 100.0
                    );
                }
            }
        }
        if variant != ItemRows::Naive {
            let activated = self.zeros::<bf16>(rows * FFN);
            let times = self.time_repeats(repeats, || {
                (0..LAYERS).try_for_each(|layer| {
                    let work = LoraItems {
                        items: expand.view(),
                        num_items: num_expand.view(),
                        rows: variant,
                        descriptor_offset: ((layer * GROUPS.len() + 2) * 64) as u32,
                        grid: ((expand_items.len() * Lora::gated_column_tiles(FFN)) as u32).min(16 * self.device.num_multiprocessors()),
                    };
                    let shrunk = Shrunk {
                        v: v.view(),
                        partial: partial.view(),
                        counters: counters.view(),
                        num_splits: Lora::num_splits(HIDDEN, max_splits),
                        rows,
                        v_stride,
                    };
                    let buffers = (y16.view(), activated.view());
                    self.kernels
                        .lora
                        .launch_expand_gated(&self.stream, work, shrunk, Gate::Silu, buffers, FFN)
                })
            });
            let bytes = LAYERS * (num_adapters * rank * 2 * 2 * FFN + rows * 3 * FFN * 2);
            self.report(&format!("  expand gate_up and activation x {LAYERS}"), times, bytes as f64);
        }
        let times = self.time_repeats(repeats, || {
            (0..LAYERS).try_for_each(|layer| (0..GROUPS.len()).try_for_each(|group| one(group, layer, true, true)))
        });
        self.report(
            "  all of a step",
            times,
            GROUPS.iter().map(|group| bytes_of_group(group, true, true)).sum(),
        );
        let _ = bytes_of(&expand_items[0]);
    }

    /// Milliseconds of cuBLASLt for a group's shrinks or expands in all layers, each segment and each slice a GEMM of its own.
    fn gemm_of_segments(&self, group: &Group, shrink: bool, segment: usize, rank: usize, adapters: &[View<'_, bf16>], x: View<'_, bf16>) -> f64 {
        let mut gemm = Gemm::new(&self.device).expect("cuBLASLt");
        let (y16, y32) = (self.zeros::<bf16>(segment * group.width()), self.zeros::<f32>(segment * group.width()));
        // Of the same sizes as the adapters' own; their places do not matter.
        let layer_len = adapters[0].len() / LAYERS;
        let args = |adapter: usize, layer: usize, slice: usize| {
            let (n, k) = if shrink {
                (rank * group.d_out.len(), group.d_in)
            } else {
                (group.d_out[slice], rank)
            };
            let y = match group.f32_output && !shrink {
                true => GemmOutput::AddF32(y32.view()),
                false => GemmOutput::Bf16(y16.view()),
            };
            let w = adapters[adapter].slice(layer * layer_len..adapters[adapter].len());
            let x = x.slice(adapter * segment * k..x.len());
            GemmArgs {
                x,
                w,
                bias: None,
                y,
                m: segment,
                n,
                k,
            }
        };
        let slices = if shrink { 1 } else { group.d_out.len() };
        for slice in 0..slices {
            let first = args(0, 0, slice);
            let weights: Vec<View<'_, bf16>> = (0..LAYERS).map(|layer| args(0, layer, slice).w).collect();
            gemm.tune(&self.stream, &first, &weights, || Ok(())).expect("tune");
        }
        let all = (0..LAYERS).flat_map(|layer| (0..adapters.len()).flat_map(move |adapter| (0..slices).map(move |slice| (adapter, layer, slice))));
        self.time_repeats(5, || {
            all.clone()
                .try_for_each(|(adapter, layer, slice)| gemm.launch(&self.stream, &args(adapter, layer, slice)))
        })[0]
    }

    fn attention_decode(&self) {
        for (rows, context) in [
            (1, 192),
            (8, 192),
            (32, 192),
            (64, 192),
            (128, 192),
            (256, 192),
            (1, 8192),
            (16, 4096),
            (64, 1024),
            (32, 2048),
        ] {
            let blocks = context / 16;
            let num_blocks = rows * blocks;
            let cache = self.random(num_blocks * SHAPE.block_stride, 1, 1.0);
            let q = self.random(rows * SHAPE.qkv_width(), 7, 0.1);
            let out = self.zeros::<bf16>(rows * HIDDEN);
            // Blocks of one sequence lie apart, as in use.
            let tables: Vec<u32> = (0..rows)
                .flat_map(|row| (0..blocks).map(move |block| (block * rows + row) as u32))
                .collect();
            let tables = self.stream.upload(&tables).expect("memory");
            let starts = self
                .stream
                .upload(&(0..rows).map(|row| (row * blocks) as u32).collect::<Vec<_>>())
                .expect("memory");
            let lens = self.stream.upload(&vec![context as u32; rows]).expect("memory");
            let max_splits = AttentionDecode::splits_for(&SHAPE, rows, self.device.num_multiprocessors());
            let partial = self.zeros::<f32>(AttentionDecode::partial_len(&SHAPE, rows, max_splits));
            let counters = self.zeros::<u32>(rows * SHAPE.num_kv_heads);
            let times = self.time(|| {
                (0..LAYERS).try_for_each(|layer| {
                    let [k_cache, v_cache] = layer_kv(&cache, layer);
                    let args = AttentionDecodeArgs {
                        shape: SHAPE,
                        out: out.view(),
                        q: q.view(),
                        q_stride: SHAPE.qkv_width(),
                        k_cache,
                        v_cache,
                        rows: None,
                        context_lens: lens.view(),
                        block_table_starts: starts.view(),
                        block_tables: tables.view(),
                        partial: partial.view(),
                        counters: counters.view(),
                        sequences: rows,
                        max_splits,
                        window: None,
                        scale: 0.088,
                    };
                    self.kernels.attention_decode.launch(&self.stream, &args)
                })
            });
            let bytes = (LAYERS * rows * context * SHAPE.num_kv_heads * 128 * 4) as f64;
            self.report(&format!("{rows} rows, context {context}, {max_splits} splits, x {LAYERS}"), times, bytes);
        }
    }

    fn attention_prefill(&self) {
        for (sequences, chunk) in [(1, 2048), (8, 256), (1, 8192)] {
            let rows = sequences * chunk;
            let blocks = chunk / 16;
            let cache = self.random(sequences * blocks * SHAPE.block_stride, 1, 1.0);
            let [k_cache, v_cache] = layer_kv(&cache, 0);
            let q = self.random(rows * SHAPE.qkv_width(), 7, 0.1);
            let out = self.zeros::<bf16>(rows * HIDDEN);
            let tables = self.stream.upload(&(0..(sequences * blocks) as u32).collect::<Vec<_>>()).expect("memory");
            let tile_rows = AttentionPrefill::tile_rows(&SHAPE);
            let tiles: Vec<PrefillTile> = (0..rows)
                .step_by(tile_rows)
                .map(|row| PrefillTile {
                    row_start: row as u32,
                    num_rows: tile_rows as u32,
                    position: (row % chunk) as u32,
                    block_table_start: (row / chunk * blocks) as u32,
                })
                .collect();
            let tiles = self.stream.upload(&tiles).expect("memory");
            let layers = 8;
            let times = self.time(|| {
                (0..layers).try_for_each(|_| {
                    let args = AttentionPrefillArgs {
                        shape: SHAPE,
                        out: out.view(),
                        q: q.view(),
                        q_stride: SHAPE.qkv_width(),
                        k_cache,
                        v_cache,
                        tiles: tiles.view(),
                        block_tables: tables.view(),
                        window: None,
                        scale: 0.088,
                    };
                    self.kernels.attention_prefill.launch(&self.stream, &args)
                })
            });
            let flops = layers as f64 * sequences as f64 * 2.0 * 4096.0 * (chunk * (chunk + 1)) as f64;
            println!(
                "  {sequences} x {chunk} rows: {:.4} ms a layer, {:.0} TFLOP/s, {:.2} ms for {LAYERS} layers",
                times[0] / f64::from(layers),
                flops / times[0] / 1e9,
                times[0] / f64::from(layers) * LAYERS as f64
            );
        }
    }

    /// Rows of the table, of the base model alone, and each under an adapter of its own with a delta of rank 16.
    fn embedding(&self) {
        const RANK: usize = 16;
        let table = self.random(VOCAB * HIDDEN, 1, 1.0);
        for rows in [1, 64, 256, 2048] {
            // Far apart, so that no two are neighbours in memory.
            let sources: Vec<u32> = (0..rows).map(|row| (row * 7919 % VOCAB) as u32).collect();
            let sources = self.stream.upload(&sources).expect("memory");
            let (chosen, out) = (self.zeros::<u32>(1), self.zeros::<f32>(rows * HIDDEN));
            let num_adapters = rows.min(64);
            let (a, b_t) = (
                self.random(num_adapters * VOCAB * RANK, 2, 1.0),
                self.random(num_adapters * RANK * HIDDEN, 3, 1.0),
            );
            let adapter = |index: usize| EmbeddingAdapter {
                a: a.view().address() + (index * VOCAB * RANK * 2) as u64,
                b_t: b_t.view().address() + (index * RANK * HIDDEN * 2) as u64,
                lora_rank: RANK as u32,
                scaling: 1.0,
                vocab: VOCAB as u32,
                ..EmbeddingAdapter::default()
            };
            let adapters = self.stream.upload(&(0..num_adapters).map(adapter).collect::<Vec<_>>()).expect("memory");
            let address = |row: usize| adapters.view().address() + (row % num_adapters * size_of::<EmbeddingAdapter>()) as u64;
            for (name, addresses, bytes) in [
                ("base", vec![0; rows], 6),
                ("rank 16", (0..rows).map(address).collect::<Vec<u64>>(), 6 + 2 * RANK),
            ] {
                let addresses = self.stream.upload(&addresses).expect("memory");
                let args = EmbeddingArgs {
                    out: out.view(),
                    table: table.view(),
                    token_sources: sources.view(),
                    chosen: chosen.view(),
                    adapters: addresses.view(),
                    rows,
                    hidden: HIDDEN,
                };
                let times = self.time(|| self.kernels.embedding.launch(&self.stream, &args));
                self.report(&format!("{name}, {rows} rows"), times, (rows * HIDDEN * bytes) as f64);
            }
        }
    }

    fn random_fill(&self) {
        let out = self.zeros::<bf16>(1 << 28);
        let times = self.time(|| self.kernels.random_fill.launch(&self.stream, out.view(), 1, 0.0, 1.0));
        self.report("512 MiB", times, (out.len() * 2) as f64);
    }

    fn elementwise(&self) {
        for rows in [1, 64, 256, 2048] {
            let residual = self.zeros::<f32>(rows * HIDDEN);
            let weight = self.random(HIDDEN, 1, 1.0);
            let (x, y) = (self.random(rows * HIDDEN, 1, 1.0), self.zeros::<bf16>(rows * HIDDEN));
            // Every other row is sampled, as of prompts of two tokens.
            let gathered: Vec<u32> = (0..rows as u32).step_by(2).collect();
            let gather = self.stream.upload(&gathered).expect("memory");
            let args = RmsNormArgs {
                residual: residual.view(),
                x: None,
                weight: weight.view(),
                y: y.view(),
                gather: Some(gather.view()),
                rows: gathered.len(),
                eps: 1e-5,
            };
            let times = self.time(|| (0..LAYERS).try_for_each(|_| self.kernels.rms_norm.launch(&self.stream, &args)));
            let what = format!("rms_norm of {} rows of {rows} x {LAYERS}", gathered.len());
            self.report(&what, times, (LAYERS * gathered.len() * HIDDEN * 6) as f64);
            for (name, with_x) in [("rms_norm", false), ("add_rms_norm", true)] {
                let args = RmsNormArgs {
                    residual: residual.view(),
                    x: with_x.then(|| x.view()),
                    weight: weight.view(),
                    y: y.view(),
                    gather: None,
                    rows,
                    eps: 1e-5,
                };
                let times = self.time(|| (0..LAYERS).try_for_each(|_| self.kernels.rms_norm.launch(&self.stream, &args)));
                self.report(
                    &format!("{name} {rows} rows x {LAYERS}"),
                    times,
                    (LAYERS * rows * HIDDEN * if with_x { 12 } else { 6 }) as f64,
                );
            }
            let gate_up = self.random(rows * 2 * FFN, 1, 1.0);
            let act = self.zeros::<bf16>(rows * FFN);
            for (name, gate) in [("silu_mul", Gate::Silu), ("gelu_tanh_mul", Gate::GeluTanh)] {
                let activation = &self.kernels.activation;
                let times = self.time(|| (0..LAYERS).try_for_each(|_| activation.launch(&self.stream, gate, gate_up.view(), act.view(), rows, FFN)));
                self.report(&format!("{name} {rows} rows x {LAYERS}"), times, (LAYERS * rows * FFN * 6) as f64);
            }
            let qkv = self.random(rows * SHAPE.qkv_width(), 1, 1.0);
            let cache = self.zeros::<bf16>(rows.div_ceil(16) * SHAPE.block_stride);
            let [k_cache, v_cache] = layer_kv(&cache, 0);
            let positions = self.stream.upload(&(0..rows as u32).collect::<Vec<_>>()).expect("memory");
            let cos_sin = self.stream.upload(&vec![[0.6f32, 0.8]; 2048 * 64]).expect("memory");
            let norms = [2, 3].map(|seed| self.random(SHAPE.head_dim, seed, 1.0));
            for (name, with_norms) in [("rope_kv", false), ("norm_rope_kv", true)] {
                let args = RopeKvArgs {
                    shape: SHAPE,
                    qkv: qkv.view(),
                    positions: positions.view(),
                    kv_slots: positions.view(),
                    cos_sin: cos_sin.view(),
                    qk_norm: with_norms.then(|| (norms[0].view(), norms[1].view())),
                    k_cache,
                    v_cache,
                    rows,
                    eps: 1e-5,
                };
                let times = self.time(|| (0..LAYERS).try_for_each(|_| self.kernels.rope_kv.launch(&self.stream, &args)));
                self.report(
                    &format!("{name} {rows} rows x {LAYERS}"),
                    times,
                    (LAYERS * rows * 128 * 2 * (2 * 32 + 4 * 8)) as f64,
                );
            }
        }
    }

    fn sampling(&self) {
        const EDITS: usize = 256;
        let greedy = SampleParams {
            flags: flags::CHOOSE,
            top_p: 1.0,
            repetition_penalty: 1.0,
            ..SampleParams::default()
        };
        let plain = SampleParams {
            temperature: 0.8,
            u: 0.5,
            ..greedy
        };
        let cases = [
            ("greedy", greedy),
            ("temperature", plain),
            ("top-k 50", SampleParams { top_k: 50, ..plain }),
            (
                "top-k 50, top-p 0.9",
                SampleParams {
                    top_k: 50,
                    top_p: 0.9,
                    ..plain
                },
            ),
            ("top-p 0.9", SampleParams { top_p: 0.9, ..plain }),
            ("min-p 0.05", SampleParams { min_p: 0.05, ..plain }),
            (
                "penalties and biases of 256 tokens",
                SampleParams {
                    repetition_penalty: 1.1,
                    frequency_penalty: 0.5,
                    presence_penalty: 0.5,
                    num_edits: EDITS as u32,
                    ..plain
                },
            ),
            (
                "mask of every other token",
                SampleParams {
                    flags: flags::CHOOSE | flags::MASKED,
                    ..plain
                },
            ),
            (
                "greedy, 20 log-probabilities",
                SampleParams {
                    flags: flags::CHOOSE | flags::OUTPUT_LOGPROB,
                    num_top: 20,
                    ..greedy
                },
            ),
        ];
        for rows in [1, 64, 256] {
            // Peaked, as a model's logits are: a few large ones over a broad floor.
            let mut state = 1u64;
            let host: Vec<f32> = (0..rows * VOCAB)
                .map(|i| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let x = (state >> 40) as f32 / (1u64 << 24) as f32;
                    x * 4.0 + if i % 997 == 0 { 12.0 * x } else { 0.0 }
                })
                .collect();
            let logits = self.stream.upload(&host).expect("memory");
            let results = self.zeros::<SampleResult>(rows);
            // Each row has edits of its own: the kernel keeps what it changes in them.
            let edit = |index: usize| SampleEdit {
                token: (index % EDITS * 499) as u32,
                counts: flags::EDIT_SEEN | 2,
                bias: 0.5,
                saved: 0.0,
            };
            let edits = self.stream.upload(&(0..rows * EDITS).map(edit).collect::<Vec<_>>()).expect("memory");
            let masks = self.stream.upload(&vec![0x5555_5555u32; VOCAB / 32]).expect("memory");
            let (chosen, top_ids, top_logprobs) = (
                self.zeros::<u32>(rows),
                self.zeros::<u32>(rows * MAX_TOP),
                self.zeros::<f32>(rows * MAX_TOP),
            );
            for (name, params) in cases {
                let row = |row: usize| SampleParams {
                    slot: row as u32,
                    edits_start: (row * EDITS) as u32,
                    vocab: VOCAB as u32,
                    logits_start: (row * VOCAB) as u64,
                    ..params
                };
                let params: Vec<SampleParams> = (0..rows).map(row).collect();
                let params = self.stream.upload(&params).expect("memory");
                let args = SamplingArgs {
                    logits: logits.view(),
                    params: params.view(),
                    edits: edits.view(),
                    masks: masks.view(),
                    results: results.view(),
                    top_ids: top_ids.view(),
                    top_logprobs: top_logprobs.view(),
                    chosen: chosen.view(),
                    rows,
                };
                let times = self.time(|| self.kernels.sampling.launch(&self.stream, &args));
                self.report(&format!("{name}, {rows} rows"), times, (rows * VOCAB * 4) as f64);
            }
        }
    }

    /// Rows whose adapters, each its own, add tokens: the base model's logits moved, and those of the adapter's rows.
    fn own_logits(&self) {
        let kernels = &self.kernels.own_logits;
        for rows in [1, 8, 64] {
            let width = VOCAB + 64;
            let own_start = rows * VOCAB;
            let logits = self.zeros::<f32>(own_start + rows * width);
            let copies: Vec<LogitsCopy> = (0..rows)
                .map(|row| LogitsCopy {
                    from: (row * VOCAB) as u64,
                    to: (own_start + row * width) as u64,
                    len: VOCAB as u32,
                    reserved: 0,
                })
                .collect();
            let copies = self.stream.upload(&copies).expect("memory");
            let times = self.time(|| kernels.launch_copy(&self.stream, logits.view(), copies.view(), VOCAB));
            self.report(&format!("copy, {rows} rows"), times, (rows * VOCAB * 8) as f64);
            let x = self.random(rows * HIDDEN, 1, 1.0);
            for (adapters, num_tokens) in [(rows, 4), (rows, 64), (1, 16384)] {
                let weights = self.random(adapters * num_tokens * HIDDEN, 2, 1.0);
                let ids = self.stream.upload(&(0..num_tokens as u32).collect::<Vec<_>>()).expect("memory");
                let rows_of_each = rows / adapters;
                let item = |adapter: usize, first: usize| TokenRowsItem {
                    rows: weights.view().address() + (adapter * num_tokens * HIDDEN * 2) as u64,
                    token_ids: ids.view().address(),
                    y_start: (own_start + (adapter * rows_of_each + first) * width) as u64,
                    y_stride: width as u32,
                    num_tokens: num_tokens as u32,
                    row_start: (adapter * rows_of_each + first) as u32,
                    num_rows: MAX_ITEM_ROWS.min(rows_of_each - first) as u32,
                };
                let items: Vec<TokenRowsItem> = (0..adapters)
                    .flat_map(|adapter| (0..rows_of_each).step_by(MAX_ITEM_ROWS).map(move |first| (adapter, first)))
                    .map(|(adapter, first)| item(adapter, first))
                    .collect();
                let items = self.stream.upload(&items).expect("memory");
                let times = self.time(|| kernels.launch_token_rows(&self.stream, logits.view(), x.view(), HIDDEN, items.view(), num_tokens));
                let bytes = (adapters * num_tokens * HIDDEN * 2) as f64;
                self.report(&format!("{rows} rows, {adapters} adapters, {num_tokens} tokens each"), times, bytes);
            }
        }
    }
}
