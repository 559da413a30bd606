//! Attention of rows that are alone in their sequence (`cuda/attention_decode.cu`).

use std::sync::Arc;

use half::bf16;

use super::{
    CudaError, Device, LaunchConfig, Stream, View, arguments,
    device::{Kernel, Module},
    dimension, images, require, require_len,
    rope_kv::HeadShape,
};

const NAME: &str = "attention_decode";
const HEAD_DIMS: [usize; 4] = [64, 96, 128, 256];

/// Positions under which splitting a sequence among blocks costs more than it gives.
const MIN_SPLIT: i32 = 256;
/// Blocks a multiprocessor up to which a block has 8 warps instead of 4, and that it has room for then: the fewer blocks, the more loads must each
/// have in flight.
const FEW_BLOCKS: usize = 2;

/// Arguments.
pub struct AttentionDecodeArgs<'a> {
    /// Heads and blocks.
    pub shape: HeadShape,
    /// `[sequences, num_heads · head_dim]`, overwritten where the context is not empty.
    pub out: View<'a, bf16>,
    /// `[sequences, q_stride]`.
    pub q: View<'a, bf16>,
    /// Elements from one row of `q` to the next.
    pub q_stride: usize,
    /// `[num_blocks, num_kv_heads, block_size, head_dim]`, blocks `block_stride` apart.
    pub k_cache: View<'a, bf16>,
    /// The same.
    pub v_cache: View<'a, bf16>,
    /// `[sequences]` row of each in `q` and `out`; `None`: its own index.
    pub rows: Option<View<'a, u32>>,
    /// `[sequences]` positions to attend to; 0 leaves the row alone.
    pub context_lens: View<'a, u32>,
    /// `[sequences]` where each one's blocks begin in `block_tables`.
    pub block_table_starts: View<'a, u32>,
    /// Block ids.
    pub block_tables: View<'a, u32>,
    /// From [`AttentionDecode::partial_len`].
    pub partial: View<'a, f32>,
    /// `[sequences, num_kv_heads]`, zero before and after.
    pub counters: View<'a, u32>,
    /// Sequences.
    pub sequences: usize,
    /// Most blocks that share one sequence and K/V head.
    pub max_splits: usize,
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
    rows: u64,
    context_lens: u64,
    block_table_starts: u64,
    block_tables: u64,
    partial: u64,
    counters: u64,
    block_stride: i64,
    q_stride: i32,
    num_heads: i32,
    num_kv_heads: i32,
    block_shift: i32,
    max_splits: i32,
    min_split: i32,
    window: i32,
    scale: f32,
}

/// The loaded kernels.
pub struct AttentionDecode {
    /// By head size: for up to 8 query heads a K/V head, and for up to 16.
    kernels: Vec<[Kernel; 2]>,
}

impl AttentionDecode {
    pub(super) fn load(device: &Arc<Device>) -> Result<Self, CudaError> {
        let module = Module::load(device, images::ATTENTION_DECODE)?;
        let names = [
            ["attention_decode_d64_heads8", "attention_decode_d64_heads16"],
            ["attention_decode_d96_heads8", "attention_decode_d96_heads16"],
            ["attention_decode_d128_heads8", "attention_decode_d128_heads16"],
            ["attention_decode_d256_heads8", "attention_decode_d256_heads16"],
        ];
        let kernels = names.iter().zip(HEAD_DIMS).map(|(names, head_dim)| {
            let kernels = [module.kernel(names[0])?, module.kernel(names[1])?];
            // Beyond what every kernel may take; what a device has is checked when the warps of a launch are chosen.
            let most = device.max_shared_bytes();
            kernels[0].allow_shared_bytes(Self::shared_bytes(head_dim, 8, 8).min(most))?;
            kernels[1].allow_shared_bytes(Self::shared_bytes(head_dim, 16, 8).min(most))?;
            Ok(kernels)
        });
        Ok(Self {
            kernels: kernels.collect::<Result<_, CudaError>>()?,
        })
    }

    /// Whether there is a kernel for this shape; the reason if not.
    ///
    /// # Errors
    /// `Shape`.
    pub fn supports(shape: &HeadShape) -> Result<(), CudaError> {
        require(NAME, HEAD_DIMS.contains(&shape.head_dim), || {
            format!("head_dim is {}, there are kernels for {HEAD_DIMS:?}", shape.head_dim)
        })?;
        require(
            NAME,
            shape.num_kv_heads > 0 && shape.num_heads.is_multiple_of(shape.num_kv_heads) && shape.num_heads / shape.num_kv_heads <= 16,
            || {
                format!(
                    "{} query heads over {} K/V heads: not a whole number up to 16",
                    shape.num_heads, shape.num_kv_heads
                )
            },
        )?;
        require(NAME, shape.block_size >= 16 && shape.block_size.is_power_of_two(), || {
            format!("block_size is {}, not a power of two of at least 16", shape.block_size)
        })
    }

    /// Elements of `partial` for so many sequences and splits.
    pub fn partial_len(shape: &HeadShape, sequences: usize, max_splits: usize) -> usize {
        match max_splits {
            0 | 1 => 0,
            _ => sequences * shape.num_heads * max_splits * (shape.head_dim + 2),
        }
    }

    /// A warp's outputs, maxima and sums for each of `heads` rows; output rows are padded by 1.
    fn shared_bytes(head_dim: usize, heads: usize, warps: usize) -> u32 {
        (4 * warps * heads * (head_dim + 1 + 2)) as u32
    }

    /// Splits that fill the device when so many sequences decode, and leave no block for a second turn.
    pub fn splits_for(shape: &HeadShape, sequences: usize, num_multiprocessors: u32) -> usize {
        (FEW_BLOCKS * num_multiprocessors as usize / (sequences * shape.num_kv_heads).max(1)).clamp(1, 32)
    }

    /// Enqueues it. Block ids are trusted to lie in the cache.
    ///
    /// # Errors
    /// `Shape` if a line of the contract is broken.
    pub fn launch(&self, stream: &Stream, args: &AttentionDecodeArgs<'_>) -> Result<(), CudaError> {
        let shape = args.shape;
        Self::supports(&shape)?;
        require(
            NAME,
            args.q_stride >= shape.num_heads * shape.head_dim && args.q_stride.is_multiple_of(8),
            || format!("q_stride is {}", args.q_stride),
        )?;
        require_len(NAME, "out", args.out, args.sequences * shape.num_heads * shape.head_dim)?;
        require_len(
            NAME,
            "q",
            args.q,
            args.sequences.saturating_sub(1) * args.q_stride + shape.num_heads * shape.head_dim,
        )?;
        require_len(NAME, "k_cache", args.k_cache, shape.block_len())?;
        require_len(NAME, "v_cache", args.v_cache, shape.block_len())?;
        require_len(NAME, "context_lens", args.context_lens, args.sequences)?;
        require_len(NAME, "block_table_starts", args.block_table_starts, args.sequences)?;
        require(NAME, (1..=64).contains(&args.max_splits), || {
            format!("max_splits is {}, not 1 to 64", args.max_splits)
        })?;
        if args.max_splits > 1 {
            require_len(NAME, "partial", args.partial, Self::partial_len(&shape, args.sequences, args.max_splits))?;
            require_len(NAME, "counters", args.counters, args.sequences * shape.num_kv_heads)?;
        }
        let raw = RawArgs {
            out: args.out.address(),
            q: args.q.address(),
            k: args.k_cache.address(),
            v: args.v_cache.address(),
            rows: args.rows.map_or(0, View::address),
            context_lens: args.context_lens.address(),
            block_table_starts: args.block_table_starts.address(),
            block_tables: args.block_tables.address(),
            partial: args.partial.address(),
            counters: args.counters.address(),
            block_stride: shape.block_stride as i64,
            q_stride: dimension(NAME, "q_stride", args.q_stride)?,
            num_heads: shape.num_heads as i32,
            num_kv_heads: shape.num_kv_heads as i32,
            block_shift: shape.block_size.ilog2() as i32,
            max_splits: args.max_splits as i32,
            min_split: MIN_SPLIT,
            window: dimension(NAME, "window", args.window.unwrap_or(0))?,
            scale: args.scale,
        };
        let variant = usize::from(shape.num_heads / shape.num_kv_heads > 8);
        let by_dim = HEAD_DIMS
            .iter()
            .position(|&dim| dim == shape.head_dim)
            .expect("supports() has checked it");
        let grid = [shape.num_kv_heads as u32, args.sequences as u32, args.max_splits as u32];
        let device = stream.device();
        let shared_bytes = |warps| Self::shared_bytes(shape.head_dim, 8 << variant, warps);
        let few_blocks = args.sequences * shape.num_kv_heads <= FEW_BLOCKS * device.num_multiprocessors() as usize;
        let warps = if few_blocks && shared_bytes(8) <= device.max_shared_bytes() {
            8
        } else {
            4
        };
        let config = LaunchConfig {
            grid,
            block: 32 * warps as u32,
            shared_bytes: shared_bytes(warps),
            cluster: 1,
        };
        stream.launch(&self.kernels[by_dim][variant], config, arguments![raw])
    }
}
