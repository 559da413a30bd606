//! The gate of the MLP (`cuda/activation.cu`).

use std::sync::Arc;

use half::bf16;

use super::{
    CudaError, Device, LaunchConfig, Stream, View, arguments,
    device::{Kernel, Module},
    dimension, images, require, require_len,
};

/// Which function is applied to the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// `x · sigmoid(x)`.
    Silu,
    /// GELU by tanh.
    GeluTanh,
}

/// The loaded kernels.
pub struct GatedActivation {
    silu: Kernel,
    gelu_tanh: Kernel,
}

impl GatedActivation {
    pub(super) fn load(device: &Arc<Device>) -> Result<Self, CudaError> {
        let module = Module::load(device, images::ACTIVATION)?;
        Ok(Self {
            silu: module.kernel("silu_mul")?,
            gelu_tanh: module.kernel("gelu_tanh_mul")?,
        })
    }

    /// `y [rows, ffn] = act(gate) · up` with `gate_up [rows, 2 · ffn]`.
    ///
    /// # Errors
    /// `Shape` if a line of the contract is broken.
    pub fn launch(&self, stream: &Stream, gate: Gate, gate_up: View<'_, bf16>, y: View<'_, bf16>, rows: usize, ffn: usize) -> Result<(), CudaError> {
        const NAME: &str = "activation";
        require(NAME, ffn.is_multiple_of(8), || format!("ffn is {ffn}, not a multiple of 8"))?;
        require_len(NAME, "gate_up", gate_up, rows * 2 * ffn)?;
        require_len(NAME, "y", y, rows * ffn)?;
        let num_vectors = (rows * ffn / 8) as i64;
        let (width, from, to) = (dimension(NAME, "ffn", ffn)?, gate_up.address(), y.address());
        let kernel = match gate {
            Gate::Silu => &self.silu,
            Gate::GeluTanh => &self.gelu_tanh,
        };
        let config = LaunchConfig::new([(rows * ffn / 8).div_ceil(256) as u32, 1, 1], 256);
        stream.launch(kernel, config, arguments![from, to, num_vectors, width])
    }
}
