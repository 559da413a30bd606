//! Embedding lookup (`cuda/embedding.cu`).

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use half::bf16;

use super::{
    CudaError, Device, LaunchConfig, Stream, View, arguments,
    device::{Kernel, Module},
    dimension, images, require, require_len,
};

const NAME: &str = "embedding";

/// Bit of a token source that makes it an index into the chosen tokens of the step before.
pub const FROM_CHOSEN: u32 = 0x8000_0000;

/// An adapter's change of the embedding, in device memory: `x ← scale ⊙ (x + scaling · A[:, token]ᵀ · Bᵀ) + bias`, where x is the token's row
/// among its own rows, else in its own table, else in the base model's.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub struct EmbeddingAdapter {
    /// Address of A, `[vocab, lora_rank]` bf16, of its own vocabulary.
    pub a: u64,
    /// Address of Bᵀ, `[lora_rank, hidden]` bf16.
    pub b_t: u64,
    /// Its rank.
    pub lora_rank: u32,
    /// Multiplies the change.
    pub scaling: f32,
    /// Address of `[vocab, hidden]` bf16, of its own vocabulary, that is used in place of the table; 0: the table.
    pub table: u64,
    /// Address of `[hidden]` f32; 0: ones.
    pub scale: u64,
    /// Address of `[hidden]` f32; 0: zeros.
    pub bias: u64,
    /// Address of `[num_own]` token ids, ascending.
    pub own_ids: u64,
    /// Address of their rows, `[num_own, hidden]` bf16.
    pub own_rows: u64,
    /// Tokens that have a row of their own.
    pub num_own: u32,
    /// Tokens that the adapter has, at least 1: those that the table lacks are in its own table or among its own rows.
    pub vocab: u32,
}

/// Arguments of a lookup.
pub struct EmbeddingArgs<'a> {
    /// `[rows, hidden]`, overwritten.
    pub out: View<'a, f32>,
    /// `[vocab, hidden]`.
    pub table: View<'a, bf16>,
    /// `[rows]` token ids, or [`FROM_CHOSEN`] and an index.
    pub token_sources: View<'a, u32>,
    /// Token ids that the step before chose.
    pub chosen: View<'a, u32>,
    /// `[rows]` addresses of an [`EmbeddingAdapter`], or 0.
    pub adapters: View<'a, u64>,
    /// Rows.
    pub rows: usize,
    /// Width.
    pub hidden: usize,
}

/// The loaded kernel.
pub struct Embedding {
    kernel: Kernel,
}

impl Embedding {
    pub(super) fn load(device: &Arc<Device>) -> Result<Self, CudaError> {
        let kernel = Module::load(device, images::EMBEDDING)?.kernel(NAME)?;
        Ok(Self { kernel })
    }

    /// Enqueues the lookup.
    ///
    /// # Errors
    /// `Shape` if a line of the contract is broken.
    pub fn launch(&self, stream: &Stream, args: &EmbeddingArgs<'_>) -> Result<(), CudaError> {
        require(NAME, args.hidden.is_multiple_of(8), || {
            format!("hidden is {}, not a multiple of 8", args.hidden)
        })?;
        require(NAME, !args.table.is_empty() && args.table.len().is_multiple_of(args.hidden), || {
            format!("the table has {} elements, not whole rows of {}", args.table.len(), args.hidden)
        })?;
        require_len(NAME, "out", args.out, args.rows * args.hidden)?;
        require_len(NAME, "token_sources", args.token_sources, args.rows)?;
        require_len(NAME, "adapters", args.adapters, args.rows)?;
        let vocab = dimension(NAME, "vocab", args.table.len() / args.hidden)? as u32;
        let hidden = dimension(NAME, "hidden", args.hidden)?;
        let (out, table, sources) = (args.out.address(), args.table.address(), args.token_sources.address());
        let (chosen, adapters) = (args.chosen.address(), args.adapters.address());
        let config = LaunchConfig::new([args.rows as u32, 1, 1], 128);
        stream.launch(&self.kernel, config, arguments![out, table, sources, chosen, adapters, hidden, vocab])
    }
}
