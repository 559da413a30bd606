//! q/k norm, rotary embedding and KV write in one pass (`cuda/rope_kv.cu`).

use std::sync::Arc;

use half::bf16;

use super::{
    CudaError, Device, LaunchConfig, Stream, View, arguments,
    device::{Kernel, Module},
    dimension, images, require, require_len,
};

const NAME: &str = "rope_kv";

/// The KV slot of a row whose K and V go nowhere.
pub const NO_SLOT: u32 = u32::MAX;

/// Heads and blocks, the same for every layer.
#[derive(Clone, Copy, Debug)]
pub struct HeadShape {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of one.
    pub head_dim: usize,
    /// Positions of a block.
    pub block_size: usize,
    /// Elements from one block of a layer's K (or V) to the next, at least [`Self::block_len`].
    pub block_stride: usize,
}

impl HeadShape {
    /// Width of a row of q, k, v.
    pub fn qkv_width(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }

    /// Elements of one block of K (or of V).
    pub fn block_len(&self) -> usize {
        self.num_kv_heads * self.block_size * self.head_dim
    }
}

/// Arguments.
pub struct RopeKvArgs<'a> {
    /// Heads and blocks.
    pub shape: HeadShape,
    /// `[rows, qkv_width]`; q is rotated in place.
    pub qkv: View<'a, bf16>,
    /// `[rows]`.
    pub positions: View<'a, u32>,
    /// `[rows]`, or [`NO_SLOT`].
    pub kv_slots: View<'a, u32>,
    /// `[max_position, head_dim / 2]` cosine and sine.
    pub cos_sin: View<'a, [f32; 2]>,
    /// `[head_dim]` each.
    pub qk_norm: Option<(View<'a, bf16>, View<'a, bf16>)>,
    /// `[num_blocks, num_kv_heads, block_size, head_dim]`, blocks `block_stride` apart.
    pub k_cache: View<'a, bf16>,
    /// The same.
    pub v_cache: View<'a, bf16>,
    /// Rows.
    pub rows: usize,
    /// Of the q/k norm.
    pub eps: f32,
}

impl RopeKvArgs<'_> {
    /// Checks the contract; the addresses of the norms, 0 if there are none.
    pub(super) fn check(&self) -> Result<(u64, u64), CudaError> {
        let shape = self.shape;
        let half = shape.head_dim / 2;
        require(NAME, shape.head_dim.is_multiple_of(4) && shape.head_dim <= 256 && half > 0, || {
            format!("head_dim is {}: not a multiple of 4 up to 256", shape.head_dim)
        })?;
        require_len(NAME, "qkv", self.qkv, self.rows * shape.qkv_width())?;
        require_len(NAME, "positions", self.positions, self.rows)?;
        require_len(NAME, "kv_slots", self.kv_slots, self.rows)?;
        require_len(NAME, "cos_sin", self.cos_sin, half)?;
        require_len(NAME, "k_cache", self.k_cache, shape.block_len())?;
        require_len(NAME, "v_cache", self.v_cache, shape.block_len())?;
        self.qk_norm.map_or(Ok((0, 0)), |(q, k)| {
            require_len(NAME, "q_norm", q, shape.head_dim)?;
            require_len(NAME, "k_norm", k, shape.head_dim)?;
            Ok((q.address(), k.address()))
        })
    }

    pub(super) fn max_position(&self) -> Result<u32, CudaError> {
        Ok(dimension(NAME, "max_position", self.cos_sin.len() / (self.shape.head_dim / 2))? as u32)
    }
}

/// The loaded kernel.
pub struct RopeKv {
    kernel: Kernel,
}

impl RopeKv {
    pub(super) fn load(device: &Arc<Device>) -> Result<Self, CudaError> {
        let kernel = Module::load(device, images::ROPE_KV)?.kernel(NAME)?;
        Ok(Self { kernel })
    }

    /// Enqueues it. Slots are trusted to lie in the cache.
    ///
    /// # Errors
    /// `Shape` if a line of the contract is broken.
    pub fn launch(&self, stream: &Stream, args: &RopeKvArgs<'_>) -> Result<(), CudaError> {
        let shape = args.shape;
        let (q_norm, k_norm) = args.check()?;
        let heads = shape.num_heads + 2 * shape.num_kv_heads;
        let (num_heads, num_kv_heads) = (
            dimension(NAME, "num_heads", shape.num_heads)?,
            dimension(NAME, "num_kv_heads", shape.num_kv_heads)?,
        );
        let (head_dim, block_size) = (shape.head_dim as i32, dimension(NAME, "block_size", shape.block_size)?);
        let max_position = args.max_position()?;
        let (qkv, positions, slots, cos_sin) = (
            args.qkv.address(),
            args.positions.address(),
            args.kv_slots.address(),
            args.cos_sin.address(),
        );
        let (k_cache, v_cache, eps) = (args.k_cache.address(), args.v_cache.address(), args.eps);
        let block_stride = shape.block_stride as i64;
        let config = LaunchConfig::new([args.rows as u32, heads.div_ceil(4) as u32, 1], 128);
        stream.launch(
            &self.kernel,
            config,
            arguments![
                qkv,
                positions,
                slots,
                cos_sin,
                q_norm,
                k_norm,
                k_cache,
                v_cache,
                block_stride,
                num_heads,
                num_kv_heads,
                head_dim,
                block_size,
                max_position,
                eps
            ],
        )
    }
}
