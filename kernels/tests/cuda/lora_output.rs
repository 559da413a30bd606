//! Scales and biases on outputs, against the reference; rows and slices without terms keep their bits.

use bytemuck::bytes_of;
use polylora_kernels::{
    cuda::{
        DeviceBuffer,
        lora::{ItemRows, LoraItem, LoraItems},
        lora_output::{OutputInto, OutputTerms},
    },
    reference,
};

use crate::support::{Gpu, Rng, TOLERANCE, assert_close, gpu, widen};

/// One adapter's terms for one group. The device has other bytes before them: offsets are used.
struct Adapter {
    /// By slice.
    scale: Vec<Option<Vec<f32>>>,
    bias: Vec<Option<Vec<f32>>>,
    _memory: Vec<DeviceBuffer<f32>>,
    table: DeviceBuffer<u8>,
}

/// `has[slice]`: a scale, a bias.
fn adapter(gpu: &Gpu, rng: &mut Rng, d_out: &[usize], has: &[(bool, bool)]) -> Adapter {
    let mut terms = OutputTerms::default();
    let mut memory = Vec::new();
    let (mut scale, mut bias) = (Vec::new(), Vec::new());
    for (slice, (&width, &(has_scale, has_bias))) in d_out.iter().zip(has).enumerate() {
        for (has, values, address) in [
            (has_scale, &mut scale, &mut terms.scale[slice]),
            (has_bias, &mut bias, &mut terms.bias[slice]),
        ] {
            values.push(has.then(|| rng.f32s(width, 2.0)));
            if let Some(Some(values)) = values.last() {
                let device = gpu.stream.upload(values).unwrap();
                *address = device.view().address();
                memory.push(device);
            }
        }
    }
    let table = [vec![0xffu8; 64], bytes_of(&terms).to_vec()].concat();
    Adapter {
        scale,
        bias,
        _memory: memory,
        table: gpu.stream.upload(&table).unwrap(),
    }
}

/// `(adapter or base, rows)` in row order.
const SEGMENTS: [(Option<usize>, usize); 7] = [
    (Some(0), 1),
    (None, 2),
    (Some(1), 70),
    (Some(2), 3),
    (Some(3), 1),
    (None, 1),
    (Some(0), 9),
];

fn items(adapters: &[Adapter]) -> Vec<LoraItem> {
    let mut row_start = 0;
    let mut items = Vec::new();
    for (adapter, num_rows) in SEGMENTS {
        if let Some(adapter) = adapter {
            items.push(LoraItem {
                descriptors: adapters[adapter].table.view().address(),
                row_start,
                num_rows: num_rows as u16,
                rank_tile: 0,
            });
        }
        row_start += num_rows as u32;
    }
    items
}

fn check(gpu: &Gpu, rng: &mut Rng, d_out: &[usize], kinds: [&[(bool, bool)]; 4], grid: u32) {
    let adapters = kinds.map(|has| adapter(gpu, rng, d_out, has));
    let items = items(&adapters);
    let counts = gpu.stream.upload(&[items.len() as u32]).unwrap();
    // One more item than counted, that must not be looked at.
    let device_items = gpu
        .stream
        .upload(
            &[
                items,
                vec![LoraItem {
                    descriptors: 16,
                    num_rows: 1,
                    ..LoraItem::default()
                }],
            ]
            .concat(),
        )
        .unwrap();
    let work = LoraItems {
        items: device_items.view(),
        num_items: counts.view(),
        rows: ItemRows::UpTo64,
        descriptor_offset: 64,
        grid,
    };
    let num_rows: usize = SEGMENTS.iter().map(|(_, rows)| rows).sum();
    let width: usize = d_out.iter().sum();
    let y = rng.bf16s(num_rows * width, 3.0);
    let residual = rng.f32s(num_rows * width, 3.0);

    let in_bf16 = gpu.stream.upload(&y).unwrap();
    gpu.kernels
        .lora_output
        .launch(&gpu.stream, work, OutputInto::Bf16(in_bf16.view()), d_out)
        .unwrap();
    let in_f32 = gpu.stream.upload(&widen(&y)).unwrap();
    gpu.kernels
        .lora_output
        .launch(&gpu.stream, work, OutputInto::F32(in_f32.view()), d_out)
        .unwrap();
    let mut outputs = vec![
        ("bf16", widen(&gpu.stream.download(in_bf16.view()).unwrap()), false),
        ("f32", gpu.stream.download(in_f32.view()).unwrap(), false),
    ];
    if d_out.len() == 1 {
        // The rows with terms are set aside, "the projection" is added, and all comes together again.
        let stream = gpu.stream.upload(&residual).unwrap();
        let saved = gpu.stream.upload(&vec![f32::NAN; num_rows * width]).unwrap();
        gpu.kernels
            .lora_output
            .launch_set_aside(&gpu.stream, work, stream.view(), saved.view(), width)
            .unwrap();
        let added: Vec<f32> = gpu
            .stream
            .download(stream.view())
            .unwrap()
            .iter()
            .zip(&y)
            .map(|(a, b)| a + b.to_f32())
            .collect();
        let stream = gpu.stream.upload(&added).unwrap();
        let into = OutputInto::Residual {
            y: stream.view(),
            saved: saved.view(),
        };
        gpu.kernels.lora_output.launch(&gpu.stream, work, into, d_out).unwrap();
        outputs.push(("residual", gpu.stream.download(stream.view()).unwrap(), true));
    }

    for (what, got, is_added) in outputs {
        let what = format!("{what}, {d_out:?}, grid {grid}");
        let mut row = 0;
        for (adapter, count) in SEGMENTS {
            let range = row * width..(row + count) * width;
            row += count;
            let (before, y) = (&residual[range.clone()], widen(&y[range.clone()]));
            let mut expected = y.clone();
            let mut y_offset = 0;
            for (slice, &d_out) in d_out.iter().enumerate() {
                let of = |terms: fn(&Adapter) -> &Vec<Option<Vec<f32>>>| adapter.and_then(|adapter| terms(&adapters[adapter])[slice].as_deref());
                reference::lora_output(&mut expected, width, y_offset, d_out, of(|a| &a.scale), of(|a| &a.bias));
                y_offset += d_out;
            }
            let is_touched = expected != y;
            if is_added {
                expected.iter_mut().zip(before).for_each(|(value, before)| *value += before);
            }
            match is_touched {
                false => assert_eq!(&got[range], expected, "{what}: rows without terms keep their bits"),
                true => assert_close(&what, &got[range], &expected, TOLERANCE),
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn outputs_are_scaled_and_shifted() {
    let gpu = gpu();
    let mut rng = Rng(51);
    let (none, scale, bias, both) = ((false, false), (true, false), (false, true), (true, true));
    // Stacked slices, some of them without terms, and wider than a tile.
    check(
        &gpu,
        &mut rng,
        &[1040, 64, 72],
        [&[both, none, scale], &[none, bias, none], &[scale, scale, scale], &[none; 3]],
        5,
    );
    check(
        &gpu,
        &mut rng,
        &[264, 264],
        [&[none, both], &[bias, scale], &[both, both], &[none; 2]],
        64,
    );
    check(&gpu, &mut rng, &[1032], [&[both], &[scale], &[bias], &[none]], 3);
    check(&gpu, &mut rng, &[8], [&[scale], &[both], &[none], &[bias]], 64);
}
