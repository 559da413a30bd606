//! Kernels of the CPU engine: f32 activations, f32 or bf16 weights; AVX2 and AVX-512 chosen at run time.
//!
//! All are deterministic, and a row's result has the same bits whatever the rows beside it and whatever the number of threads: a
//! sequence gives the same tokens alone, in a mixed batch, chunked, or from a cached prefix. (Another instruction set may give others.)
//!
//! One family a file; [`reference`](crate::reference) says plainly what each computes.

mod attention;
mod buffer;
mod elementwise;
mod gemm;
mod lora;
mod pool;
mod priority;
mod simd;

pub use attention::{AttentionSequence, AttentionShape, paged_attention, write_kv};
pub use buffer::HugeBuffer;
pub use elementwise::{add_rms_norm, gelu_tanh_mul, rms_norm, rope, silu_mul};
pub use gemm::{PackedMatrix, WeightDtype, gemm};
pub use lora::{LoraElement, LoraJob, lora};
pub use pool::ThreadPool;
pub use priority::stand_back;

/// The instructions that the kernels use on this CPU, for logs and benches.
pub fn instruction_set() -> &'static str {
    match simd::Isa::detect() {
        simd::Isa::Portable => "portable",
        simd::Isa::Avx2 => "avx2",
        simd::Isa::Avx512 => "avx512",
        simd::Isa::Avx512Bf16 => "avx512_bf16",
    }
}

#[cfg(test)]
mod test_data {
    /// `len` values in -1..1, a function of `seed` alone (SplitMix64).
    pub fn random(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut next = || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    /// Every element within `tolerance`, relative to 1 or to the expected value if that is larger; and not all near zero.
    pub fn assert_close(got: &[f32], expected: &[f32], tolerance: f32, case: &str) {
        assert_eq!(got.len(), expected.len(), "{case}");
        for (idx, (got, expected)) in got.iter().zip(expected).enumerate() {
            let error = (got - expected).abs();
            assert!(
                error <= tolerance * expected.abs().max(1.0),
                "{case}: element {idx} is {got}, not {expected}"
            );
        }
        assert!(expected.iter().any(|value| value.abs() > 1e-3), "{case}: nothing to compare");
    }
}
