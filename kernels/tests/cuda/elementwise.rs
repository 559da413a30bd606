//! Embedding, norms, rope with KV write, activations.

use bytemuck::bytes_of;
use half::bf16;
use polylora_kernels::{
    cuda::{
        activation::Gate,
        embedding::{EmbeddingAdapter, FROM_CHOSEN},
        rms_norm::RmsNormArgs,
        rope_kv::{HeadShape, NO_SLOT, RopeKvArgs},
    },
    reference,
};

use crate::support::{Rng, TOLERANCE, assert_close, gpu, poison_bf16, widen};

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn rms_norm_adds_and_normalizes() {
    let gpu = gpu();
    let mut rng = Rng(1);
    for (rows, hidden) in [(1, 64), (2, 576), (3, 896), (7, 4096), (64, 192), (133, 1028), (1, 16384)] {
        let residual = rng.f32s(rows * hidden, 3.0);
        let x = rng.bf16s(rows * hidden, 2.0);
        let weight = rng.bf16s(hidden, 1.5);
        for with_x in [false, true] {
            let device_residual = gpu.stream.upload(&residual).unwrap();
            let (device_x, device_weight) = (gpu.stream.upload(&x).unwrap(), gpu.stream.upload(&weight).unwrap());
            let y = gpu.stream.upload(&poison_bf16(rows * hidden)).unwrap();
            let args = RmsNormArgs {
                residual: device_residual.view(),
                x: with_x.then(|| device_x.view()),
                weight: device_weight.view(),
                y: y.view(),
                gather: None,
                rows,
                eps: 1e-5,
            };
            gpu.kernels.rms_norm.launch(&gpu.stream, &args).unwrap();
            let sums: Vec<f32> = residual.iter().zip(&x).map(|(a, b)| if with_x { a + b.to_f32() } else { *a }).collect();
            assert_eq!(gpu.stream.download(device_residual.view()).unwrap(), sums, "residual");
            let expected = reference::rms_norm(&sums, &widen(&weight), 1e-5);
            assert_close("rms_norm", &widen(&gpu.stream.download(y.view()).unwrap()), &expected, TOLERANCE);
        }
    }
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn rms_norm_gathers_rows() {
    let gpu = gpu();
    let mut rng = Rng(2);
    let (rows, hidden) = (9, 256);
    let residual = rng.f32s(rows * hidden, 3.0);
    let weight = rng.bf16s(hidden, 1.5);
    let gather = [8u32, 0, 3, 3];
    let (device_residual, device_weight) = (gpu.stream.upload(&residual).unwrap(), gpu.stream.upload(&weight).unwrap());
    let device_gather = gpu.stream.upload(&gather).unwrap();
    let y = gpu.stream.upload(&poison_bf16(gather.len() * hidden)).unwrap();
    let args = RmsNormArgs {
        residual: device_residual.view(),
        x: None,
        weight: device_weight.view(),
        y: y.view(),
        gather: Some(device_gather.view()),
        rows: gather.len(),
        eps: 1e-6,
    };
    gpu.kernels.rms_norm.launch(&gpu.stream, &args).unwrap();
    let picked: Vec<f32> = gather
        .iter()
        .flat_map(|&row| residual[row as usize * hidden..][..hidden].to_vec())
        .collect();
    let expected = reference::rms_norm(&picked, &widen(&weight), 1e-6);
    assert_close("gathered", &widen(&gpu.stream.download(y.view()).unwrap()), &expected, TOLERANCE);
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn embedding_looks_up_and_adds_adapters() {
    let gpu = gpu();
    let mut rng = Rng(3);
    let (vocab, hidden, rank) = (50, 72, 5);
    let table = rng.bf16s(vocab * hidden, 1.0);
    let a = rng.bf16s(vocab * rank, 1.0);
    let b_t = rng.bf16s(rank * hidden, 1.0);
    let (device_table, device_a, device_b) = (
        gpu.stream.upload(&table).unwrap(),
        gpu.stream.upload(&a).unwrap(),
        gpu.stream.upload(&b_t).unwrap(),
    );
    let own_table = rng.bf16s(vocab * hidden, 1.0);
    let (scale, bias) = (rng.f32s(hidden, 2.0), rng.f32s(hidden, 1.0));
    let device_own = gpu.stream.upload(&own_table).unwrap();
    let (device_scale, device_bias) = (gpu.stream.upload(&scale).unwrap(), gpu.stream.upload(&bias).unwrap());
    let delta = EmbeddingAdapter {
        a: device_a.view().address(),
        b_t: device_b.view().address(),
        lora_rank: rank as u32,
        scaling: 0.75,
        vocab: vocab as u32,
        ..Default::default()
    };
    // A delta; DoRA with a bias; a table of its own; and that with a bias alone.
    let adapters = [
        delta,
        EmbeddingAdapter {
            scale: device_scale.view().address(),
            bias: device_bias.view().address(),
            ..delta
        },
        EmbeddingAdapter {
            table: device_own.view().address(),
            vocab: vocab as u32,
            ..Default::default()
        },
        EmbeddingAdapter {
            table: device_own.view().address(),
            bias: device_bias.view().address(),
            vocab: vocab as u32,
            ..Default::default()
        },
    ];
    let device_adapters = adapters.map(|adapter| gpu.stream.upload(bytes_of(&adapter)).unwrap());
    let chosen = [31u32, 49];
    let sources = [7u32, FROM_CHOSEN | 1, 0, FROM_CHOSEN, 12, 7, FROM_CHOSEN | 1, 48];
    let tokens = [7usize, 49, 0, 31, 12, 7, 49, 48];
    let with_adapter = [None, Some(0), None, None, Some(1), Some(2), Some(3), Some(1)];
    let addresses = with_adapter.map(|adapter: Option<usize>| adapter.map_or(0, |adapter| device_adapters[adapter].view().address()));
    let got = gpu.embedding(device_table.view(), hidden, &sources, &chosen, &addresses);
    let mut expected = Vec::new();
    for (&token, adapter) in tokens.iter().zip(with_adapter) {
        for column in 0..hidden {
            let delta: f32 = (0..rank).map(|r| a[token * rank + r].to_f32() * b_t[r * hidden + column].to_f32()).sum();
            let (base, own) = (table[token * hidden + column].to_f32(), own_table[token * hidden + column].to_f32());
            expected.push(match adapter {
                None => base,
                Some(0) => base + 0.75 * delta,
                Some(1) => scale[column] * (base + 0.75 * delta) + bias[column],
                Some(2) => own,
                Some(_) => own + bias[column],
            });
        }
    }
    assert_close("embedding", &got, &expected, 1e-6);
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn activations_gate() {
    let gpu = gpu();
    let mut rng = Rng(4);
    for (rows, ffn) in [(1, 8), (3, 1536), (7, 264), (64, 96)] {
        let gate_up = rng.bf16s(rows * 2 * ffn, 4.0);
        let device_gate_up = gpu.stream.upload(&gate_up).unwrap();
        for gate in [Gate::Silu, Gate::GeluTanh] {
            let y = gpu.stream.upload(&poison_bf16(rows * ffn)).unwrap();
            gpu.kernels
                .activation
                .launch(&gpu.stream, gate, device_gate_up.view(), y.view(), rows, ffn)
                .unwrap();
            let expected = match gate {
                Gate::Silu => reference::silu_mul(&widen(&gate_up), ffn),
                Gate::GeluTanh => reference::gelu_tanh_mul(&widen(&gate_up), ffn),
            };
            assert_close("activation", &widen(&gpu.stream.download(y.view()).unwrap()), &expected, TOLERANCE);
        }
    }
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn rope_rotates_q_and_writes_kv() {
    let gpu = gpu();
    let mut rng = Rng(5);
    for (num_heads, num_kv_heads, head_dim, qk_norm) in [
        (9, 3, 64, false),
        (4, 1, 96, true),
        (8, 2, 128, true),
        (2, 2, 256, false),
        (14, 2, 64, true),
    ] {
        let shape = HeadShape {
            num_heads,
            num_kv_heads,
            head_dim,
            block_size: 16,
            block_stride: num_kv_heads * 16 * head_dim + 64,
        };
        let (rows, num_blocks, max_position) = (7, 5, 40);
        let qkv = rng.bf16s(rows * shape.qkv_width(), 2.0);
        let mut slots: Vec<u32> = (0..num_blocks * 16).collect();
        rng.shuffle(&mut slots);
        slots.truncate(rows);
        slots[2] = NO_SLOT;
        let positions: Vec<u32> = (0..rows).map(|_| rng.below(max_position) as u32).collect();
        let angles = rng.f32s(max_position * head_dim / 2, 3.0);
        let cos_sin: Vec<[f32; 2]> = angles.iter().map(|angle| [angle.cos(), angle.sin()]).collect();
        let norms = [rng.bf16s(head_dim, 1.5), rng.bf16s(head_dim, 1.5)];
        let cache_len = num_blocks as usize * shape.block_stride;
        let device_qkv = gpu.stream.upload(&qkv).unwrap();
        let device_norms = norms.each_ref().map(|norm| gpu.stream.upload(norm).unwrap());
        let (k_cache, v_cache) = (
            gpu.stream.upload(&poison_bf16(cache_len)).unwrap(),
            gpu.stream.upload(&poison_bf16(cache_len)).unwrap(),
        );
        let (device_positions, device_slots) = (gpu.stream.upload(&positions).unwrap(), gpu.stream.upload(&slots).unwrap());
        let device_cos_sin = gpu.stream.upload(&cos_sin).unwrap();
        let args = RopeKvArgs {
            shape,
            qkv: device_qkv.view(),
            positions: device_positions.view(),
            kv_slots: device_slots.view(),
            cos_sin: device_cos_sin.view(),
            qk_norm: qk_norm.then(|| (device_norms[0].view(), device_norms[1].view())),
            k_cache: k_cache.view(),
            v_cache: v_cache.view(),
            rows,
            eps: 1e-6,
        };
        gpu.kernels.rope_kv.launch(&gpu.stream, &args).unwrap();

        let rotated = |from: usize, heads: usize, norm: &[bf16]| {
            let picked: Vec<f32> = (0..rows)
                .flat_map(|row| widen(&qkv[row * shape.qkv_width() + from * head_dim..][..heads * head_dim]))
                .collect();
            let normed = if qk_norm {
                reference::rms_norm(&picked, &widen(norm), 1e-6)
            } else {
                picked
            };
            let (cos, sin): (Vec<f32>, Vec<f32>) = cos_sin.iter().map(|[cos, sin]| (*cos, *sin)).unzip();
            reference::rope(&normed, heads, head_dim, &positions, &cos, &sin)
        };
        let got = gpu.stream.download(device_qkv.view()).unwrap();
        let got_q: Vec<f32> = (0..rows)
            .flat_map(|row| widen(&got[row * shape.qkv_width()..][..num_heads * head_dim]))
            .collect();
        assert_close("q", &got_q, &rotated(0, num_heads, &norms[0]), TOLERANCE);
        let expected_k = rotated(num_heads, num_kv_heads, &norms[1]);
        let (got_k, got_v) = (gpu.stream.download(k_cache.view()).unwrap(), gpu.stream.download(v_cache.view()).unwrap());
        let mut written = 0;
        for (row, &slot) in slots.iter().enumerate().filter(|&(_, &slot)| slot != NO_SLOT) {
            for head in 0..num_kv_heads {
                let at = slot as usize / 16 * shape.block_stride + (head * 16 + slot as usize % 16) * head_dim;
                assert_close(
                    "k",
                    &widen(&got_k[at..][..head_dim]),
                    &expected_k[(row * num_kv_heads + head) * head_dim..][..head_dim],
                    TOLERANCE,
                );
                let v = &qkv[row * shape.qkv_width() + (num_heads + num_kv_heads + head) * head_dim..][..head_dim];
                assert_eq!(&got_v[at..][..head_dim], v, "v");
                written += head_dim;
            }
        }
        assert_eq!(got_k.iter().filter(|value| !value.is_nan()).count(), written, "nothing else is written");
    }
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn random_fill_is_uniform_and_seeded() {
    let gpu = gpu();
    let buffer = gpu.stream.upload(&poison_bf16(100_000)).unwrap();
    let fill = |seed| {
        gpu.kernels.random_fill.launch(&gpu.stream, buffer.view(), seed, 1.0, 0.5).unwrap();
        widen(&gpu.stream.download(buffer.view()).unwrap())
    };
    let (first, again, other) = (fill(1), fill(1), fill(2));
    assert_eq!(first, again);
    assert_ne!(first, other);
    assert!(first.iter().all(|value| (0.5..=1.5).contains(value)));
    let mean = first.iter().sum::<f32>() / first.len() as f32;
    assert!((mean - 1.0).abs() < 0.01, "{mean}");
}
