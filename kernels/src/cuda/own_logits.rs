//! Logits of rows whose adapter has tokens of its own (`cuda/own_logits.cu`).

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use half::bf16;

use super::{
    CudaError, Device, LaunchConfig, Stream, View, arguments,
    device::{Kernel, Module},
    dimension, images, require, require_len,
};

const COPY: &str = "copy_logits";
const TOKEN_ROWS: &str = "token_row_logits";
const COPY_TILE: usize = 2048;
const TOKENS_PER_BLOCK: usize = 8;
/// What a grid's second dimension takes.
const MAX_GRID_Y: usize = 65535;

/// Most rows of a [`TokenRowsItem`].
pub const MAX_ITEM_ROWS: usize = 8;

/// One row's logits that are copied. In device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct LogitsCopy {
    /// Where they begin, in elements.
    pub from: u64,
    /// Where the copy does; the two are apart.
    pub to: u64,
    /// How many.
    pub len: u32,
    /// Zero.
    pub reserved: u32,
}

/// Neighbouring rows under an adapter that brings rows of the head for single tokens. In device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct TokenRowsItem {
    /// Address of the adapter's rows, `[num_tokens, hidden]` bf16.
    pub rows: u64,
    /// Address of `[num_tokens]`: whose rows they are.
    pub token_ids: u64,
    /// Where the first row's logits begin, in elements.
    pub y_start: u64,
    /// From one row's logits to the next's.
    pub y_stride: u32,
    /// Tokens.
    pub num_tokens: u32,
    /// First row of x.
    pub row_start: u32,
    /// Rows, at most [`MAX_ITEM_ROWS`].
    pub num_rows: u32,
}

/// The loaded kernels.
pub struct OwnLogits {
    copy: Kernel,
    token_rows: Kernel,
}

impl OwnLogits {
    pub(super) fn load(device: &Arc<Device>) -> Result<Self, CudaError> {
        let module = Module::load(device, images::OWN_LOGITS)?;
        Ok(Self {
            copy: module.kernel(COPY)?,
            token_rows: module.kernel(TOKEN_ROWS)?,
        })
    }

    /// Enqueues the copies, of at most `max_len` logits each. They are trusted to lie in `logits`.
    ///
    /// # Errors
    /// `Shape` if a line of the contract is broken.
    pub fn launch_copy(&self, stream: &Stream, logits: View<'_, f32>, copies: View<'_, LogitsCopy>, max_len: usize) -> Result<(), CudaError> {
        require(COPY, (1..=MAX_GRID_Y).contains(&copies.len()), || format!("{} copies", copies.len()))?;
        require_len(COPY, "logits", logits, max_len)?;
        let grid = [max_len.div_ceil(COPY_TILE) as u32, copies.len() as u32, 1];
        let (logits, copies) = (logits.address(), copies.address());
        stream.launch(&self.copy, LaunchConfig::new(grid, 256), arguments![logits, copies])
    }

    /// Enqueues `logits[t, id(j)] = x[t] · rows[j]ᵀ` for the items' rows; `x [_, hidden]`. The items, of at most `max_tokens` tokens each, are
    /// trusted.
    ///
    /// # Errors
    /// `Shape` if a line of the contract is broken.
    pub fn launch_token_rows(
        &self,
        stream: &Stream,
        logits: View<'_, f32>,
        x: View<'_, bf16>,
        hidden: usize,
        items: View<'_, TokenRowsItem>,
        max_tokens: usize,
    ) -> Result<(), CudaError> {
        require(TOKEN_ROWS, (1..=MAX_GRID_Y).contains(&items.len()), || format!("{} items", items.len()))?;
        require(TOKEN_ROWS, hidden.is_multiple_of(8), || {
            format!("hidden is {hidden}, not a multiple of 8")
        })?;
        require_len(TOKEN_ROWS, "x", x, hidden)?;
        let grid = [max_tokens.div_ceil(TOKENS_PER_BLOCK) as u32, items.len() as u32, 1];
        let hidden = dimension(TOKEN_ROWS, "hidden", hidden)?;
        let (logits, x, items) = (logits.address(), x.address(), items.address());
        stream.launch(&self.token_rows, LaunchConfig::new(grid, 256), arguments![logits, x, items, hidden])
    }
}
