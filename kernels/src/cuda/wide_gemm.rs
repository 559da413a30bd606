//! The GEMM of our own for 65 to 256 rows on Hopper: contract and method are at the head of `cuda/wide_gemm.cu`.

use std::sync::Arc;

use super::{
    CudaError, Device, LaunchConfig, Stream,
    activation::Gate,
    arguments,
    device::{Kernel, TensorMap},
    gemm::{GemmArgs, GemmOutput},
    hopper::{DEPTH, MAX_CLUSTER, MAX_STAGES, MIN_STEPS, Multiprocessors, OTHER_SHARED_BYTES, RawArgs},
    images, require,
};

const NAME: &str = "wide_gemm";
/// Fewer rows are the stream kernel's.
const MIN_ROWS: usize = 65;
const MIN_STAGES: usize = 3;
/// Shared memory that is left for a block of the kernel that runs beside this one.
const ROOM_BYTES: usize = 8 << 10;
/// Sums of a thread from which a block has no warp for the copies, nor registers for anything beside it.
const MANY_SUMS: usize = 192;
/// Sums of a thread up to which splits can be added: more do not fit in the ring.
const MOST_SUMS_TO_SPLIT: usize = 192;
/// The tiles that are tried for more than one wave of blocks.
const TILE_OF_WAVES: usize = 128;

/// Most rows, rows of w of a block, whether those are of gate and up.
const VARIANTS: [(usize, usize, bool, &str); 12] = [
    (128, 64, false, "wide_gemm_rows128_tile64"),
    (128, 96, false, "wide_gemm_rows128_tile96"),
    (128, 128, false, "wide_gemm_rows128_tile128"),
    (128, 192, false, "wide_gemm_rows128_tile192"),
    (128, 224, false, "wide_gemm_rows128_tile224"),
    (256, 64, false, "wide_gemm_rows256_tile64"),
    (256, 96, false, "wide_gemm_rows256_tile96"),
    (256, 128, false, "wide_gemm_rows256_tile128"),
    (256, 192, false, "wide_gemm_rows256_tile192"),
    (256, 224, false, "wide_gemm_rows256_tile224"),
    (128, 224, true, "wide_gemm_rows128_tile224_gated"),
    (256, 224, true, "wide_gemm_rows256_tile224_gated"),
];

/// How a shape is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WideCut {
    /// Index of a variant.
    pub(super) variant: usize,
    /// Blocks that share a tile's sum.
    pub(super) num_splits: usize,
    /// Blocks that share x.
    pub(super) num_sharing: usize,
    /// Of w's ring.
    pub(super) num_stages: usize,
    /// Of x's.
    pub(super) num_x_stages: usize,
}

impl WideCut {
    /// Whether blocks of another kernel find room on a multiprocessor beside one of this.
    pub(super) fn has_room(self) -> bool {
        let (rows, tile, ..) = VARIANTS[self.variant];
        sums(rows, tile) < MANY_SUMS
    }
}

/// Sums of each of the 256 threads that multiply.
fn sums(rows: usize, tile: usize) -> usize {
    rows * tile / 256
}

struct Variant {
    rows: usize,
    tile: usize,
    is_gated: bool,
    kernel: Kernel,
}

impl Variant {
    /// Columns of y of a block.
    fn columns(&self) -> usize {
        if self.is_gated { self.tile / 2 } else { self.tile }
    }

    /// Bytes of a stage of w and of one of x.
    fn stage_bytes(&self) -> [usize; 2] {
        [self.tile, self.rows].map(|rows| rows * DEPTH * 2)
    }

    /// Whether the sums of splits fit in the rings.
    fn may_split(&self) -> bool {
        !self.is_gated && sums(self.rows, self.tile) <= MOST_SUMS_TO_SPLIT
    }

    /// Stages of w and of x that fit, if they are enough for rings and, with splits, for a tile's sums. What is left over by as many of x as of
    /// w goes to w, which has the longer way.
    fn stages(&self, shared_bytes: usize, num_splits: usize) -> Option<[usize; 2]> {
        let sums = sums(self.rows, self.tile);
        let room = if sums < MANY_SUMS { ROOM_BYTES } else { 0 };
        let ring_bytes = shared_bytes - OTHER_SHARED_BYTES - room;
        let [w_bytes, x_bytes] = self.stage_bytes();
        let x_stages = (ring_bytes / (w_bytes + x_bytes)).min(MAX_STAGES);
        let w_stages = ((ring_bytes - x_stages * x_bytes) / w_bytes).min(MAX_STAGES);
        let holds_sums = w_stages * w_bytes + x_stages * x_bytes >= self.rows * (self.tile + 8) * 4;
        let fits = x_stages >= MIN_STAGES && (num_splits == 1 || self.may_split() && holds_sums);
        fits.then_some([w_stages, x_stages])
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
struct RawWideArgs {
    gemm: RawArgs,
    num_sharing: i32,
    num_x_stages: i32,
    gate: i32,
    padding: i32,
}

/// The loaded kernels.
pub(super) struct WideGemm {
    variants: Vec<Variant>,
    multiprocessors: Multiprocessors,
}

impl WideGemm {
    /// `None` on devices other than Hopper.
    pub fn load(device: &Arc<Device>) -> Result<Option<Self>, CudaError> {
        let Some(multiprocessors) = Multiprocessors::of_hopper(device) else {
            return Ok(None);
        };
        let kernels = multiprocessors.load(device, images::WIDE_GEMM, VARIANTS.map(|(.., name)| name))?;
        let variant = |((rows, tile, is_gated, _), kernel)| Variant {
            rows,
            tile,
            is_gated,
            kernel,
        };
        Ok(Some(Self {
            variants: VARIANTS.into_iter().zip(kernels).map(variant).collect(),
            multiprocessors,
        }))
    }

    /// Rows of the smallest variant that takes `rows`.
    pub fn most_rows(&self, rows: usize) -> Option<usize> {
        let mut most = self.variants.iter().map(|variant| variant.rows).filter(|_| rows >= MIN_ROWS);
        most.find(|&most| rows <= most)
    }

    /// Cuts that may be the fastest for a shape, most of them one wave of blocks; none if it is not one of the kernel's.
    pub fn candidates(&self, args: &GemmArgs<'_>) -> Vec<WideCut> {
        let mut cuts = Vec::new();
        let Some(rows) = self.most_rows(args.m).filter(|_| args.n.is_multiple_of(8)) else {
            return cuts;
        };
        let (is_gated, columns) = (matches!(args.y, GemmOutput::Gated(..)), args.y_columns());
        let Multiprocessors { count, shared_bytes } = self.multiprocessors;
        let steps = args.k.div_ceil(DEPTH);
        let is_for_it = |variant: &Variant| variant.rows == rows && variant.is_gated == is_gated;
        for (index, variant) in self.variants.iter().enumerate().filter(|(_, variant)| is_for_it(variant)) {
            for num_sharing in [1, 2] {
                let tiles = columns.div_ceil(variant.columns()).next_multiple_of(num_sharing);
                let max_splits = match variant.may_split() {
                    true => (MAX_CLUSTER / num_sharing).min((steps / MIN_STEPS).max(1)),
                    false => 1,
                };
                for num_splits in 1..=max_splits {
                    let blocks = tiles * num_splits;
                    let (too_many, too_few) = (blocks > count, 2 * blocks < count);
                    let waves_may_do = num_splits == 1 && variant.tile >= TILE_OF_WAVES;
                    if (too_many && !waves_may_do) || (too_few && num_splits < max_splits) {
                        continue;
                    }
                    if let Some([num_stages, num_x_stages]) = variant.stages(shared_bytes, num_splits) {
                        cuts.push(WideCut {
                            variant: index,
                            num_splits,
                            num_sharing,
                            num_stages,
                            num_x_stages,
                        });
                    }
                }
            }
        }
        cuts
    }

    /// Enqueues it. The lengths of `args` are checked by the caller.
    pub fn launch(&self, stream: &Stream, args: &GemmArgs<'_>, cut: WideCut) -> Result<(), CudaError> {
        let variant = &self.variants[cut.variant];
        require(NAME, args.m <= variant.rows && args.n.is_multiple_of(8), || {
            format!("m is {}, at most {}; n is {}", args.m, variant.rows, args.n)
        })?;
        let gate = match args.y {
            GemmOutput::Gated(_, gate) => Some(gate),
            _ => None,
        };
        require(NAME, gate.is_some() == variant.is_gated, || {
            format!("the cut is {}gated, y is not so", if variant.is_gated { "" } else { "not " })
        })?;
        let w_map = TensorMap::new(args.w.address(), args.n, args.k, variant.columns())?;
        // Rows past `m` that x's buffer has are copied as they are; what comes of them is not written.
        let x_rows = (args.x.len() / args.k).min(variant.rows);
        let x_map = TensorMap::new(args.x.address(), x_rows, args.k, variant.rows / 2)?;
        let raw = RawWideArgs {
            gemm: RawArgs::new(NAME, args, cut.num_splits, cut.num_stages)?,
            num_sharing: cut.num_sharing as i32,
            num_x_stages: cut.num_x_stages as i32,
            gate: i32::from(gate == Some(Gate::GeluTanh)),
            padding: 0,
        };
        let [w_bytes, x_bytes] = variant.stage_bytes();
        let cluster = (cut.num_splits * cut.num_sharing) as u32;
        let config = LaunchConfig {
            grid: [cluster, args.y_columns().div_ceil(variant.columns() * cut.num_sharing) as u32, 1],
            block: if sums(variant.rows, variant.tile) < MANY_SUMS { 288 } else { 256 },
            shared_bytes: (cut.num_stages * w_bytes + cut.num_x_stages * x_bytes + 1024) as u32,
            cluster,
        };
        stream.launch(&variant.kernel, config, arguments![w_map, x_map, raw])
    }
}
