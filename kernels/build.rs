//! Compiles the CUDA kernels when the feature `cuda` is on.

fn main() {}
