//! Logits to tokens and log-probabilities (`cuda/sampling.cu`).

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::{
    CudaError, Device, LaunchConfig, Stream, View, arguments,
    device::{Kernel, Module},
    images, require_len,
};

const NAME: &str = "sample";
const MAX_CANDIDATES: u32 = 4096;

/// Most likeliest tokens that the kernel reports per row.
pub const MAX_TOP: usize = 64;

/// Bits of [`SampleParams::flags`].
pub mod flags {
    /// Choose a token.
    pub const CHOOSE: u32 = 1;
    /// Only tokens of the mask.
    pub const MASKED: u32 = 2;
    /// Report the chosen token's log-probability.
    pub const OUTPUT_LOGPROB: u32 = 4;
    /// Report `prompt_token`'s log-probability.
    pub const PROMPT_LOGPROB: u32 = 8;
    /// Of [`super::SampleEdit::counts`](super::SampleEdit): the token may not be chosen.
    pub const EDIT_FORBIDDEN: u32 = 0x8000_0000;
    /// Of `counts`: the token is in the prompt or in the output.
    pub const EDIT_SEEN: u32 = 0x4000_0000;
    /// Of `counts`: the low bits hold the times in the output.
    pub const EDIT_COUNT: u32 = 0x3fff_ffff;
}

/// What one row asks for. In device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct SampleParams {
    /// The draw, in `[0, 1)`.
    pub u: f64,
    /// Of [`flags`].
    pub flags: u32,
    /// 0 is greedy.
    pub temperature: f32,
    /// In (0, 1].
    pub top_p: f32,
    /// In [0, 1].
    pub min_p: f32,
    /// 0 is all.
    pub top_k: u32,
    /// In (0, 2].
    pub repetition_penalty: f32,
    /// In [-2, 2].
    pub frequency_penalty: f32,
    /// In [-2, 2].
    pub presence_penalty: f32,
    /// First of its edits.
    pub edits_start: u32,
    /// How many.
    pub num_edits: u32,
    /// First word of its mask.
    pub mask_start: u32,
    /// Likeliest tokens to report, at most [`MAX_TOP`].
    pub num_top: u32,
    /// The token whose log-probability is wanted.
    pub prompt_token: u32,
    /// Where the chosen id goes.
    pub slot: u32,
    /// Tokens of this row, at least 1.
    pub vocab: u32,
    /// Zero.
    pub reserved: u32,
    /// Where the row's logits begin, in elements.
    pub logits_start: u64,
}

/// A token whose logit is changed. In device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct SampleEdit {
    /// The token; once per row.
    pub token: u32,
    /// Of [`flags`].
    pub counts: u32,
    /// Added.
    pub bias: f32,
    /// Scratch of the kernel.
    pub saved: f32,
}

/// What one row gave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct SampleResult {
    /// The chosen token.
    pub token: u32,
    /// 0: fine; 1: a logit is not finite; 2: nothing is allowed.
    pub status: u32,
    /// The chosen token's.
    pub logprob: f32,
    /// The prompt token's.
    pub prompt_logprob: f32,
}

/// Arguments.
pub struct SamplingArgs<'a> {
    /// All rows' logits, where `params` say; as they were when the kernel is done. What lies between them is not read.
    pub logits: View<'a, f32>,
    /// `[rows]`.
    pub params: View<'a, SampleParams>,
    /// All rows' edits.
    pub edits: View<'a, SampleEdit>,
    /// All rows' masks.
    pub masks: View<'a, u32>,
    /// `[rows]`, overwritten.
    pub results: View<'a, SampleResult>,
    /// `[rows, MAX_TOP]`, overwritten in rows with `num_top > 0`; `u32::MAX` past the last.
    pub top_ids: View<'a, u32>,
    /// The same.
    pub top_logprobs: View<'a, f32>,
    /// By `slot`.
    pub chosen: View<'a, u32>,
    /// Rows.
    pub rows: usize,
}

/// The loaded kernel.
pub struct Sampling {
    kernel: Kernel,
}

impl Sampling {
    pub(super) fn load(device: &Arc<Device>) -> Result<Self, CudaError> {
        let kernel = Module::load(device, images::SAMPLING)?.kernel(NAME)?;
        Ok(Self { kernel })
    }

    /// Enqueues it. What `params` say of logits, edits, masks and slots is trusted.
    ///
    /// # Errors
    /// `Shape` if a line of the contract is broken.
    pub fn launch(&self, stream: &Stream, args: &SamplingArgs<'_>) -> Result<(), CudaError> {
        require_len(NAME, "logits", args.logits, args.rows)?;
        require_len(NAME, "params", args.params, args.rows)?;
        require_len(NAME, "results", args.results, args.rows)?;
        require_len(NAME, "top_ids", args.top_ids, args.rows * MAX_TOP)?;
        require_len(NAME, "top_logprobs", args.top_logprobs, args.rows * MAX_TOP)?;
        let (logits, params, edits, masks) = (args.logits.address(), args.params.address(), args.edits.address(), args.masks.address());
        let (results, top_ids, top_logprobs, chosen) = (
            args.results.address(),
            args.top_ids.address(),
            args.top_logprobs.address(),
            args.chosen.address(),
        );
        let config = LaunchConfig {
            grid: [args.rows as u32, 1, 1],
            block: 1024,
            shared_bytes: MAX_CANDIDATES * 8,
            cluster: 1,
        };
        stream.launch(
            &self.kernel,
            config,
            arguments![logits, params, edits, masks, results, top_ids, top_logprobs, chosen],
        )
    }
}
