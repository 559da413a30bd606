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
    rms_norm::RmsNormArgs,
    rope_kv::RopeKvArgs,
};

const SHRINK: &str = "lora_shrink";
const EXPAND: &str = "lora_expand";

/// Ranks of one shrink item.
pub const RANK_TILE: usize = 16;
/// Columns of x that a block of the shrink takes at a time.
pub const K_TILE: usize = 1024;
const COLUMN_TILE: usize = 512;
const GATED_COLUMN_TILE: usize = 256;
/// Dynamic shared memory of the variants for up to 64 rows: two turns of 16 rows and 512 columns of y.
const RING_BYTES: [u32; 2] = [2 * 16 * 512 * 2, 2 * 16 * 512 * 4];
/// Blocks that any device with clusters makes one of.
const MAX_CLUSTER_BLOCKS: usize = 8;
/// Head widths that the expand of q, k, v can rotate: a warp has whole heads.
const ROPE_HEAD_DIMS: [usize; 2] = [64, 128];

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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ItemRows {
    /// Items of up to 8 rows: decode.
    UpTo8,
    /// Items of up to 16 rows: decode under few adapters, so that their B is read less often.
    UpTo16,
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
            Self::UpTo16 => 16,
            Self::UpTo64 => 64,
            Self::Naive => u16::MAX as usize,
        }
    }

    /// Place of an expand's kernel: for up to 8 rows, for up to 64, by plain loops.
    fn expand_kernel(self) -> usize {
        match self {
            Self::UpTo8 => 0,
            Self::UpTo16 | Self::UpTo64 => 1,
            Self::Naive => 2,
        }
    }
}

/// Where `v = scaling · x · Aᵀ` goes between shrink and expand.
#[derive(Clone, Copy)]
pub struct Shrunk<'a> {
    /// `[rows, v_stride]`; each slice's ranks begin at the next multiple of [`RANK_TILE`].
    pub v: View<'a, bf16>,
    /// Sums over parts of the columns, `[num_splits, rows, v_stride]`; not read if there is one part.
    pub partial: View<'a, f32>,
    /// One an item of the shrink, zero before and after.
    pub counters: View<'a, u32>,
    /// Parts of the columns.
    pub num_splits: usize,
    /// Rows.
    pub rows: usize,
    /// A multiple of [`RANK_TILE`], at least the sum of an adapter's ranks, each rounded up to one.
    pub v_stride: usize,
}

impl Shrunk<'_> {
    fn check(&self, kernel: &'static str) -> Result<(), CudaError> {
        require(kernel, self.num_splits > 0 && self.v_stride.is_multiple_of(RANK_TILE), || {
            format!("{} splits, v_stride is {}, a multiple of {RANK_TILE}", self.num_splits, self.v_stride)
        })?;
        let partial = if self.num_splits > 1 {
            self.num_splits * self.rows * self.v_stride
        } else {
            0
        };
        require_len(kernel, "partial", self.partial, partial)?;
        require_len(kernel, "v", self.v, self.rows * self.v_stride)
    }
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

/// x of the shrink.
#[derive(Clone, Copy)]
pub struct ShrinkInput<'a> {
    /// `[rows, d_in]`.
    pub x: View<'a, bf16>,
    /// Columns.
    pub d_in: usize,
    /// The kernel before this one reads x itself, and lets this one start after it has waited for x: then both run side by side. True after a
    /// GEMM of our own over the same x, never after a kernel that writes x.
    pub is_ready: bool,
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
    v_stride: i32,
    y_stride: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct RawShrinkArgs {
    x: u64,
    v: u64,
    partial: u64,
    counters: u64,
    items: u64,
    num_items: u64,
    descriptor_offset: u32,
    d_in: i32,
    k_per_split: i32,
    num_splits: i32,
    split_rows: i64,
    v_stride: i32,
    x_is_ready: i32,
}

impl RawExpandArgs {
    fn new(work: LoraItems<'_>, from: Shrunk<'_>, d_out: &[usize]) -> Result<Self, CudaError> {
        let slices = RawSlices::new(EXPAND, d_out, Lora::column_tiles)?;
        from.check(EXPAND)?;
        require_len(EXPAND, "num_items", work.num_items, 1)?;
        Ok(Self {
            v: from.v.address(),
            items: work.items.address(),
            num_items: work.num_items.address(),
            slices,
            descriptor_offset: work.descriptor_offset,
            v_stride: dimension(EXPAND, "v_stride", from.v_stride)?,
            y_stride: dimension(EXPAND, "y_stride", d_out.iter().sum())?,
        })
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
struct RawNormArgs {
    residual: u64,
    normed: u64,
    weight: u64,
    eps: f32,
    reserved: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct RawRopeArgs {
    positions: u64,
    kv_slots: u64,
    cos_sin: u64,
    q_norm: u64,
    k_norm: u64,
    k_cache: u64,
    v_cache: u64,
    block_stride: i64,
    block_size: i32,
    reserved: u32,
    max_position: u32,
    eps: f32,
}

/// The loaded kernels.
pub struct Lora {
    shrink: [Kernel; 4],
    expand_bf16: [Kernel; 3],
    expand_f32: [Kernel; 3],
    /// By gate; for items of up to 8 and of up to 64 rows.
    expand_gated: [[Kernel; 2]; 2],
    /// By head width; for items of up to 8 and of up to 64 rows.
    expand_rope: [[Kernel; 2]; 2],
    /// For items of up to 16 rows; on devices with clusters of blocks.
    expand_norm: Option<Kernel>,
}

impl Lora {
    pub(super) fn load(device: &Arc<Device>) -> Result<Self, CudaError> {
        let shrink = Module::load(device, images::LORA_SHRINK)?;
        let expand = Module::load(device, images::LORA_EXPAND)?;
        let expand_f32 = [
            expand.kernel("lora_expand_rows8_f32")?,
            expand.kernel("lora_expand_rows64_f32")?,
            expand.kernel("lora_expand_naive_f32")?,
        ];
        expand_f32[ItemRows::UpTo64.expand_kernel()].allow_shared_bytes(RING_BYTES[1])?;
        let expand_norm = match device.info().compute_capability >= (9, 0) {
            true => Some(expand.kernel("lora_expand_norm")?),
            false => None,
        };
        Ok(Self {
            expand_norm,
            shrink: [
                shrink.kernel("lora_shrink_rows8")?,
                shrink.kernel("lora_shrink_rows16")?,
                shrink.kernel("lora_shrink_rows64")?,
                shrink.kernel("lora_shrink_naive")?,
            ],
            expand_bf16: [
                expand.kernel("lora_expand_rows8_bf16")?,
                expand.kernel("lora_expand_rows64_bf16")?,
                expand.kernel("lora_expand_naive_bf16")?,
            ],
            expand_f32,
            expand_gated: [
                [expand.kernel("lora_expand_silu_rows8")?, expand.kernel("lora_expand_silu_rows64")?],
                [expand.kernel("lora_expand_gelu_rows8")?, expand.kernel("lora_expand_gelu_rows64")?],
            ],
            expand_rope: [
                [
                    expand.kernel("lora_expand_rope_rows8_d64")?,
                    expand.kernel("lora_expand_rope_rows64_d64")?,
                ],
                [
                    expand.kernel("lora_expand_rope_rows8_d128")?,
                    expand.kernel("lora_expand_rope_rows64_d128")?,
                ],
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
    pub fn launch_shrink(&self, stream: &Stream, work: LoraItems<'_>, input: ShrinkInput<'_>, to: Shrunk<'_>) -> Result<(), CudaError> {
        let ShrinkInput { x, d_in, is_ready } = input;
        require(SHRINK, d_in.is_multiple_of(8) && d_in > 0, || {
            format!("d_in is {d_in}, not a multiple of 8")
        })?;
        to.check(SHRINK)?;
        require_len(SHRINK, "num_items", work.num_items, 1)?;
        require_len(SHRINK, "counters", to.counters, if to.num_splits > 1 { work.items.len() } else { 0 })?;
        require_len(SHRINK, "x", x, d_in)?;
        let k_per_split = (d_in.div_ceil(K_TILE)).div_ceil(to.num_splits) * K_TILE;
        let raw = RawShrinkArgs {
            x: x.address(),
            v: to.v.address(),
            partial: to.partial.address(),
            counters: to.counters.address(),
            items: work.items.address(),
            num_items: work.num_items.address(),
            descriptor_offset: work.descriptor_offset,
            d_in: dimension(SHRINK, "d_in", d_in)?,
            k_per_split: dimension(SHRINK, "k_per_split", k_per_split)?,
            num_splits: to.num_splits as i32,
            split_rows: to.rows as i64,
            v_stride: dimension(SHRINK, "v_stride", to.v_stride)?,
            x_is_ready: i32::from(is_ready),
        };
        let config = LaunchConfig::new([work.grid, 1, 1], 128);
        stream.launch(&self.shrink[work.rows as usize], config, arguments![raw])
    }

    /// Enqueues `y += scaling · v · Bᵀ` for the items' rows; `y [rows, Σ d_out]`. Items and descriptors are trusted.
    ///
    /// # Errors
    /// `Shape` if a line of the contract is broken.
    pub fn launch_expand(&self, stream: &Stream, work: LoraItems<'_>, from: Shrunk<'_>, y: ExpandInto<'_>, d_out: &[usize]) -> Result<(), CudaError> {
        let raw = RawExpandArgs::new(work, from, d_out)?;
        let (kernels, y, ring) = match y {
            ExpandInto::Bf16(y) => (&self.expand_bf16, y.address(), RING_BYTES[0]),
            ExpandInto::F32(y) => (&self.expand_f32, y.address(), RING_BYTES[1]),
        };
        stream.launch(&kernels[work.rows.expand_kernel()], expand_config(work, ring), arguments![y, raw])
    }

    /// Whether [`Self::launch_expand_rope`] knows heads of this width.
    pub fn can_rotate(head_dim: usize) -> bool {
        ROPE_HEAD_DIMS.contains(&head_dim)
    }

    /// Enqueues the expand of q, k, v and what [`super::rope_kv::RopeKv`] does, in one pass: `qkv += scaling · v · Bᵀ`, then norm, rotary
    /// embedding and KV write. Items cover every row; one of base rows has descriptor address 0. Items, descriptors and slots are trusted.
    ///
    /// # Errors
    /// `Shape` if a line of the contract is broken.
    pub fn launch_expand_rope(&self, stream: &Stream, work: LoraItems<'_>, from: Shrunk<'_>, rope: &RopeKvArgs<'_>) -> Result<(), CudaError> {
        let (q_norm, k_norm) = rope.check()?;
        let shape = rope.shape;
        let kernels = ROPE_HEAD_DIMS.iter().position(|&head_dim| head_dim == shape.head_dim);
        let Some(kernels) = kernels.filter(|_| work.rows != ItemRows::Naive) else {
            return require(EXPAND, false, || format!("head_dim is {}, items of {:?}", shape.head_dim, work.rows));
        };
        let widths = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads].map(|heads| heads * shape.head_dim);
        let raw = RawExpandArgs::new(work, from, &widths)?;
        let raw_rope = RawRopeArgs {
            positions: rope.positions.address(),
            kv_slots: rope.kv_slots.address(),
            cos_sin: rope.cos_sin.address(),
            q_norm,
            k_norm,
            k_cache: rope.k_cache.address(),
            v_cache: rope.v_cache.address(),
            block_stride: shape.block_stride as i64,
            reserved: 0,
            block_size: dimension(EXPAND, "block_size", shape.block_size)?,
            max_position: rope.max_position()?,
            eps: rope.eps,
        };
        let qkv = rope.qkv.address();
        let kernel = &self.expand_rope[kernels][work.rows.expand_kernel()];
        stream.launch(kernel, expand_config(work, RING_BYTES[0]), arguments![qkv, raw, raw_rope])
    }

    /// Whether [`Self::launch_expand_norm`] knows rows of this width here.
    pub fn can_norm(&self, hidden: usize) -> bool {
        self.expand_norm.is_some() && Self::column_tiles(&[hidden]) <= MAX_CLUSTER_BLOCKS
    }

    /// Enqueues `residual += v · Bᵀ` and the RMSNorm of what comes out, in one pass. Items cover every row; one of base rows has descriptor
    /// address 0. Items and descriptors are trusted.
    ///
    /// # Errors
    /// `Shape` if a line of the contract is broken.
    pub fn launch_expand_norm(&self, stream: &Stream, work: LoraItems<'_>, from: Shrunk<'_>, norm: &RmsNormArgs<'_>) -> Result<(), CudaError> {
        let hidden = norm.weight.len();
        let kernel = self.expand_norm.as_ref().filter(|_| self.can_norm(hidden) && work.rows.max_rows() <= 16);
        let Some(kernel) = kernel else {
            return require(EXPAND, false, || format!("no norm of {hidden} columns for items of {:?} here", work.rows));
        };
        require(EXPAND, norm.x.is_none() && norm.gather.is_none(), || "the norm adds or gathers".into())?;
        require_len(EXPAND, "residual", norm.residual, norm.rows * hidden)?;
        require_len(EXPAND, "normed", norm.y, norm.rows * hidden)?;
        let raw = RawExpandArgs::new(work, from, &[hidden])?;
        let raw_norm = RawNormArgs {
            residual: norm.residual.address(),
            normed: norm.y.address(),
            weight: norm.weight.address(),
            eps: norm.eps,
            reserved: 0,
        };
        let blocks = Self::column_tiles(&[hidden]) as u32;
        let config = LaunchConfig {
            cluster: blocks,
            ..LaunchConfig::new([work.grid.div_ceil(blocks) * blocks, 1, 1], 128)
        };
        stream.launch(kernel, config, arguments![raw, raw_norm])
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
        from.check(EXPAND)?;
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
            v_stride: dimension(EXPAND, "v_stride", from.v_stride)?,
            y_stride: width,
        };
        let kernel = &self.expand_gated[gate as usize][work.rows.expand_kernel()];
        let (gate_up, y) = (gate_up.address(), y.address());
        stream.launch(kernel, expand_config(work, RING_BYTES[0]), arguments![gate_up, y, raw])
    }
}

fn expand_config(work: LoraItems<'_>, ring_bytes: u32) -> LaunchConfig {
    let shared_bytes = if work.rows.expand_kernel() == 1 { ring_bytes } else { 0 };
    LaunchConfig {
        shared_bytes,
        ..LaunchConfig::new([work.grid, 1, 1], 128)
    }
}
