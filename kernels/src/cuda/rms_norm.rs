//! RMSNorm of the residual stream (`cuda/rms_norm.cu`).

use std::sync::Arc;

use half::bf16;

use super::{
    CudaError, Device, LaunchConfig, Stream, View, arguments,
    device::{Kernel, Module},
    dimension, images, require, require_len,
};

/// Arguments of a norm.
pub struct RmsNormArgs<'a> {
    /// `[rows, hidden]`; the sum with `x` is written back.
    pub residual: View<'a, f32>,
    /// `[rows, hidden]`, added to the residual first.
    pub x: Option<View<'a, bf16>>,
    /// `[hidden]`.
    pub weight: View<'a, bf16>,
    /// `[rows, hidden]`, overwritten.
    pub y: View<'a, bf16>,
    /// `[rows]`: row `i` of `y` is the norm of this row of the residual; only without `x`. `None`: of row `i`.
    pub gather: Option<View<'a, u32>>,
    /// Rows of `y`.
    pub rows: usize,
    /// Added under the root.
    pub eps: f32,
}

/// The loaded kernels.
pub struct RmsNorm {
    plain: Kernel,
    add: Kernel,
}

impl RmsNorm {
    pub(super) fn load(device: &Arc<Device>) -> Result<Self, CudaError> {
        let module = Module::load(device, images::RMS_NORM)?;
        Ok(Self {
            plain: module.kernel("rms_norm")?,
            add: module.kernel("add_rms_norm")?,
        })
    }

    /// Enqueues the norm.
    ///
    /// # Errors
    /// `Shape` if a line of the contract is broken.
    pub fn launch(&self, stream: &Stream, args: &RmsNormArgs<'_>) -> Result<(), CudaError> {
        const NAME: &str = "rms_norm";
        let width = args.weight.len();
        require(NAME, width.is_multiple_of(4) && width <= 16384, || {
            format!("hidden is {width}: not a multiple of 4 up to 16384")
        })?;
        require_len(NAME, "y", args.y, args.rows * width)?;
        let hidden = dimension(NAME, "hidden", width)?;
        let (residual, weight, y, eps) = (args.residual.address(), args.weight.address(), args.y.address(), args.eps);
        let config = LaunchConfig::new([args.rows as u32, 1, 1], 256);
        match (args.x, args.gather) {
            (Some(x), None) => {
                require_len(NAME, "residual", args.residual, args.rows * width)?;
                require_len(NAME, "x", x, args.rows * width)?;
                let x = x.address();
                stream.launch(&self.add, config, arguments![residual, x, weight, y, hidden, eps])
            }
            (None, gather) => {
                match gather {
                    Some(rows) => require_len(NAME, "gather", rows, args.rows)?,
                    None => require_len(NAME, "residual", args.residual, args.rows * width)?,
                }
                let gather = gather.map_or(0, View::address);
                stream.launch(&self.plain, config, arguments![residual, weight, y, gather, hidden, eps])
            }
            (Some(_), Some(_)) => require(NAME, false, || "x and gather exclude each other".into()),
        }
    }
}
