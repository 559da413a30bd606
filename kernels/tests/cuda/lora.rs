//! Shrink and expand over every mix of adapters, against the reference, row by row.

use bytemuck::{bytes_of, cast_slice};
use half::bf16;
use polylora_kernels::{
    cuda::{
        DeviceBuffer,
        activation::Gate,
        gemm::{Gemm, GemmArgs, GemmOutput},
        lora::{ExpandInto, ItemRows, Lora, LoraDescriptor, LoraItem, LoraItems, RANK_TILE, ShrinkInput, Shrunk},
        rms_norm::RmsNormArgs,
        rope_kv::{HeadShape, NO_SLOT, RopeKvArgs},
    },
    reference,
};

use crate::support::{Gpu, Rng, TOLERANCE, assert_close, gpu, poison_bf16, widen};

/// One adapter's weights for one group, host and device. The device has a second descriptor before it: offsets are used.
struct Adapter {
    ranks: Vec<usize>,
    scaling: Vec<f32>,
    a: Vec<Vec<bf16>>,
    b_t: Vec<Vec<bf16>>,
    _memory: Vec<DeviceBuffer<bf16>>,
    table: DeviceBuffer<u8>,
}

fn adapter(gpu: &Gpu, rng: &mut Rng, d_in: usize, d_out: &[usize], ranks: &[usize]) -> Adapter {
    let a: Vec<Vec<bf16>> = ranks.iter().map(|rank| rng.bf16s(rank * d_in, 0.2)).collect();
    let b_t: Vec<Vec<bf16>> = ranks.iter().zip(d_out).map(|(rank, d_out)| rng.bf16s(rank * d_out, 0.2)).collect();
    let scaling: Vec<f32> = ranks.iter().map(|_| 0.5 + rng.unit().abs()).collect();
    let stacked = gpu.stream.upload(&a.concat()).unwrap();
    let mut descriptor = LoraDescriptor {
        a: stacked.view().address(),
        rank_total: ranks.iter().sum::<usize>() as u16,
        ..Default::default()
    };
    let mut memory = vec![stacked];
    for (slice, b_t) in b_t.iter().enumerate() {
        let device = gpu.stream.upload(b_t).unwrap();
        descriptor.b_t[slice] = device.view().address();
        descriptor.lora_rank[slice] = ranks[slice] as u16;
        descriptor.scaling[slice] = scaling[slice];
        memory.push(device);
    }
    let table = [vec![0xffu8; 64], bytes_of(&descriptor).to_vec()].concat();
    Adapter {
        ranks: ranks.to_vec(),
        scaling,
        a,
        b_t,
        _memory: memory,
        table: gpu.stream.upload(&table).unwrap(),
    }
}

/// `(adapter or base, rows)` runs in row order.
type Segments = Vec<(Option<usize>, usize)>;

fn items(adapters: &[Adapter], segments: &Segments, rows: ItemRows, by_rank: bool) -> Vec<LoraItem> {
    let mut items = Vec::new();
    let mut row = 0;
    for &(adapter, num_rows) in segments {
        if let Some(adapter) = adapter {
            let adapter = &adapters[adapter];
            let tiles = if by_rank {
                adapter.ranks.iter().sum::<usize>().div_ceil(RANK_TILE)
            } else {
                1
            };
            for first in (0..num_rows).step_by(rows.max_rows()) {
                for rank_tile in 0..tiles {
                    items.push(LoraItem {
                        descriptors: adapter.table.view().address(),
                        row_start: (row + first) as u32,
                        num_rows: rows.max_rows().min(num_rows - first) as u16,
                        rank_tile: rank_tile as u16,
                    });
                }
            }
        }
        row += num_rows;
    }
    items
}

/// What lies between shrink and expand, poisoned.
struct Between {
    v: DeviceBuffer<bf16>,
    partial: DeviceBuffer<f32>,
    counters: DeviceBuffer<u32>,
    num_splits: usize,
    rows: usize,
    v_stride: usize,
}

impl Between {
    fn new(gpu: &Gpu, rows: usize, v_stride: usize, num_splits: usize) -> Self {
        Self {
            v: gpu.stream.upload(&poison_bf16(rows * v_stride)).unwrap(),
            partial: gpu.stream.upload(&vec![f32::NAN; num_splits * rows * v_stride]).unwrap(),
            counters: gpu.stream.upload(&vec![0; rows * v_stride]).unwrap(),
            num_splits,
            rows,
            v_stride,
        }
    }

    fn shrunk(&self) -> Shrunk<'_> {
        Shrunk {
            v: self.v.view(),
            partial: self.partial.view(),
            counters: self.counters.view(),
            num_splits: self.num_splits,
            rows: self.rows,
            v_stride: self.v_stride,
        }
    }
}

/// Ranks of a stack as they lie in v.
fn padded(ranks: &[usize]) -> usize {
    ranks.iter().map(|rank| rank.next_multiple_of(RANK_TILE)).sum()
}

fn input(x: &DeviceBuffer<bf16>, d_in: usize) -> ShrinkInput<'_> {
    ShrinkInput {
        x: x.view(),
        d_in,
        is_ready: false,
    }
}

/// Items over every row: those of base rows have no descriptors.
fn covering_items(adapters: &[Adapter], segments: &Segments, rows: ItemRows) -> Vec<LoraItem> {
    let mut all = items(adapters, segments, rows, false);
    let mut row = 0;
    for &(adapter, count) in segments {
        for first in (0..count).step_by(rows.max_rows()).filter(|_| adapter.is_none()) {
            all.push(LoraItem {
                descriptors: 0,
                row_start: (row + first) as u32,
                num_rows: rows.max_rows().min(count - first) as u16,
                rank_tile: 0,
            });
        }
        row += count;
    }
    all
}

struct Case<'a> {
    d_in: usize,
    d_out: &'a [usize],
    segments: &'a Segments,
    rows: ItemRows,
    f32_output: bool,
    grid: u32,
}

fn check(gpu: &Gpu, rng: &mut Rng, adapters: &[Adapter], case: &Case<'_>) {
    let Case {
        d_in,
        d_out,
        segments,
        rows,
        f32_output,
        grid,
    } = *case;
    let num_rows: usize = segments.iter().map(|&(_, rows)| rows).sum();
    let width: usize = d_out.iter().sum();
    let x = rng.bf16s(num_rows * d_in, 1.0);
    let y = rng.bf16s(num_rows * width, 0.5);
    let v_stride = adapters.iter().map(|adapter| padded(&adapter.ranks)).max().unwrap_or(0) + RANK_TILE;
    let device_x = gpu.stream.upload(&x).unwrap();
    let between = Between::new(gpu, num_rows + 2, v_stride, Lora::num_splits(d_in, 4));
    let shrunk = between.shrunk();
    let (shrink_items, expand_items) = (items(adapters, segments, rows, true), items(adapters, segments, rows, false));
    // One more item than counted, that must not be looked at.
    let poison = LoraItem {
        descriptors: 16,
        row_start: 0,
        num_rows: 1,
        rank_tile: 0,
    };
    let upload = |items: &[LoraItem]| gpu.stream.upload(&[items, &[poison]].concat()).unwrap();
    let (device_shrink, device_expand) = (upload(&shrink_items), upload(&expand_items));
    let counts = gpu.stream.upload(&[shrink_items.len() as u32, expand_items.len() as u32]).unwrap();
    let work = |items, count| LoraItems {
        items,
        num_items: count,
        rows,
        descriptor_offset: 64,
        grid,
    };
    let shrink = work(device_shrink.view(), counts.view().slice(0..1));
    gpu.kernels
        .lora
        .launch_shrink(&gpu.stream, shrink, input(&device_x, d_in), shrunk)
        .unwrap();
    let expand = work(device_expand.view(), counts.view().slice(1..2));
    let got = if f32_output {
        let device_y = gpu.stream.upload(&widen(&y)).unwrap();
        gpu.kernels
            .lora
            .launch_expand(&gpu.stream, expand, shrunk, ExpandInto::F32(device_y.view()), d_out)
            .unwrap();
        gpu.stream.download(device_y.view()).unwrap()
    } else {
        let device_y = gpu.stream.upload(&y).unwrap();
        gpu.kernels
            .lora
            .launch_expand(&gpu.stream, expand, shrunk, ExpandInto::Bf16(device_y.view()), d_out)
            .unwrap();
        widen(&gpu.stream.download(device_y.view()).unwrap())
    };

    let mut row = 0;
    for &(adapter, count) in segments {
        let range = row * width..(row + count) * width;
        let mut expected = widen(&y[range.clone()]);
        let what = format!(
            "{case:?} rows {row}..{}",
            row + count,
            case = (d_in, d_out, segments, rows, f32_output, grid)
        );
        match adapter.map(|adapter| &adapters[adapter]) {
            None => assert_eq!(&got[range], expected, "base rows are not touched: {what}"),
            Some(adapter) => {
                let before = expected.clone();
                let mut y_offset = 0;
                for (slice, &rank) in adapter.ranks.iter().enumerate() {
                    if rank > 0 {
                        let shrunk = reference::lora_shrink(&widen(&x[row * d_in..(row + count) * d_in]), d_in, &widen(&adapter.a[slice]), rank);
                        let b_t = widen(&adapter.b_t[slice]);
                        let b: Vec<f32> = (0..d_out[slice])
                            .flat_map(|column| (0..rank).map(move |r| (column, r)))
                            .map(|(c, r)| b_t[r * d_out[slice] + c])
                            .collect();
                        reference::lora_expand(&shrunk, rank, &b, d_out[slice], adapter.scaling[slice], &mut expected, width, y_offset);
                    }
                    y_offset += d_out[slice];
                }
                assert_close(&what, &got[range.clone()], &expected, TOLERANCE);
                // The delta itself, so that a large y can't hide a wrong one (in bf16 it could: y is rounded).
                if f32_output && adapter.ranks.iter().sum::<usize>() > 0 {
                    let delta = |values: &[f32]| values.iter().zip(&before).map(|(a, b)| a - b).collect::<Vec<_>>();
                    assert_close(&what, &delta(&got[range]), &delta(&expected), 2.0 * TOLERANCE);
                }
            }
        }
        row += count;
    }
}

/// The mixes that a server meets, as rows of adapters 0…7.
fn workloads(rng: &mut Rng, num_rows: usize) -> Vec<Segments> {
    let group = |mut rows: Vec<Option<usize>>| {
        rows.sort();
        let mut segments: Segments = Vec::new();
        for adapter in rows {
            match segments.last_mut() {
                Some((last, count)) if *last == adapter => *count += 1,
                _ => segments.push((adapter, 1)),
            }
        }
        segments
    };
    let zipf = |rng: &mut Rng| [0, 0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6][rng.below(12)];
    vec![
        (0..num_rows).map(|row| (Some(row % 8), 1)).collect(),
        vec![(Some(3), num_rows)],
        group((0..num_rows).map(|_| Some(rng.below(8))).collect()),
        group((0..num_rows).map(|_| Some(zipf(rng))).collect()),
        group((0..num_rows).map(|row| Some(usize::from(row == 0))).collect()),
        group((0..num_rows).map(|_| (rng.below(2) == 0).then(|| rng.below(8))).collect()),
        vec![(None, num_rows)],
    ]
}

fn check_workloads(rng_seed: u64, d_in: usize, d_out: &[usize], ranks: &[Vec<usize>], row_counts: &[usize], variants: &[ItemRows]) {
    let gpu = gpu();
    let mut rng = Rng(rng_seed);
    let adapters: Vec<Adapter> = ranks.iter().map(|ranks| adapter(&gpu, &mut rng, d_in, d_out, ranks)).collect();
    for &num_rows in row_counts {
        for segments in workloads(&mut rng, num_rows) {
            for &rows in variants {
                for (f32_output, grid) in [(false, 5), (true, 64)] {
                    check(
                        &gpu,
                        &mut rng,
                        &adapters,
                        &Case {
                            d_in,
                            d_out,
                            segments: &segments,
                            rows,
                            f32_output,
                            grid,
                        },
                    );
                }
            }
        }
    }
}

const ALL: [ItemRows; 4] = [ItemRows::UpTo8, ItemRows::UpTo16, ItemRows::UpTo64, ItemRows::Naive];

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn stacked_slices_with_mixed_ranks() {
    // Among them slices that the adapter lacks, rank 1, and ranks that are no multiple of 16 or of 8.
    let ranks = [
        vec![16, 16, 16],
        vec![8, 8, 8],
        vec![4, 0, 4],
        vec![1, 1, 1],
        vec![0, 13, 0],
        vec![32, 7, 20],
        vec![64, 64, 64],
        vec![0, 0, 0],
    ];
    check_workloads(31, 192, &[192, 64, 64], &ranks, &[1, 3, 26], &ALL);
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn one_slice_with_every_kind_of_rank() {
    let ranks = [vec![16], vec![256], vec![1], vec![9], vec![17], vec![128], vec![3], vec![33]];
    check_workloads(32, 64, &[136], &ranks, &[2, 7, 133], &ALL[..3]);
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn wide_inputs_are_split() {
    let ranks = vec![vec![16, 16]; 8];
    check_workloads(33, 2568, &[520, 1032], &ranks, &[9], &ALL[..3]);
    let ranks = vec![vec![24]; 8];
    check_workloads(34, 5128, &[72], &ranks, &[3], &ALL[..3]);
}

/// The fused pass against expand and activation one after the other; base rows have items without descriptors.
#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn gated_expand_is_expand_then_activation() {
    let gpu = gpu();
    let mut rng = Rng(36);
    let (d_in, ffn) = (64, 264);
    let d_out = [ffn, ffn];
    let ranks = [[16, 16], [8, 8], [0, 5], [33, 64], [4, 0], [1, 1], [16, 7], [0, 0]];
    let adapters: Vec<Adapter> = ranks.iter().map(|ranks| adapter(&gpu, &mut rng, d_in, &d_out, ranks)).collect();
    for num_rows in [1, 7, 30, 150] {
        for segments in workloads(&mut rng, num_rows) {
            for (rows, gate) in [
                (ItemRows::UpTo8, Gate::Silu),
                (ItemRows::UpTo16, Gate::Silu),
                (ItemRows::UpTo64, Gate::Silu),
                (ItemRows::UpTo8, Gate::GeluTanh),
                (ItemRows::UpTo64, Gate::GeluTanh),
            ] {
                let x = rng.bf16s(num_rows * d_in, 1.0);
                let gate_up = rng.bf16s(num_rows * 2 * ffn, 1.0);
                let (device_x, device_gate_up) = (gpu.stream.upload(&x).unwrap(), gpu.stream.upload(&gate_up).unwrap());
                let between = Between::new(&gpu, num_rows, 128, 1);
                let shrunk = between.shrunk();
                let shrink_items = items(&adapters, &segments, rows, true);
                let gated_items = covering_items(&adapters, &segments, rows);
                let counts = gpu.stream.upload(&[shrink_items.len() as u32, gated_items.len() as u32]).unwrap();
                let device_shrink = gpu.stream.upload(&[shrink_items, vec![LoraItem::default()]].concat()).unwrap();
                let device_gated = gpu.stream.upload(&gated_items).unwrap();
                let work = |items, count| LoraItems {
                    items,
                    num_items: count,
                    rows,
                    descriptor_offset: 64,
                    grid: 7,
                };
                let shrink = work(device_shrink.view(), counts.view().slice(0..1));
                gpu.kernels
                    .lora
                    .launch_shrink(&gpu.stream, shrink, input(&device_x, d_in), shrunk)
                    .unwrap();
                let y = gpu.stream.upload(&vec![bf16::NAN; num_rows * ffn]).unwrap();
                let gated = work(device_gated.view(), counts.view().slice(1..2));
                let buffers = (device_gate_up.view(), y.view());
                gpu.kernels
                    .lora
                    .launch_expand_gated(&gpu.stream, gated, shrunk, gate, buffers, ffn)
                    .unwrap();

                let mut sums = widen(&gate_up);
                let mut row = 0;
                for &(adapter, count) in &segments {
                    if let Some(adapter) = adapter.map(|adapter| &adapters[adapter]) {
                        let rows = &mut sums[row * 2 * ffn..(row + count) * 2 * ffn];
                        for slice in (0..2).filter(|&slice| adapter.ranks[slice] > 0) {
                            let rank = adapter.ranks[slice];
                            let x = widen(&x[row * d_in..(row + count) * d_in]);
                            let shrunk = reference::lora_shrink(&x, d_in, &widen(&adapter.a[slice]), rank);
                            let b_t = widen(&adapter.b_t[slice]);
                            let b: Vec<f32> = (0..ffn * rank).map(|i| b_t[i % rank * ffn + i / rank]).collect();
                            reference::lora_expand(&shrunk, rank, &b, ffn, adapter.scaling[slice], rows, 2 * ffn, slice * ffn);
                        }
                    }
                    row += count;
                }
                let expected = match gate {
                    Gate::Silu => reference::silu_mul(&sums, ffn),
                    Gate::GeluTanh => reference::gelu_tanh_mul(&sums, ffn),
                };
                assert_close(
                    &format!("{segments:?} {rows:?}"),
                    &widen(&gpu.stream.download(y.view()).unwrap()),
                    &expected,
                    TOLERANCE,
                );
            }
        }
    }
}

/// Shrink of these segments over `x`, and the plain expand's and the covering items with their counts.
struct Shrink<'a> {
    between: &'a Between,
    covering: DeviceBuffer<LoraItem>,
    expand: DeviceBuffer<LoraItem>,
    counts: DeviceBuffer<u32>,
    rows: ItemRows,
}

impl<'a> Shrink<'a> {
    fn run(gpu: &Gpu, adapters: &[Adapter], segments: &Segments, rows: ItemRows, x: ShrinkInput<'_>, between: &'a Between) -> Self {
        let shrink = items(adapters, segments, rows, true);
        let expand = items(adapters, segments, rows, false);
        let covering = covering_items(adapters, segments, rows);
        let counts = [shrink.len() as u32, expand.len() as u32, covering.len() as u32];
        let upload = |items: Vec<LoraItem>| gpu.stream.upload(&[items, vec![LoraItem::default()]].concat()).unwrap();
        let shrink = upload(shrink);
        let made = Self {
            between,
            covering: upload(covering),
            expand: upload(expand),
            counts: gpu.stream.upload(&counts).unwrap(),
            rows,
        };
        let work = made.work(&shrink, 0);
        gpu.kernels.lora.launch_shrink(&gpu.stream, work, x, between.shrunk()).unwrap();
        gpu.stream.synchronize().unwrap();
        assert!(gpu.stream.download(between.counters.view()).unwrap().iter().all(|&count| count == 0));
        made
    }

    fn work<'b>(&'b self, items: &'b DeviceBuffer<LoraItem>, count: usize) -> LoraItems<'b> {
        LoraItems {
            items: items.view(),
            num_items: self.counts.view().slice(count..count + 1),
            rows: self.rows,
            descriptor_offset: 64,
            grid: 7,
        }
    }
}

/// The fused pass against the expand and the rotary embedding one after the other.
#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn expand_with_rope_is_expand_then_rope() {
    let gpu = gpu();
    let mut rng = Rng(37);
    let d_in = 1096;
    let ranks = [
        [16, 16, 16],
        [8, 8, 8],
        [4, 0, 4],
        [1, 1, 1],
        [0, 13, 0],
        [32, 7, 20],
        [64, 64, 64],
        [0, 0, 0],
    ];
    for (num_heads, num_kv_heads, head_dim, has_norm) in [(9, 3, 64, false), (4, 1, 128, true), (5, 5, 64, true), (6, 2, 128, false)] {
        let shape = HeadShape {
            num_heads,
            num_kv_heads,
            head_dim,
            block_size: 16,
            block_stride: num_kv_heads * 16 * head_dim + 64,
        };
        let d_out = [num_heads, num_kv_heads, num_kv_heads].map(|heads| heads * head_dim);
        let adapters: Vec<Adapter> = ranks.iter().map(|ranks| adapter(&gpu, &mut rng, d_in, &d_out, ranks)).collect();
        for num_rows in [1, 7, 50] {
            let (num_blocks, max_position) = (5, 40);
            let mut slots: Vec<u32> = (0..num_blocks * 16).collect();
            rng.shuffle(&mut slots);
            slots.truncate(num_rows);
            if num_rows > 2 {
                slots[2] = NO_SLOT;
            }
            let positions: Vec<u32> = (0..num_rows).map(|_| rng.below(max_position) as u32).collect();
            let angles = rng.f32s(max_position * head_dim / 2, 3.0);
            let cos_sin: Vec<[f32; 2]> = angles.iter().map(|angle| [angle.cos(), angle.sin()]).collect();
            let norms = [0, 1].map(|_| gpu.stream.upload(&rng.bf16s(head_dim, 1.5)).unwrap());
            let (positions, slots) = (gpu.stream.upload(&positions).unwrap(), gpu.stream.upload(&slots).unwrap());
            let cos_sin = gpu.stream.upload(&cos_sin).unwrap();
            let cache = rng.bf16s(num_blocks as usize * shape.block_stride, 1.0);
            for segments in workloads(&mut rng, num_rows) {
                let (x, qkv) = (rng.bf16s(num_rows * d_in, 1.0), rng.bf16s(num_rows * shape.qkv_width(), 1.0));
                let x = gpu.stream.upload(&x).unwrap();
                for rows in &ALL[..3] {
                    let between = Between::new(&gpu, num_rows, 192, 2);
                    let shrink = Shrink::run(&gpu, &adapters, &segments, *rows, input(&x, d_in), &between);
                    let results = [false, true].map(|fused| {
                        let qkv = gpu.stream.upload(&qkv).unwrap();
                        let (k_cache, v_cache) = (gpu.stream.upload(&cache).unwrap(), gpu.stream.upload(&cache).unwrap());
                        let rope = RopeKvArgs {
                            shape,
                            qkv: qkv.view(),
                            positions: positions.view(),
                            kv_slots: slots.view(),
                            cos_sin: cos_sin.view(),
                            qk_norm: has_norm.then(|| (norms[0].view(), norms[1].view())),
                            k_cache: k_cache.view(),
                            v_cache: v_cache.view(),
                            rows: num_rows,
                            eps: 1e-6,
                        };
                        let (lora, shrunk) = (&gpu.kernels.lora, shrink.between.shrunk());
                        if fused {
                            let work = shrink.work(&shrink.covering, 2);
                            lora.launch_expand_rope(&gpu.stream, work, shrunk, &rope).unwrap();
                        } else {
                            let work = shrink.work(&shrink.expand, 1);
                            lora.launch_expand(&gpu.stream, work, shrunk, ExpandInto::Bf16(qkv.view()), &d_out)
                                .unwrap();
                            gpu.kernels.rope_kv.launch(&gpu.stream, &rope).unwrap();
                        }
                        let got = widen(&gpu.stream.download(qkv.view()).unwrap());
                        let q: Vec<f32> = got.chunks(shape.qkv_width()).flat_map(|row| row[..d_out[0]].to_vec()).collect();
                        [
                            q,
                            widen(&gpu.stream.download(k_cache.view()).unwrap()),
                            widen(&gpu.stream.download(v_cache.view()).unwrap()),
                        ]
                    });
                    for (what, got, expected) in ["q", "k", "v"]
                        .iter()
                        .zip(&results[1])
                        .zip(&results[0])
                        .map(|((what, got), expected)| (what, got, expected))
                    {
                        assert_close(&format!("{what} {shape:?} {segments:?} {rows:?}"), got, expected, TOLERANCE);
                    }
                }
            }
        }
    }
}

/// The fused pass against the expand and the norm one after the other.
#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn expand_with_norm_is_expand_then_norm() {
    let gpu = gpu();
    let mut rng = Rng(38);
    let ranks = [16, 8, 0, 1, 13, 33, 64, 24].map(|rank| vec![rank]);
    for (hidden, d_in) in [(64, 64), (512, 1096), (576, 64), (4096, 128)] {
        if !gpu.kernels.lora.can_norm(hidden) {
            assert!(gpu.device.info().compute_capability < (9, 0), "Hopper has clusters");
            return;
        }
        let adapters: Vec<Adapter> = ranks.iter().map(|ranks| adapter(&gpu, &mut rng, d_in, &[hidden], ranks)).collect();
        let weight = gpu.stream.upload(&rng.bf16s(hidden, 1.0)).unwrap();
        for num_rows in [1, 7, 50] {
            for segments in workloads(&mut rng, num_rows) {
                let (x, residual) = (rng.bf16s(num_rows * d_in, 1.0), rng.f32s(num_rows * hidden, 1.0));
                let x = gpu.stream.upload(&x).unwrap();
                for rows in &ALL[..2] {
                    let between = Between::new(&gpu, num_rows, 64, Lora::num_splits(d_in, 4));
                    let shrink = Shrink::run(&gpu, &adapters, &segments, *rows, input(&x, d_in), &between);
                    let results = [false, true].map(|fused| {
                        let residual = gpu.stream.upload(&residual).unwrap();
                        let normed = gpu.stream.upload(&poison_bf16(num_rows * hidden)).unwrap();
                        let norm = RmsNormArgs {
                            residual: residual.view(),
                            x: None,
                            weight: weight.view(),
                            y: normed.view(),
                            gather: None,
                            rows: num_rows,
                            eps: 1e-5,
                        };
                        let (lora, shrunk) = (&gpu.kernels.lora, shrink.between.shrunk());
                        if fused {
                            let work = shrink.work(&shrink.covering, 2);
                            lora.launch_expand_norm(&gpu.stream, work, shrunk, &norm).unwrap();
                        } else {
                            let work = shrink.work(&shrink.expand, 1);
                            lora.launch_expand(&gpu.stream, work, shrunk, ExpandInto::F32(residual.view()), &[hidden])
                                .unwrap();
                            gpu.kernels.rms_norm.launch(&gpu.stream, &norm).unwrap();
                        }
                        (
                            gpu.stream.download(residual.view()).unwrap(),
                            widen(&gpu.stream.download(normed.view()).unwrap()),
                        )
                    });
                    let what = format!("{hidden} {segments:?} {rows:?}");
                    assert_close(&what, &results[1].0, &results[0].0, 1e-6);
                    assert_close(&what, &results[1].1, &results[0].1, TOLERANCE);
                }
            }
        }
    }
}

/// A shrink beside the GEMM over the same x, again and again: it may neither read x before it is there nor let the expand see y too early.
#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn a_shrink_beside_its_gemm_is_one_after_it() {
    let gpu = gpu();
    let mut gemm = Gemm::new(&gpu.device).unwrap();
    let mut rng = Rng(39);
    let (rows, hidden, rank) = (24, 1024, 16);
    let adapters = [adapter(&gpu, &mut rng, hidden, &[hidden], &[rank])];
    let segments = vec![(Some(0), rows)];
    let (weight, norm_weight) = (
        gpu.stream.upload(&rng.bf16s(hidden * hidden, 0.02)).unwrap(),
        gpu.stream.upload(&rng.bf16s(hidden, 1.0)).unwrap(),
    );
    let start = rng.f32s(rows * hidden, 1.0);
    let results = [false, true].map(|beside| {
        let residual = gpu.stream.upload(&start).unwrap();
        let x = gpu.stream.upload(&poison_bf16(rows * hidden)).unwrap();
        let args = GemmArgs {
            x: x.view(),
            w: weight.view(),
            bias: None,
            y: GemmOutput::AddF32(residual.view()),
            m: rows,
            n: hidden,
            k: hidden,
        };
        let between = Between::new(&gpu, rows, 16, 1);
        let own = gemm.own_candidates(&args);
        let items_of = |by_rank| items(&adapters, &segments, ItemRows::UpTo8, by_rank);
        let (shrink, expand) = (gpu.stream.upload(&items_of(true)).unwrap(), gpu.stream.upload(&items_of(false)).unwrap());
        let count = gpu.stream.upload(&[expand.len() as u32]).unwrap();
        let work = |items| LoraItems {
            items,
            num_items: count.view(),
            rows: ItemRows::UpTo8,
            descriptor_offset: 64,
            grid: 8,
        };
        for round in 0..20 {
            let norm = RmsNormArgs {
                residual: residual.view(),
                x: None,
                weight: norm_weight.view(),
                y: x.view(),
                gather: None,
                rows,
                eps: 1e-5,
            };
            gpu.kernels.rms_norm.launch(&gpu.stream, &norm).unwrap();
            // The first candidate runs everywhere; each of the others that this device has takes its turn.
            gemm.launch_own(&gpu.stream, &args, own[if beside { round % own.len() } else { 0 }])
                .unwrap();
            let input = ShrinkInput {
                is_ready: beside,
                ..input(&x, hidden)
            };
            gpu.kernels
                .lora
                .launch_shrink(&gpu.stream, work(shrink.view()), input, between.shrunk())
                .unwrap();
            let y = ExpandInto::F32(residual.view());
            gpu.kernels
                .lora
                .launch_expand(&gpu.stream, work(expand.view()), between.shrunk(), y, &[hidden])
                .unwrap();
        }
        let _ = &mut gemm;
        gpu.stream.download(residual.view()).unwrap()
    });
    assert_close("20 layers", &results[1], &results[0], 1e-2);
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn a_captured_launch_serves_other_mixes() {
    let gpu = gpu();
    let mut rng = Rng(35);
    let (d_in, d_out) = (128, [96]);
    let adapters: Vec<Adapter> = [8, 16].iter().map(|&rank| adapter(&gpu, &mut rng, d_in, &d_out, &[rank])).collect();
    let x = rng.bf16s(4 * d_in, 1.0);
    let device_x = gpu.stream.upload(&x).unwrap();
    let y = DeviceBuffer::<bf16>::zeroed(&gpu.stream, 4 * 96).unwrap();
    let between = Between::new(&gpu, 4, 16, 1);
    let shrunk = between.shrunk();
    let device_items = DeviceBuffer::<LoraItem>::zeroed(&gpu.stream, 4).unwrap();
    let count = DeviceBuffer::<u32>::zeroed(&gpu.stream, 1).unwrap();
    let work = LoraItems {
        items: device_items.view(),
        num_items: count.view(),
        rows: ItemRows::UpTo8,
        descriptor_offset: 64,
        grid: 4,
    };
    gpu.stream.synchronize().unwrap();
    let graph = gpu
        .stream
        .capture(|| {
            gpu.stream.fill_bytes(y.view(), 0)?;
            gpu.kernels.lora.launch_shrink(&gpu.stream, work, input(&device_x, d_in), shrunk)?;
            gpu.kernels
                .lora
                .launch_expand(&gpu.stream, work, shrunk, ExpandInto::Bf16(y.view()), &d_out)
        })
        .unwrap();
    for segments in [vec![(Some(0), 4)], vec![(Some(1), 1), (None, 2), (Some(0), 1)], vec![(None, 4)]] {
        let mut host_items = items(&adapters, &segments, ItemRows::UpTo8, true);
        let num_items = host_items.len() as u32;
        host_items.resize(4, LoraItem::default());
        gpu.stream.copy_to_device(device_items.view(), &host_items).unwrap();
        gpu.stream.copy_to_device(count.view(), &[num_items]).unwrap();
        gpu.stream.launch_graph(&graph).unwrap();
        let got = widen(&gpu.stream.download(y.view()).unwrap());
        let mut row = 0;
        for (adapter, rows) in segments {
            let got = &got[row * 96..(row + rows) * 96];
            match adapter.map(|adapter| &adapters[adapter]) {
                None => assert!(got.iter().all(|&value| value == 0.0)),
                Some(adapter) => {
                    let mut expected = vec![0.0; rows * 96];
                    let rank = adapter.ranks[0];
                    let shrunk = reference::lora_shrink(&widen(&x[row * d_in..(row + rows) * d_in]), d_in, &widen(&adapter.a[0]), rank);
                    let b_t: &[bf16] = cast_slice(&adapter.b_t[0]);
                    let b: Vec<f32> = (0..96)
                        .flat_map(|c| (0..rank).map(move |r| (c, r)))
                        .map(|(c, r)| b_t[r * 96 + c].to_f32())
                        .collect();
                    reference::lora_expand(&shrunk, rank, &b, 96, adapter.scaling[0], &mut expected, 96, 0);
                    assert_close("replay", got, &expected, TOLERANCE);
                }
            }
            row += rows;
        }
    }
}
