//! What the launchers of our own Hopper GEMMs share: `cuda/hopper.cuh`.

use std::sync::Arc;

use super::{
    CudaError, Device,
    device::{Kernel, Module},
    dimension,
    gemm::{GemmArgs, GemmBias, OutputKind},
};

/// Columns of a stage.
pub(super) const DEPTH: usize = 64;
pub(super) const MAX_STAGES: usize = 16;
/// Blocks of a cluster that every device takes.
pub(super) const MAX_CLUSTER: usize = 8;
/// Of static shared memory: the barriers.
const STATIC_SHARED_BYTES: usize = 2 * 8 * MAX_STAGES;
/// Beside the stages: that, and what aligning them may cost.
pub(super) const OTHER_SHARED_BYTES: usize = STATIC_SHARED_BYTES + 1024;
/// Fewer steps than this do not pay for their block.
pub(super) const MIN_STEPS: usize = 4;

/// What a shape's cuts depend on.
#[derive(Clone, Copy)]
pub(super) struct Multiprocessors {
    pub count: usize,
    /// What a block may have of one's shared memory.
    pub shared_bytes: usize,
}

impl Multiprocessors {
    /// Of a Hopper device; `None` on others, which the kernels do not run on.
    pub fn of_hopper(device: &Device) -> Option<Self> {
        (device.info().compute_capability == (9, 0)).then(|| Self {
            count: device.num_multiprocessors() as usize,
            shared_bytes: device.max_shared_bytes() as usize,
        })
    }

    /// The kernels of an image, each with all the shared memory that it may have.
    pub fn load<const N: usize>(self, device: &Arc<Device>, image: &'static [u8], names: [&'static str; N]) -> Result<Vec<Kernel>, CudaError> {
        let module = Module::load(device, image)?;
        let load = |name| {
            let kernel = module.kernel(name)?;
            kernel.allow_shared_bytes((self.shared_bytes - STATIC_SHARED_BYTES) as u32)?;
            Ok(kernel)
        };
        names.into_iter().map(load).collect()
    }
}

/// [`GemmArgs`] as the kernels take them.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct RawArgs {
    y: u64,
    bias: u64,
    m: i32,
    n: i32,
    k: i32,
    output: i32,
    num_splits: i32,
    num_stages: i32,
}

impl RawArgs {
    /// # Errors
    /// `Shape` for dimensions that the kernels have no numbers for.
    pub fn new(kernel: &'static str, args: &GemmArgs<'_>, num_splits: usize, num_stages: usize) -> Result<Self, CudaError> {
        Ok(Self {
            y: args.y.address_and_len().0,
            bias: args.bias.map_or(0, GemmBias::address),
            m: dimension(kernel, "m", args.m)?,
            n: dimension(kernel, "n", args.y_columns())?,
            k: dimension(kernel, "k", args.k)?,
            output: match args.y.kind() {
                OutputKind::Bf16 | OutputKind::Gated => 0,
                OutputKind::F32 => 1,
                OutputKind::AddF32 => 2,
            },
            num_splits: num_splits as i32,
            num_stages: num_stages as i32,
        })
    }
}
