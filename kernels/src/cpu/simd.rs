//! One vector interface over AVX-512, AVX2 + FMA and plain arrays, so that each kernel is written once.
//!
//! A value of a [`Simd`] type is the proof that this CPU has the instructions: only [`dispatch!`] makes one, inside a function compiled
//! for them, after [`Isa::detect`] has seen them. The bodies are `#[inline(always)]`, so they are compiled for that function's features.

use half::bf16;

/// Which instructions the kernels use; later ones include the earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "only x86 has them"))]
pub(crate) enum Isa {
    /// What the target guarantees; the compiler vectorises.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The same, and `vdpbf16ps`.
    Avx512Bf16,
}

impl Isa {
    /// The best that this CPU has.
    #[cfg(target_arch = "x86_64")]
    pub fn detect() -> Self {
        // The standard library asks the CPU once and remembers.
        if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")) {
            return Self::Portable;
        }
        let has_avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        match has_avx512 {
            true if is_x86_feature_detected!("avx512bf16") => Self::Avx512Bf16,
            true => Self::Avx512,
            false => Self::Avx2,
        }
    }

    /// The best that this CPU has.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn detect() -> Self {
        Self::Portable
    }

    /// All that this CPU has.
    #[cfg(test)]
    pub fn available() -> impl Iterator<Item = Self> {
        [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16]
            .into_iter()
            .filter(|isa| *isa <= Self::detect())
    }
}

/// Vectors of `LANES` f32. Every operation is lane by lane unless it says otherwise.
pub(super) trait Simd: Copy {
    /// f32 lanes, at most 16.
    const LANES: usize;
    type Vector: Copy;

    fn splat(self, value: f32) -> Self::Vector;
    /// The first `LANES` elements; panics if there are fewer.
    fn load(self, source: &[f32]) -> Self::Vector;
    /// The first `LANES` elements, zeros where there are fewer.
    fn load_partial(self, source: &[f32]) -> Self::Vector;
    /// To the first `LANES` elements; panics if there are fewer.
    fn store(self, target: &mut [f32], value: Self::Vector);
    /// To the first `LANES` elements, or as many as there are.
    fn store_partial(self, target: &mut [f32], value: Self::Vector);
    /// Like `load`, widened.
    fn load_bf16(self, source: &[bf16]) -> Self::Vector;
    /// Of `LANES` words, the low halves as bf16, widened. Panics if there are fewer.
    fn load_low_bf16(self, source: &[u32]) -> Self::Vector;
    /// Of `LANES` words, the high halves as bf16, widened. Panics if there are fewer.
    fn load_high_bf16(self, source: &[u32]) -> Self::Vector;

    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn div(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a · b + c`, fused where the CPU can.
    fn fma(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// The smaller; `b` if either is NaN.
    fn min(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// The larger; `b` if either is NaN.
    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// To the nearest integer, halves to even.
    fn round(self, a: Self::Vector) -> Self::Vector;
    /// `2^a` for integral `a` in -126..=127.
    fn exp2_integral(self, a: Self::Vector) -> Self::Vector;
    /// Zero where `a < b`, else `value`.
    fn zero_where_less(self, a: Self::Vector, b: Self::Vector, value: Self::Vector) -> Self::Vector;
    /// Sum of the lanes, in a fixed order.
    fn sum(self, a: Self::Vector) -> f32;
    /// The largest lane; any value if one is NaN.
    fn max_lane(self, a: Self::Vector) -> f32;

    /// Asks for the cache line at `address`, which need not be valid, to be brought to the second-level cache.
    #[inline(always)]
    fn prefetch<T>(self, address: *const T) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: every x86-64 has the instruction; it never faults and has no effect but on caches.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(address.cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = address;
    }

    /// Like `load_bf16`, zeros where there are fewer.
    #[inline(always)]
    fn load_partial_bf16(self, source: &[bf16]) -> Self::Vector {
        let mut padded = [bf16::ZERO; 16];
        let len = source.len().min(Self::LANES);
        padded[..len].copy_from_slice(&source[..len]);
        self.load_bf16(&padded)
    }
}

/// e^x: at most 2 units in the last place off for normal results; zero below the smallest normal f32, `f32::MAX`'s magnitude at the top
/// (x > 88.37 is taken as 88.37), NaN for NaN.
///
/// Cody and Waite's reduction with Cephes' polynomial of degree 5 (`expf.c`).
#[inline(always)]
pub(super) fn exp<S: Simd>(s: S, x: S::Vector) -> S::Vector {
    const LOWEST: f32 = -87.336_54;
    let clamped = s.max(s.splat(LOWEST), s.min(s.splat(88.376_26), x));
    let n = s.round(s.mul(clamped, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fma(n, s.splat(-0.693_359_4), clamped);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_1e-4);
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = s.fma(p, r, s.splat(coefficient));
    }
    let p = s.add(s.fma(p, s.mul(r, r), r), s.splat(1.0));
    // n reaches 127.5 at the top; it is an integer, so at most 127.
    s.zero_where_less(x, s.splat(LOWEST), s.mul(p, s.exp2_integral(n)))
}

/// Arrays of 8: two SSE or NEON registers each once compiled.
#[derive(Clone, Copy)]
pub(super) struct Portable;

#[inline(always)]
fn map(f: impl Fn(usize) -> f32) -> [f32; 8] {
    std::array::from_fn(f)
}

impl Simd for Portable {
    const LANES: usize = 8;
    type Vector = [f32; 8];

    #[inline(always)]
    fn splat(self, value: f32) -> [f32; 8] {
        [value; 8]
    }
    #[inline(always)]
    fn load(self, source: &[f32]) -> [f32; 8] {
        let source = &source[..8];
        map(|lane| source[lane])
    }
    #[inline(always)]
    fn load_partial(self, source: &[f32]) -> [f32; 8] {
        map(|lane| source.get(lane).copied().unwrap_or(0.0))
    }
    #[inline(always)]
    fn store(self, target: &mut [f32], value: [f32; 8]) {
        target[..8].copy_from_slice(&value);
    }
    #[inline(always)]
    fn store_partial(self, target: &mut [f32], value: [f32; 8]) {
        target.iter_mut().zip(value).for_each(|(target, value)| *target = value);
    }
    #[inline(always)]
    fn load_bf16(self, source: &[bf16]) -> [f32; 8] {
        let source = &source[..8];
        map(|lane| f32::from_bits(u32::from(source[lane].to_bits()) << 16))
    }
    #[inline(always)]
    fn load_low_bf16(self, source: &[u32]) -> [f32; 8] {
        let source = &source[..8];
        map(|lane| f32::from_bits(source[lane] << 16))
    }
    #[inline(always)]
    fn load_high_bf16(self, source: &[u32]) -> [f32; 8] {
        let source = &source[..8];
        map(|lane| f32::from_bits(source[lane] & 0xffff_0000))
    }
    #[inline(always)]
    fn add(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map(|lane| a[lane] + b[lane])
    }
    #[inline(always)]
    fn sub(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map(|lane| a[lane] - b[lane])
    }
    #[inline(always)]
    fn mul(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map(|lane| a[lane] * b[lane])
    }
    #[inline(always)]
    fn div(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map(|lane| a[lane] / b[lane])
    }
    #[inline(always)]
    fn fma(self, a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        // Without the instruction, `mul_add` is a slow library call.
        const FUSED: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));
        map(|lane| {
            if FUSED {
                a[lane].mul_add(b[lane], c[lane])
            } else {
                a[lane] * b[lane] + c[lane]
            }
        })
    }
    #[inline(always)]
    fn min(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map(|lane| if a[lane] < b[lane] { a[lane] } else { b[lane] })
    }
    #[inline(always)]
    fn max(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map(|lane| if a[lane] > b[lane] { a[lane] } else { b[lane] })
    }
    #[inline(always)]
    fn round(self, a: [f32; 8]) -> [f32; 8] {
        // Adding 1.5 · 2^23 leaves no bits for a fraction; exact for |a| < 2^22, and exp stays below 128.
        const MAGIC: f32 = 12_582_912.0;
        map(|lane| (a[lane] + MAGIC) - MAGIC)
    }
    #[inline(always)]
    fn exp2_integral(self, a: [f32; 8]) -> [f32; 8] {
        map(|lane| f32::from_bits((((a[lane] as i32) + 127) << 23) as u32))
    }
    #[inline(always)]
    fn zero_where_less(self, a: [f32; 8], b: [f32; 8], value: [f32; 8]) -> [f32; 8] {
        map(|lane| if a[lane] < b[lane] { 0.0 } else { value[lane] })
    }
    #[inline(always)]
    fn sum(self, a: [f32; 8]) -> f32 {
        ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]))
    }
    #[inline(always)]
    fn max_lane(self, a: [f32; 8]) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::bf16;

    use super::Simd;

    /// Eight lanes of AVX2 with FMA.
    #[derive(Clone, Copy)]
    pub struct Avx2(());

    /// Sixteen lanes of AVX-512.
    #[derive(Clone, Copy)]
    pub struct Avx512(());

    impl Avx2 {
        /// # Safety
        /// This CPU has AVX2 and FMA.
        #[inline(always)]
        pub unsafe fn new() -> Self {
            Self(())
        }
    }

    impl Avx512 {
        /// # Safety
        /// This CPU has AVX-512 F, BW, DQ and VL, and AVX2 and FMA.
        #[inline(always)]
        pub unsafe fn new() -> Self {
            Self(())
        }

        /// Products of bf16 pairs, added to `c` (`vdpbf16ps`): `c + w.high · x.high + w.low · x.low` in each lane.
        ///
        /// # Safety
        /// This CPU has AVX512_BF16.
        #[inline(always)]
        pub unsafe fn dot_bf16_pairs(self, weights: &[u32], x_pair: u32, c: __m512) -> __m512 {
            assert!(weights.len() >= 16);
            // SAFETY: the contract; 16 words are read, checked above.
            unsafe {
                let weights: __m512bh = std::mem::transmute(_mm512_loadu_si512(weights.as_ptr().cast()));
                let x: __m512bh = std::mem::transmute(_mm512_set1_epi32(x_pair as i32));
                _mm512_dpbf16_ps(c, weights, x)
            }
        }

        /// 32 f32 rounded to nearest even bf16, in pairs.
        ///
        /// # Safety
        /// This CPU has AVX512_BF16.
        #[inline(always)]
        pub unsafe fn round_to_bf16_pairs(self, low: __m512, high: __m512, target: &mut [u32; 16]) {
            // SAFETY: the contract; `target` is one register long.
            unsafe {
                let pairs: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
                _mm512_storeu_si512(target.as_mut_ptr().cast(), pairs);
            }
        }
    }

    /// `fn name(arguments) -> result` of a token's impl, as one expression of intrinsics.
    macro_rules! lanewise {
        ($($name:ident($($argument:ident),*): $vector:ty = $value:expr;)*) => {
            $(
                #[inline(always)]
                fn $name(self, $($argument: $vector),*) -> $vector {
                    // SAFETY: the token proves the instructions; nothing here touches memory.
                    unsafe { $value }
                }
            )*
        };
    }

    impl Simd for Avx2 {
        const LANES: usize = 8;
        type Vector = __m256;

        lanewise! {
            add(a, b): __m256 = _mm256_add_ps(a, b);
            sub(a, b): __m256 = _mm256_sub_ps(a, b);
            mul(a, b): __m256 = _mm256_mul_ps(a, b);
            div(a, b): __m256 = _mm256_div_ps(a, b);
            fma(a, b, c): __m256 = _mm256_fmadd_ps(a, b, c);
            min(a, b): __m256 = _mm256_min_ps(a, b);
            max(a, b): __m256 = _mm256_max_ps(a, b);
            round(a): __m256 = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
            exp2_integral(a): __m256 =
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127))));
            zero_where_less(a, b, value): __m256 = _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(a, b), value);
        }

        #[inline(always)]
        fn splat(self, value: f32) -> __m256 {
            // SAFETY: the token proves AVX.
            unsafe { _mm256_set1_ps(value) }
        }
        #[inline(always)]
        fn load(self, source: &[f32]) -> __m256 {
            let source = &source[..8];
            // SAFETY: the token proves AVX; eight elements are there.
            unsafe { _mm256_loadu_ps(source.as_ptr()) }
        }
        #[inline(always)]
        fn load_partial(self, source: &[f32]) -> __m256 {
            let mut padded = [0.0; 8];
            let len = source.len().min(8);
            padded[..len].copy_from_slice(&source[..len]);
            self.load(&padded)
        }
        #[inline(always)]
        fn store(self, target: &mut [f32], value: __m256) {
            let target = &mut target[..8];
            // SAFETY: the token proves AVX; eight elements are there.
            unsafe { _mm256_storeu_ps(target.as_mut_ptr(), value) }
        }
        #[inline(always)]
        fn store_partial(self, target: &mut [f32], value: __m256) {
            let mut padded = [0.0; 8];
            self.store(&mut padded, value);
            let len = target.len().min(8);
            target[..len].copy_from_slice(&padded[..len]);
        }
        #[inline(always)]
        fn load_bf16(self, source: &[bf16]) -> __m256 {
            let source = &source[..8];
            // SAFETY: the token proves AVX2; eight elements of two bytes are there.
            unsafe {
                let halves = _mm_loadu_si128(source.as_ptr().cast());
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
            }
        }
        #[inline(always)]
        fn load_low_bf16(self, source: &[u32]) -> __m256 {
            let source = &source[..8];
            // SAFETY: the token proves AVX2; eight words are there.
            unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(source.as_ptr().cast()))) }
        }
        #[inline(always)]
        fn load_high_bf16(self, source: &[u32]) -> __m256 {
            let source = &source[..8];
            // SAFETY: the token proves AVX2; eight words are there.
            unsafe { _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(source.as_ptr().cast()), _mm256_set1_epi32(!0xffff))) }
        }
        #[inline(always)]
        fn sum(self, a: __m256) -> f32 {
            // SAFETY: the token proves AVX.
            unsafe {
                let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
            }
        }
        #[inline(always)]
        fn max_lane(self, a: __m256) -> f32 {
            // SAFETY: the token proves AVX.
            unsafe {
                let four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
                let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
            }
        }
    }

    /// Mask of the first `len` of 16 lanes.
    #[inline(always)]
    fn first_lanes(len: usize) -> __mmask16 {
        if len >= 16 { !0 } else { (1 << len) - 1 }
    }

    impl Simd for Avx512 {
        const LANES: usize = 16;
        type Vector = __m512;

        lanewise! {
            add(a, b): __m512 = _mm512_add_ps(a, b);
            sub(a, b): __m512 = _mm512_sub_ps(a, b);
            mul(a, b): __m512 = _mm512_mul_ps(a, b);
            div(a, b): __m512 = _mm512_div_ps(a, b);
            fma(a, b, c): __m512 = _mm512_fmadd_ps(a, b, c);
            min(a, b): __m512 = _mm512_min_ps(a, b);
            max(a, b): __m512 = _mm512_max_ps(a, b);
            round(a): __m512 = _mm512_roundscale_ps::<0>(a);
            exp2_integral(a): __m512 =
                _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(127))));
            zero_where_less(a, b, value): __m512 = _mm512_maskz_mov_ps(!_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), value);
        }

        #[inline(always)]
        fn splat(self, value: f32) -> __m512 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_set1_ps(value) }
        }
        #[inline(always)]
        fn load(self, source: &[f32]) -> __m512 {
            let source = &source[..16];
            // SAFETY: the token proves AVX-512; sixteen elements are there.
            unsafe { _mm512_loadu_ps(source.as_ptr()) }
        }
        #[inline(always)]
        fn load_partial(self, source: &[f32]) -> __m512 {
            // SAFETY: the token proves AVX-512; lanes past the slice are masked and not read.
            unsafe { _mm512_maskz_loadu_ps(first_lanes(source.len()), source.as_ptr()) }
        }
        #[inline(always)]
        fn store(self, target: &mut [f32], value: __m512) {
            let target = &mut target[..16];
            // SAFETY: the token proves AVX-512; sixteen elements are there.
            unsafe { _mm512_storeu_ps(target.as_mut_ptr(), value) }
        }
        #[inline(always)]
        fn store_partial(self, target: &mut [f32], value: __m512) {
            // SAFETY: the token proves AVX-512; lanes past the slice are masked and not written.
            unsafe { _mm512_mask_storeu_ps(target.as_mut_ptr(), first_lanes(target.len()), value) }
        }
        #[inline(always)]
        fn load_bf16(self, source: &[bf16]) -> __m512 {
            let source = &source[..16];
            // SAFETY: the token proves AVX-512; sixteen elements of two bytes are there.
            unsafe {
                let halves = _mm256_loadu_si256(source.as_ptr().cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
            }
        }
        #[inline(always)]
        fn load_low_bf16(self, source: &[u32]) -> __m512 {
            let source = &source[..16];
            // SAFETY: the token proves AVX-512; sixteen words are there.
            unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(source.as_ptr().cast()))) }
        }
        #[inline(always)]
        fn load_high_bf16(self, source: &[u32]) -> __m512 {
            let source = &source[..16];
            // SAFETY: the token proves AVX-512; sixteen words are there.
            unsafe { _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(source.as_ptr().cast()), _mm512_set1_epi32(!0xffff))) }
        }
        #[inline(always)]
        fn sum(self, a: __m512) -> f32 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_reduce_add_ps(a) }
        }
        #[inline(always)]
        fn max_lane(self, a: __m512) -> f32 {
            // SAFETY: the token proves AVX-512.
            unsafe { _mm512_reduce_max_ps(a) }
        }
    }
}

/// Defines `fn name(isa, arguments…)`, which runs `body(token, arguments…)` compiled for the instructions of `isa`.
macro_rules! dispatch {
    ($visibility:vis fn $name:ident $([$generic:ident: $bound:path])? ($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? = $body:path) => {
        $visibility fn $name $(<$generic: $bound>)? (isa: $crate::cpu::simd::Isa, $($argument: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2 $(<$generic: $bound>)? ($($argument: $type),*) $(-> $result)? {
                // SAFETY: this function runs only where the CPU has them.
                $body(unsafe { $crate::cpu::simd::Avx2::new() }, $($argument),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
            fn avx512 $(<$generic: $bound>)? ($($argument: $type),*) $(-> $result)? {
                // SAFETY: this function runs only where the CPU has them.
                $body(unsafe { $crate::cpu::simd::Avx512::new() }, $($argument),*)
            }
            match isa {
                // SAFETY: an `Isa` above `Portable` comes from `Isa::detect` or is below it.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::simd::Isa::Avx512 | $crate::cpu::simd::Isa::Avx512Bf16 => unsafe { avx512($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::simd::Isa::Avx2 => unsafe { avx2($($argument),*) },
                _ => $body($crate::cpu::simd::Portable, $($argument),*),
            }
        }
    };
}
pub(super) use dispatch;

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(always)]
    fn exp_all_body<S: Simd>(s: S, x: &mut [f32]) {
        for x in x.chunks_mut(S::LANES) {
            s.store_partial(x, exp(s, s.load_partial(x)));
        }
    }
    dispatch!(fn exp_all(x: &mut [f32]) = exp_all_body);

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for isa in Isa::available() {
            let x: Vec<f32> = (0..200_000).map(|idx| -87.3 + idx as f32 * (175.6 / 200_000.0)).collect();
            let mut got = x.clone();
            exp_all(isa, &mut got);
            for (&x, &got) in x.iter().zip(&got) {
                let exact = f64::from(x).exp();
                let unit = f64::from(f32::EPSILON) * 2_f64.powi(exact.log2().floor() as i32);
                assert!((f64::from(got) - exact).abs() <= 2.0 * unit, "{isa:?}: exp({x}) gave {got}, not {exact}");
            }
            let mut special = [0.0, -0.0, f32::NEG_INFINITY, -1e30, -88.0, f32::NAN, f32::INFINITY];
            exp_all(isa, &mut special);
            assert_eq!(special[..5], [1.0, 1.0, 0.0, 0.0, 0.0]);
            assert!(special[5].is_nan() && special[6] > 1e38);
        }
    }
}
