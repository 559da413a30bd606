//! The kernels of polylora. [`cpu`] holds the GEMMs and attention of the CPU engine; `cuda` (feature `cuda`) the launchers of the
//! CUDA kernels; [`reference`] says plainly what each of them computes.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod reference;
