//! The CUDA kernels and how they are launched: `cuda/NAME.cu` by `NAME.rs`, whose launcher checks each line of the contract at the head of
//! the `.cu` file. [`device`] is the driver as values, [`gemm`] cuBLASLt.

use std::sync::Arc;

pub mod activation;
pub mod attention_decode;
pub mod attention_prefill;
pub mod device;
pub mod embedding;
pub mod gemm;
mod hopper;
pub mod host_slab;
pub mod lora;
pub mod lora_output;
pub mod own_logits;
pub mod random_fill;
pub mod rms_norm;
pub mod rope_kv;
pub mod sampling;
mod stream_gemm;
pub mod tuning;
mod wide_gemm;

pub use device::{CudaError, Device, DeviceBuffer, DeviceInfo, Event, Graph, LaunchConfig, PinnedBuffer, Stream, View, devices};
pub use host_slab::HostSlab;

/// The compiled kernels.
mod images {
    /// The driver reads an image's headers in place; `include_bytes!` alone is aligned to 1.
    #[repr(C, align(64))]
    struct Aligned<T>(T);

    include!(concat!(env!("OUT_DIR"), "/images.rs"));
}

/// Pointers to kernel arguments, in order, as the driver wants them.
macro_rules! arguments {
    ($($argument:ident),* $(,)?) => {
        &mut [$((&raw const $argument).cast::<std::ffi::c_void>().cast_mut()),*]
    };
}
use arguments;

/// A broken contract unless `condition` holds.
fn require(kernel: &'static str, condition: bool, reason: impl FnOnce() -> String) -> Result<(), CudaError> {
    match condition {
        true => Ok(()),
        false => Err(CudaError::Shape { kernel, reason: reason() }),
    }
}

/// A dimension as the kernels take it.
fn dimension(kernel: &'static str, name: &str, value: usize) -> Result<i32, CudaError> {
    i32::try_from(value).map_err(|_| CudaError::Shape {
        kernel,
        reason: format!("{name} is {value}, at most {} fits", i32::MAX),
    })
}

/// A view has at least `needed` elements.
fn require_len<T>(kernel: &'static str, name: &str, view: View<'_, T>, needed: usize) -> Result<(), CudaError> {
    require(kernel, view.len() >= needed, || {
        format!("{name} has {} elements, {needed} are needed", view.len())
    })
}

/// Every kernel, loaded on one device.
pub struct Kernels {
    /// Embedding lookup.
    pub embedding: embedding::Embedding,
    /// RMSNorm, with the residual add.
    pub rms_norm: rms_norm::RmsNorm,
    /// q/k norm, rotary embedding, KV write.
    pub rope_kv: rope_kv::RopeKv,
    /// Attention of decode rows.
    pub attention_decode: attention_decode::AttentionDecode,
    /// Attention of prefill chunks.
    pub attention_prefill: attention_prefill::AttentionPrefill,
    /// SwiGLU, GeGLU.
    pub activation: activation::GatedActivation,
    /// Shrink and expand.
    pub lora: lora::Lora,
    /// Scales and biases on outputs.
    pub lora_output: lora_output::LoraOutput,
    /// Logits of tokens of an adapter's own.
    pub own_logits: own_logits::OwnLogits,
    /// Logits to tokens.
    pub sampling: sampling::Sampling,
    /// Random weights.
    pub random_fill: random_fill::RandomFill,
}

impl Kernels {
    /// Loads the images; the driver picks the device's.
    ///
    /// # Errors
    /// The driver's: among others, no image for this device.
    pub fn load(device: &Arc<Device>) -> Result<Self, CudaError> {
        device.bind()?;
        Ok(Self {
            embedding: embedding::Embedding::load(device)?,
            rms_norm: rms_norm::RmsNorm::load(device)?,
            rope_kv: rope_kv::RopeKv::load(device)?,
            attention_decode: attention_decode::AttentionDecode::load(device)?,
            attention_prefill: attention_prefill::AttentionPrefill::load(device)?,
            activation: activation::GatedActivation::load(device)?,
            lora: lora::Lora::load(device)?,
            lora_output: lora_output::LoraOutput::load(device)?,
            own_logits: own_logits::OwnLogits::load(device)?,
            sampling: sampling::Sampling::load(device)?,
            random_fill: random_fill::RandomFill::load(device)?,
        })
    }
}
