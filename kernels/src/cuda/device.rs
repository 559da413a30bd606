//! The CUDA driver as values: a device, its streams, events, memory and graphs. What is made here is given back by `Drop`.
//!
//! A wrong index or address in *device* memory can fault the device (every later call then fails with an error), never the host: calls that
//! trust such metadata are safe functions. Freeing device or pinned memory waits for the device, so a buffer outlives the work on it.

use std::{
    ffi::{CStr, CString, c_void},
    marker::PhantomData,
    ops::Range,
    sync::{Arc, PoisonError, RwLock, RwLockWriteGuard},
};

use bytemuck::Pod;
use cudarc::driver::sys::{self, CUdevice_attribute, CUresult};

/// A call to the driver or to cuBLASLt that failed, or that was refused before it was made.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum CudaError {
    /// The driver's answer.
    #[error("{call}: {name}")]
    Driver {
        /// Which call.
        call: &'static str,
        /// `CUDA_ERROR_…`.
        name: String,
    },
    /// Memory that the device does not have.
    #[error("{needed_bytes} bytes of device memory are needed, {free_bytes} are free")]
    OutOfMemory {
        /// Asked for.
        needed_bytes: usize,
        /// There.
        free_bytes: usize,
    },
    /// cuBLASLt's answer.
    #[error("{call}: {status}")]
    Cublas {
        /// Which call.
        call: &'static str,
        /// `CUBLAS_STATUS_…`.
        status: String,
    },
    /// A kernel's contract that the arguments break.
    #[error("{kernel}: {reason}")]
    Shape {
        /// Which kernel.
        kernel: &'static str,
        /// Expected and got.
        reason: String,
    },
    /// No driver, no device, or a device that is too old.
    #[error("{0}")]
    NoDevice(String),
}

impl CudaError {
    /// Whether a capture came to nothing because of something else that the process does. Nothing was enqueued then.
    pub fn is_lost_capture(&self) -> bool {
        matches!(self, Self::Driver { name, .. } if name == "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
    }
}

pub(super) fn check(call: &'static str, result: CUresult) -> Result<(), CudaError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut name = std::ptr::null();
    // SAFETY: the driver is loaded (it answered `call`); it writes a pointer to a static string, or leaves null for a code that it does not know.
    let known = unsafe { sys::cuGetErrorName(result, &mut name) } == CUresult::CUDA_SUCCESS && !name.is_null();
    let name = match known {
        // SAFETY: a static, terminated string of the driver.
        true => unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned(),
        false => format!("{result:?}"),
    };
    Err(CudaError::Driver { call, name })
}

macro_rules! driver {
    ($function:ident($($argument:expr),* $(,)?)) => {
        // SAFETY: handles are live (their owners keep them), pointers are to locals or to memory whose length the caller checked.
        $crate::cuda::device::check(stringify!($function), unsafe { sys::$function($($argument),*) })
    };
}

pub(super) use driver;

/// Captures share it; what waits for a whole context has it alone. CUDA allows no such wait while a stream of the context is being captured, whatever
/// thread does either: in driver 580.159 the two meeting is a null pointer inside the driver.
static CAPTURES: RwLock<()> = RwLock::new(());

/// While it is held no stream of the process is being captured.
pub(super) fn between_captures() -> RwLockWriteGuard<'static, ()> {
    CAPTURES.write().unwrap_or_else(PoisonError::into_inner)
}

/// What is known of a device before it is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number.
    pub ordinal: usize,
    /// `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// `(9, 0)`.
    pub compute_capability: (u32, u32),
    /// Bytes of memory.
    pub total_bytes: usize,
}

/// The toolkit's that the kernels are compiled with; drivers load no image of a newer major version.
const MIN_DRIVER_VERSION: i32 = 13_000;

/// The devices that the kernels run on. Never panics: what is missing is said in the error.
///
/// # Errors
/// `NoDevice` with the reason: no driver, no cuBLASLt, no device, none of compute capability 8.0.
pub fn devices() -> Result<Vec<DeviceInfo>, CudaError> {
    let missing = |what: &str| CudaError::NoDevice(what.into());
    // SAFETY: opens the library and closes it again.
    if !unsafe { sys::is_culib_present() } {
        return Err(missing("no CUDA driver (libcuda.so) on this machine"));
    }
    // SAFETY: as above.
    if !unsafe { cudarc::cublaslt::sys::is_culib_present() } {
        return Err(missing("cuBLASLt (libcublasLt.so.13) is not found; put its folder in LD_LIBRARY_PATH"));
    }
    driver!(cuInit(0)).map_err(|error| missing(&format!("the CUDA driver does not start: {error}")))?;
    let version = driver_version()?;
    if version < MIN_DRIVER_VERSION {
        return Err(missing(&format!(
            "the CUDA driver supports CUDA {}.{}; {}.{} is needed (driver 580 or newer)",
            version / 1000,
            version % 1000 / 10,
            MIN_DRIVER_VERSION / 1000,
            MIN_DRIVER_VERSION % 1000 / 10
        )));
    }
    let mut count = 0;
    driver!(cuDeviceGetCount(&mut count))?;
    let devices = (0..count).map(device_info).collect::<Result<Vec<_>, _>>()?;
    if devices.is_empty() {
        return Err(missing("the CUDA driver sees no device"));
    }
    if let Some(device) = devices.iter().find(|device| device.compute_capability < (8, 0)) {
        let (major, minor) = device.compute_capability;
        return Err(missing(&format!("{} has compute capability {major}.{minor}; 8.0 is needed", device.name)));
    }
    Ok(devices)
}

/// The newest CUDA that the driver supports: `13000` is 13.0.
pub(super) fn driver_version() -> Result<i32, CudaError> {
    let mut version = 0;
    driver!(cuDriverGetVersion(&mut version))?;
    Ok(version)
}

fn device_info(ordinal: i32) -> Result<DeviceInfo, CudaError> {
    let mut device = 0;
    driver!(cuDeviceGet(&mut device, ordinal))?;
    let mut name = [0; 256];
    driver!(cuDeviceGetName(name.as_mut_ptr(), 256, device))?;
    let mut total_bytes = 0;
    driver!(cuDeviceTotalMem_v2(&mut total_bytes, device))?;
    Ok(DeviceInfo {
        ordinal: ordinal as usize,
        // SAFETY: the driver terminates what it wrote to the 256 bytes.
        name: unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned(),
        compute_capability: (
            attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        total_bytes,
    })
}

fn attribute(device: sys::CUdevice, which: CUdevice_attribute) -> Result<u32, CudaError> {
    let mut value = 0;
    driver!(cuDeviceGetAttribute(&mut value, which, device))?;
    Ok(value as u32)
}

/// An opened device: its primary context.
pub struct Device {
    context: sys::CUcontext,
    device: sys::CUdevice,
    info: DeviceInfo,
    num_multiprocessors: u32,
    max_shared_bytes: u32,
}

// SAFETY: a context may be used from any thread; `bind` makes it current there.
unsafe impl Send for Device {}
// SAFETY: as above; nothing here is mutable.
unsafe impl Sync for Device {}

impl Device {
    /// Opens a device and binds it to this thread.
    ///
    /// # Errors
    /// As [`devices`]; `NoDevice` if there is none of this number.
    pub fn open(ordinal: usize) -> Result<Arc<Self>, CudaError> {
        let found = devices()?;
        let info = found
            .get(ordinal)
            .cloned()
            .ok_or_else(|| CudaError::NoDevice(format!("there is no device {ordinal}, the driver sees {}", found.len())))?;
        let mut device = 0;
        driver!(cuDeviceGet(&mut device, ordinal as i32))?;
        let mut context = std::ptr::null_mut();
        driver!(cuDevicePrimaryCtxRetain(&mut context, device))?;
        let device = Self {
            context,
            device,
            info,
            num_multiprocessors: attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            max_shared_bytes: attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        };
        device.bind()?;
        Ok(Arc::new(device))
    }

    /// Makes the device current on this thread, as every call below expects.
    ///
    /// # Errors
    /// The driver's.
    pub fn bind(&self) -> Result<(), CudaError> {
        driver!(cuCtxSetCurrent(self.context))
    }

    /// Name, number, capability.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Streaming multiprocessors.
    pub fn num_multiprocessors(&self) -> u32 {
        self.num_multiprocessors
    }

    /// Most shared memory of one block.
    pub fn max_shared_bytes(&self) -> u32 {
        self.max_shared_bytes
    }

    /// Bytes of device memory that nobody holds.
    ///
    /// # Errors
    /// The driver's.
    pub fn free_bytes(&self) -> Result<usize, CudaError> {
        let (mut free, mut total) = (0, 0);
        driver!(cuMemGetInfo_v2(&mut free, &mut total))?;
        Ok(free)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // An error here has nobody left to hear it.
        let _ = driver!(cuDevicePrimaryCtxRelease_v2(self.device));
    }
}

/// A part of a device buffer: address and length, in elements.
#[repr(C)]
pub struct View<'a, T> {
    address: u64,
    len: usize,
    buffer: PhantomData<&'a T>,
}

impl<T> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for View<'_, T> {}

impl<'a, T> View<'a, T> {
    /// `len` elements at a device address that something else keeps allocated. A wrong one faults the device.
    pub fn from_address(address: u64, len: usize) -> Self {
        Self {
            address,
            len,
            buffer: PhantomData,
        }
    }

    /// Where it begins on the device.
    pub fn address(self) -> u64 {
        self.address
    }

    /// Elements.
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// A part of it. Panics when that reaches past its end.
    pub fn slice(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} elements", self.len);
        Self {
            address: self.address + (range.start * size_of::<T>()) as u64,
            len: range.end - range.start,
            buffer: PhantomData,
        }
    }

    /// Its first `len` elements.
    pub fn first(self, len: usize) -> Self {
        self.slice(0..len)
    }

    /// The same bytes as elements of another type. Panics unless they divide into whole, aligned ones.
    pub fn cast<U>(self) -> View<'a, U> {
        let bytes = self.len * size_of::<T>();
        assert!(
            bytes.is_multiple_of(size_of::<U>()) && self.address.is_multiple_of(align_of::<U>() as u64),
            "cast of {bytes} bytes"
        );
        View {
            address: self.address,
            len: bytes / size_of::<U>(),
            buffer: PhantomData,
        }
    }
}

/// Device memory.
pub struct DeviceBuffer<T> {
    address: u64,
    len: usize,
    device: Arc<Device>,
    element: PhantomData<T>,
}

// SAFETY: an address and a length; the memory is the device's.
unsafe impl<T> Send for DeviceBuffer<T> {}

impl<T: Pod> DeviceBuffer<T> {
    /// `len` elements of whatever was there.
    ///
    /// # Errors
    /// `OutOfMemory` with both numbers.
    pub fn uninit(device: &Arc<Device>, len: usize) -> Result<Self, CudaError> {
        let needed_bytes = (len * size_of::<T>()).max(16);
        let mut address = 0;
        // SAFETY: the address goes to a local.
        match unsafe { sys::cuMemAlloc_v2(&mut address, needed_bytes) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(CudaError::OutOfMemory {
                needed_bytes,
                free_bytes: device.free_bytes()?,
            }),
            result => check("cuMemAlloc_v2", result),
        }?;
        Ok(Self {
            address,
            len,
            device: device.clone(),
            element: PhantomData,
        })
    }

    /// `len` elements of zero bytes.
    ///
    /// # Errors
    /// As [`Self::uninit`].
    pub fn zeroed(stream: &Stream, len: usize) -> Result<Self, CudaError> {
        let buffer = Self::uninit(&stream.device, len)?;
        stream.fill_bytes(buffer.view(), 0)?;
        Ok(buffer)
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of it.
    pub fn view(&self) -> View<'_, T> {
        View {
            address: self.address,
            len: self.len,
            buffer: PhantomData,
        }
    }
}

impl<T> Drop for DeviceBuffer<T> {
    fn drop(&mut self) {
        // Waits for the device. An error here has nobody left to hear it.
        let _ = self.device.bind();
        let _ = driver!(cuMemFree_v2(self.address));
    }
}

/// Page-locked host memory, which the device copies from and to by itself.
pub struct PinnedBuffer<T> {
    data: *mut T,
    len: usize,
    device: Arc<Device>,
}

// SAFETY: owned memory, like a Vec's.
unsafe impl<T: Send> Send for PinnedBuffer<T> {}
// SAFETY: shared access reads only.
unsafe impl<T: Sync> Sync for PinnedBuffer<T> {}

impl<T: Pod> PinnedBuffer<T> {
    /// `len` zeros.
    ///
    /// # Errors
    /// The driver's.
    pub fn zeroed(device: &Arc<Device>, len: usize) -> Result<Self, CudaError> {
        let bytes = (len * size_of::<T>()).max(64);
        let mut data = std::ptr::null_mut();
        device.bind()?;
        driver!(cuMemHostAlloc(&mut data, bytes, 0))?;
        // SAFETY: `bytes` were allocated, page-aligned.
        unsafe { data.cast::<u8>().write_bytes(0, bytes) };
        Ok(Self {
            data: data.cast(),
            len,
            device: device.clone(),
        })
    }
}

impl<T> std::ops::Deref for PinnedBuffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` elements, initialised by `zeroed`; every bit pattern is one (`Pod`).
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }
}

impl<T> std::ops::DerefMut for PinnedBuffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.len) }
    }
}

impl<T> Drop for PinnedBuffer<T> {
    fn drop(&mut self) {
        let _ = self.device.bind();
        let _ = driver!(cuMemFreeHost(self.data.cast()));
    }
}

/// A queue of work; what is enqueued runs in order.
pub struct Stream {
    stream: sys::CUstream,
    device: Arc<Device>,
    overlap: bool,
}

// SAFETY: a stream may be used from any thread to which the context is bound.
unsafe impl Send for Stream {}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug)]
pub struct LaunchConfig {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Neighbouring blocks in x that share their shared memory; 1: none.
    pub cluster: u32,
}

impl LaunchConfig {
    /// A launch without dynamic shared memory.
    pub fn new(grid: [u32; 3], block: u32) -> Self {
        Self {
            grid,
            block,
            shared_bytes: 0,
            cluster: 1,
        }
    }
}

impl Stream {
    /// A stream that does not wait for the default stream. On Hopper and newer, kernels launched on it overlap the end of the kernel before
    /// them (programmatic dependent launch); see `wait_for_previous_kernel` in `common.cuh`.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        device.bind()?;
        let mut stream = std::ptr::null_mut();
        let non_blocking = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        driver!(cuStreamCreateWithPriority(&mut stream, non_blocking, 0))?;
        Ok(Self {
            stream,
            device: device.clone(),
            overlap: device.info.compute_capability >= (9, 0),
        })
    }

    /// Turns the overlap of neighbouring kernels on or off, to measure what it gives.
    pub fn set_overlap(&mut self, overlap: bool) {
        self.overlap = overlap && self.device.info.compute_capability >= (9, 0);
    }

    /// Whose it is.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.stream
    }

    /// Waits until all that was enqueued is done.
    ///
    /// # Errors
    /// The driver's, also those of the work.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        driver!(cuStreamSynchronize(self.stream))
    }

    /// What is enqueued from here on starts after `event`.
    ///
    /// # Errors
    /// The driver's.
    pub fn wait(&self, event: &Event) -> Result<(), CudaError> {
        driver!(cuStreamWaitEvent(self.stream, event.event, 0))
    }

    /// Sets every byte.
    ///
    /// # Errors
    /// The driver's.
    pub fn fill_bytes<T>(&self, view: View<'_, T>, value: u8) -> Result<(), CudaError> {
        if view.is_empty() {
            return Ok(());
        }
        driver!(cuMemsetD8Async(view.address, value, view.len * size_of::<T>(), self.stream))
    }

    /// Copies host memory to the device. Pinned memory is copied in the background: it must not be written before this stream has come
    /// so far; from other memory it has been taken when this returns.
    ///
    /// # Errors
    /// `Shape` unless both are of one length.
    pub fn copy_to_device<T: Pod>(&self, to: View<'_, T>, from: &[T]) -> Result<(), CudaError> {
        same_len("copy to the device", to.len, from.len())?;
        if from.is_empty() {
            return Ok(());
        }
        driver!(cuMemcpyHtoDAsync_v2(to.address, from.as_ptr().cast(), size_of_val(from), self.stream))
    }

    /// Copies from the device into pinned memory in the background: it may be read once this stream has come so far.
    ///
    /// # Errors
    /// `Shape` unless both are of one length.
    pub fn copy_to_pinned<T: Pod>(&self, to: &mut PinnedBuffer<T>, range: Range<usize>, from: View<'_, T>) -> Result<(), CudaError> {
        let to = &mut to[range];
        same_len("copy to the host", to.len(), from.len)?;
        if to.is_empty() {
            return Ok(());
        }
        driver!(cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from.address, size_of_val(to), self.stream))
    }

    /// Copies within the device.
    ///
    /// # Errors
    /// `Shape` unless both are of one length.
    pub fn copy_on_device<T: Pod>(&self, to: View<'_, T>, from: View<'_, T>) -> Result<(), CudaError> {
        same_len("copy on the device", to.len, from.len)?;
        driver!(cuMemcpyDtoDAsync_v2(to.address, from.address, from.len * size_of::<T>(), self.stream))
    }

    /// A device copy of `data`, there when this returns.
    ///
    /// # Errors
    /// `OutOfMemory`, or the driver's.
    pub fn upload<T: Pod>(&self, data: &[T]) -> Result<DeviceBuffer<T>, CudaError> {
        let buffer = DeviceBuffer::uninit(&self.device, data.len())?;
        self.copy_to_device(buffer.view(), data)?;
        self.synchronize()?;
        Ok(buffer)
    }

    /// A host copy of device memory, after waiting for this stream.
    ///
    /// # Errors
    /// The driver's.
    pub fn download<T: Pod>(&self, view: View<'_, T>) -> Result<Vec<T>, CudaError> {
        let mut data = vec![T::zeroed(); view.len];
        if !view.is_empty() {
            driver!(cuMemcpyDtoHAsync_v2(
                data.as_mut_ptr().cast(),
                view.address,
                size_of_val(&data[..]),
                self.stream
            ))?;
        }
        self.synchronize()?;
        Ok(data)
    }

    /// Launches a kernel with arguments by pointer, in the order of its parameters. Each pointer must be to a value of the parameter's size.
    pub(super) fn launch(&self, kernel: &Kernel, config: LaunchConfig, arguments: &mut [*mut c_void]) -> Result<(), CudaError> {
        if config.grid.contains(&0) {
            return Ok(());
        }
        let attribute = |id, value| sys::CUlaunchAttribute { id, pad: [0; 4], value };
        let mut attributes = [
            attribute(
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                sys::CUlaunchAttributeValue {
                    programmaticStreamSerializationAllowed: i32::from(self.overlap),
                },
            ),
            attribute(
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
                sys::CUlaunchAttributeValue {
                    clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 {
                        x: config.cluster,
                        y: 1,
                        z: 1,
                    },
                },
            ),
        ];
        // Cards older than Hopper know neither.
        let num_attributes = if config.cluster > 1 { 2 } else { u32::from(self.overlap) };
        let config = sys::CUlaunchConfig {
            gridDimX: config.grid[0],
            gridDimY: config.grid[1],
            gridDimZ: config.grid[2],
            blockDimX: config.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: config.shared_bytes,
            hStream: self.stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: num_attributes,
        };
        driver!(cuLaunchKernelEx(&config, kernel.function, arguments.as_mut_ptr(), std::ptr::null_mut())).map_err(|error| CudaError::Shape {
            kernel: kernel.name,
            reason: error.to_string(),
        })
    }

    /// Records what `enqueue` puts on this stream (and on streams that wait for it and that it waits for) instead of running it. A capture that
    /// the driver drops for what else the process does is tried again a few times.
    ///
    /// # Errors
    /// `enqueue`'s, or the driver's.
    pub fn capture<E: From<CudaError>>(&self, mut enqueue: impl FnMut() -> Result<(), E>) -> Result<Graph, E> {
        const TRIES: usize = 4;
        for _ in 1..TRIES {
            if let Ok(graph) = self.capture_once(&mut enqueue)? {
                return Ok(graph);
            }
        }
        self.capture_once(&mut enqueue)?.map_err(E::from)
    }

    /// Inside, the error of a [lost](CudaError::is_lost_capture) capture.
    fn capture_once<E: From<CudaError>>(&self, enqueue: &mut impl FnMut() -> Result<(), E>) -> Result<Result<Graph, CudaError>, E> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let shared = CAPTURES.read().unwrap_or_else(PoisonError::into_inner);
        driver!(cuStreamBeginCapture_v2(self.stream, mode))?;
        let enqueued = enqueue();
        let mut graph = std::ptr::null_mut();
        // Also after an error: else the stream would stay in capture.
        let ended = driver!(cuStreamEndCapture(self.stream, &mut graph));
        drop(shared);
        // The reason for whatever error `enqueue` then had.
        if let Err(error) = &ended
            && error.is_lost_capture()
        {
            return Ok(Err(error.clone()));
        }
        enqueued?;
        ended?;
        let mut executable = std::ptr::null_mut();
        let instantiated = driver!(cuGraphInstantiateWithFlags(&mut executable, graph, 0));
        let destroyed = driver!(cuGraphDestroy(graph));
        instantiated?;
        destroyed?;
        Ok(Ok(Graph {
            executable,
            device: self.device.clone(),
        }))
    }

    /// Runs a graph.
    ///
    /// # Errors
    /// The driver's.
    pub fn launch_graph(&self, graph: &Graph) -> Result<(), CudaError> {
        driver!(cuGraphLaunch(graph.executable, self.stream))
    }
}

fn same_len(what: &'static str, to: usize, from: usize) -> Result<(), CudaError> {
    match to == from {
        true => Ok(()),
        false => Err(CudaError::Shape {
            kernel: what,
            reason: format!("{from} elements to a place of {to}"),
        }),
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.device.bind();
        let _ = driver!(cuStreamDestroy_v2(self.stream));
    }
}

/// A recorded sequence of launches.
pub struct Graph {
    executable: sys::CUgraphExec,
    device: Arc<Device>,
}

// SAFETY: owned by one thread at a time.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.device.bind();
        let _ = driver!(cuGraphExecDestroy(self.executable));
    }
}

/// A mark in a stream.
pub struct Event {
    event: sys::CUevent,
    device: Arc<Device>,
}

// SAFETY: as for streams.
unsafe impl Send for Event {}
// SAFETY: the driver's calls on events may come from several threads at once.
unsafe impl Sync for Event {}

impl Event {
    /// `timed` events can be subtracted; the others are cheaper.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(device: &Arc<Device>, timed: bool) -> Result<Self, CudaError> {
        let flags = match timed {
            true => sys::CUevent_flags::CU_EVENT_DEFAULT,
            false => sys::CUevent_flags::CU_EVENT_DISABLE_TIMING,
        };
        let mut event = std::ptr::null_mut();
        driver!(cuEventCreate(&mut event, flags as u32))?;
        Ok(Self {
            event,
            device: device.clone(),
        })
    }

    /// Marks where `stream` is now.
    ///
    /// # Errors
    /// The driver's.
    pub fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        driver!(cuEventRecord(self.event, stream.stream))
    }

    /// Whether the work before it is done. Never waits.
    ///
    /// # Errors
    /// The driver's, also those of the work.
    pub fn is_done(&self) -> Result<bool, CudaError> {
        // SAFETY: the event is live.
        match unsafe { sys::cuEventQuery(self.event) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check("cuEventQuery", result).map(|()| true),
        }
    }

    /// Waits for the work before it.
    ///
    /// # Errors
    /// The driver's, also those of the work.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        driver!(cuEventSynchronize(self.event))
    }

    /// Milliseconds from `earlier` to this one; both timed and done.
    ///
    /// # Errors
    /// The driver's.
    pub fn milliseconds_since(&self, earlier: &Event) -> Result<f32, CudaError> {
        let mut milliseconds = 0.0;
        driver!(cuEventElapsedTime_v2(&mut milliseconds, earlier.event, self.event))?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = self.device.bind();
        let _ = driver!(cuEventDestroy_v2(self.event));
    }
}

/// A loaded image; its kernels keep it loaded.
pub(super) struct Module {
    module: sys::CUmodule,
    device: Arc<Device>,
}

// SAFETY: handles of the context.
unsafe impl Send for Module {}
// SAFETY: nothing here is mutable.
unsafe impl Sync for Module {}

impl Module {
    pub(super) fn load(device: &Arc<Device>, image: &'static [u8]) -> Result<Arc<Self>, CudaError> {
        let mut module = std::ptr::null_mut();
        driver!(cuModuleLoadData(&mut module, image.as_ptr().cast()))?;
        Ok(Arc::new(Self {
            module,
            device: device.clone(),
        }))
    }

    pub(super) fn kernel(self: &Arc<Self>, name: &'static str) -> Result<Kernel, CudaError> {
        let mut function = std::ptr::null_mut();
        let c_name = CString::new(name).expect("kernel names have no zero byte");
        driver!(cuModuleGetFunction(&mut function, self.module, c_name.as_ptr())).map_err(|error| CudaError::Shape {
            kernel: name,
            reason: error.to_string(),
        })?;
        Ok(Kernel {
            function,
            name,
            _module: self.clone(),
        })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let _ = self.device.bind();
        let _ = driver!(cuModuleUnload(self.module));
    }
}

/// A kernel of a loaded module.
pub(super) struct Kernel {
    function: sys::CUfunction,
    name: &'static str,
    _module: Arc<Module>,
}

// SAFETY: handles of the context.
unsafe impl Send for Kernel {}

/// A matrix as the bulk copy engine sees it: boxes of it go to shared memory with the 128-byte swizzle. A kernel argument.
#[repr(transparent)]
pub(super) struct TensorMap(sys::CUtensorMap);

impl TensorMap {
    /// `[rows, columns]` bf16, row-major, in boxes of `box_rows` rows and 64 columns; what lies outside reads as zero. Columns are a multiple
    /// of 8, the address one of 16.
    pub(super) fn new(address: u64, rows: usize, columns: usize, box_rows: usize) -> Result<Self, CudaError> {
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let (sizes, stride) = ([columns as u64, rows as u64], [2 * columns as u64]);
        let (box_sizes, steps) = ([64, box_rows as u32], [1, 1]);
        driver!(cuTensorMapEncodeTiled(
            &mut map,
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2,
            std::ptr::with_exposed_provenance_mut(address as usize),
            sizes.as_ptr(),
            stride.as_ptr(),
            box_sizes.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ))?;
        Ok(Self(map))
    }
}

impl Kernel {
    pub(super) fn allow_shared_bytes(&self, bytes: u32) -> Result<(), CudaError> {
        let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        driver!(cuFuncSetAttribute(self.function, which, bytes as i32))
    }
}
