//! Attention over the paged cache: decode rows and prefill chunks.

use half::bf16;
use polylora_kernels::{
    cuda::{
        DeviceBuffer,
        attention_decode::{AttentionDecode, AttentionDecodeArgs},
        attention_prefill::{AttentionPrefill, AttentionPrefillArgs, PrefillTile},
        rope_kv::HeadShape,
    },
    reference,
};

use crate::support::{Gpu, Rng, TOLERANCE, assert_close, gpu, poison_bf16, widen};

/// Sequences with K and V in a paged cache whose blocks are shuffled and whose unused places are NaN.
struct Cache {
    shape: HeadShape,
    /// Per sequence, `[len, num_kv_heads, head_dim]`.
    k: Vec<Vec<bf16>>,
    v: Vec<Vec<bf16>>,
    /// Blocks of K, each with V's behind it if the stride leaves it room.
    cache: DeviceBuffer<bf16>,
    v_start: usize,
    starts: Vec<u32>,
    block_tables: DeviceBuffer<u32>,
}

fn cache(gpu: &Gpu, rng: &mut Rng, shape: HeadShape, lens: &[usize]) -> Cache {
    let blocks_of = |len: usize| len.div_ceil(shape.block_size);
    let num_blocks = lens.iter().map(|&len| blocks_of(len)).sum::<usize>() + 3;
    let mut free: Vec<u32> = (0..num_blocks as u32).collect();
    rng.shuffle(&mut free);
    let is_interleaved = shape.block_stride >= 2 * shape.block_len();
    let v_start = if is_interleaved {
        shape.block_len()
    } else {
        num_blocks * shape.block_stride
    };
    let mut cache = poison_bf16(v_start + num_blocks * shape.block_stride);
    let (mut ks, mut vs, mut starts, mut tables) = (vec![], vec![], vec![], vec![]);
    for &len in lens {
        let width = shape.num_kv_heads * shape.head_dim;
        let (k, v) = (rng.bf16s(len * width, 2.0), rng.bf16s(len * width, 1.0));
        starts.push(tables.len() as u32);
        for _ in 0..blocks_of(len) {
            tables.push(free.pop().expect("enough blocks"));
        }
        for position in 0..len {
            let block = tables[*starts.last().unwrap() as usize + position / shape.block_size] as usize;
            for head in 0..shape.num_kv_heads {
                let to = block * shape.block_stride + (head * shape.block_size + position % shape.block_size) * shape.head_dim;
                let from = (position * shape.num_kv_heads + head) * shape.head_dim;
                cache[to..][..shape.head_dim].copy_from_slice(&k[from..][..shape.head_dim]);
                cache[v_start + to..][..shape.head_dim].copy_from_slice(&v[from..][..shape.head_dim]);
            }
        }
        ks.push(k);
        vs.push(v);
    }
    Cache {
        shape,
        k: ks,
        v: vs,
        cache: gpu.stream.upload(&cache).unwrap(),
        v_start,
        starts,
        block_tables: gpu.stream.upload(&tables).unwrap(),
    }
}

impl Cache {
    fn expected(&self, sequence: usize, q: &[bf16], window: Option<usize>) -> Vec<f32> {
        let shape = self.shape;
        reference::attention(
            &widen(q),
            &widen(&self.k[sequence]),
            &widen(&self.v[sequence]),
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            0.3,
            window,
        )
    }
}

fn check_decode(gpu: &Gpu, rng: &mut Rng, shape: HeadShape, lens: &[usize], max_splits: usize, window: Option<usize>) {
    let cache = cache(gpu, rng, shape, lens);
    let width = shape.num_heads * shape.head_dim;
    let q_stride = shape.qkv_width();
    let q = rng.bf16s(lens.len() * q_stride, 0.5);
    let device_q = gpu.stream.upload(&q).unwrap();
    let marker = bf16::from_f32(-7.0);
    let out = gpu.stream.upload(&vec![marker; lens.len() * width]).unwrap();
    let context_lens = gpu.stream.upload(&lens.iter().map(|&len| len as u32).collect::<Vec<_>>()).unwrap();
    let starts = gpu.stream.upload(&cache.starts).unwrap();
    let partial = gpu
        .stream
        .upload(&vec![f32::NAN; AttentionDecode::partial_len(&shape, lens.len(), max_splits)])
        .unwrap();
    let counters = gpu.stream.upload(&vec![0u32; lens.len() * shape.num_kv_heads]).unwrap();
    // Twice, for the counters.
    for _ in 0..2 {
        let args = AttentionDecodeArgs {
            shape,
            out: out.view(),
            q: device_q.view(),
            q_stride,
            k_cache: cache.cache.view(),
            v_cache: cache.cache.view().slice(cache.v_start..cache.cache.len()),
            rows: None,
            context_lens: context_lens.view(),
            block_table_starts: starts.view(),
            block_tables: cache.block_tables.view(),
            partial: partial.view(),
            counters: counters.view(),
            sequences: lens.len(),
            max_splits,
            window,
            scale: 0.3,
        };
        gpu.kernels.attention_decode.launch(&gpu.stream, &args).unwrap();
    }
    assert!(
        gpu.stream.download(counters.view()).unwrap().iter().all(|&count| count == 0),
        "counters are left at 0"
    );
    let got = gpu.stream.download(out.view()).unwrap();
    for (sequence, &len) in lens.iter().enumerate() {
        let got = &got[sequence * width..][..width];
        if len == 0 {
            assert!(got.iter().all(|&value| value == marker), "an empty context leaves the row alone");
        } else {
            let what = format!("{shape:?} len {len} of {lens:?}, {max_splits} splits, window {window:?}");
            assert_close(
                &what,
                &widen(got),
                &cache.expected(sequence, &q[sequence * q_stride..][..width], window),
                TOLERANCE,
            );
        }
    }
}

fn shape(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> HeadShape {
    HeadShape {
        num_heads,
        num_kv_heads,
        head_dim,
        block_size: 16,
        // K, V and a gap.
        block_stride: num_kv_heads * 16 * head_dim * 2 + 64,
    }
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn decode_attends_to_its_context() {
    let gpu = gpu();
    let mut rng = Rng(11);
    for shape in [
        shape(9, 3, 64),
        shape(8, 2, 128),
        shape(14, 2, 64),
        shape(3, 3, 96),
        shape(4, 1, 256),
        shape(16, 1, 128),
        shape(9, 1, 64),
    ] {
        for lens in [&[1][..], &[17, 0, 200], &[64, 63, 65, 16, 15, 2]] {
            check_decode(&gpu, &mut rng, shape, lens, 1, None);
        }
    }
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn decode_splits_long_contexts_and_merges() {
    let gpu = gpu();
    let mut rng = Rng(12);
    for shape in [shape(8, 2, 128), shape(3, 1, 64)] {
        check_decode(&gpu, &mut rng, shape, &[700, 1, 256, 257, 1030], 4, None);
    }
    let blocks_of_64 = HeadShape {
        block_size: 64,
        block_stride: 2 * 64 * 64,
        ..shape(8, 2, 64)
    };
    check_decode(&gpu, &mut rng, blocks_of_64, &[600, 100], 2, None);
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn decode_keeps_to_its_window() {
    let gpu = gpu();
    let mut rng = Rng(13);
    check_decode(&gpu, &mut rng, shape(4, 2, 64), &[5, 40, 41, 100, 700], 3, Some(40));
    check_decode(&gpu, &mut rng, shape(4, 2, 64), &[700, 513], 2, Some(512));
}

/// Chunks `(num_rows, context_len)`: the chunk's rows are the last of the context.
fn check_prefill(gpu: &Gpu, rng: &mut Rng, shape: HeadShape, chunks: &[(usize, usize)], window: Option<usize>) {
    let lens: Vec<usize> = chunks.iter().map(|&(_, len)| len).collect();
    let cache = cache(gpu, rng, shape, &lens);
    let width = shape.num_heads * shape.head_dim;
    let q_stride = shape.qkv_width();
    // A row before and after that belongs to nobody.
    let num_rows: usize = chunks.iter().map(|&(rows, _)| rows).sum::<usize>() + 2;
    let q = rng.bf16s(num_rows * q_stride, 0.5);
    let mut tiles = Vec::new();
    let mut row = 1;
    for (sequence, &(rows, len)) in chunks.iter().enumerate() {
        for first in (0..rows).step_by(AttentionPrefill::tile_rows(&shape)) {
            tiles.push(PrefillTile {
                row_start: (row + first) as u32,
                num_rows: AttentionPrefill::tile_rows(&shape).min(rows - first) as u32,
                position: (len - rows + first) as u32,
                block_table_start: cache.starts[sequence],
            });
        }
        row += rows;
    }
    let device_q = gpu.stream.upload(&q).unwrap();
    let out = gpu.stream.upload(&poison_bf16(num_rows * width)).unwrap();
    let device_tiles = gpu.stream.upload(&tiles).unwrap();
    let args = AttentionPrefillArgs {
        shape,
        out: out.view(),
        q: device_q.view(),
        q_stride,
        k_cache: cache.cache.view(),
        v_cache: cache.cache.view().slice(cache.v_start..cache.cache.len()),
        tiles: device_tiles.view(),
        block_tables: cache.block_tables.view(),
        window,
        scale: 0.3,
    };
    gpu.kernels.attention_prefill.launch(&gpu.stream, &args).unwrap();
    let got = gpu.stream.download(out.view()).unwrap();
    let mut row = 1;
    for (sequence, &(rows, len)) in chunks.iter().enumerate() {
        let q: Vec<bf16> = (row..row + rows).flat_map(|row| q[row * q_stride..][..width].to_vec()).collect();
        let what = format!("{shape:?} chunk {rows} of {len} in {chunks:?}, window {window:?}");
        assert_close(
            &what,
            &widen(&got[row * width..(row + rows) * width]),
            &cache.expected(sequence, &q, window),
            TOLERANCE,
        );
        row += rows;
    }
    assert!(
        got[..width].iter().chain(&got[row * width..]).all(|value| value.is_nan()),
        "rows in no tile are not touched"
    );
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn prefill_chunks_are_causal() {
    let gpu = gpu();
    let mut rng = Rng(14);
    for shape in [
        shape(9, 3, 64),
        shape(8, 2, 128),
        shape(14, 2, 64),
        shape(3, 3, 96),
        shape(4, 1, 256),
        shape(16, 1, 64),
        shape(2, 2, 128),
    ] {
        check_prefill(&gpu, &mut rng, shape, &[(5, 5), (1, 1), (33, 80), (70, 70)], None);
    }
    check_prefill(&gpu, &mut rng, shape(8, 2, 128), &[(150, 333)], None);
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn prefill_keeps_to_its_window() {
    let gpu = gpu();
    let mut rng = Rng(15);
    check_prefill(&gpu, &mut rng, shape(4, 2, 64), &[(100, 150), (3, 3)], Some(40));
    check_prefill(&gpu, &mut rng, shape(4, 2, 128), &[(10, 300)], Some(64));
}

#[test]
#[ignore = "needs a GPU: --include-ignored"]
fn unsupported_shapes_are_refused() {
    assert!(AttentionDecode::supports(&shape(8, 3, 64)).is_err());
    assert!(AttentionDecode::supports(&shape(8, 2, 80)).is_err());
    assert!(AttentionDecode::supports(&shape(34, 2, 64)).is_err());
    assert!(
        AttentionDecode::supports(&HeadShape {
            block_size: 8,
            ..shape(8, 2, 64)
        })
        .is_err()
    );
    assert!(AttentionDecode::supports(&shape(32, 8, 128)).is_ok());
}
