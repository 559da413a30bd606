//! Dense GEMMs: `y[m, n] = x[m, k] · w[n, k]ᵀ (+ bias)`, bf16 in, f32 sums, bf16 or f32 out, or accumulated into f32.
//!
//! By cuBLASLt; for up to 256 rows by a kernel of our own (`cuda/skinny_gemm.cu`, `cuda/stream_gemm.cu`, `cuda/wide_gemm.cu`) where
//! [`Gemm::tune`] measures that it is faster on the device.
//! Everything that a call of cuBLASLt needs is made once per shape and kept (a *plan*): descriptors, layouts, and the algorithm, which `tune`
//! picks by measuring cuBLASLt's candidates. What it picks may be kept on disk ([`super::tuning`]).

use std::{collections::HashMap, ffi::c_void, ptr, sync::Arc};

use cudarc::cublaslt::sys::{self, cublasLtMatmulDescAttributes_t as DescAttribute, cublasStatus_t, cudaDataType_t};
use half::bf16;

use super::{
    CudaError, Device, DeviceBuffer, Event, LaunchConfig, Stream, View,
    activation::Gate,
    arguments,
    device::{Kernel, Module, between_captures, driver_version},
    dimension, images, require, require_len,
    stream_gemm::{StreamCut, StreamGemm},
    tuning::{TunedFor, Tuning},
    wide_gemm::{WideCut, WideGemm},
};

const NAME: &str = "gemm";
/// What NVIDIA recommends for Hopper; smaller cards do with less.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Most rows of the skinny kernel, by variant.
const SKINNY_ROWS: [usize; 3] = [8, 16, 32];
/// Most rows that a kernel of our own is taken for where no shrink runs beside it and no activation is spared: with more, what is faster alone
/// is not so in a step, where the card's power is the limit.
const MOST_ROWS_ALONE: usize = 64;
/// What a shrink costs that runs after its GEMM instead of beside it, about.
const MICROSECONDS_OF_A_SHRINK: f32 = 3.0;
/// Candidates of cuBLASLt that are timed.
const MAX_CANDIDATES: usize = 12;

fn check(call: &'static str, status: cublasStatus_t) -> Result<(), CudaError> {
    match status {
        cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
        status => Err(CudaError::Cublas {
            call,
            status: format!("{status:?}"),
        }),
    }
}

macro_rules! cublas {
    ($function:ident($($argument:expr),* $(,)?)) => {
        // SAFETY: handles are live (their owners keep them), pointers are to locals or to device memory whose length the caller checked.
        check(stringify!($function), unsafe { sys::$function($($argument),*) })
    };
}

/// Bias of a GEMM, in the dtype of its output (cuBLASLt knows no other).
#[derive(Clone, Copy)]
pub enum GemmBias<'a> {
    /// For [`GemmOutput::Bf16`].
    Bf16(View<'a, bf16>),
    /// For the others.
    F32(View<'a, f32>),
}

impl GemmBias<'_> {
    pub(super) fn address(self) -> u64 {
        match self {
            Self::Bf16(bias) => bias.address(),
            Self::F32(bias) => bias.address(),
        }
    }
}

/// y of a GEMM.
#[derive(Clone, Copy)]
pub enum GemmOutput<'a> {
    /// Overwritten.
    Bf16(View<'a, bf16>),
    /// Overwritten.
    F32(View<'a, f32>),
    /// Added to.
    AddF32(View<'a, f32>),
    /// `[m, n / 2]`, overwritten: w is a stack of gate and up, and y the gate's activation times up, both rounded to bf16 before.
    Gated(View<'a, bf16>, Gate),
}

impl GemmOutput<'_> {
    pub(super) fn kind(self) -> OutputKind {
        match self {
            Self::Bf16(_) => OutputKind::Bf16,
            Self::F32(_) => OutputKind::F32,
            Self::AddF32(_) => OutputKind::AddF32,
            Self::Gated(..) => OutputKind::Gated,
        }
    }

    pub(super) fn address_and_len(self) -> (u64, usize) {
        match self {
            Self::Bf16(view) | Self::Gated(view, _) => (view.address(), view.len()),
            Self::F32(view) | Self::AddF32(view) => (view.address(), view.len()),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum OutputKind {
    Bf16,
    F32,
    AddF32,
    Gated,
}

/// A shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub output: OutputKind,
    pub bias: bool,
    /// A shrink over the same x follows.
    pub beside: bool,
}

/// What a shape is computed by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Choice {
    /// cuBLASLt with this algorithm (its words mean something to the same library alone).
    Cublas([u64; 8]),
    Skinny,
    Stream(StreamCut),
    Wide(WideCut),
    /// A gated output: by a GEMM and an activation.
    Apart,
}

impl Choice {
    /// The kernel of our own that it is.
    fn own(&self) -> Option<OwnGemm> {
        match self {
            Self::Cublas(_) | Self::Apart => None,
            Self::Skinny => Some(OwnGemm::Skinny),
            Self::Stream(cut) => Some(OwnGemm::Stream(*cut)),
            Self::Wide(cut) => Some(OwnGemm::Wide(*cut)),
        }
    }
}

/// Arguments of a GEMM.
#[derive(Clone, Copy)]
pub struct GemmArgs<'a> {
    /// `[m, k]`.
    pub x: View<'a, bf16>,
    /// `[n, k]`.
    pub w: View<'a, bf16>,
    /// `[n]`.
    pub bias: Option<GemmBias<'a>>,
    /// `[m, n]`, or as its kind says.
    pub y: GemmOutput<'a>,
    /// Rows of x.
    pub m: usize,
    /// Rows of w.
    pub n: usize,
    /// Columns of both.
    pub k: usize,
}

impl GemmArgs<'_> {
    pub(super) fn y_columns(&self) -> usize {
        match self.y {
            GemmOutput::Gated(..) => self.n / 2,
            _ => self.n,
        }
    }

    fn key(&self) -> Key {
        Key {
            m: self.m,
            n: self.n,
            k: self.k,
            output: self.y.kind(),
            bias: self.bias.is_some(),
            beside: false,
        }
    }

    /// As [`Self::check`], for outputs that cuBLASLt knows.
    fn check_plain(&self) -> Result<(), CudaError> {
        let is_gated = matches!(self.y, GemmOutput::Gated(..));
        require(NAME, !is_gated, || "a gated output is launch_gated's".into())?;
        self.check()
    }

    fn check(&self) -> Result<(), CudaError> {
        require(NAME, self.m > 0 && self.n > 0 && self.k > 0, || {
            format!("m, n, k are {}, {}, {}", self.m, self.n, self.k)
        })?;
        require(NAME, self.k.is_multiple_of(8), || format!("k is {}, not a multiple of 8", self.k))?;
        require_len(NAME, "x", self.x, self.m * self.k)?;
        require_len(NAME, "w", self.w, self.n * self.k)?;
        match (self.bias, self.y) {
            (None, _) => {}
            (Some(GemmBias::Bf16(bias)), GemmOutput::Bf16(_)) => require_len(NAME, "bias", bias, self.n)?,
            (Some(GemmBias::F32(bias)), GemmOutput::F32(_) | GemmOutput::AddF32(_)) => require_len(NAME, "bias", bias, self.n)?,
            _ => require(NAME, false, || "the bias is not of the output's dtype".into())?,
        }
        let gated_columns = if let GemmOutput::Gated(..) = self.y { 16 } else { 1 };
        require(NAME, self.n.is_multiple_of(gated_columns), || {
            format!("n is {}, not a multiple of {gated_columns}", self.n)
        })?;
        let ((_, len), needed) = (self.y.address_and_len(), self.m * self.y_columns());
        require(NAME, len >= needed, || format!("y has {len} elements, {needed} are needed"))
    }
}

/// Descriptors and algorithm of one shape.
struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Drop for Plan {
    fn drop(&mut self) {
        // What was not made is null. Errors here have nobody left to hear them.
        for layout in [self.w, self.x, self.y] {
            if !layout.is_null() {
                let _ = cublas!(cublasLtMatrixLayoutDestroy(layout));
            }
        }
        if !self.operation.is_null() {
            let _ = cublas!(cublasLtMatmulDescDestroy(self.operation));
        }
    }
}

/// A kernel of our own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OwnGemm {
    /// `skinny_gemm.cu`, up to 32 rows.
    Skinny,
    /// `stream_gemm.cu`, up to 128 rows on Hopper.
    Stream(StreamCut),
    /// `wide_gemm.cu`, 65 to 256 rows on Hopper.
    Wide(WideCut),
}

impl OwnGemm {
    /// Whether blocks of a shrink find room beside its own.
    fn has_room(self) -> bool {
        match self {
            Self::Skinny | Self::Stream(_) => true,
            Self::Wide(cut) => cut.has_room(),
        }
    }
}

impl From<OwnGemm> for Choice {
    fn from(own: OwnGemm) -> Self {
        match own {
            OwnGemm::Skinny => Self::Skinny,
            OwnGemm::Stream(cut) => Self::Stream(cut),
            OwnGemm::Wide(cut) => Self::Wide(cut),
        }
    }
}

impl std::ops::AddAssign for Tuned {
    fn add_assign(&mut self, other: Self) {
        self.measured += other.measured;
        self.known += other.known;
    }
}

/// cuBLASLt with its workspace and its plans. For one stream at a time: the workspace is shared by all calls.
pub struct Gemm {
    handle: sys::cublasLtHandle_t,
    workspace: DeviceBuffer<u8>,
    plans: HashMap<Key, Plan>,
    skinny_bf16: [Kernel; 3],
    skinny_f32: [Kernel; 3],
    stream: Option<StreamGemm>,
    wide: Option<WideGemm>,
    /// Shapes that an own kernel is faster for.
    own: HashMap<Key, OwnGemm>,
    /// What was found for shapes, here or in an earlier process.
    tuning: Tuning,
    tuned_for: TunedFor,
}

/// How [`Gemm::tune`] came to its choices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tuned {
    /// Shapes that were measured.
    pub measured: usize,
    /// Shapes whose choice was known from before.
    pub known: usize,
}

// SAFETY: handles may be used from any thread, one at a time (`&mut self`).
unsafe impl Send for Gemm {}

impl Gemm {
    /// Opens cuBLASLt on the device that is bound to this thread.
    ///
    /// # Errors
    /// `Cublas`, `OutOfMemory`.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        let module = Module::load(device, images::SKINNY_GEMM)?;
        let mut handle = ptr::null_mut();
        cublas!(cublasLtCreate(&mut handle))?;
        Ok(Self {
            skinny_bf16: [
                module.kernel("skinny_gemm_rows8_bf16")?,
                module.kernel("skinny_gemm_rows16_bf16")?,
                module.kernel("skinny_gemm_rows32_bf16")?,
            ],
            skinny_f32: [
                module.kernel("skinny_gemm_rows8_f32")?,
                module.kernel("skinny_gemm_rows16_f32")?,
                module.kernel("skinny_gemm_rows32_f32")?,
            ],
            stream: StreamGemm::load(device)?,
            wide: WideGemm::load(device)?,
            own: HashMap::new(),
            tuning: Tuning::default(),
            tuned_for: tuned_for(device)?,
            handle,
            workspace: DeviceBuffer::uninit(device, WORKSPACE_BYTES)?,
            plans: HashMap::new(),
        })
    }

    /// What the choices of [`Self::tune`] are good for.
    pub fn tuned_for(&self) -> &TunedFor {
        &self.tuned_for
    }

    /// Choices of an earlier process with the same [`Self::tuned_for`]: `tune` does not measure these shapes again.
    pub fn set_tuning(&mut self, tuning: Tuning) {
        self.tuning = tuning;
    }

    /// What `set_tuning` gave and `tune` has found since.
    pub fn tuning(&self) -> &Tuning {
        &self.tuning
    }

    /// Enqueues a GEMM. A shape that was not seen before gets the algorithm that cuBLASLt thinks best.
    ///
    /// # Errors
    /// `Shape` for lengths that don't fit; `Cublas`.
    pub fn launch(&mut self, stream: &Stream, args: &GemmArgs<'_>) -> Result<(), CudaError> {
        args.check_plain()?;
        let key = args.key();
        if let Some(own) = self.own.get(&key) {
            return self.enqueue_own(stream, args, *own);
        }
        if !self.plans.contains_key(&key) {
            let mut plan = new_plan(key)?;
            plan.algorithm = *self.candidates(&plan)?.first().ok_or_else(|| CudaError::Cublas {
                call: "cublasLtMatmulAlgoGetHeuristic",
                status: format!("no algorithm for {key:?}"),
            })?;
            self.plans.insert(key, plan);
        }
        self.enqueue(stream, &self.plans[&key], args)
    }

    /// As [`Self::launch`] for a GEMM that a shrink over the same x follows. True if an own kernel was taken, beside which the shrink may run
    /// ([`super::lora::ShrinkInput::is_ready`]), or into whose last blocks' time it comes where they leave no room; that one is taken also where
    /// cuBLASLt is faster by less than the shrink takes.
    ///
    /// # Errors
    /// As [`Self::launch`].
    pub fn launch_beside(&mut self, stream: &Stream, args: &GemmArgs<'_>) -> Result<bool, CudaError> {
        args.check()?;
        let key = Key { beside: true, ..args.key() };
        match self.own.get(&key) {
            Some(OwnGemm::Stream(cut)) => self.enqueue_own(stream, args, OwnGemm::Stream(cut.with_room())).map(|()| true),
            Some(own) => self.enqueue_own(stream, args, *own).map(|()| true),
            None => self.launch(stream, args).map(|()| false),
        }
    }

    /// As [`Self::launch`] for a gated output. False, and nothing enqueued, where [`Self::tune_gated`] has not found that one kernel is faster than
    /// the GEMM and the activation one after the other.
    ///
    /// # Errors
    /// As [`Self::launch`].
    pub fn launch_gated(&self, stream: &Stream, args: &GemmArgs<'_>) -> Result<bool, CudaError> {
        args.check()?;
        match self.own.get(&args.key()) {
            Some(own) => self.enqueue_own(stream, args, *own).map(|()| true),
            None => Ok(false),
        }
    }

    /// As [`Self::tune`] for a gated output: the fastest kernel of our own, if it is faster than `apart` with the same weights, which is the GEMM
    /// and its activation and may use this `Gemm`.
    ///
    /// # Errors
    /// As [`Self::tune`], and those of `apart`.
    pub fn tune_gated(
        &mut self,
        stream: &Stream,
        args: &GemmArgs<'_>,
        weights: &[View<'_, bf16>],
        before: impl Fn() -> Result<(), CudaError>,
        mut apart: impl FnMut(&mut Self, View<'_, bf16>) -> Result<(), CudaError>,
    ) -> Result<Tuned, CudaError> {
        args.check()?;
        let (key, candidates) = (args.key(), self.own_candidates(args));
        if candidates.is_empty() {
            return Ok(Tuned::default());
        }
        if let Some(&choice) = self.tuning.0.get(&key)
            && (choice == Choice::Apart || choice.own().is_some_and(|own| candidates.contains(&own)))
        {
            if let Some(own) = choice.own() {
                self.own.insert(key, own);
            }
            return Ok(Tuned { measured: 0, known: 1 });
        }
        let mut best = (time(stream, args, weights, &before, |args| apart(self, args.w))?, Choice::Apart);
        for own in candidates {
            let microseconds = time(stream, args, weights, &before, |args| self.enqueue_own(stream, args, own))?;
            if microseconds < best.0 {
                best = (microseconds, own.into());
            }
        }
        self.tuning.0.insert(key, best.1);
        match best.1.own() {
            Some(own) => self.own.insert(key, own),
            None => self.own.remove(&key),
        };
        Ok(Tuned { measured: 1, known: 0 })
    }

    /// Picks the fastest kernel or algorithm for a shape by timing the candidates on `weights` in turn (several, so that they come from memory
    /// as in use, not from the cache), each run after `before`, as in use small kernels are what lies between GEMMs. y is left with any values.
    /// A shape whose own kernel has been chosen for as many rows as that kernel's variant takes gets the same, and what [`Self::set_tuning`]
    /// knows is not measured again.
    ///
    /// # Errors
    /// As [`Self::launch`], and those of `before`.
    pub fn tune(
        &mut self,
        stream: &Stream,
        args: &GemmArgs<'_>,
        weights: &[View<'_, bf16>],
        before: impl Fn() -> Result<(), CudaError>,
    ) -> Result<Tuned, CudaError> {
        args.check_plain()?;
        let key = args.key();
        if let Some(&choice) = self.tuning.0.get(&key)
            && self.adopt(args, choice)?
        {
            return Ok(Tuned { measured: 0, known: 1 });
        }
        let (choice, beside) = self.measure(stream, args, weights, before)?;
        self.tuning.0.insert(key, choice);
        let key = Key { beside: true, ..key };
        self.own.remove(&key);
        self.tuning.0.remove(&key);
        if let Some(own) = beside {
            self.own.insert(key, own);
            self.tuning.0.insert(key, own.into());
        }
        Ok(Tuned { measured: 1, known: 0 })
    }

    /// Takes choices that were made before, for the shape alone and beside a shrink; false if they can't be, which leaves things as they are.
    fn adopt(&mut self, args: &GemmArgs<'_>, choice: Choice) -> Result<bool, CudaError> {
        let key = args.key();
        if choice == Choice::Apart {
            return Ok(false);
        }
        let beside = Key { beside: true, ..key };
        let own = [(key, choice.own()), (beside, self.tuning.0.get(&beside).and_then(Choice::own))];
        let candidates = self.own_candidates(args);
        if own.iter().filter_map(|(_, own)| *own).any(|own| !candidates.contains(&own)) {
            return Ok(false);
        }
        if let Choice::Cublas(data) = choice {
            let mut plan = new_plan(key)?;
            plan.algorithm = sys::cublasLtMatmulAlgo_t { data };
            if !self.can_run(&plan) {
                return Ok(false);
            }
            self.plans.insert(key, plan);
        }
        for (key, own) in own {
            match own {
                Some(own) => self.own.insert(key, own),
                None => self.own.remove(&key),
            };
        }
        Ok(true)
    }

    /// Whether cuBLASLt takes a plan's algorithm for its shape, with the workspace that there is.
    fn can_run(&self, plan: &Plan) -> bool {
        let mut result = sys::cublasLtMatmulHeuristicResult_t {
            algo: plan.algorithm,
            workspaceSize: 0,
            state: cublasStatus_t::CUBLAS_STATUS_SUCCESS,
            wavesCount: 0.0,
            reserved: [0; 4],
        };
        let checked = cublas!(cublasLtMatmulAlgoCheck(
            self.handle,
            plan.operation,
            plan.w,
            plan.x,
            plan.y,
            plan.y,
            &plan.algorithm,
            &mut result
        ));
        checked.is_ok() && result.workspaceSize <= WORKSPACE_BYTES
    }

    fn measure(
        &mut self,
        stream: &Stream,
        args: &GemmArgs<'_>,
        weights: &[View<'_, bf16>],
        before: impl Fn() -> Result<(), CudaError>,
    ) -> Result<(Choice, Option<OwnGemm>), CudaError> {
        let key = args.key();
        let most_rows = self.most_rows(args.m);
        let of_most_rows = |gemm: &Self, beside| most_rows.and_then(|m| gemm.own.get(&Key { m, beside, ..key }).copied());
        if key.m > 1
            && let Some(own) = of_most_rows(self, false)
        {
            self.own.insert(key, own);
            return Ok((own.into(), of_most_rows(self, true)));
        }
        let mut plan = new_plan(key)?;
        let mut best = (f32::INFINITY, None);
        for algorithm in self.candidates(&plan)? {
            plan.algorithm = algorithm;
            // A candidate that can't run after all is no candidate.
            if let Ok(microseconds) = time(stream, args, weights, &before, |args| self.enqueue(stream, &plan, args))
                && microseconds < best.0
            {
                best = (microseconds, Some(algorithm));
            }
        }
        let (microseconds, algorithm) = best;
        plan.algorithm = algorithm.ok_or_else(|| CudaError::Cublas {
            call: "cublasLtMatmul",
            status: format!("no algorithm for {key:?}"),
        })?;
        let cublas = Choice::Cublas(plan.algorithm.data);
        self.plans.insert(key, plan);
        self.own.remove(&key);
        if key.m > MOST_ROWS_ALONE && most_rows.is_some_and(|m| m > key.m) {
            return Ok((cublas, of_most_rows(self, true)));
        }
        // Without room the shrink comes after, as with cuBLASLt.
        let (mut alone, mut beside) = ((microseconds, None), (microseconds + MICROSECONDS_OF_A_SHRINK, None));
        for own in self.own_candidates(args) {
            let alone_microseconds = time(stream, args, weights, &before, |args| self.enqueue_own(stream, args, own))?;
            let beside_microseconds = alone_microseconds + if own.has_room() { 0.0 } else { MICROSECONDS_OF_A_SHRINK };
            if alone_microseconds < alone.0 && key.m <= MOST_ROWS_ALONE {
                alone = (alone_microseconds, Some(own));
            }
            if beside_microseconds < beside.0 {
                beside = (beside_microseconds, Some(own));
            }
        }
        if let (_, Some(own)) = alone {
            self.own.insert(key, own);
        }
        Ok((alone.1.map_or(cublas, Choice::from), beside.1))
    }

    /// Rows of the variant of an own kernel that takes so many; the same kernel is taken for all that it takes.
    fn most_rows(&self, rows: usize) -> Option<usize> {
        let stream = self.stream.as_ref().and_then(|stream| stream.most_rows(rows));
        stream.or_else(|| self.wide.as_ref().and_then(|wide| wide.most_rows(rows)))
    }

    /// What a shape was given by [`Self::tune`]: an own kernel, or `None` for cuBLASLt.
    pub fn chosen(&self, args: &GemmArgs<'_>) -> Option<OwnGemm> {
        self.own.get(&args.key()).copied()
    }

    /// The own kernels that can do a shape, in every cut that [`Self::tune`] tries.
    pub fn own_candidates(&self, args: &GemmArgs<'_>) -> Vec<OwnGemm> {
        let is_gated = args.y.kind() == OutputKind::Gated;
        let skinny = (!is_gated && SKINNY_ROWS.iter().any(|&rows| args.m <= rows)).then_some(OwnGemm::Skinny);
        let stream = self.stream.iter().filter(|_| !is_gated);
        let stream = stream.flat_map(|stream| stream.candidates(args)).map(OwnGemm::Stream);
        let wide = self.wide.iter().flat_map(|wide| wide.candidates(args)).map(OwnGemm::Wide);
        skinny.into_iter().chain(stream).chain(wide).collect()
    }

    /// Enqueues an own kernel, whatever was measured.
    ///
    /// # Errors
    /// `Shape` for lengths that don't fit, and for more rows than the kernel's.
    pub fn launch_own(&self, stream: &Stream, args: &GemmArgs<'_>, own: OwnGemm) -> Result<(), CudaError> {
        args.check()?;
        self.enqueue_own(stream, args, own)
    }

    fn enqueue_own(&self, stream: &Stream, args: &GemmArgs<'_>, own: OwnGemm) -> Result<(), CudaError> {
        let takes_gated = matches!(own, OwnGemm::Wide(_));
        require(NAME, takes_gated || args.y.kind() != OutputKind::Gated, || {
            format!("{own:?} has no gated output")
        })?;
        match (own, &self.stream, &self.wide) {
            (OwnGemm::Skinny, ..) => self.enqueue_skinny(stream, args),
            (OwnGemm::Stream(cut), Some(kernels), _) => kernels.launch(stream, args, cut),
            (OwnGemm::Wide(cut), _, Some(kernels)) => kernels.launch(stream, args, cut),
            _ => require(NAME, false, || format!("this device has no kernel for {own:?}")),
        }
    }

    fn enqueue_skinny(&self, stream: &Stream, args: &GemmArgs<'_>) -> Result<(), CudaError> {
        let Some(variant) = SKINNY_ROWS.iter().position(|&rows| args.m <= rows) else {
            return require(NAME, false, || format!("m is {}, at most {SKINNY_ROWS:?} for the skinny kernel", args.m));
        };
        let kernel = match args.y.kind() {
            OutputKind::Bf16 | OutputKind::Gated => &self.skinny_bf16[variant],
            OutputKind::F32 | OutputKind::AddF32 => &self.skinny_f32[variant],
        };
        let bias = args.bias.map_or(0, GemmBias::address);
        let (x, w, (y, _)) = (args.x.address(), args.w.address(), args.y.address_and_len());
        let (m, n, k) = (args.m as i32, dimension(NAME, "n", args.n)?, dimension(NAME, "k", args.k)?);
        let add = i32::from(args.y.kind() == OutputKind::AddF32);
        let config = LaunchConfig::new([args.n.div_ceil(16) as u32, 1, 1], 256);
        stream.launch(kernel, config, arguments![x, w, bias, y, m, n, k, add])
    }

    fn candidates(&self, plan: &Plan) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, CudaError> {
        let mut preference = ptr::null_mut();
        cublas!(cublasLtMatmulPreferenceCreate(&mut preference))?;
        let bytes = WORKSPACE_BYTES;
        let which = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let mut results: Vec<sys::cublasLtMatmulHeuristicResult_t> = Vec::with_capacity(MAX_CANDIDATES);
        let mut found = 0;
        let asked = cublas!(cublasLtMatmulPreferenceSetAttribute(
            preference,
            which,
            (&raw const bytes).cast(),
            size_of_val(&bytes)
        ))
        .and_then(|()| {
            cublas!(cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                plan.operation,
                plan.w,
                plan.x,
                plan.y,
                plan.y,
                preference,
                MAX_CANDIDATES as i32,
                results.as_mut_ptr(),
                &mut found
            ))
        });
        cublas!(cublasLtMatmulPreferenceDestroy(preference))?;
        asked?;
        // SAFETY: cuBLASLt has written `found` of the results, at most as many as were asked for.
        unsafe { results.set_len((found as usize).min(MAX_CANDIDATES)) };
        let usable = results.into_iter().filter(|result| result.state == cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        Ok(usable.map(|result| result.algo).collect())
    }

    fn enqueue(&self, stream: &Stream, plan: &Plan, args: &GemmArgs<'_>) -> Result<(), CudaError> {
        if let Some(bias) = args.bias {
            let address = bias.address();
            let which = DescAttribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            cublas!(cublasLtMatmulDescSetAttribute(
                plan.operation,
                which,
                (&raw const address).cast(),
                size_of_val(&address)
            ))?;
        }
        let alpha = 1f32;
        let beta = if args.y.kind() == OutputKind::AddF32 { 1f32 } else { 0f32 };
        let (y, _) = args.y.address_and_len();
        let device_pointer = |address: u64| ptr::with_exposed_provenance_mut::<c_void>(address as usize);
        cublas!(cublasLtMatmul(
            self.handle,
            plan.operation,
            (&raw const alpha).cast(),
            device_pointer(args.w.address()),
            plan.w,
            device_pointer(args.x.address()),
            plan.x,
            (&raw const beta).cast(),
            device_pointer(y),
            plan.y,
            device_pointer(y),
            plan.y,
            &plan.algorithm,
            device_pointer(self.workspace.view().address()),
            WORKSPACE_BYTES,
            stream.raw().cast()
        ))
    }
}

impl Drop for Gemm {
    fn drop(&mut self) {
        self.plans.clear();
        // It waits for the whole context.
        let _alone = between_captures();
        let _ = cublas!(cublasLtDestroy(self.handle));
    }
}

fn tuned_for(device: &Device) -> Result<TunedFor, CudaError> {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let info = device.info();
    let (major, minor) = info.compute_capability;
    // SAFETY: takes nothing; the library is open.
    let cublas = unsafe { sys::cublasLtGetVersion() };
    // Another hash, of another build, costs a measurement.
    let mut kernels = DefaultHasher::new();
    (images::SKINNY_GEMM, images::STREAM_GEMM, images::WIDE_GEMM).hash(&mut kernels);
    Ok(TunedFor(format!(
        "{}, compute capability {major}.{minor}, driver {}, cuBLASLt {cublas}, kernels {}-{:016x}",
        info.name,
        driver_version()?,
        env!("CARGO_PKG_VERSION"),
        kernels.finish()
    )))
}

/// Microseconds of one `run` over `weights` in turn, in a graph, as steps are run.
fn time(
    stream: &Stream,
    args: &GemmArgs<'_>,
    weights: &[View<'_, bf16>],
    before: impl Fn() -> Result<(), CudaError>,
    mut run: impl FnMut(&GemmArgs<'_>) -> Result<(), CudaError>,
) -> Result<f32, CudaError> {
    const ROUNDS: usize = 8;
    // Loads the kernels, which a capture may not.
    before()?;
    run(args)?;
    let graph = stream.capture(|| {
        (0..ROUNDS).try_for_each(|round| {
            let w = weights.get(round % weights.len().max(1)).copied().unwrap_or(args.w);
            before()?;
            run(&GemmArgs { w, ..*args })
        })
    })?;
    let (begin, end) = (Event::new(stream.device(), true)?, Event::new(stream.device(), true)?);
    stream.launch_graph(&graph)?;
    let mut best = f32::INFINITY;
    for _ in 0..3 {
        begin.record(stream)?;
        stream.launch_graph(&graph)?;
        end.record(stream)?;
        end.synchronize()?;
        best = best.min(end.milliseconds_since(&begin)?);
    }
    Ok(best * 1000.0 / ROUNDS as f32)
}

/// cuBLASLt is column-major: it computes yᵀ `[n, m]` = w · xᵀ, with w read as the transpose of `[k, n]`.
fn new_plan(key: Key) -> Result<Plan, CudaError> {
    let mut plan = Plan {
        operation: ptr::null_mut(),
        w: ptr::null_mut(),
        x: ptr::null_mut(),
        y: ptr::null_mut(),
        algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
    };
    let (bf16_type, f32_type) = (cudaDataType_t::CUDA_R_16BF, cudaDataType_t::CUDA_R_32F);
    let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
    cublas!(cublasLtMatmulDescCreate(&mut plan.operation, compute, f32_type))?;
    // `CUBLAS_OP_T`, of cublas_api.h.
    const TRANSPOSE: i32 = 1;
    let transpose = TRANSPOSE;
    let set = |which, value: *const c_void, bytes| cublas!(cublasLtMatmulDescSetAttribute(plan.operation, which, value, bytes));
    set(
        DescAttribute::CUBLASLT_MATMUL_DESC_TRANSA,
        (&raw const transpose).cast(),
        size_of_val(&transpose),
    )?;
    if key.bias {
        let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
        set(
            DescAttribute::CUBLASLT_MATMUL_DESC_EPILOGUE,
            (&raw const epilogue).cast(),
            size_of_val(&epilogue),
        )?;
    }
    let (m, n, k) = (key.m as u64, key.n as u64, key.k as u64);
    let y_type = if key.output == OutputKind::Bf16 { bf16_type } else { f32_type };
    cublas!(cublasLtMatrixLayoutCreate(&mut plan.w, bf16_type, k, n, k as i64))?;
    cublas!(cublasLtMatrixLayoutCreate(&mut plan.x, bf16_type, k, m, k as i64))?;
    cublas!(cublasLtMatrixLayoutCreate(&mut plan.y, y_type, n, m, n as i64))?;
    Ok(plan)
}
