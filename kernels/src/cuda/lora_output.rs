//! Scales and biases that an adapter has on the outputs of its modules (`cuda/lora_output.cu`): DoRA, `lora_bias`, trained biases.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use half::bf16;

use super::{
    CudaError, Device, LaunchConfig, Stream, View, arguments,
    device::{Kernel, Module},
    dimension, images,
    lora::{LoraItems, RawSlices},
    require, require_len,
};

const NAME: &str = "lora_output";
const COLUMN_TILE: usize = 1024;

/// What one adapter has for one group of projections in one layer. In device memory; an address of 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct OutputTerms {
    /// Address of each slice's scale, `[d_out]` f32.
    pub scale: [u64; 3],
    /// Address of each slice's bias, `[d_out]` f32.
    pub bias: [u64; 3],
    /// Zero.
    pub reserved: [u64; 2],
}

/// y of [`LoraOutput::launch`].
#[derive(Clone, Copy)]
pub enum OutputInto<'a> {
    /// Rounded.
    Bf16(View<'a, bf16>),
    /// As it is.
    F32(View<'a, f32>),
    /// A projection that is added to the residual stream: rows that were set aside, to be added back.
    Residual {
        /// What [`LoraOutput::launch_set_aside`] left zeros in, and the projection was added to.
        y: View<'a, f32>,
        /// Where it moved the rows.
        saved: View<'a, f32>,
    },
}

#[derive(Clone, Copy)]
#[repr(C)]
struct RawOutputArgs {
    items: u64,
    num_items: u64,
    slices: RawSlices,
    descriptor_offset: u32,
    y_stride: i32,
}

/// The loaded kernels.
pub struct LoraOutput {
    bf16: Kernel,
    f32: Kernel,
    set_aside: Kernel,
}

impl LoraOutput {
    pub(super) fn load(device: &Arc<Device>) -> Result<Self, CudaError> {
        let module = Module::load(device, images::LORA_OUTPUT)?;
        Ok(Self {
            bf16: module.kernel("lora_output_bf16")?,
            f32: module.kernel("lora_output_f32")?,
            set_aside: module.kernel("lora_set_aside")?,
        })
    }

    /// Column tiles: the work is items times these.
    pub fn column_tiles(d_out: &[usize]) -> usize {
        d_out.iter().map(|d_out| d_out.div_ceil(COLUMN_TILE)).sum()
    }

    /// Enqueues `y ← scale ⊙ y + bias` for the items' rows; `y [rows, Σ d_out]`. The items' tables are of [`OutputTerms`]. Items may have any
    /// number of rows. Items and terms are trusted.
    ///
    /// # Errors
    /// `Shape` if a line of the contract is broken.
    pub fn launch(&self, stream: &Stream, work: LoraItems<'_>, y: OutputInto<'_>, d_out: &[usize]) -> Result<(), CudaError> {
        let raw = raw_args(work, d_out)?;
        let (kernel, y, saved) = match y {
            OutputInto::Bf16(y) => (&self.bf16, y.address(), 0),
            OutputInto::F32(y) => (&self.f32, y.address(), 0),
            OutputInto::Residual { y, saved } => {
                require(NAME, d_out.len() == 1, || format!("{} slices of the residual stream", d_out.len()))?;
                (&self.f32, y.address(), saved.address())
            }
        };
        stream.launch(kernel, LaunchConfig::new([work.grid, 1, 1], 128), arguments![y, saved, raw])
    }

    /// Enqueues `saved ← y, y ← 0` for the rows of the items that have terms for this group; `y`, `saved` `[rows, width]`.
    ///
    /// # Errors
    /// `Shape` if a line of the contract is broken.
    pub fn launch_set_aside(
        &self,
        stream: &Stream,
        work: LoraItems<'_>,
        y: View<'_, f32>,
        saved: View<'_, f32>,
        width: usize,
    ) -> Result<(), CudaError> {
        let raw = raw_args(work, &[width])?;
        let (y, saved) = (y.address(), saved.address());
        stream.launch(&self.set_aside, LaunchConfig::new([work.grid, 1, 1], 128), arguments![y, saved, raw])
    }
}

fn raw_args(work: LoraItems<'_>, d_out: &[usize]) -> Result<RawOutputArgs, CudaError> {
    let slices = RawSlices::new(NAME, d_out, LoraOutput::column_tiles)?;
    require_len(NAME, "num_items", work.num_items, 1)?;
    Ok(RawOutputArgs {
        items: work.items.address(),
        num_items: work.num_items.address(),
        slices,
        descriptor_offset: work.descriptor_offset,
        y_stride: dimension(NAME, "y_stride", d_out.iter().sum())?,
    })
}
