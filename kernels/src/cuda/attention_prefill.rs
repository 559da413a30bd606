//! Causal attention of prefill chunks (`cuda/attention_prefill.cu`).

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use half::bf16;

use super::{
    CudaError, Device, LaunchConfig, Stream, View, arguments,
    attention_decode::AttentionDecode,
    device::{Kernel, Module},
    dimension, images, require, require_len,
    rope_kv::HeadShape,
};

const NAME: &str = "attention_prefill";

/// Neighbouring rows of one sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct PrefillTile {
    /// First row.
    pub row_start: u32,
    /// Rows, at most [`AttentionPrefill::tile_rows`].
    pub num_rows: u32,
    /// Position of the first row.
    pub position: u32,
    /// Where the sequence's blocks begin in `block_tables`.
    pub block_table_start: u32,
}

/// Arguments.
pub struct AttentionPrefillArgs<'a> {
    /// Heads and blocks.
    pub shape: HeadShape,
    /// `[rows, num_heads · head_dim]`, overwritten in the tiles' rows.
    pub out: View<'a, bf16>,
    /// `[rows, q_stride]`.
    pub q: View<'a, bf16>,
    /// Elements from one row of `q` to the next.
    pub q_stride: usize,
    /// `[num_blocks, num_kv_heads, block_size, head_dim]`, blocks `block_stride` apart.
    pub k_cache: View<'a, bf16>,
    /// The same.
    pub v_cache: View<'a, bf16>,
    /// The work.
    pub tiles: View<'a, PrefillTile>,
    /// Block ids.
    pub block_tables: View<'a, u32>,
    /// See only the last so many positions.
    pub window: Option<usize>,
    /// Multiplies the scores.
    pub scale: f32,
}

#[repr(C)]
struct RawArgs {
    out: u64,
    q: u64,
    k: u64,
    v: u64,
    tiles: u64,
    block_tables: u64,
    block_stride: i64,
    q_stride: i32,
    num_heads: i32,
    num_kv_heads: i32,
    block_shift: i32,
    window: i32,
    scale: f32,
}

/// A kernel and its shape.
struct Variant {
    kernel: Kernel,
    head_dim: usize,
    /// Positions of a K or V tile.
    positions: usize,
}

impl Variant {
    /// q, and two stages of a K and a V tile; rows padded by 8 elements.
    fn shared_bytes(&self) -> u32 {
        ((score_rows(self.head_dim) + 2 * 2 * self.positions) * (self.head_dim + 8) * 2) as u32
    }
}

/// Score rows of a block.
fn score_rows(head_dim: usize) -> usize {
    if head_dim == 256 { 64 } else { 128 }
}

/// The loaded kernels, those with larger tiles first.
pub struct AttentionPrefill {
    variants: Vec<Variant>,
}

impl AttentionPrefill {
    pub(super) fn load(device: &Arc<Device>) -> Result<Self, CudaError> {
        let module = Module::load(device, images::ATTENTION_PREFILL)?;
        let shapes = [
            ("attention_prefill_d64", 64, 64),
            ("attention_prefill_d96", 96, 64),
            ("attention_prefill_d128", 128, 64),
            ("attention_prefill_d128_small", 128, 32),
            ("attention_prefill_d256", 256, 32),
        ];
        let mut variants = Vec::new();
        for (name, head_dim, positions) in shapes {
            let variant = Variant {
                kernel: module.kernel(name)?,
                head_dim,
                positions,
            };
            if variant.shared_bytes() <= device.max_shared_bytes() {
                variant.kernel.allow_shared_bytes(variant.shared_bytes())?;
                variants.push(variant);
            }
        }
        Ok(Self { variants })
    }

    /// Most rows of a tile.
    pub fn tile_rows(shape: &HeadShape) -> usize {
        score_rows(shape.head_dim) / (shape.num_heads / shape.num_kv_heads)
    }

    /// Enqueues it. Tiles and block ids are trusted to lie in `q` and in the cache.
    ///
    /// # Errors
    /// `Shape` if a line of the contract is broken.
    pub fn launch(&self, stream: &Stream, args: &AttentionPrefillArgs<'_>) -> Result<(), CudaError> {
        let shape = args.shape;
        AttentionDecode::supports(&shape)?;
        require(
            NAME,
            args.q_stride >= shape.num_heads * shape.head_dim && args.q_stride.is_multiple_of(8),
            || format!("q_stride is {}", args.q_stride),
        )?;
        require_len(NAME, "k_cache", args.k_cache, shape.block_len())?;
        require_len(NAME, "v_cache", args.v_cache, shape.block_len())?;
        let raw = RawArgs {
            out: args.out.address(),
            q: args.q.address(),
            k: args.k_cache.address(),
            v: args.v_cache.address(),
            tiles: args.tiles.address(),
            block_tables: args.block_tables.address(),
            block_stride: shape.block_stride as i64,
            q_stride: dimension(NAME, "q_stride", args.q_stride)?,
            num_heads: shape.num_heads as i32,
            num_kv_heads: shape.num_kv_heads as i32,
            block_shift: shape.block_size.ilog2() as i32,
            window: dimension(NAME, "window", args.window.unwrap_or(0))?,
            scale: args.scale,
        };
        let variant = self.variants.iter().find(|variant| variant.head_dim == shape.head_dim);
        let Some(variant) = variant else {
            return require(NAME, false, || {
                format!("head_dim {}: the device has too little shared memory", shape.head_dim)
            });
        };
        let config = LaunchConfig {
            grid: [args.tiles.len() as u32, shape.num_kv_heads as u32, 1],
            block: 128,
            shared_bytes: variant.shared_bytes(),
            cluster: 1,
        };
        stream.launch(&variant.kernel, config, arguments![raw])
    }
}
