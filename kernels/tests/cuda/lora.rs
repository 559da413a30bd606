//! Shrink and expand over every mix of adapters, against the reference, row by row.

use bytemuck::{bytes_of, cast_slice};
use half::bf16;
use polylora_kernels::{
    cuda::{
        DeviceBuffer,
        activation::Gate,
        lora::{ExpandInto, ItemRows, Lora, LoraDescriptor, LoraItem, LoraItems, RANK_TILE, Shrunk},
    },
    reference,
};

use crate::support::{Gpu, Rng, TOLERANCE, assert_close, gpu, widen};

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
    let v_stride = adapters
        .iter()
        .map(|adapter| adapter.ranks.iter().sum::<usize>())
        .max()
        .unwrap_or(1)
        .max(1)
        + 3;
    let num_splits = Lora::num_splits(d_in, 4);
    let (split_rows, device_x) = (num_rows + 2, gpu.stream.upload(&x).unwrap());
    let v = gpu.stream.upload(&vec![f32::NAN; num_splits * split_rows * v_stride]).unwrap();
    let shrunk = Shrunk {
        v: v.view(),
        num_splits,
        split_rows,
        v_stride,
    };
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
        .launch_shrink(&gpu.stream, shrink, device_x.view(), d_in, shrunk)
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

const ALL: [ItemRows; 3] = [ItemRows::UpTo8, ItemRows::UpTo64, ItemRows::Naive];

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
    check_workloads(32, 64, &[136], &ranks, &[2, 7, 133], &[ItemRows::UpTo8, ItemRows::UpTo64]);
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn wide_inputs_are_split() {
    let ranks = vec![vec![16, 16]; 8];
    check_workloads(33, 2568, &[520, 1032], &ranks, &[9], &[ItemRows::UpTo8, ItemRows::UpTo64]);
    let ranks = vec![vec![24]; 8];
    check_workloads(34, 5128, &[72], &ranks, &[3], &[ItemRows::UpTo8, ItemRows::UpTo64]);
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
                (ItemRows::UpTo64, Gate::Silu),
                (ItemRows::UpTo8, Gate::GeluTanh),
                (ItemRows::UpTo64, Gate::GeluTanh),
            ] {
                let x = rng.bf16s(num_rows * d_in, 1.0);
                let gate_up = rng.bf16s(num_rows * 2 * ffn, 1.0);
                let (device_x, device_gate_up) = (gpu.stream.upload(&x).unwrap(), gpu.stream.upload(&gate_up).unwrap());
                let v = gpu.stream.upload(&vec![f32::NAN; num_rows * 128]).unwrap();
                let shrunk = Shrunk {
                    v: v.view(),
                    num_splits: 1,
                    split_rows: num_rows,
                    v_stride: 128,
                };
                let shrink_items = items(&adapters, &segments, rows, true);
                let mut gated_items = items(&adapters, &segments, rows, false);
                let mut row = 0;
                for &(adapter, count) in &segments {
                    for first in (0..count).step_by(rows.max_rows()).filter(|_| adapter.is_none()) {
                        gated_items.push(LoraItem {
                            descriptors: 0,
                            row_start: (row + first) as u32,
                            num_rows: rows.max_rows().min(count - first) as u16,
                            rank_tile: 0,
                        });
                    }
                    row += count;
                }
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
                    .launch_shrink(&gpu.stream, shrink, device_x.view(), d_in, shrunk)
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
    let v = gpu.stream.upload(&[f32::NAN; 4 * 16]).unwrap();
    let shrunk = Shrunk {
        v: v.view(),
        num_splits: 1,
        split_rows: 4,
        v_stride: 16,
    };
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
            gpu.kernels.lora.launch_shrink(&gpu.stream, work, device_x.view(), d_in, shrunk)?;
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
