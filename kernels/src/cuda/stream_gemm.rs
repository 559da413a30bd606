//! The GEMM of our own for up to 128 rows on Hopper: contract and method are at the head of `cuda/stream_gemm.cu`.

use std::sync::Arc;

use super::{
    CudaError, Device, LaunchConfig, Stream, arguments,
    device::{Kernel, TensorMap},
    gemm::GemmArgs,
    hopper::{DEPTH, MAX_CLUSTER, MAX_STAGES, MIN_STEPS, Multiprocessors, OTHER_SHARED_BYTES, RawArgs},
    images, require,
};

const NAME: &str = "stream_gemm";
/// So many stages hide all of memory's latency.
const STAGES_TO_SPARE: usize = 8;
/// What the device keeps of each block's shared memory for itself.
const RESERVED_BYTES: usize = 1024;

/// Most rows, columns of y of a block.
const VARIANTS: [(usize, usize, &str); 15] = [
    (8, 64, "stream_gemm_rows8_tile64"),
    (8, 128, "stream_gemm_rows8_tile128"),
    (8, 256, "stream_gemm_rows8_tile256"),
    (16, 64, "stream_gemm_rows16_tile64"),
    (16, 128, "stream_gemm_rows16_tile128"),
    (16, 256, "stream_gemm_rows16_tile256"),
    (32, 64, "stream_gemm_rows32_tile64"),
    (32, 128, "stream_gemm_rows32_tile128"),
    (32, 256, "stream_gemm_rows32_tile256"),
    (64, 64, "stream_gemm_rows64_tile64"),
    (64, 128, "stream_gemm_rows64_tile128"),
    (64, 256, "stream_gemm_rows64_tile256"),
    (128, 64, "stream_gemm_rows128_tile64"),
    (128, 128, "stream_gemm_rows128_tile128"),
    (128, 256, "stream_gemm_rows128_tile256"),
];

/// How a shape is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamCut {
    /// Index of a variant.
    pub(super) variant: usize,
    /// Blocks that share a tile's sum.
    pub(super) num_splits: usize,
    pub(super) num_stages: usize,
}

impl StreamCut {
    /// A stage less, where there are many: room for blocks of a kernel that runs beside this one.
    pub(super) fn with_room(self) -> Self {
        let room = usize::from(self.num_stages > STAGES_TO_SPARE);
        Self {
            num_stages: self.num_stages - room,
            ..self
        }
    }
}

struct Variant {
    rows: usize,
    tile: usize,
    kernel: Kernel,
}

impl Variant {
    fn stage_bytes(&self) -> usize {
        (self.tile + self.rows) * DEPTH * 2
    }

    /// Stages that fit when so many blocks share a multiprocessor, and at least those that hold a tile's sums.
    fn stages(&self, shared_bytes: usize, blocks: usize) -> Option<usize> {
        let least = (self.rows * (self.tile + 4) * 4).div_ceil(self.stage_bytes()).max(3);
        let stages = ((shared_bytes + RESERVED_BYTES) / blocks - RESERVED_BYTES - OTHER_SHARED_BYTES) / self.stage_bytes();
        (stages >= least).then_some(stages.min(MAX_STAGES))
    }
}

/// The loaded kernels.
pub(super) struct StreamGemm {
    variants: Vec<Variant>,
    multiprocessors: Multiprocessors,
}

impl StreamGemm {
    /// `None` on devices other than Hopper.
    pub fn load(device: &Arc<Device>) -> Result<Option<Self>, CudaError> {
        let Some(multiprocessors) = Multiprocessors::of_hopper(device) else {
            return Ok(None);
        };
        let kernels = multiprocessors.load(device, images::STREAM_GEMM, VARIANTS.map(|(.., name)| name))?;
        let variants = VARIANTS.into_iter().zip(kernels);
        Ok(Some(Self {
            variants: variants.map(|((rows, tile, _), kernel)| Variant { rows, tile, kernel }).collect(),
            multiprocessors,
        }))
    }

    /// Rows of the smallest variant that takes `rows`.
    pub fn most_rows(&self, rows: usize) -> Option<usize> {
        self.variants.iter().map(|variant| variant.rows).find(|&most| rows <= most)
    }

    /// Cuts that may be the fastest for a shape; none if it is not one of the kernel's.
    pub fn candidates(&self, args: &GemmArgs<'_>) -> Vec<StreamCut> {
        let mut cuts = Vec::new();
        let Some(rows) = self.most_rows(args.m).filter(|_| args.n.is_multiple_of(8)) else {
            return cuts;
        };
        let Multiprocessors { count, shared_bytes } = self.multiprocessors;
        let steps = args.k.div_ceil(DEPTH);
        for (index, variant) in self.variants.iter().enumerate().filter(|(_, variant)| variant.rows == rows) {
            let tiles = args.n.div_ceil(variant.tile);
            let max_splits = MAX_CLUSTER.min((steps / MIN_STEPS).max(1));
            for num_splits in 1..=max_splits {
                let blocks = tiles * num_splits;
                let (too_many, too_few) = (blocks > 2 * count, 2 * blocks < count);
                if (too_many && num_splits > 1) || (too_few && num_splits < max_splits) {
                    continue;
                }
                let shared_by = if blocks > count { 2 } else { 1 };
                for sharing in 1..=shared_by {
                    if let Some(num_stages) = variant.stages(shared_bytes, sharing) {
                        cuts.push(StreamCut {
                            variant: index,
                            num_splits,
                            num_stages,
                        });
                    }
                }
            }
        }
        cuts
    }

    /// Enqueues it. The lengths of `args` are checked by the caller.
    pub fn launch(&self, stream: &Stream, args: &GemmArgs<'_>, cut: StreamCut) -> Result<(), CudaError> {
        let variant = &self.variants[cut.variant];
        require(NAME, args.m <= variant.rows && args.n.is_multiple_of(8), || {
            format!("m is {}, at most {}; n is {}", args.m, variant.rows, args.n)
        })?;
        let w_map = TensorMap::new(args.w.address(), args.n, args.k, variant.tile)?;
        // Rows past `m` that x's buffer has are copied as they are, which is quicker than zeros; what comes of them is not written.
        let x_rows = (args.x.len() / args.k).min(variant.rows);
        let x_map = TensorMap::new(args.x.address(), x_rows, args.k, variant.rows)?;
        let raw = RawArgs::new(NAME, args, cut.num_splits, cut.num_stages)?;
        let tiles = args.n.div_ceil(variant.tile) as u32;
        let config = LaunchConfig {
            grid: [cut.num_splits as u32, tiles, 1],
            block: if variant.tile == 64 { 160 } else { 288 },
            shared_bytes: (cut.num_stages * variant.stage_bytes() + 1024) as u32,
            cluster: cut.num_splits as u32,
        };
        stream.launch(&variant.kernel, config, arguments![w_map, x_map, raw])
    }
}
