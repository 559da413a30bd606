//! A device, random data, and how results are compared.

use std::sync::Arc;

use half::bf16;
use polylora_kernels::cuda::{Device, Kernels, Stream, View, embedding::EmbeddingArgs};

/// With the feature and without a device a test fails and says so: a GPU test never vanishes.
pub struct Gpu {
    pub device: Arc<Device>,
    pub stream: Stream,
    pub kernels: Kernels,
}

pub fn gpu() -> Gpu {
    let device = Device::open(0).expect("these tests need a CUDA device");
    let stream = Stream::new(&device).expect("a stream");
    let kernels = Kernels::load(&device).expect("the kernels load");
    Gpu { device, stream, kernels }
}

impl Gpu {
    /// Rows of `table` by `sources`, each under the adapter at its address (0: none), into memory that holds no number before.
    pub fn embedding(&self, table: View<'_, bf16>, hidden: usize, sources: &[u32], chosen: &[u32], adapters: &[u64]) -> Vec<f32> {
        let (token_sources, chosen) = (self.stream.upload(sources).unwrap(), self.stream.upload(chosen).unwrap());
        let adapters = self.stream.upload(adapters).unwrap();
        let out = self.stream.upload(&vec![f32::NAN; sources.len() * hidden]).unwrap();
        let args = EmbeddingArgs {
            out: out.view(),
            table,
            token_sources: token_sources.view(),
            chosen: chosen.view(),
            adapters: adapters.view(),
            rows: sources.len(),
            hidden,
        };
        self.kernels.embedding.launch(&self.stream, &args).unwrap();
        self.stream.download(out.view()).unwrap()
    }
}

/// SplitMix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// In [-1, 1).
    pub fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn f32s(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.unit() * scale).collect()
    }

    pub fn bf16s(&mut self, n: usize, scale: f32) -> Vec<bf16> {
        (0..n).map(|_| bf16::from_f32(self.unit() * scale)).collect()
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

pub fn widen(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|value| value.to_f32()).collect()
}

pub fn poison_bf16(n: usize) -> Vec<bf16> {
    vec![bf16::NAN; n]
}

/// ‖got − expected‖ / ‖expected‖ below `tolerance`, and expected isn't near zero.
#[track_caller]
pub fn assert_close(what: &str, got: &[f32], expected: &[f32], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{what}: length");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let size = norm(&mut expected.iter().map(|&value| f64::from(value)));
    assert!(size > 1e-3, "{what}: the expected output is near zero ({size:e}): nothing is tested");
    let error = norm(&mut got.iter().zip(expected).map(|(&got, &expected)| f64::from(got) - f64::from(expected))) / size;
    if error.is_nan() || error >= tolerance {
        let worst = (0..got.len()).max_by(|&a, &b| {
            let off = |i: usize| if got[i].is_nan() { f32::INFINITY } else { (got[i] - expected[i]).abs() };
            off(a).total_cmp(&off(b))
        });
        let worst = worst.expect("not empty");
        panic!(
            "{what}: relative error {error:.2e}, at most {tolerance:.0e}; worst at {worst}: got {}, expected {}",
            got[worst], expected[worst]
        );
    }
}

pub const TOLERANCE: f64 = 1e-2;
