//! `y = x · Wᵀ + bias` for few to many rows over a weight matrix packed once at load.
//!
//! Shapes   x `[m, k]` f32, W `[n, k]` f32 or bf16, bias `[n]`, y `[m, n]` f32, row-major.
//! Layout   W in panels of 32 rows, each `[k][32]` (f32) or `[k / 2][32][2]` (bf16 pairs, as `vdpbf16ps` takes them); k padded with zeros
//!          to blocks of 16 f32 or 16 pairs, n to whole panels. One layout for every instruction set.
//! Order    each y element is one chain of fused multiply-adds over k in ascending order, in one lane: its bits depend neither on m, nor on
//!          its row's place in the batch, nor on the number of threads. (bf16 with `vdpbf16ps`: a chain of pairs, x rounded to bf16;
//!          elsewhere the weights are widened and x stays f32.)
//! Cost     flops `2·m·n·k`; bytes `n·k·(4 or 2)` once for up to `ROW_BLOCK` rows. Up to about 8 rows the memory is the roof.
//! Threads  over runs of panels (and blocks of rows, when there are many); k is never split.

use half::bf16;

use super::buffer::Region;
use super::pool::{DisjointMut, ThreadPool};
use super::simd::{Isa, Simd, dispatch};

/// Rows of W in a panel: two AVX-512 registers.
const PANEL: usize = 32;
/// f32 values of k, or bf16 pairs, in a block: one cache line of x.
const BLOCK: usize = 16;
/// Most rows in a register tile: 12 x 2 accumulators of AVX-512's 32 registers.
const MAX_TILE: usize = 12;
/// Rows that stay in the second-level cache while the panels pass: 8 tiles.
const ROW_BLOCK_TILES: usize = 8;

/// What a weight matrix is stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightDtype {
    /// 32-bit floats.
    F32,
    /// bfloat16, products summed in f32.
    Bf16,
}

impl WeightDtype {
    /// Values of k in one block of 64 bytes a row.
    fn block_len(self) -> usize {
        match self {
            Self::F32 => BLOCK,
            Self::Bf16 => 2 * BLOCK,
        }
    }
}

/// 16 values of k of a panel.
type F32Block = [[f32; PANEL]; BLOCK];
/// 16 pairs of k of a panel.
type Bf16Block = [[u32; PANEL]; BLOCK];
/// Either of them, as cache lines.
type BlockLines = [[u32; 16]; 2 * BLOCK];

/// An `[n, k]` weight matrix, packed for [`gemm`].
pub struct PackedMatrix {
    n: usize,
    k: usize,
    dtype: WeightDtype,
    /// `[n / 32][k / 16]` of `F32Block`, or `[n / 32][k / 32]` of `Bf16Block`.
    panels: Region,
}

impl PackedMatrix {
    /// Packs `n` rows of `k`. `read_row(row, out)` writes row `row` as f32; it is called once for each row, from any thread of the pool.
    /// bf16 rounds to nearest even, so rows that were bf16 stay as they are.
    ///
    /// Matrices packed with one pool lie side by side in huge pages, in the order of these calls; they may outlive the pool.
    /// Panics if `n` or `k` is 0.
    pub fn pack(pool: &ThreadPool, n: usize, k: usize, dtype: WeightDtype, read_row: &(dyn Fn(usize, &mut [f32]) + Sync)) -> Self {
        assert!(n > 0 && k > 0, "a weight matrix has rows and columns, not [{n}, {k}]");
        let num_panels = n.div_ceil(PANEL);
        let blocks = k.div_ceil(dtype.block_len());
        let mut panels = pool.take_memory(num_panels * blocks * size_of::<F32Block>());
        let rows_of = |panel: usize| panel * PANEL..n.min((panel + 1) * PANEL);
        let padded_k = blocks * dtype.block_len();
        let read_panel = |panel: usize, rows: &mut Vec<f32>| {
            rows.resize(PANEL * padded_k, 0.0);
            rows_of(panel)
                .zip(rows.chunks_mut(padded_k))
                .for_each(|(row, out)| read_row(row, &mut out[..k]));
        };
        match dtype {
            WeightDtype::F32 => pool.for_rows(panels.as_mut_slice::<F32Block>(), blocks, 1, |first_panel, panels| {
                let mut rows = Vec::new();
                for (idx, panel) in panels.chunks_mut(blocks).enumerate() {
                    read_panel(first_panel + idx, &mut rows);
                    let num_rows = rows_of(first_panel + idx).len();
                    for (k_idx, values) in panel.as_flattened_mut().iter_mut().enumerate() {
                        (0..num_rows).for_each(|row| values[row] = rows[row * padded_k + k_idx]);
                    }
                }
            }),
            WeightDtype::Bf16 => pool.for_rows(panels.as_mut_slice::<Bf16Block>(), blocks, 1, |first_panel, panels| {
                let mut rows = Vec::new();
                for (idx, panel) in panels.chunks_mut(blocks).enumerate() {
                    read_panel(first_panel + idx, &mut rows);
                    let num_rows = rows_of(first_panel + idx).len();
                    for (pair, words) in panel.as_flattened_mut().iter_mut().enumerate() {
                        (0..num_rows).for_each(|row| words[row] = pack_pair(rows[row * padded_k + 2 * pair], rows[row * padded_k + 2 * pair + 1]));
                    }
                }
            }),
        }
        Self { n, k, dtype, panels }
    }

    /// Rows: the length of an output row.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Columns: the length of an input row.
    pub fn k(&self) -> usize {
        self.k
    }

    /// What it is stored in.
    pub fn dtype(&self) -> WeightDtype {
        self.dtype
    }

    /// Memory that it holds, padding counted.
    pub fn bytes(&self) -> usize {
        self.panels.bytes()
    }

    /// Writes row `row` as f32. The embedding lookup of a tied model reads the head's matrix so.
    ///
    /// Panics if `row >= n` or `out` isn't `k` long.
    pub fn unpack_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.n, "row {row} of {}", self.n);
        assert_eq!(out.len(), self.k, "a row's length");
        let (panel, lane) = (row / PANEL, row % PANEL);
        match self.dtype {
            WeightDtype::F32 => {
                let values = self.f32_panel(panel).as_flattened();
                out.iter_mut().zip(values).for_each(|(out, values)| *out = values[lane]);
            }
            WeightDtype::Bf16 => {
                let words = self.bf16_panel(panel).as_flattened();
                for (out, words) in out.chunks_mut(2).zip(words) {
                    let pair = [f32::from_bits(words[lane] << 16), f32::from_bits(words[lane] & 0xffff_0000)];
                    out.copy_from_slice(&pair[..out.len()]);
                }
            }
        }
    }

    fn num_panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    /// Blocks of 64 bytes a row, in a panel and in a packed row of x.
    fn blocks(&self) -> usize {
        self.k.div_ceil(self.dtype.block_len())
    }

    fn f32_panel(&self, panel: usize) -> &[F32Block] {
        &self.panels.as_slice()[panel * self.blocks()..][..self.blocks()]
    }

    fn panel_lines(&self, panel: usize) -> &[BlockLines] {
        &self.panels.as_slice()[panel * self.blocks()..][..self.blocks()]
    }

    fn bf16_panel(&self, panel: usize) -> &[Bf16Block] {
        &self.panels.as_slice()[panel * self.blocks()..][..self.blocks()]
    }
}

/// Low half first in k.
fn pack_pair(first: f32, second: f32) -> u32 {
    u32::from(bf16::from_f32(first).to_bits()) | u32::from(bf16::from_f32(second).to_bits()) << 16
}

/// `y[m, n] = x[m, k] · Wᵀ (+ bias[n])`, overwriting `y`. W is read once for the whole batch (once for each 96 rows, if there are more).
///
/// A row's result has the same bits whatever `m` and whatever the number of threads.
/// With bf16 weights on a CPU that has AVX512_BF16, x is rounded to bf16 too.
/// Panics if a length disagrees with `m` and W. Reference: [`reference::gemm`](crate::reference::gemm).
pub fn gemm(pool: &ThreadPool, x: &[f32], m: usize, w: &PackedMatrix, bias: Option<&[f32]>, y: &mut [f32]) {
    gemm_with(Isa::detect(), pool, x, m, w, bias, y);
}

fn gemm_with(isa: Isa, pool: &ThreadPool, x: &[f32], m: usize, w: &PackedMatrix, bias: Option<&[f32]>, y: &mut [f32]) {
    assert_eq!(x.len(), m * w.k, "x is [m, k] = [{m}, {}]", w.k);
    assert_eq!(y.len(), m * w.n, "y is [m, n] = [{m}, {}]", w.n);
    assert!(bias.is_none_or(|bias| bias.len() == w.n), "bias is [n] = [{}]", w.n);
    if m == 0 {
        return;
    }
    let format = match (w.dtype, isa) {
        (WeightDtype::F32, _) => Format::F32,
        (WeightDtype::Bf16, Isa::Avx512Bf16) => Format::Bf16Pairs,
        (WeightDtype::Bf16, _) => Format::Bf16Widened,
    };
    // Blocks of 64 bytes in a packed row of x.
    let x_blocks = if format == Format::Bf16Widened { 2 * w.blocks() } else { w.blocks() };
    if m == 1 && format != Format::Bf16Pairs && w.k == x_blocks * BLOCK {
        // One row packed is the row itself.
        let x_blocks = x.as_chunks().0;
        run_tasks(
            pool,
            &Gemm {
                isa,
                format,
                w,
                tiles: Tiles::new(m),
                x: PackedX::F32(x_blocks),
                bias,
            },
            y,
        );
        return;
    }
    pool.with_scratch(|scratch| {
        scratch.reserve(m * x_blocks * 64);
        let tiles = Tiles::new(m);
        let x = match format {
            Format::Bf16Pairs => {
                let packed = scratch.prefix_mut::<[u32; BLOCK]>(m * x_blocks);
                pack_x(pool, x, w.k, tiles, packed, x_blocks, round_row);
                PackedX::Bf16Pairs(packed)
            }
            Format::F32 | Format::Bf16Widened => {
                let packed = scratch.prefix_mut::<[f32; BLOCK]>(m * x_blocks);
                pack_x(pool, x, w.k, tiles, packed, x_blocks, copy_row);
                PackedX::F32(packed)
            }
        };
        run_tasks(
            pool,
            &Gemm {
                isa,
                format,
                w,
                tiles,
                x,
                bias,
            },
            y,
        );
    });
}

/// How weights and x meet in a tile.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    F32,
    /// bf16 weights widened in registers; x in f32.
    Bf16Widened,
    /// Pairs of bf16 on both sides.
    Bf16Pairs,
}

/// The rows cut into tiles of nearly equal size.
#[derive(Clone, Copy)]
struct Tiles {
    num_rows: usize,
    num_tiles: usize,
}

impl Tiles {
    fn new(num_rows: usize) -> Self {
        Self {
            num_rows,
            num_tiles: num_rows.div_ceil(MAX_TILE),
        }
    }

    fn first_row(self, tile: usize) -> usize {
        tile * self.num_rows / self.num_tiles
    }

    fn len(self, tile: usize) -> usize {
        self.first_row(tile + 1) - self.first_row(tile)
    }
}

/// x in tiles, each `[k / 16][tile rows]` of 64-byte blocks.
enum PackedX<'a> {
    F32(&'a [[f32; BLOCK]]),
    Bf16Pairs(&'a [[u32; BLOCK]]),
}

struct Gemm<'a> {
    isa: Isa,
    format: Format,
    w: &'a PackedMatrix,
    tiles: Tiles,
    x: PackedX<'a>,
    bias: Option<&'a [f32]>,
}

/// Fills `packed` tile by tile; `write_row(row of x, target, stride)` writes the row's blocks to every `stride`th of `target`.
fn pack_x<T: Send>(
    pool: &ThreadPool,
    x: &[f32],
    k: usize,
    tiles: Tiles,
    packed: &mut [[T; BLOCK]],
    x_blocks: usize,
    write_row: impl Fn(&[f32], &mut [[T; BLOCK]], usize) + Sync,
) {
    let packed = DisjointMut::new(packed);
    let pack_tile = |tile: usize| {
        let (first_row, tile_len) = (tiles.first_row(tile), tiles.len(tile));
        // SAFETY: tiles are disjoint row ranges.
        let target = unsafe { packed.slice(first_row * x_blocks, tile_len * x_blocks) };
        for row in 0..tile_len {
            write_row(&x[(first_row + row) * k..][..k], &mut target[row..], tile_len);
        }
    };
    // Few rows are packed sooner than a worker is told about it.
    match tiles.num_tiles * tiles.len(0) * x_blocks {
        0..4096 => (0..tiles.num_tiles).for_each(pack_tile),
        _ => pool.run(tiles.num_tiles, &pack_tile),
    }
}

fn copy_row(row: &[f32], target: &mut [[f32; BLOCK]], stride: usize) {
    let mut target = target.iter_mut().step_by(stride);
    let (blocks, rest) = row.as_chunks::<BLOCK>();
    for (block, target) in blocks.iter().zip(&mut target) {
        *target = *block;
    }
    // The rest of a row, and a block that exists only because bf16 blocks are twice as long.
    let mut last = [0.0; BLOCK];
    last[..rest.len()].copy_from_slice(rest);
    for target in target {
        *target = std::mem::take(&mut last);
    }
}

/// Writes a row rounded to bf16, in pairs.
#[cfg(target_arch = "x86_64")]
fn round_row(row: &[f32], target: &mut [[u32; BLOCK]], stride: usize) {
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn round(row: &[f32], target: &mut [[u32; BLOCK]], stride: usize) {
        // SAFETY: this function is compiled for AVX-512 with bf16.
        let s = unsafe { super::simd::Avx512::new() };
        for (values, target) in row.chunks(2 * BLOCK).zip(target.iter_mut().step_by(stride)) {
            let (low, high) = values.split_at(values.len().min(BLOCK));
            // SAFETY: as above.
            unsafe { s.round_to_bf16_pairs(s.load_partial(low), s.load_partial(high), target) };
        }
    }
    // SAFETY: x is rounded only for `Format::Bf16Pairs`, which needs `Isa::Avx512Bf16`.
    unsafe { round(row, target, stride) }
}

/// Writes a row rounded to bf16, in pairs.
#[cfg(not(target_arch = "x86_64"))]
fn round_row(row: &[f32], target: &mut [[u32; BLOCK]], stride: usize) {
    for (values, target) in row.chunks(2 * BLOCK).zip(target.iter_mut().step_by(stride)) {
        let value = |idx: usize| values.get(idx).copied().unwrap_or(0.0);
        *target = std::array::from_fn(|pair| pack_pair(value(2 * pair), value(2 * pair + 1)));
    }
}

/// Cuts the panels (and the tiles, if many) into tasks and runs them.
fn run_tasks(pool: &ThreadPool, gemm: &Gemm<'_>, y: &mut [f32]) {
    let num_panels = gemm.w.num_panels();
    let num_row_blocks = gemm.tiles.num_tiles.div_ceil(ROW_BLOCK_TILES);
    // In units of about a nanosecond: 16 bytes of weights read, or 64 multiply-adds.
    let panel_bytes = gemm.w.blocks() * size_of::<F32Block>();
    let cost = num_panels * panel_bytes / 16 * (1 + gemm.tiles.num_rows / 8);
    const TASK_COST: usize = 4_000;
    let num_tasks = (cost / TASK_COST).clamp(1, 4 * pool.num_threads());
    let num_panel_runs = num_tasks.div_ceil(num_row_blocks).min(num_panels);
    let y = DisjointMut::new(y);
    pool.run(num_panel_runs * num_row_blocks, &|task| {
        let (panel_run, row_block) = (task / num_row_blocks, task % num_row_blocks);
        let first_tile = row_block * ROW_BLOCK_TILES;
        let tiles = first_tile..gemm.tiles.num_tiles.min(first_tile + ROW_BLOCK_TILES);
        let end_panel = (panel_run + 1) * num_panels / num_panel_runs;
        for panel in panel_run * num_panels / num_panel_runs..end_panel {
            for tile in tiles.clone() {
                let ahead = match tiles.len() {
                    4.. if panel + 1 < end_panel => Ahead::new(gemm.w.panel_lines(panel + 1), tile - tiles.start, tiles.len()),
                    // The hardware sees one pass over the weights coming; a few tiles leave too little time.
                    _ => Ahead::none(),
                };
                gemm.run_tile(panel, tile, ahead, &y);
            }
        }
    });
}

impl Gemm<'_> {
    fn run_tile(&self, panel: usize, tile: usize, ahead: Ahead<'_>, y: &DisjointMut<'_, f32>) {
        let first_row = self.tiles.first_row(tile);
        let first_column = panel * PANEL;
        let num_columns = PANEL.min(self.w.n - first_column);
        // SAFETY: each (panel, tile) is run once, and its columns and rows of y are its own.
        let row_of_y = |row: usize| unsafe { y.slice((first_row + row) * self.w.n + first_column, num_columns) };
        let output = Output {
            row_of_y: &row_of_y,
            bias: self.bias.map(|bias| &bias[first_column..][..num_columns]),
        };
        match (&self.x, self.format) {
            (PackedX::F32(x), Format::F32) => tile_f32(self.isa, &self.tile(x, tile, self.w.f32_panel(panel), ahead, output)),
            (PackedX::F32(x), _) => tile_bf16_widened(self.isa, &self.tile(x, tile, self.w.bf16_panel(panel), ahead, output)),
            #[cfg(target_arch = "x86_64")]
            (PackedX::Bf16Pairs(x), _) => {
                let tile = self.tile(x, tile, self.w.bf16_panel(panel), ahead, output);
                // SAFETY: x is in pairs only if `Isa::detect` saw AVX512_BF16.
                unsafe { tile_bf16_pairs(&tile) };
            }
            #[cfg(not(target_arch = "x86_64"))]
            (PackedX::Bf16Pairs(x), _) => unreachable!("{} blocks of pairs without vdpbf16ps", x.len()),
        }
    }

    fn tile<'a, 'y, X, B>(&self, x: &'a [[X; BLOCK]], tile: usize, panel: &'a [B], ahead: Ahead<'a>, output: Output<'a, 'y>) -> Tile<'a, 'y, X, B> {
        let x_blocks = x.len() / self.tiles.num_rows;
        let num_rows = self.tiles.len(tile);
        Tile {
            x: &x[self.tiles.first_row(tile) * x_blocks..][..num_rows * x_blocks],
            num_rows,
            panel,
            ahead,
            output,
        }
    }
}

/// A tile of x and a panel of W.
struct Tile<'a, 'y, X, B> {
    /// `[k / 16][num_rows]`
    x: &'a [[X; BLOCK]],
    num_rows: usize,
    panel: &'a [B],
    ahead: Ahead<'a>,
    output: Output<'a, 'y>,
}

/// What a tile brings to the cache while it computes: its share of the next panel, so that the first tile there finds it.
struct Ahead<'a> {
    panel: &'a [BlockLines],
    /// Lines of each block.
    lines: std::ops::Range<usize>,
}

impl<'a> Ahead<'a> {
    /// The share of tile `tile` of `num_tiles`.
    fn new(panel: &'a [BlockLines], tile: usize, num_tiles: usize) -> Self {
        let lines = tile * 2 * BLOCK / num_tiles..(tile + 1) * 2 * BLOCK / num_tiles;
        Self { panel, lines }
    }

    fn none() -> Self {
        Self { panel: &[], lines: 0..0 }
    }

    #[inline(always)]
    fn prefetch<S: Simd>(&self, s: S, block: usize) {
        if let Some(block) = self.panel.get(block) {
            for line in &block[self.lines.clone()] {
                s.prefetch(line.as_ptr());
            }
        }
    }
}

/// Where a tile's sums go.
struct Output<'a, 'y> {
    /// The panel's columns of a row of the tile.
    row_of_y: &'a dyn Fn(usize) -> &'y mut [f32],
    bias: Option<&'a [f32]>,
}

impl Output<'_, '_> {
    /// Stores the sums of rows from `first_row` of the tile, at `first_column` of the panel.
    #[inline(always)]
    fn store<S: Simd, const ROWS: usize, const VECTORS: usize>(
        &self,
        s: S,
        first_row: usize,
        first_column: usize,
        sums: [[S::Vector; VECTORS]; ROWS],
    ) {
        for (row, sums) in sums.into_iter().enumerate() {
            let y = (self.row_of_y)(first_row + row);
            for (vector, sums) in sums.into_iter().enumerate() {
                let column = first_column + vector * S::LANES;
                if column >= y.len() {
                    break;
                }
                let sums = match self.bias {
                    Some(bias) => s.add(sums, s.load_partial(&bias[column..])),
                    None => sums,
                };
                s.store_partial(&mut y[column..], sums);
            }
        }
    }
}

/// Calls `$run!(rows)` with the number of rows as a literal.
macro_rules! with_constant_rows {
    ($num_rows:expr, [$($rows:literal)*], $run:ident) => {
        match $num_rows {
            $($rows => $run!($rows),)*
            num_rows => unreachable!("a tile of {num_rows} rows"),
        }
    };
}

/// Runs `$sums::<S, ROWS, 2>(s, tile, first_row, column)` over a tile in parts whose accumulators fit this instruction set's registers.
macro_rules! in_register_tiles {
    ($sums:ident($s:ident, $tile:ident)) => {
        if S::LANES == 16 {
            macro_rules! run {
                ($rows:literal) => {
                    $sums::<S, $rows, 2>($s, $tile, 0, 0)
                };
            }
            with_constant_rows!($tile.num_rows, [1 2 3 4 5 6 7 8 9 10 11 12], run);
        } else {
            // 16 registers: 6 x 2 accumulators, half a panel at a time.
            for column in [0, 2 * S::LANES] {
                let mut first_row = 0;
                while first_row < $tile.num_rows {
                    let rows_here = ($tile.num_rows - first_row).min(6);
                    macro_rules! run {
                        ($rows:literal) => {
                            $sums::<S, $rows, 2>($s, $tile, first_row, column)
                        };
                    }
                    with_constant_rows!(rows_here, [1 2 3 4 5 6], run);
                    first_row += rows_here;
                }
            }
        }
    };
}

#[inline(always)]
fn tile_f32_body<S: Simd>(s: S, tile: &Tile<'_, '_, f32, F32Block>) {
    in_register_tiles!(sums_f32(s, tile));
}
dispatch!(fn tile_f32(tile: &Tile<'_, '_, f32, F32Block>) = tile_f32_body);

#[inline(always)]
fn tile_bf16_widened_body<S: Simd>(s: S, tile: &Tile<'_, '_, f32, Bf16Block>) {
    in_register_tiles!(sums_bf16_widened(s, tile));
}
dispatch!(fn tile_bf16_widened(tile: &Tile<'_, '_, f32, Bf16Block>) = tile_bf16_widened_body);

/// `ROWS` rows from `first_row` of the tile, times `VECTORS` registers of columns from `column` of the panel.
#[inline(always)]
fn sums_f32<S: Simd, const ROWS: usize, const VECTORS: usize>(s: S, tile: &Tile<'_, '_, f32, F32Block>, first_row: usize, column: usize) {
    let mut sums = [[s.splat(0.0); VECTORS]; ROWS];
    for (block, (x, w)) in tile.x.chunks_exact(tile.num_rows).zip(tile.panel).enumerate() {
        tile.ahead.prefetch(s, block);
        let x: &[[f32; BLOCK]; ROWS] = x[first_row..][..ROWS].try_into().expect("ROWS blocks");
        for k in 0..BLOCK {
            let mut weights = [s.splat(0.0); VECTORS];
            for (vector, weights) in weights.iter_mut().enumerate() {
                *weights = s.load(&w[k][column + vector * S::LANES..]);
            }
            for row in 0..ROWS {
                let x = s.splat(x[row][k]);
                for vector in 0..VECTORS {
                    sums[row][vector] = s.fma(x, weights[vector], sums[row][vector]);
                }
            }
        }
    }
    tile.output.store(s, first_row, column, sums);
}

/// The same over bf16 weights: the even k of a pair, then the odd.
#[inline(always)]
fn sums_bf16_widened<S: Simd, const ROWS: usize, const VECTORS: usize>(s: S, tile: &Tile<'_, '_, f32, Bf16Block>, first_row: usize, column: usize) {
    let mut sums = [[s.splat(0.0); VECTORS]; ROWS];
    // A block of x is half as long in k as one of W.
    let halves = tile.panel.iter().flat_map(|block| block.as_chunks::<{ BLOCK / 2 }>().0);
    for (half, (x, w)) in tile.x.chunks_exact(tile.num_rows).zip(halves).enumerate() {
        if half.is_multiple_of(2) {
            tile.ahead.prefetch(s, half / 2);
        }
        let x: &[[f32; BLOCK]; ROWS] = x[first_row..][..ROWS].try_into().expect("ROWS blocks");
        for pair in 0..BLOCK / 2 {
            for odd in 0..2 {
                let mut weights = [s.splat(0.0); VECTORS];
                for (vector, weights) in weights.iter_mut().enumerate() {
                    let words = &w[pair][column + vector * S::LANES..];
                    *weights = if odd == 0 { s.load_low_bf16(words) } else { s.load_high_bf16(words) };
                }
                for row in 0..ROWS {
                    let x = s.splat(x[row][2 * pair + odd]);
                    for vector in 0..VECTORS {
                        sums[row][vector] = s.fma(x, weights[vector], sums[row][vector]);
                    }
                }
            }
        }
    }
    tile.output.store(s, first_row, column, sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn tile_bf16_pairs(tile: &Tile<'_, '_, u32, Bf16Block>) {
    macro_rules! run {
        ($rows:literal) => {
            // SAFETY: this function is compiled for AVX-512 with bf16.
            unsafe { sums_bf16_pairs::<$rows>(tile) }
        };
    }
    with_constant_rows!(tile.num_rows, [1 2 3 4 5 6 7 8 9 10 11 12], run);
}

/// All `ROWS` rows of the tile, times the panel, in pairs of bf16.
///
/// # Safety
/// This CPU has AVX-512 with bf16.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn sums_bf16_pairs<const ROWS: usize>(tile: &Tile<'_, '_, u32, Bf16Block>) {
    // SAFETY: the contract.
    let s = unsafe { super::simd::Avx512::new() };
    let mut sums = [[s.splat(0.0); 2]; ROWS];
    for (block, (x, w)) in tile.x.as_chunks::<ROWS>().0.iter().zip(tile.panel).enumerate() {
        tile.ahead.prefetch(s, block);
        for pair in 0..BLOCK {
            for row in 0..ROWS {
                for vector in 0..2 {
                    // SAFETY: the contract.
                    sums[row][vector] = unsafe { s.dot_bf16_pairs(&w[pair][vector * 16..], x[row][pair], sums[row][vector]) };
                }
            }
        }
    }
    tile.output.store(s, 0, 0, sums);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::test_data::{assert_close, random};
    use crate::reference;

    fn pack(pool: &ThreadPool, w: &[f32], n: usize, k: usize, dtype: WeightDtype) -> PackedMatrix {
        PackedMatrix::pack(pool, n, k, dtype, &|row, out| out.copy_from_slice(&w[row * k..][..k]))
    }

    fn rounded(values: &[f32]) -> Vec<f32> {
        values.iter().map(|&value| bf16::from_f32(value).to_f32()).collect()
    }

    #[test]
    fn agrees_with_the_reference_on_every_instruction_set() {
        let pool = ThreadPool::new(2);
        for (m, n, k) in [
            (1, 1, 1),
            (1, 33, 17),
            (2, 64, 32),
            (3, 31, 64),
            (7, 192, 576),
            (12, 40, 48),
            (13, 96, 100),
            (64, 65, 63),
            (133, 70, 33),
        ] {
            let (x, w, bias) = (random(m * k, 1), random(n * k, 2), random(n, 3));
            for dtype in [WeightDtype::F32, WeightDtype::Bf16] {
                let packed = pack(&pool, &w, n, k, dtype);
                let w = if dtype == WeightDtype::F32 { w.clone() } else { rounded(&w) };
                for isa in Isa::available() {
                    let x_used = if dtype == WeightDtype::Bf16 && isa == Isa::Avx512Bf16 {
                        rounded(&x)
                    } else {
                        x.clone()
                    };
                    for bias in [None, Some(&bias[..])] {
                        let mut y = vec![f32::NAN; m * n];
                        gemm_with(isa, &pool, &x, m, &packed, bias, &mut y);
                        // A random walk of k products below 1: sums of some sqrt(k), each rounded to 2^-24 of itself, sqrt(k) errors adding.
                        let tolerance = 1e-6 + 6e-8 * k as f32;
                        assert_close(
                            &y,
                            &reference::gemm(&x_used, m, &w, n, k, bias),
                            tolerance,
                            &format!("{isa:?} {dtype:?} [{m}, {n}, {k}]"),
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_in_any_batch_and_on_any_number_of_threads() {
        let (n, k, m) = (200, 150, 133);
        let (x, w) = (random(m * k, 4), random(n * k, 5));
        for dtype in [WeightDtype::F32, WeightDtype::Bf16] {
            let packed = pack(&ThreadPool::new(1), &w, n, k, dtype);
            for isa in Isa::available() {
                let run = |threads: usize, x: &[f32], m: usize| {
                    let mut y = vec![0.0; m * n];
                    gemm_with(isa, &ThreadPool::new(threads), x, m, &packed, None, &mut y);
                    y.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                };
                let all = run(1, &x, m);
                assert_eq!(all, run(3, &x, m));
                for (first_row, rows) in [(0, 1), (132, 1), (5, 2), (10, 12), (3, 13), (20, 64), (7, 25)] {
                    assert_eq!(
                        run(2, &x[first_row * k..][..rows * k], rows),
                        all[first_row * n..][..rows * n],
                        "{isa:?} {dtype:?} {rows} rows"
                    );
                }
            }
        }
    }

    #[test]
    fn rows_come_back_as_they_were_packed() {
        let pool = ThreadPool::new(2);
        let (n, k) = (70, 37);
        let w = random(n * k, 6);
        for dtype in [WeightDtype::F32, WeightDtype::Bf16] {
            let packed = pack(&pool, &w, n, k, dtype);
            let expected = if dtype == WeightDtype::F32 { w.clone() } else { rounded(&w) };
            let mut row = vec![0.0; k];
            for row_idx in 0..n {
                packed.unpack_row(row_idx, &mut row);
                assert_eq!(row, expected[row_idx * k..][..k]);
            }
            assert_eq!((packed.n(), packed.k(), packed.dtype()), (n, k, dtype));
            assert_eq!(packed.bytes(), 96 * if dtype == WeightDtype::F32 { 48 * 4 } else { 64 * 2 });
        }
    }
}
