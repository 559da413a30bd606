//! Random weights, for benchmarks of a shape (`cuda/random_fill.cu`).

use std::sync::Arc;

use half::bf16;

use super::{
    CudaError, Device, LaunchConfig, Stream, View, arguments,
    device::{Kernel, Module},
    images,
};

/// The loaded kernel.
pub struct RandomFill {
    kernel: Kernel,
}

impl RandomFill {
    pub(super) fn load(device: &Arc<Device>) -> Result<Self, CudaError> {
        let kernel = Module::load(device, images::RANDOM_FILL)?.kernel("random_fill")?;
        Ok(Self { kernel })
    }

    /// Fills `out` uniformly in `[center − half_width, center + half_width)`.
    ///
    /// # Errors
    /// The driver's.
    pub fn launch(&self, stream: &Stream, out: View<'_, bf16>, seed: u64, center: f32, half_width: f32) -> Result<(), CudaError> {
        let (address, len) = (out.address(), out.len() as i64);
        let grid = out.len().div_ceil(256).min(16 * stream.device().num_multiprocessors() as usize) as u32;
        let config = LaunchConfig::new([grid, 1, 1], 256);
        stream.launch(&self.kernel, config, arguments![address, len, seed, center, half_width])
    }
}
