//! Kernels of the CPU engine: f32 activations, f32 or bf16 weights; AVX2 and AVX-512 chosen at run time.
