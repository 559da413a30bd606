//! Each CUDA kernel against `reference`, on shapes, ranks and mixes of adapters as a server meets them. Outputs are poisoned first, so that an
//! element that nothing wrote is found; rows that a kernel must not touch keep a known value.
//!
//! One tolerance: inputs and outputs are bf16 (relative rounding 2⁻⁹) with f32 sums, so the relative error in the 2-norm stays below 1 %.

#[cfg(feature = "cuda")]
mod attention;
#[cfg(feature = "cuda")]
mod elementwise;
#[cfg(feature = "cuda")]
mod gemm;
#[cfg(feature = "cuda")]
mod lora;
#[cfg(feature = "cuda")]
mod lora_output;
#[cfg(feature = "cuda")]
mod own_tokens;
#[cfg(feature = "cuda")]
mod sampling;
#[cfg(feature = "cuda")]
mod support;

/// So that a run without the feature says what it leaves out.
#[cfg(not(feature = "cuda"))]
#[test]
#[ignore = "needs --features cuda and a GPU"]
fn cuda_kernels() {}
