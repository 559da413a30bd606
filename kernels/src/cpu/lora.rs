//! Shrink and expand for any mix of adapters: `y[rows, columns] += scaling · (x[rows] · Aᵀ) · Bᵀ`.
//!
//! Shapes   x `[m, d_in]` f32; per job A `[r, d_in]`, b_t `[r, d_out]` in f32 or bf16; y `[m, y_stride]` f32; row-major.
//! Order    shrink: vector lanes over `d_in`, one accumulator per (row, rank) pair, lanes added in a fixed order; expand: one chain over the
//!          rank in ascending order, then `y + scaling · sum`. So a row's bits don't depend on the rows beside it or on the threads.
//!          bf16 adapters are widened in registers; x is never rounded.
//! Cost     flops `2·rows·r·(d_in + d_out)`; A and B are read once for up to 6 rows: with few rows their bytes are the roof.
//! Threads  two sections (all shrinks, then all expands), each cut by cost over jobs, rows and ranks or columns.

use half::bf16;

use super::pool::{DisjointMut, ThreadPool};
use super::simd::{Isa, Simd, dispatch};

/// What A and B are stored in.
pub trait LoraElement: Copy + Sync + private::Load {}
impl LoraElement for f32 {}
impl LoraElement for bf16 {}

mod private {
    use super::*;

    /// Widening loads.
    #[expect(private_bounds, private_interfaces, reason = "seals LoraElement")]
    pub trait Load: Sized {
        fn load<S: Simd>(s: S, source: &[Self]) -> S::Vector;
        fn load_partial<S: Simd>(s: S, source: &[Self]) -> S::Vector;
    }

    #[expect(private_bounds, private_interfaces, reason = "seals LoraElement")]
    impl Load for f32 {
        #[inline(always)]
        fn load<S: Simd>(s: S, source: &[f32]) -> S::Vector {
            s.load(source)
        }
        #[inline(always)]
        fn load_partial<S: Simd>(s: S, source: &[f32]) -> S::Vector {
            s.load_partial(source)
        }
    }

    #[expect(private_bounds, private_interfaces, reason = "seals LoraElement")]
    impl Load for bf16 {
        #[inline(always)]
        fn load<S: Simd>(s: S, source: &[bf16]) -> S::Vector {
            s.load_bf16(source)
        }
        #[inline(always)]
        fn load_partial<S: Simd>(s: S, source: &[bf16]) -> S::Vector {
            s.load_partial_bf16(source)
        }
    }
}

/// One adapter's pair on one segment of rows: `y[rows, y_offset .. y_offset + d_out] += scaling · (x[rows] · Aᵀ) · Bᵀ`.
#[derive(Clone, Copy, Debug)]
pub struct LoraJob<'a, T = f32> {
    /// First row of the segment.
    pub row_start: usize,
    /// Rows of the segment.
    pub num_rows: usize,
    /// A `[lora_rank, d_in]`.
    pub a: &'a [T],
    /// B transposed, `[lora_rank, d_out]`.
    pub b_t: &'a [T],
    /// Rows of A.
    pub lora_rank: usize,
    /// Columns of y that the job adds to.
    pub d_out: usize,
    /// First of those columns.
    pub y_offset: usize,
    /// α/r or α/√r.
    pub scaling: f32,
}

/// Adds all jobs of one projection group (q, k, v share x; so do gate, up), with any mix of ranks, to `y`.
///
/// `x [m, d_in]`, `y [m, y_stride]`. `scratch` holds the shrunk rows; it grows as needed and is meant to be reused.
/// A row's result has the same bits whatever the rows beside it and whatever the number of threads.
/// Panics if a length disagrees, a job ends past `m` or `y_stride`, or two jobs add to the same elements.
/// Reference: [`reference::lora_shrink`](crate::reference::lora_shrink), [`reference::lora_expand`](crate::reference::lora_expand).
pub fn lora<T: LoraElement>(
    pool: &ThreadPool,
    x: &[f32],
    d_in: usize,
    jobs: &[LoraJob<'_, T>],
    y: &mut [f32],
    y_stride: usize,
    scratch: &mut Vec<f32>,
) {
    lora_with(Isa::detect(), pool, x, d_in, jobs, y, y_stride, scratch);
}

#[expect(clippy::too_many_arguments, reason = "the public function's, and the instruction set")]
fn lora_with<T: LoraElement>(
    isa: Isa,
    pool: &ThreadPool,
    x: &[f32],
    d_in: usize,
    jobs: &[LoraJob<'_, T>],
    y: &mut [f32],
    y_stride: usize,
    scratch: &mut Vec<f32>,
) {
    if jobs.is_empty() {
        return;
    }
    assert!(
        d_in > 0 && x.len().is_multiple_of(d_in),
        "x is [m, d_in] with d_in = {d_in}, not {} long",
        x.len()
    );
    let m = x.len() / d_in;
    assert_eq!(y.len(), m * y_stride, "y is [m, y_stride] = [{m}, {y_stride}]");
    for job in jobs {
        assert!(job.row_start + job.num_rows <= m, "rows {} + {} of {m}", job.row_start, job.num_rows);
        assert!(
            job.y_offset + job.d_out <= y_stride,
            "columns {} + {} of {y_stride}",
            job.y_offset,
            job.d_out
        );
        assert_eq!(job.a.len(), job.lora_rank * d_in, "A is [lora_rank, d_in] = [{}, {d_in}]", job.lora_rank);
        assert_eq!(
            job.b_t.len(),
            job.lora_rank * job.d_out,
            "b_t is [lora_rank, d_out] = [{}, {}]",
            job.lora_rank,
            job.d_out
        );
    }
    assert!(are_disjoint(jobs), "two LoRA jobs add to the same elements");

    let v_len = jobs.iter().map(|job| job.num_rows * job.lora_rank).sum();
    if scratch.len() < v_len {
        scratch.resize(v_len, 0.0);
    }
    let v = &mut scratch[..v_len];

    let shrink_cost = |job: &LoraJob<'_, T>| cost(job.num_rows, job.lora_rank * d_in);
    let shared_v = DisjointMut::new(v);
    run_by_cost(pool, jobs, shrink_cost, RANK_GROUP, &|job| job.lora_rank, &|job_idx, ranks, v_start| {
        let job = &jobs[job_idx];
        // SAFETY: the shrink of these ranks alone writes these columns of the job's part of v.
        let v_at = |row: usize, rank: usize, len: usize| unsafe { shared_v.slice(v_start + row * job.lora_rank + rank, len) };
        let rows = &x[job.row_start * d_in..][..job.num_rows * d_in];
        shrink(
            isa,
            &Shrink {
                x: rows,
                a: job.a,
                d_in,
                first_rank: ranks.start,
                end_rank: ranks.end,
                v_at: &v_at,
            },
        );
    });

    let v = &*v;
    let expand_cost = |job: &LoraJob<'_, T>| cost(job.num_rows, job.lora_rank * job.d_out);
    let shared_y = DisjointMut::new(y);
    run_by_cost(pool, jobs, expand_cost, COLUMN_GROUP, &|job| job.d_out, &|job_idx, columns, v_start| {
        let job = &jobs[job_idx];
        let first_column = job.y_offset + columns.start;
        // SAFETY: jobs are disjoint (asserted above), and so are the column groups of one job.
        let y_at = |row: usize| unsafe { shared_y.slice((job.row_start + row) * y_stride + first_column, columns.len()) };
        expand(
            isa,
            &Expand {
                v: &v[v_start..][..job.num_rows * job.lora_rank],
                lora_rank: job.lora_rank,
                b_t: job.b_t,
                d_out: job.d_out,
                first_column: columns.start,
                num_rows: job.num_rows,
                scaling: job.scaling,
                y_at: &y_at,
            },
        );
    });
}

/// Ranks that a task takes at least.
const RANK_GROUP: usize = 4;
/// How far ahead of its arithmetic one row's expand asks for B.
const RANKS_AHEAD: usize = 8;
/// Columns that a task takes at least: 16 AVX-512 registers.
const COLUMN_GROUP: usize = 256;

/// About nanoseconds on one core: each weight read once (4 a ns), each multiply-add done (48 a ns).
fn cost(num_rows: usize, weights: usize) -> usize {
    weights / 4 + num_rows * weights / 48
}

/// Cuts each job's `extent` (ranks or columns) into groups and the groups of all jobs, in order, into tasks of similar cost.
/// `run(job_idx, part of the extent, start of the job's v)`.
fn run_by_cost<T: LoraElement>(
    pool: &ThreadPool,
    jobs: &[LoraJob<'_, T>],
    cost: impl Fn(&LoraJob<'_, T>) -> usize + Sync,
    group: usize,
    extent: &(dyn Fn(&LoraJob<'_, T>) -> usize + Sync),
    run: &(dyn Fn(usize, std::ops::Range<usize>, usize) + Sync),
) {
    const TASK_COST: usize = 3_000;
    let total: usize = jobs.iter().map(&cost).sum();
    let num_tasks = (total / TASK_COST).clamp(1, 4 * pool.num_threads());
    pool.run(num_tasks, &|task| {
        // A group belongs to the task in whose share of the total its start lies.
        let share = task * total / num_tasks..(task + 1) * total / num_tasks;
        let is_last = task + 1 == num_tasks;
        let (mut job_start, mut v_start) = (0, 0);
        for (job_idx, job) in jobs.iter().enumerate() {
            let job_cost = cost(job);
            let num_groups = extent(job).div_ceil(group);
            let first_group_from = |at: usize| match at.checked_sub(job_start) {
                None => 0,
                Some(inside) => (inside * num_groups).div_ceil(job_cost.max(1)).min(num_groups),
            };
            let first = first_group_from(share.start);
            let end = if is_last { num_groups } else { first_group_from(share.end) };
            if first < end {
                run(job_idx, first * group..extent(job).min(end * group), v_start);
            }
            job_start += job_cost;
            v_start += job.num_rows * job.lora_rank;
        }
    });
}

/// Whether no two jobs share an element of y.
fn are_disjoint<T>(jobs: &[LoraJob<'_, T>]) -> bool {
    // Nearly always a few projections side by side, each with ascending segments.
    let mut projections: [(std::ops::Range<usize>, usize); 8] = std::array::from_fn(|_| (0..0, 0));
    let mut num_projections = 0;
    let is_usual = jobs.iter().all(|job| {
        let columns = job.y_offset..job.y_offset + job.d_out;
        let row_end = job.row_start + job.num_rows;
        for (known, last_row_end) in &mut projections[..num_projections] {
            if *known == columns {
                let ascending = job.row_start >= *last_row_end;
                *last_row_end = row_end;
                return ascending;
            }
            if known.start < columns.end && columns.start < known.end {
                return false;
            }
        }
        if num_projections == projections.len() {
            return false;
        }
        projections[num_projections] = (columns, row_end);
        num_projections += 1;
        true
    });
    let overlap = |a: &LoraJob<'_, T>, b: &LoraJob<'_, T>| {
        a.row_start < b.row_start + b.num_rows
            && b.row_start < a.row_start + a.num_rows
            && a.y_offset < b.y_offset + b.d_out
            && b.y_offset < a.y_offset + a.d_out
    };
    is_usual
        || jobs
            .iter()
            .enumerate()
            .all(|(idx, job)| jobs[..idx].iter().all(|earlier| !overlap(earlier, job)))
}

/// `v[row, rank] = x[row] · a[rank]` for some ranks.
struct Shrink<'a, 'v, T> {
    x: &'a [f32],
    a: &'a [T],
    d_in: usize,
    first_rank: usize,
    end_rank: usize,
    /// `(row, rank, len)`: where v goes.
    v_at: &'a dyn Fn(usize, usize, usize) -> &'v mut [f32],
}

fn shrink<T: LoraElement>(isa: Isa, shrink: &Shrink<'_, '_, T>) {
    dispatch!(fn run[T: LoraElement](shrink: &Shrink<'_, '_, T>) = shrink_body);
    run(isa, shrink);
}

/// The largest number of rows whose `rows x 4` accumulators fit the registers.
const fn max_rows<S: Simd>() -> usize {
    if S::LANES == 16 { 6 } else { 3 }
}

#[inline(always)]
fn shrink_body<S: Simd, T: LoraElement>(s: S, job: &Shrink<'_, '_, T>) {
    let mut rank = job.first_rank;
    while rank < job.end_rank {
        let ranks_here = if job.end_rank - rank >= RANK_GROUP { RANK_GROUP } else { 1 };
        let a = &job.a[rank * job.d_in..][..ranks_here * job.d_in];
        for (tile, x) in job.x.chunks(max_rows::<S>() * job.d_in).enumerate() {
            let first_row = tile * max_rows::<S>();
            macro_rules! run {
                ($($rows:literal)*) => {
                    match (x.len() / job.d_in, ranks_here) {
                        $(($rows, RANK_GROUP) => shrink_tile::<S, T, $rows, RANK_GROUP>(s, x, a, job, first_row, rank),)*
                        $(($rows, _) => shrink_tile::<S, T, $rows, 1>(s, x, a, job, first_row, rank),)*
                        (rows, _) => unreachable!("a tile of {rows} rows"),
                    }
                };
            }
            run!(1 2 3 4 5 6);
        }
        rank += ranks_here;
    }
}

#[inline(always)]
fn shrink_tile<S: Simd, T: LoraElement, const ROWS: usize, const RANKS: usize>(
    s: S,
    x: &[f32],
    a: &[T],
    job: &Shrink<'_, '_, T>,
    first_row: usize,
    first_rank: usize,
) {
    const BLOCK: usize = 16;
    let d_in = job.d_in;
    let num_blocks = d_in / BLOCK;
    let mut x_rows: [&[f32]; ROWS] = [&[]; ROWS];
    let mut x_blocks: [&[[f32; BLOCK]]; ROWS] = [&[]; ROWS];
    for row in 0..ROWS {
        x_rows[row] = &x[row * d_in..][..d_in];
        x_blocks[row] = &x_rows[row].as_chunks().0[..num_blocks];
    }
    let mut a_rows: [&[T]; RANKS] = [&[]; RANKS];
    let mut a_blocks: [&[[T; BLOCK]]; RANKS] = [&[]; RANKS];
    for rank in 0..RANKS {
        a_rows[rank] = &a[rank * d_in..][..d_in];
        a_blocks[rank] = &a_rows[rank].as_chunks().0[..num_blocks];
    }
    let mut sums = [[s.splat(0.0); RANKS]; ROWS];
    for block in 0..num_blocks {
        for lane in (0..BLOCK).step_by(S::LANES) {
            let mut a = [s.splat(0.0); RANKS];
            for (a, blocks) in a.iter_mut().zip(&a_blocks) {
                *a = T::load(s, &blocks[block][lane..]);
                if ROWS == 1 {
                    // A row of A is too short for the hardware to see it coming; the next group of them follows this one.
                    s.prefetch(blocks[block][lane..].as_ptr().wrapping_add(RANKS * d_in));
                }
            }
            for row in 0..ROWS {
                let x = s.load(&x_blocks[row][block][lane..]);
                for rank in 0..RANKS {
                    sums[row][rank] = s.fma(x, a[rank], sums[row][rank]);
                }
            }
        }
    }
    for k in (num_blocks * BLOCK..d_in).step_by(S::LANES) {
        for row in 0..ROWS {
            let x = s.load_partial(&x_rows[row][k..]);
            for rank in 0..RANKS {
                sums[row][rank] = s.fma(x, T::load_partial(s, &a_rows[rank][k..]), sums[row][rank]);
            }
        }
    }
    for (row, sums) in sums.into_iter().enumerate() {
        let v = (job.v_at)(first_row + row, first_rank, RANKS);
        for (v, sum) in v.iter_mut().zip(sums) {
            *v = s.sum(sum);
        }
    }
}

/// `y[row, columns] += scaling · Σ v[row, rank] · b_t[rank, columns]` for some columns.
struct Expand<'a, 'y, T> {
    v: &'a [f32],
    lora_rank: usize,
    b_t: &'a [T],
    d_out: usize,
    first_column: usize,
    num_rows: usize,
    scaling: f32,
    /// The columns of a row.
    y_at: &'a dyn Fn(usize) -> &'y mut [f32],
}

fn expand<T: LoraElement>(isa: Isa, expand: &Expand<'_, '_, T>) {
    dispatch!(fn run[T: LoraElement](expand: &Expand<'_, '_, T>) = expand_body);
    run(isa, expand);
}

#[inline(always)]
fn expand_body<S: Simd, T: LoraElement>(s: S, job: &Expand<'_, '_, T>) {
    let num_columns = (job.y_at)(0).len();
    let mut column = 0;
    while column < num_columns {
        let vectors_left = (num_columns - column) / S::LANES;
        // One row takes long runs of B; more rows share the registers.
        let vectors = match vectors_left {
            16.. if job.num_rows == 1 && S::LANES == 16 => 16,
            4.. => 4,
            _ => 1,
        };
        let mut row = 0;
        while row < job.num_rows {
            let rows_here = (job.num_rows - row).min(max_rows::<S>());
            macro_rules! run {
                ($($rows:literal)*) => {
                    match (rows_here, vectors) {
                        (1, 16) => expand_tile::<S, T, 1, 16>(s, job, row, column),
                        $(($rows, 4) => expand_tile::<S, T, $rows, 4>(s, job, row, column),)*
                        $(($rows, _) => expand_tile::<S, T, $rows, 1>(s, job, row, column),)*
                        (rows, _) => unreachable!("a tile of {rows} rows"),
                    }
                };
            }
            run!(1 2 3 4 5 6);
            row += rows_here;
        }
        column += vectors * S::LANES;
    }
}

#[inline(always)]
fn expand_tile<S: Simd, T: LoraElement, const ROWS: usize, const VECTORS: usize>(s: S, job: &Expand<'_, '_, T>, first_row: usize, column: usize) {
    let mut v: [&[f32]; ROWS] = [&[]; ROWS];
    for (row, v) in v.iter_mut().enumerate() {
        *v = &job.v[(first_row + row) * job.lora_rank..][..job.lora_rank];
    }
    let mut sums = [[s.splat(0.0); VECTORS]; ROWS];
    let first_column = job.first_column + column;
    let is_whole = first_column + VECTORS * S::LANES <= job.d_out;
    for (rank, b_row) in job.b_t.chunks_exact(job.d_out).enumerate() {
        let mut b = [s.splat(0.0); VECTORS];
        if is_whole {
            let b_row = &b_row[first_column..][..VECTORS * S::LANES];
            for (vector, b) in b.iter_mut().enumerate() {
                *b = T::load(s, &b_row[vector * S::LANES..]);
                if ROWS == 1 {
                    // Columns of a run of ranks lie apart: the hardware doesn't follow.
                    s.prefetch(b_row[vector * S::LANES..].as_ptr().wrapping_add(RANKS_AHEAD * job.d_out));
                }
            }
        } else {
            for (vector, b) in b.iter_mut().enumerate() {
                *b = T::load_partial(s, &b_row[(first_column + vector * S::LANES).min(job.d_out)..]);
            }
        }
        for row in 0..ROWS {
            let v = s.splat(v[row][rank]);
            for vector in 0..VECTORS {
                sums[row][vector] = s.fma(v, b[vector], sums[row][vector]);
            }
        }
    }
    for (row, sums) in sums.into_iter().enumerate() {
        let y = &mut (job.y_at)(first_row + row)[column..];
        for (sum, y) in sums.into_iter().zip(y.chunks_mut(S::LANES)) {
            let updated = s.fma(s.splat(job.scaling), sum, s.load_partial(y));
            s.store_partial(y, updated);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::test_data::{assert_close, random};
    use crate::reference;

    struct Adapter {
        a: Vec<f32>,
        b_t: Vec<f32>,
        rank: usize,
        row_start: usize,
        num_rows: usize,
        d_out: usize,
        y_offset: usize,
        scaling: f32,
    }

    fn adapters(segments: &[(usize, usize)], ranks: &[usize], projections: &[(usize, usize)], d_in: usize) -> Vec<Adapter> {
        let mut seed = 100;
        let mut adapters = Vec::new();
        for (idx, &(row_start, num_rows)) in segments.iter().enumerate() {
            for &(y_offset, d_out) in projections {
                let rank = ranks[(idx + y_offset) % ranks.len()];
                seed += 1;
                let (a, b_t) = (random(rank * d_in, seed), random(rank * d_out, seed + 1000));
                adapters.push(Adapter {
                    a,
                    b_t,
                    rank,
                    row_start,
                    num_rows,
                    d_out,
                    y_offset,
                    scaling: 0.5 + idx as f32,
                });
            }
        }
        adapters
    }

    fn jobs(adapters: &[Adapter]) -> Vec<LoraJob<'_>> {
        let mut jobs = Vec::new();
        for adapter in adapters {
            let Adapter {
                ref a,
                ref b_t,
                rank,
                row_start,
                num_rows,
                d_out,
                y_offset,
                scaling,
            } = *adapter;
            jobs.push(LoraJob {
                row_start,
                num_rows,
                a,
                b_t,
                lora_rank: rank,
                d_out,
                y_offset,
                scaling,
            });
        }
        jobs
    }

    fn expected(x: &[f32], d_in: usize, adapters: &[Adapter], y: &[f32], y_stride: usize) -> Vec<f32> {
        let mut y = y.to_vec();
        for adapter in adapters {
            let rows = &x[adapter.row_start * d_in..][..adapter.num_rows * d_in];
            let v = reference::lora_shrink(rows, d_in, &adapter.a, adapter.rank);
            let b: Vec<f32> = (0..adapter.d_out)
                .flat_map(|n| (0..adapter.rank).map(move |rank| (n, rank)))
                .map(|(n, rank)| adapter.b_t[rank * adapter.d_out + n])
                .collect();
            let y = &mut y[adapter.row_start * y_stride..][..adapter.num_rows * y_stride];
            reference::lora_expand(&v, adapter.rank, &b, adapter.d_out, adapter.scaling, y, y_stride, adapter.y_offset);
        }
        y
    }

    #[test]
    fn agrees_with_the_reference_for_mixed_ranks() {
        let pool = ThreadPool::new(2);
        for (d_in, projections) in [
            (64, vec![(0, 64), (64, 16), (80, 16)]),
            (100, vec![(0, 37), (40, 300)]),
            (576, vec![(0, 576), (576, 192)]),
            (7, vec![(3, 5)]),
        ] {
            let y_stride = projections.iter().map(|(offset, d_out)| offset + d_out).max().unwrap() + 1;
            // Rows 3 and 4 are base rows.
            let segments = [(0, 1), (1, 2), (5, 1), (6, 7), (13, 64), (77, 1)];
            let m = 80;
            let adapters = adapters(&segments, &[4, 16, 1, 33, 256, 6], &projections, d_in);
            let (x, y) = (random(m * d_in, 1), random(m * y_stride, 2));
            let expected = expected(&x, d_in, &adapters, &y, y_stride);
            for isa in Isa::available() {
                let mut got = y.clone();
                lora_with(isa, &pool, &x, d_in, &jobs(&adapters), &mut got, y_stride, &mut Vec::new());
                // Sums of up to 576 · 256 products of values below 1, scaled by up to 5.5.
                assert_close(&got, &expected, 1e-3, &format!("{isa:?} d_in {d_in}"));
                for base_row in [3, 4, 78, 79] {
                    assert_eq!(
                        got[base_row * y_stride..][..y_stride],
                        y[base_row * y_stride..][..y_stride],
                        "base rows keep their bits"
                    );
                }
            }
        }
    }

    #[test]
    fn bf16_adapters_give_what_their_widened_values_give() {
        let (d_in, m) = (100, 9);
        let pool = ThreadPool::new(2);
        let mut adapters = adapters(&[(0, 1), (2, 7)], &[5, 16], &[(0, 50), (50, 20)], d_in);
        let rounded: Vec<(Vec<bf16>, Vec<bf16>)> = adapters
            .iter_mut()
            .map(|adapter| {
                let round = |values: &mut Vec<f32>| -> Vec<bf16> {
                    let rounded: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
                    *values = rounded.iter().map(|value| value.to_f32()).collect();
                    rounded
                };
                (round(&mut adapter.a), round(&mut adapter.b_t))
            })
            .collect();
        let (x, y) = (random(m * d_in, 1), random(m * 70, 2));
        for isa in Isa::available() {
            let (mut from_f32, mut from_bf16) = (y.clone(), y.clone());
            let f32_jobs = jobs(&adapters);
            let bf16_jobs: Vec<LoraJob<'_, bf16>> = f32_jobs
                .iter()
                .zip(&rounded)
                .map(|(job, (a, b_t))| LoraJob {
                    row_start: job.row_start,
                    num_rows: job.num_rows,
                    a,
                    b_t,
                    lora_rank: job.lora_rank,
                    d_out: job.d_out,
                    y_offset: job.y_offset,
                    scaling: job.scaling,
                })
                .collect();
            lora_with(isa, &pool, &x, d_in, &f32_jobs, &mut from_f32, 70, &mut Vec::new());
            lora_with(isa, &pool, &x, d_in, &bf16_jobs, &mut from_bf16, 70, &mut Vec::new());
            assert_eq!(from_f32, from_bf16);
            assert_ne!(from_f32, y);
        }
    }

    #[test]
    fn a_row_has_the_same_bits_in_any_segment_and_on_any_number_of_threads() {
        let (d_in, d_out, m, rank) = (150, 330, 40, 21);
        let (x, y, a, b_t) = (random(m * d_in, 1), random(m * d_out, 2), random(rank * d_in, 3), random(rank * d_out, 4));
        let job = |row_start: usize, num_rows: usize| LoraJob {
            row_start,
            num_rows,
            a: &a,
            b_t: &b_t,
            lora_rank: rank,
            d_out,
            y_offset: 0,
            scaling: 0.7,
        };
        for isa in Isa::available() {
            let run = |threads: usize, jobs: &[LoraJob<'_>]| {
                let mut y = y.clone();
                lora_with(isa, &ThreadPool::new(threads), &x, d_in, jobs, &mut y, d_out, &mut Vec::new());
                y.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let together = run(1, &[job(0, m)]);
            assert_eq!(together, run(3, &[job(0, m)]));
            let alone: Vec<_> = (0..m).map(|row| job(row, 1)).collect();
            assert_eq!(together, run(2, &alone));
            assert_eq!(together, run(2, &[job(0, 2), job(2, 7), job(9, 31)]));
        }
    }

    #[test]
    fn overlapping_jobs_are_refused() {
        let (a, b_t) = (vec![0.0; 8], vec![0.0; 8]);
        let job = |row_start, num_rows, y_offset| LoraJob {
            row_start,
            num_rows,
            a: &a,
            b_t: &b_t,
            lora_rank: 1,
            d_out: 8,
            y_offset,
            scaling: 1.0,
        };
        assert!(are_disjoint(&[job(0, 2, 0), job(2, 1, 0), job(0, 2, 8), job(2, 1, 8)]));
        assert!(are_disjoint(&[job(0, 2, 0), job(0, 2, 8), job(2, 1, 0)]));
        assert!(are_disjoint(&[job(2, 1, 0), job(0, 2, 0)]), "any order will do");
        assert!(are_disjoint(&[job(0, 1, 0), job(1, 1, 4)]), "columns may overlap in other rows");
        assert!(!are_disjoint(&[job(0, 2, 0), job(1, 1, 0)]));
        assert!(!are_disjoint(&[job(0, 2, 0), job(1, 1, 7)]));
    }
}
