//! Shrink and expand over the rows of many adapters (`cuda/lora_shrink.cu`, `cuda/lora_expand.cu`).
//!
//! One adapter has a table of [`LoraDescriptor`]s in device memory, one per layer and group of projections. A step's rows are cut into
//! [`LoraItem`]s. Both are read by the kernels at run time, so that a captured launch serves any mix of adapters.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use half::bf16;

use super::{
    CudaError, Device, LaunchConfig, Stream, View,
    activation::Gate,
    arguments,
    device::{Kernel, Module},
    dimension, images, require, require_len,
};

const SHRINK: &str = "lora_shrink";
const EXPAND: &str = "lora_expand";

/// Ranks of one shrink item.
pub const RANK_TILE: usize = 16;
/// Columns of x that a block of the shrink takes at a time.
pub const K_TILE: usize = 1024;
const COLUMN_TILE: usize = 512;
const GATED_COLUMN_TILE: usize = 256;

/// What one adapter has for one group of projections in one layer. In device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct LoraDescriptor {
    /// Address of the stacked A, `[rank_total, d_in]` bf16.
    pub a: u64,
    /// Address of each slice's Bᵀ, `[lora_rank, d_out]` bf16.
    pub b_t: [u64; 3],
    /// Rank of each slice; 0 where the adapter has none.
    pub lora_rank: [u16; 3],
    /// Their sum.
    pub rank_total: u16,
    /// Multiplies each slice's delta.
    pub scaling: [f32; 3],
    /// Zero.
    pub reserved: [u32; 3],
}

/// Neighbouring rows under one adapter. In device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct LoraItem {
    /// Address of the adapter's descriptor table.
    pub descriptors: u64,
    /// First row.
    pub row_start: u32,
    /// Rows, at most [`ItemRows::max_rows`].
    pub num_rows: u16,
    /// Which 16 ranks of the stacked A; the expand does not look at it.
    pub rank_tile: u16,
}

/// Which variant runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ItemRows {
    /// Items of up to 8 rows: decode.
    UpTo8,
    /// Items of up to 64 rows: prefill.
    UpTo64,
    /// Items of any number of rows, by plain loops: what the others are compared with.
    Naive,
}

impl ItemRows {
    /// Most rows of an item.
    pub fn max_rows(self) -> usize {
        match self {
            Self::UpTo8 => 8,
            Self::UpTo64 => 64,
            Self::Naive => u16::MAX as usize,
        }
    }
}

/// Where the sums over columns go between shrink and expand: `[num_splits, split_rows, v_stride]` f32.
#[derive(Clone, Copy)]
pub struct Shrunk<'a> {
    /// The memory.
    pub v: View<'a, f32>,
    /// Parts of the columns.
    pub num_splits: usize,
    /// Rows of one part.
    pub split_rows: usize,
    /// At least the largest `rank_total`.
    pub v_stride: usize,
}

/// The work of one launch.
#[derive(Clone, Copy)]
pub struct LoraItems<'a> {
    /// The items; those past `num_items` are not read.
    pub items: View<'a, LoraItem>,
    /// One element: how many there are.
    pub num_items: View<'a, u32>,
    /// Which variant.
    pub rows: ItemRows,
    /// Bytes from an adapter's table to the descriptor of this layer and group.
    pub descriptor_offset: u32,
    /// Blocks; they stride over the work.
    pub grid: u32,
}

/// y of the expand.
#[derive(Clone, Copy)]
pub enum ExpandInto<'a> {
    /// Rounded after the sum.
    Bf16(View<'a, bf16>),
    /// The residual stream, or logits.
    F32(View<'a, f32>),
}

/// The one to three projections whose outputs stand side by side, in tiles of columns.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct RawSlices {
    d_out: [i32; 3],
    tile_start: [i32; 3],
    num_tiles: i32,
}

impl RawSlices {
    /// `tiles` counts the tiles of slices.
    pub(super) fn new(kernel: &'static str, d_out: &[usize], tiles: fn(&[usize]) -> usize) -> Result<Self, CudaError> {
        require(
            kernel,
            (1..=3).contains(&d_out.len()) && d_out.iter().all(|d_out| d_out.is_multiple_of(8)),
            || format!("d_out is {d_out:?}: one to three multiples of 8"),
        )?;
        let mut raw = Self {
            d_out: [0; 3],
            tile_start: [i32::MAX; 3],
            num_tiles: dimension(kernel, "tiles", tiles(d_out))?,
        };
        for (slice, &width) in d_out.iter().enumerate() {
            raw.d_out[slice] = dimension(kernel, "d_out", width)?;
            raw.tile_start[slice] = tiles(&d_out[..slice]) as i32;
        }
        Ok(raw)
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
struct RawExpandArgs {
    v: u64,
    items: u64,
    num_items: u64,
    slices: RawSlices,
    descriptor_offset: u32,
    num_splits: i32,
    split_rows: i64,
    v_stride: i32,
    y_stride: i32,
}

/// The loaded kernels.
pub struct Lora {
    shrink: [Kernel; 3],
    expand_bf16: [Kernel; 3],
    expand_f32: [Kernel; 3],
    /// By gate; for items of up to 8 and of up to 64 rows.
    expand_gated: [[Kernel; 2]; 2],
}

impl Lora {
    pub(super) fn load(device: &Arc<Device>) -> Result<Self, CudaError> {
        let shrink = Module::load(device, images::LORA_SHRINK)?;
        let expand = Module::load(device, images::LORA_EXPAND)?;
        Ok(Self {
            shrink: [
                shrink.kernel("lora_shrink_rows8")?,
                shrink.kernel("lora_shrink_rows64")?,
                shrink.kernel("lora_shrink_naive")?,
            ],
            expand_bf16: [
                expand.kernel("lora_expand_rows8_bf16")?,
                expand.kernel("lora_expand_rows64_bf16")?,
                expand.kernel("lora_expand_naive_bf16")?,
            ],
            expand_f32: [
                expand.kernel("lora_expand_rows8_f32")?,
                expand.kernel("lora_expand_rows64_f32")?,
                expand.kernel("lora_expand_naive_f32")?,
            ],
            expand_gated: [
                [expand.kernel("lora_expand_silu_rows8")?, expand.kernel("lora_expand_silu_rows64")?],
                [expand.kernel("lora_expand_gelu_rows8")?, expand.kernel("lora_expand_gelu_rows64")?],
            ],
        })
    }

    /// Splits of `d_in` columns among blocks, at most `max_splits`: enough that every byte of A is in flight at once.
    pub fn num_splits(d_in: usize, max_splits: usize) -> usize {
        let tiles = d_in.div_ceil(K_TILE);
        tiles.div_ceil(tiles.div_ceil(max_splits.max(1)))
    }

    /// Column tiles of an expand: its work is items times these.
    pub fn column_tiles(d_out: &[usize]) -> usize {
        d_out.iter().map(|d_out| d_out.div_ceil(COLUMN_TILE)).sum()
    }

    /// Column tiles of the gated expand.
    pub fn gated_column_tiles(ffn: usize) -> usize {
        ffn.div_ceil(GATED_COLUMN_TILE)
    }

    /// Enqueues `v = x · Aᵀ` for the items' rows; `x [rows, d_in]`. Items and descriptors are trusted.
    ///
    /// # Errors
    /// `Shape` if a line of the contract is broken.
    pub fn launch_shrink(&self, stream: &Stream, work: LoraItems<'_>, x: View<'_, bf16>, d_in: usize, to: Shrunk<'_>) -> Result<(), CudaError> {
        require(SHRINK, d_in.is_multiple_of(8) && d_in > 0, || {
            format!("d_in is {d_in}, not a multiple of 8")
        })?;
        require_len(SHRINK, "v", to.v, to.num_splits * to.split_rows * to.v_stride)?;
        require_len(SHRINK, "num_items", work.num_items, 1)?;
        require(SHRINK, x.len() >= d_in && to.num_splits > 0, || {
            format!("x has {} elements, {} splits", x.len(), to.num_splits)
        })?;
        let k_per_split = (d_in.div_ceil(K_TILE)).div_ceil(to.num_splits) * K_TILE;
        let (d_in, k_per_split) = (dimension(SHRINK, "d_in", d_in)?, dimension(SHRINK, "d_in", k_per_split)?);
        let (num_splits, split_rows, v_stride) = (to.num_splits as i32, to.split_rows as i64, dimension(SHRINK, "v_stride", to.v_stride)?);
        let (x, v, items, num_items) = (x.address(), to.v.address(), work.items.address(), work.num_items.address());
        let descriptor_offset = work.descriptor_offset;
        let config = LaunchConfig::new([work.grid, 1, 1], 128);
        stream.launch(
            &self.shrink[work.rows as usize],
            config,
            arguments![
                x,
                v,
                items,
                num_items,
                descriptor_offset,
                d_in,
                k_per_split,
                num_splits,
                split_rows,
                v_stride
            ],
        )
    }

    /// Enqueues `y += scaling · v · Bᵀ` for the items' rows; `y [rows, Σ d_out]`. Items and descriptors are trusted.
    ///
    /// # Errors
    /// `Shape` if a line of the contract is broken.
    pub fn launch_expand(&self, stream: &Stream, work: LoraItems<'_>, from: Shrunk<'_>, y: ExpandInto<'_>, d_out: &[usize]) -> Result<(), CudaError> {
        let slices = RawSlices::new(EXPAND, d_out, Self::column_tiles)?;
        require_len(EXPAND, "v", from.v, from.num_splits * from.split_rows * from.v_stride)?;
        require_len(EXPAND, "num_items", work.num_items, 1)?;
        let raw = RawExpandArgs {
            v: from.v.address(),
            items: work.items.address(),
            num_items: work.num_items.address(),
            slices,
            descriptor_offset: work.descriptor_offset,
            num_splits: from.num_splits as i32,
            split_rows: from.split_rows as i64,
            v_stride: dimension(EXPAND, "v_stride", from.v_stride)?,
            y_stride: dimension(EXPAND, "y_stride", d_out.iter().sum())?,
        };
        let (kernels, y) = match y {
            ExpandInto::Bf16(y) => (&self.expand_bf16, y.address()),
            ExpandInto::F32(y) => (&self.expand_f32, y.address()),
        };
        stream.launch(
            &kernels[work.rows as usize],
            LaunchConfig::new([work.grid, 1, 1], 128),
            arguments![y, raw],
        )
    }

    /// Enqueues `y [rows, ffn] = act(gate + Δgate) · (up + Δup)` for the items' rows, with `gate_up [rows, 2 · ffn]`: the expand of gate and up
    /// and the activation in one pass. An item of base rows has descriptor address 0. Items and descriptors are trusted.
    ///
    /// # Errors
    /// `Shape` if a line of the contract is broken.
    pub fn launch_expand_gated(
        &self,
        stream: &Stream,
        work: LoraItems<'_>,
        from: Shrunk<'_>,
        gate: Gate,
        (gate_up, y): (View<'_, bf16>, View<'_, bf16>),
        ffn: usize,
    ) -> Result<(), CudaError> {
        require(EXPAND, ffn.is_multiple_of(8) && work.rows != ItemRows::Naive, || {
            format!("ffn is {ffn}, items of {:?}", work.rows)
        })?;
        require_len(EXPAND, "v", from.v, from.num_splits * from.split_rows * from.v_stride)?;
        require_len(EXPAND, "num_items", work.num_items, 1)?;
        require(EXPAND, gate_up.len() >= 2 * ffn && y.len() * 2 >= gate_up.len(), || {
            format!("gate_up has {} elements, y {}", gate_up.len(), y.len())
        })?;
        let width = dimension(EXPAND, "ffn", ffn)?;
        let raw = RawExpandArgs {
            v: from.v.address(),
            items: work.items.address(),
            num_items: work.num_items.address(),
            slices: RawSlices {
                d_out: [width, width, 0],
                tile_start: [0; 3],
                num_tiles: Self::gated_column_tiles(ffn) as i32,
            },
            descriptor_offset: work.descriptor_offset,
            num_splits: from.num_splits as i32,
            split_rows: from.split_rows as i64,
            v_stride: dimension(EXPAND, "v_stride", from.v_stride)?,
            y_stride: width,
        };
        let kernel = &self.expand_gated[gate as usize][work.rows as usize];
        let (gate_up, y) = (gate_up.address(), y.address());
        stream.launch(kernel, LaunchConfig::new([work.grid, 1, 1], 128), arguments![gate_up, y, raw])
    }
}
