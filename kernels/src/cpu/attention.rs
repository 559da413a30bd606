//! Causal attention over the paged cache, for any mix of prefill chunks and decode rows.
//!
//! Shapes   q, out `[m, num_heads · head_dim]` f32; per sequence its rows, context length and block table.
//! Layout   one layer's cache, f32: v `[num_blocks, num_kv_heads, block_size, head_dim]`; k transposed inside a block,
//!          `[num_blocks, num_kv_heads, head_dim, block_size]`, so that a score is a chain over `head_dim` in one lane and 16 positions
//!          are one load. [`write_kv`] is the only writer.
//! Order    tiles of 64 positions counted from position 0, online softmax from tile to tile, each output one chain over the positions:
//!          a row's bits depend neither on the chunk that it came in, nor on the rows beside it, nor on the threads.
//! Cost     flops `4 · head_dim · num_heads · Σ visible positions`; K and V are read once for the heads of a group and up to 48 / group rows.
//! Threads  over (sequence, block of rows, kv head).

use super::buffer::AlignedBuffer;
use super::pool::{DisjointMut, ThreadPool};
use super::simd::{Isa, Simd, dispatch, exp};

/// Positions in a tile.
const TILE: usize = 64;
/// Positions in one group of a tile: what is loaded at once from k.
const GROUP: usize = 16;
const GROUPS: usize = TILE / GROUP;
/// Query vectors (rows times heads of a group) that share a pass over K and V.
const QUERY_BLOCK: usize = 48;

/// The rows of one sequence: row `i` is at position `context_len - num_rows + i` and sees the positions up to its own.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSequence<'a> {
    /// First row of q and out.
    pub row_start: usize,
    /// Rows.
    pub num_rows: usize,
    /// Positions in the cache, these rows' own included.
    pub context_len: usize,
    /// `block_table[p / block_size]` holds position `p`.
    pub block_table: &'a [u32],
}

/// What all sequences share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads; a multiple of `num_kv_heads`.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Length of a head's vectors.
    pub head_dim: usize,
    /// Positions in a block.
    pub block_size: usize,
    /// What scores are multiplied by; usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// `Some(w)`: a row sees the last `w` positions only, its own included.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// f32 values of one block in each of k and v.
    pub fn block_len(&self) -> usize {
        self.num_kv_heads * self.block_size * self.head_dim
    }

    fn check(&self) {
        let Self {
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
            window,
            ..
        } = *self;
        assert!(
            num_kv_heads > 0 && num_heads > 0 && num_heads.is_multiple_of(num_kv_heads),
            "{num_heads} heads over {num_kv_heads} kv heads"
        );
        assert!(
            head_dim > 0 && block_size > 0 && window != Some(0),
            "head_dim, block_size and window are at least 1"
        );
    }
}

/// Writes rows `[m, num_kv_heads · head_dim]` of k and v to their slots (`block_id · block_size + offset`) of one layer's cache.
/// The layouts of the two caches differ and are [`paged_attention`]'s business.
///
/// Panics if a length disagrees or a slot is outside the cache.
pub fn write_kv(shape: &AttentionShape, k: &[f32], v: &[f32], kv_slots: &[u32], k_cache: &mut [f32], v_cache: &mut [f32]) {
    shape.check();
    let (head_dim, block_size) = (shape.head_dim, shape.block_size);
    let row_len = shape.num_kv_heads * head_dim;
    assert_eq!(
        k.len(),
        kv_slots.len() * row_len,
        "k is [m, num_kv_heads * head_dim] = [{}, {row_len}]",
        kv_slots.len()
    );
    assert_eq!(v.len(), k.len(), "v is as long as k");
    assert_eq!(k_cache.len(), v_cache.len(), "the caches are of one size");
    for ((k, v), &kv_slot) in k.chunks_exact(row_len).zip(v.chunks_exact(row_len)).zip(kv_slots) {
        let (block, offset) = (kv_slot as usize / block_size, kv_slot as usize % block_size);
        let k_block = &mut k_cache[block * shape.block_len()..][..shape.block_len()];
        let v_block = &mut v_cache[block * shape.block_len()..][..shape.block_len()];
        // Heads and their elements follow each other with one stride.
        for (element, k_column) in k.iter().zip(k_block.chunks_exact_mut(block_size)) {
            k_column[offset] = *element;
        }
        for (v, v_head) in v.chunks_exact(head_dim).zip(v_block.chunks_exact_mut(block_size * head_dim)) {
            v_head[offset * head_dim..][..head_dim].copy_from_slice(v);
        }
    }
}

/// `out[row] = softmax(scale · q[row] · Kᵀ) · V` over the positions that the row sees, for every row of every sequence.
/// Rows in no sequence are not touched.
///
/// `k`, `v`: one layer's caches, `num_blocks · block_len()` long, as [`write_kv`] filled them.
/// Panics if a length disagrees, rows of two sequences overlap or descend, or a block table is too short or names a block outside the cache.
/// Source: online softmax, arXiv:1805.02867. Reference: [`reference::attention`](crate::reference::attention).
pub fn paged_attention(
    pool: &ThreadPool,
    shape: &AttentionShape,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    sequences: &[AttentionSequence<'_>],
    out: &mut [f32],
) {
    paged_attention_with(Isa::detect(), pool, shape, q, k, v, sequences, out);
}

#[expect(clippy::too_many_arguments, reason = "the public function's, and the instruction set")]
fn paged_attention_with(
    isa: Isa,
    pool: &ThreadPool,
    shape: &AttentionShape,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    sequences: &[AttentionSequence<'_>],
    out: &mut [f32],
) {
    shape.check();
    let row_len = shape.num_heads * shape.head_dim;
    assert!(
        q.len().is_multiple_of(row_len),
        "q is [m, num_heads * head_dim] with rows of {row_len}, not {} long",
        q.len()
    );
    assert_eq!(q.len(), out.len(), "out is as long as q");
    assert_eq!(k.len(), v.len(), "the caches are of one size");
    let mut row_end = 0;
    for sequence in sequences {
        let AttentionSequence {
            row_start,
            num_rows,
            context_len,
            block_table,
        } = *sequence;
        assert!(row_start >= row_end, "rows of sequences ascend: row {row_start} comes after {row_end}");
        row_end = row_start + num_rows;
        assert!(num_rows <= context_len, "{num_rows} rows in a context of {context_len}");
        let num_blocks = context_len.div_ceil(shape.block_size);
        assert!(
            block_table.len() >= num_blocks,
            "{context_len} positions need {num_blocks} blocks, the table has {}",
            block_table.len()
        );
        for &block in &block_table[..num_blocks] {
            assert!((block as usize + 1) * shape.block_len() <= k.len(), "block {block} is outside the cache");
        }
    }
    assert!(row_end * row_len <= q.len(), "rows up to {row_end} of {}", q.len() / row_len);

    let group = shape.num_heads / shape.num_kv_heads;
    let block_rows = (QUERY_BLOCK / group).max(1);
    // Where each sequence's units (block of rows, kv head) start.
    let mut unit_starts = Vec::with_capacity(sequences.len() + 1);
    let mut num_units = 0;
    let mut cost = 0;
    for sequence in sequences {
        unit_starts.push(num_units);
        num_units += sequence.num_rows.div_ceil(block_rows) * shape.num_kv_heads;
        // About nanoseconds: 16 multiply-adds each.
        cost += sequence.num_rows * sequence.context_len * row_len * 2 / 16;
    }
    const TASK_COST: usize = 4_000;
    let num_tasks = (cost / TASK_COST).clamp(1, num_units.clamp(1, 32 * pool.num_threads()));
    let out = DisjointMut::new(out);
    pool.run(num_tasks, &|task| {
        let mut scratch = AlignedBuffer::default();
        for unit in task * num_units / num_tasks..(task + 1) * num_units / num_tasks {
            let sequence_idx = unit_starts.partition_point(|&start| start <= unit) - 1;
            let sequence = &sequences[sequence_idx];
            let unit_in_sequence = unit - unit_starts[sequence_idx];
            let (row_block, kv_head) = (unit_in_sequence / shape.num_kv_heads, unit_in_sequence % shape.num_kv_heads);
            let first_row = row_block * block_rows;
            let num_rows = block_rows.min(sequence.num_rows - first_row);
            // SAFETY: sequences' rows are disjoint (asserted above), and so are the units' rows and heads of one sequence.
            let out_at = |row: usize, head: usize| unsafe {
                out.slice((sequence.row_start + first_row + row) * row_len + head * shape.head_dim, shape.head_dim)
            };
            let unit = Unit {
                shape,
                q: &q[(sequence.row_start + first_row) * row_len..][..num_rows * row_len],
                k,
                v,
                block_table: sequence.block_table,
                num_rows,
                first_position: sequence.context_len - sequence.num_rows + first_row,
                kv_head,
                out_at: &out_at,
            };
            attend(isa, &unit, &mut scratch);
        }
    });
}

/// A block of rows of one sequence under the heads of one kv head.
struct Unit<'a, 'o> {
    shape: &'a AttentionShape,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    block_table: &'a [u32],
    num_rows: usize,
    /// Of row 0.
    first_position: usize,
    kv_head: usize,
    /// `(row, head)`: where its output goes.
    out_at: &'a dyn Fn(usize, usize) -> &'o mut [f32],
}

impl Unit<'_, '_> {
    /// Positions that a row sees.
    fn visible(&self, row: usize) -> std::ops::Range<usize> {
        let end = self.first_position + row + 1;
        self.shape.window.map_or(0, |window| end.saturating_sub(window))..end
    }

    /// Where the block with `position`, and the kv head in it, starts in k and v; and the position's place in the block.
    fn locate(&self, position: usize) -> (usize, usize) {
        let AttentionShape {
            num_kv_heads,
            head_dim,
            block_size,
            ..
        } = *self.shape;
        let block = self.block_table[position / block_size] as usize;
        ((block * num_kv_heads + self.kv_head) * block_size * head_dim, position % block_size)
    }
}

dispatch!(fn attend(unit: &Unit<'_, '_>, scratch: &mut AlignedBuffer) = attend_body);

/// Query vectors in a register tile: 6 x 4 accumulators of 32 registers, 3 x 4 of 16.
const fn max_vectors<S: Simd>() -> usize {
    if S::LANES == 16 { 6 } else { 3 }
}

#[inline(always)]
fn attend_body<S: Simd>(s: S, unit: &Unit<'_, '_>, scratch: &mut AlignedBuffer) {
    let head_dim = unit.shape.head_dim;
    let group = unit.shape.num_heads / unit.shape.num_kv_heads;
    let num_vectors = unit.num_rows * group;
    let tile_vectors = max_vectors::<S>();

    let scratch_len = num_vectors * (TILE + 2 * head_dim + 3) + head_dim * TILE;
    scratch.reserve(scratch_len * size_of::<f32>());
    let (scores, rest) = scratch.prefix_mut::<f32>(scratch_len).split_at_mut(num_vectors * TILE);
    let (gathered, rest) = rest.split_at_mut(head_dim * TILE);
    let (sums, rest) = rest.split_at_mut(num_vectors * head_dim);
    let (q, rest) = rest.split_at_mut(num_vectors * head_dim);
    let (max_scores, rest) = rest.split_at_mut(num_vectors);
    let (weight_sums, corrections) = rest.split_at_mut(num_vectors);
    let scores = scores.as_chunks_mut::<TILE>().0;
    sums.fill(0.0);
    weight_sums.fill(0.0);
    max_scores.fill(f32::NEG_INFINITY);

    // q, scaled, in register tiles `[head_dim][vectors of the tile]`.
    for (tile, q) in q.chunks_mut(tile_vectors * head_dim).enumerate() {
        let tile_len = q.len() / head_dim;
        for idx in 0..tile_len {
            let vector = tile * tile_vectors + idx;
            let (row, head) = (vector / group, unit.kv_head * group + vector % group);
            let source = &unit.q[(row * unit.shape.num_heads + head) * head_dim..][..head_dim];
            for (element, q) in source.iter().zip(q[idx..].iter_mut().step_by(tile_len)) {
                *q = element * unit.shape.scale;
            }
        }
    }

    let last_position = unit.first_position + unit.num_rows - 1;
    let first_tile = unit.visible(0).start / TILE;
    for tile_start in (first_tile * TILE..=last_position).step_by(TILE) {
        // Rows that see something of this tile: neighbours, as positions ascend.
        let is_active = |row: &usize| {
            let visible = unit.visible(*row);
            visible.start < tile_start + TILE && visible.end > tile_start
        };
        let Some(first_row) = (0..unit.num_rows).find(is_active) else { continue };
        let end_row = (first_row..unit.num_rows).find(|row| !is_active(row)).unwrap_or(unit.num_rows);
        let tile_len = TILE.min(unit.visible(end_row - 1).end - tile_start);
        let active = first_row * group..end_row * group;

        let (keys, stride) = keys_of_tile(unit, tile_start, tile_len, gathered);
        let first_of_tiles = active.start / tile_vectors * tile_vectors;
        for start in (first_of_tiles..active.end).step_by(tile_vectors) {
            let vectors_here = tile_vectors.min(num_vectors - start);
            let q = &q[start * head_dim..][..vectors_here * head_dim];
            let scores = &mut scores[start..][..vectors_here];
            macro_rules! run {
                ($($vectors:literal)*) => {
                    match vectors_here {
                        $($vectors => score_tile::<S, $vectors>(s, q.as_chunks().0, &keys, stride, tile_len, scores),)*
                        vectors => unreachable!("a tile of {vectors} query vectors"),
                    }
                };
            }
            run!(1 2 3 4 5 6);
        }

        for vector in first_of_tiles..num_vectors.min(active.end.next_multiple_of(tile_vectors)) {
            if !active.contains(&vector) {
                // In a register tile with active ones, but sees nothing here: nothing is added.
                scores[vector].fill(0.0);
                corrections[vector] = 1.0;
                continue;
            }
            let visible = unit.visible(vector / group);
            let (low, high) = (visible.start.saturating_sub(tile_start), (visible.end - tile_start).min(TILE));
            corrections[vector] = soften(s, &mut scores[vector], low, high, &mut max_scores[vector], &mut weight_sums[vector]);
        }

        for start in (first_of_tiles..active.end).step_by(tile_vectors) {
            let vectors_here = tile_vectors.min(num_vectors - start);
            let sums = &mut sums[start * head_dim..][..vectors_here * head_dim];
            let (scores, corrections) = (&scores[start..][..vectors_here], &corrections[start..][..vectors_here]);
            macro_rules! run {
                ($($vectors:literal)*) => {
                    match vectors_here {
                        $($vectors => add_values::<S, $vectors>(s, unit, tile_start, tile_len, scores, corrections, sums),)*
                        vectors => unreachable!("a tile of {vectors} query vectors"),
                    }
                };
            }
            run!(1 2 3 4 5 6);
        }
    }

    for vector in 0..num_vectors {
        let out = (unit.out_at)(vector / group, unit.kv_head * group + vector % group);
        let scale = s.splat(1.0 / weight_sums[vector]);
        let sums = &sums[vector * head_dim..][..head_dim];
        for (out, sums) in out.chunks_mut(S::LANES).zip(sums.chunks(S::LANES)) {
            s.store_partial(out, s.mul(s.load_partial(sums), scale));
        }
    }
}

/// The keys of a tile's groups, each `[head_dim]` runs of 16 positions a stride apart: in the cache where blocks are whole groups, else
/// copied to `gathered`. Groups past `tile_len` are the first one again.
#[inline(always)]
fn keys_of_tile<'a>(unit: &Unit<'a, '_>, tile_start: usize, tile_len: usize, gathered: &'a mut [f32]) -> ([&'a [f32]; GROUPS], usize) {
    let AttentionShape { head_dim, block_size, .. } = *unit.shape;
    let num_groups = tile_len.div_ceil(GROUP);
    if block_size.is_multiple_of(GROUP) {
        let mut keys: [&[f32]; GROUPS] = [&[]; GROUPS];
        for (group, keys) in keys.iter_mut().enumerate() {
            let group = if group < num_groups { group } else { 0 };
            let (start, offset) = unit.locate(tile_start + group * GROUP);
            *keys = &unit.k[start + offset..][..(head_dim - 1) * block_size + GROUP];
        }
        return (keys, block_size);
    }
    for position in 0..tile_len {
        let (start, offset) = unit.locate(tile_start + position);
        let source = unit.k[start..][..head_dim * block_size].iter().skip(offset).step_by(block_size);
        for (target, key) in gathered[position..].iter_mut().step_by(TILE).zip(source) {
            *target = *key;
        }
    }
    let mut keys: [&[f32]; GROUPS] = [&[]; GROUPS];
    for (group, keys) in keys.iter_mut().enumerate() {
        *keys = &gathered[group * GROUP..][..(head_dim - 1) * TILE + GROUP];
    }
    (keys, TILE)
}

/// `scores[vector][position] = Σ q[element][vector] · key[element][position]` for the positions that the tile has, in whole registers.
#[inline(always)]
fn score_tile<S: Simd, const VECTORS: usize>(
    s: S,
    q: &[[f32; VECTORS]],
    keys: &[&[f32]; GROUPS],
    stride: usize,
    tile_len: usize,
    scores: &mut [[f32; TILE]],
) {
    let mut first = 0;
    while first < tile_len {
        // The last tile of a sequence is seldom full.
        if tile_len - first > 2 * S::LANES {
            score_columns::<S, VECTORS, 4>(s, q, keys, stride, first, scores);
            first += 4 * S::LANES;
        } else {
            score_columns::<S, VECTORS, 2>(s, q, keys, stride, first, scores);
            first += 2 * S::LANES;
        }
    }
}

/// The scores of `REGISTERS` registers of positions from `first`.
#[inline(always)]
fn score_columns<S: Simd, const VECTORS: usize, const REGISTERS: usize>(
    s: S,
    q: &[[f32; VECTORS]],
    keys: &[&[f32]; GROUPS],
    stride: usize,
    first: usize,
    scores: &mut [[f32; TILE]],
) {
    let mut keys_at: [&[f32]; REGISTERS] = [&[]; REGISTERS];
    for (register, keys_at) in keys_at.iter_mut().enumerate() {
        let position = first + register * S::LANES;
        *keys_at = &keys[position / GROUP][position % GROUP..];
    }
    let mut sums = [[s.splat(0.0); REGISTERS]; VECTORS];
    for (element, q) in q.iter().enumerate() {
        let mut key = [s.splat(0.0); REGISTERS];
        for (key, keys_at) in key.iter_mut().zip(&keys_at) {
            *key = s.load(&keys_at[element * stride..]);
        }
        for vector in 0..VECTORS {
            let q = s.splat(q[vector]);
            for register in 0..REGISTERS {
                sums[vector][register] = s.fma(q, key[register], sums[vector][register]);
            }
        }
    }
    for (scores, sums) in scores.iter_mut().zip(sums) {
        for (register, sums) in sums.into_iter().enumerate() {
            s.store(&mut scores[first + register * S::LANES..], sums);
        }
    }
}

/// Turns a tile's scores into weights `e^(score - max)`, zero outside `low..high`, and returns what earlier sums are to be multiplied by.
#[inline(always)]
fn soften<S: Simd>(s: S, scores: &mut [f32; TILE], low: usize, high: usize, max_score: &mut f32, weight_sum: &mut f32) -> f32 {
    scores[..low].fill(f32::NEG_INFINITY);
    scores[high..].fill(f32::NEG_INFINITY);
    let mut max = s.splat(*max_score);
    for scores in scores.chunks_exact(S::LANES) {
        max = s.max(max, s.load(scores));
    }
    let new_max = s.max_lane(max);
    let mut sum = s.splat(0.0);
    for scores in scores.chunks_exact_mut(S::LANES) {
        let weights = exp(s, s.sub(s.load(scores), s.splat(new_max)));
        sum = s.add(sum, weights);
        s.store(scores, weights);
    }
    let mut correction = [0.0; 16];
    s.store(&mut correction, exp(s, s.splat(*max_score - new_max)));
    *weight_sum = *weight_sum * correction[0] + s.sum(sum);
    *max_score = new_max;
    correction[0]
}

/// `sums[vector] = sums[vector] · correction + Σ weight[position] · value[position]`, positions in ascending order.
#[inline(always)]
fn add_values<S: Simd, const VECTORS: usize>(
    s: S,
    unit: &Unit<'_, '_>,
    tile_start: usize,
    tile_len: usize,
    weights: &[[f32; TILE]],
    corrections: &[f32],
    sums: &mut [f32],
) {
    let head_dim = unit.shape.head_dim;
    let mut element = 0;
    while element + 4 * S::LANES <= head_dim {
        add_value_columns::<S, VECTORS, 4>(s, unit, tile_start, tile_len, weights, corrections, sums, element);
        element += 4 * S::LANES;
    }
    while element < head_dim {
        add_value_columns::<S, VECTORS, 1>(s, unit, tile_start, tile_len, weights, corrections, sums, element);
        element += S::LANES;
    }
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "one register tile of the function above")]
fn add_value_columns<S: Simd, const VECTORS: usize, const REGISTERS: usize>(
    s: S,
    unit: &Unit<'_, '_>,
    tile_start: usize,
    tile_len: usize,
    weights: &[[f32; TILE]],
    corrections: &[f32],
    sums: &mut [f32],
    element: usize,
) {
    let AttentionShape { head_dim, block_size, .. } = *unit.shape;
    let weights: &[[f32; TILE]; VECTORS] = weights.try_into().expect("weights of each vector");
    let is_whole = element + REGISTERS * S::LANES <= head_dim;
    let mut totals = [[s.splat(0.0); REGISTERS]; VECTORS];
    for (vector, totals) in totals.iter_mut().enumerate() {
        let correction = s.splat(corrections[vector]);
        let sums = &sums[vector * head_dim..][..head_dim];
        for (register, total) in totals.iter_mut().enumerate() {
            *total = s.mul(correction, s.load_partial(&sums[element + register * S::LANES..]));
        }
    }
    let mut position = 0;
    while position < tile_len {
        let (start, offset) = unit.locate(tile_start + position);
        let end = tile_len.min(position + block_size - offset);
        let values = unit.v[start..][..block_size * head_dim][offset * head_dim..].chunks_exact(head_dim);
        for (position, value) in (position..end).zip(values) {
            let mut values = [s.splat(0.0); REGISTERS];
            if is_whole {
                let value = &value[element..][..REGISTERS * S::LANES];
                for (register, values) in values.iter_mut().enumerate() {
                    *values = s.load(&value[register * S::LANES..]);
                }
            } else {
                for (register, values) in values.iter_mut().enumerate() {
                    *values = s.load_partial(&value[element + register * S::LANES..]);
                }
            }
            for vector in 0..VECTORS {
                let weight = s.splat(weights[vector][position % TILE]);
                for register in 0..REGISTERS {
                    totals[vector][register] = s.fma(weight, values[register], totals[vector][register]);
                }
            }
        }
        position = end;
    }
    for (vector, totals) in totals.into_iter().enumerate() {
        let sums = &mut sums[vector * head_dim..][..head_dim];
        for (register, total) in totals.into_iter().enumerate() {
            s.store_partial(&mut sums[element + register * S::LANES..], total);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::test_data::{assert_close, random};
    use crate::reference;

    /// Sequences `(rows, context)` with their K and V, plainly and in a cache whose blocks lie in a scrambled order.
    struct Case {
        shape: AttentionShape,
        q: Vec<f32>,
        k: Vec<Vec<f32>>,
        v: Vec<Vec<f32>>,
        block_tables: Vec<Vec<u32>>,
        k_cache: Vec<f32>,
        v_cache: Vec<f32>,
        sequences: Vec<(usize, usize)>,
    }

    impl Case {
        fn new(shape: AttentionShape, sequences: &[(usize, usize)]) -> Self {
            let row_len = shape.num_kv_heads * shape.head_dim;
            let num_rows: usize = sequences.iter().map(|(rows, _)| rows).sum();
            let num_blocks: usize = sequences.iter().map(|(_, context)| context.div_ceil(shape.block_size)).sum();
            // Every block twice as far, from the end: neighbours in a table are never neighbours in memory.
            let mut free_blocks = (0..2 * num_blocks as u32).filter(|block| block % 2 == 1);
            // What was never written must not matter.
            let (mut k_cache, mut v_cache) = (
                vec![f32::NAN; 2 * num_blocks * shape.block_len()],
                vec![f32::NAN; 2 * num_blocks * shape.block_len()],
            );
            let (mut ks, mut vs, mut block_tables) = (vec![], vec![], vec![]);
            for (idx, &(_, context)) in sequences.iter().enumerate() {
                let (k, v) = (random(context * row_len, 10 + idx as u64), random(context * row_len, 90 + idx as u64));
                let mut table: Vec<u32> = free_blocks.by_ref().take(context.div_ceil(shape.block_size)).collect();
                table.reverse();
                let slots: Vec<u32> = (0..context)
                    .map(|p| table[p / shape.block_size] * shape.block_size as u32 + (p % shape.block_size) as u32)
                    .collect();
                write_kv(&shape, &k, &v, &slots, &mut k_cache, &mut v_cache);
                ks.push(k);
                vs.push(v);
                block_tables.push(table);
            }
            let q = random(num_rows * shape.num_heads * shape.head_dim, 5)
                .iter()
                .map(|value| value * 4.0)
                .collect();
            Self {
                shape,
                q,
                k: ks,
                v: vs,
                block_tables,
                k_cache,
                v_cache,
                sequences: sequences.to_vec(),
            }
        }

        fn expected(&self) -> Vec<f32> {
            let AttentionShape {
                num_heads,
                num_kv_heads,
                head_dim,
                scale,
                window,
                ..
            } = self.shape;
            let mut q = &self.q[..];
            let mut out = Vec::new();
            for (idx, &(rows, _)) in self.sequences.iter().enumerate() {
                let (here, rest) = q.split_at(rows * num_heads * head_dim);
                out.extend(reference::attention(
                    here,
                    &self.k[idx],
                    &self.v[idx],
                    num_heads,
                    num_kv_heads,
                    head_dim,
                    scale,
                    window,
                ));
                q = rest;
            }
            out
        }

        fn sequences(&self) -> Vec<AttentionSequence<'_>> {
            let mut row_start = 0;
            let mut sequences = Vec::new();
            for (&(num_rows, context_len), block_table) in self.sequences.iter().zip(&self.block_tables) {
                sequences.push(AttentionSequence {
                    row_start,
                    num_rows,
                    context_len,
                    block_table,
                });
                row_start += num_rows;
            }
            sequences
        }

        fn run(&self, isa: Isa, threads: usize, sequences: &[AttentionSequence<'_>], q: &[f32]) -> Vec<f32> {
            let mut out = vec![f32::NAN; q.len()];
            paged_attention_with(
                isa,
                &ThreadPool::new(threads),
                &self.shape,
                q,
                &self.k_cache,
                &self.v_cache,
                sequences,
                &mut out,
            );
            out
        }
    }

    fn shape(num_heads: usize, num_kv_heads: usize, head_dim: usize, block_size: usize, window: Option<usize>) -> AttentionShape {
        AttentionShape {
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
            scale: 1.0 / (head_dim as f32).sqrt(),
            window,
        }
    }

    #[test]
    fn agrees_with_the_reference() {
        let mixed = [(1, 1), (1, 64), (3, 65), (70, 70), (1, 300), (20, 130), (1, 16), (5, 5)];
        for shape in [
            shape(9, 3, 64, 16, None),
            shape(4, 4, 32, 32, None),
            shape(8, 1, 128, 64, None),
            shape(2, 2, 80, 8, None),
            shape(6, 2, 20, 5, None),
            shape(2, 1, 256, 1, None),
            shape(9, 3, 64, 16, Some(40)),
            shape(2, 2, 8, 16, Some(1)),
            shape(64, 1, 16, 48, Some(100)),
        ] {
            let case = Case::new(shape, &mixed);
            let expected = case.expected();
            for isa in Isa::available() {
                assert_close(
                    &case.run(isa, 2, &case.sequences(), &case.q),
                    &expected,
                    1e-5,
                    &format!("{isa:?} {shape:?}"),
                );
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_in_any_chunk_and_on_any_number_of_threads() {
        for window in [None, Some(50)] {
            let case = Case::new(shape(9, 3, 64, 16, window), &[(200, 200)]);
            let row_len = 9 * 64;
            let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
            for isa in Isa::available() {
                let whole = bits(case.run(isa, 1, &case.sequences(), &case.q));
                assert_eq!(whole, bits(case.run(isa, 3, &case.sequences(), &case.q)));
                for (first, rows) in [(0, 1), (199, 1), (63, 2), (64, 1), (10, 100), (150, 50)] {
                    let chunk = AttentionSequence {
                        row_start: 0,
                        num_rows: rows,
                        context_len: first + rows,
                        block_table: &case.block_tables[0],
                    };
                    let got = bits(case.run(isa, 2, &[chunk], &case.q[first * row_len..][..rows * row_len]));
                    assert_eq!(
                        got,
                        whole[first * row_len..][..rows * row_len],
                        "{isa:?} window {window:?} rows {first} + {rows}"
                    );
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "block 7 is outside the cache")]
    fn a_block_outside_the_cache_is_refused() {
        let case = Case::new(shape(2, 1, 8, 16, None), &[(1, 20)]);
        let sequence = AttentionSequence {
            row_start: 0,
            num_rows: 1,
            context_len: 20,
            block_table: &[1, 7],
        };
        case.run(Isa::Portable, 1, &[sequence], &case.q);
    }
}
