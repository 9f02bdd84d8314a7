//! A GPU, its memory and its one stream.

#![expect(unsafe_code, reason = "the driver's interface is C")]

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

/// The compiled kernels: an image for each source, and what it has.
static KERNELS: [(&[u8], &[&str]); 2] = [
    (
        include_bytes!(concat!(env!("OUT_DIR"), "/kernels")),
        &[
            "linear_8",
            "linear_16",
            "linear_32",
            "linear_64",
            "linear_128",
            "linear_128_near",
            "linear_experts",
            "rms_norm",
            "rms_norm_f32",
            "rms_norm_add",
            "qk_norm",
            "embed",
            "round_bf16",
            "bend",
            "find_not_finite",
            "pick_experts",
            "sum_experts",
            "gate_mul",
        ],
    ),
    (
        include_bytes!(concat!(env!("OUT_DIR"), "/attention")),
        &[
            "rope_write",
            "attention_32",
            "attention_64",
            "attention_96",
            "attention_128",
            "attention_256",
            "attention_merge",
        ],
    ),
];

/// Kernels that take more shared memory than all chips give, and how many bytes.
pub(crate) const ROOMY: (&str, u32) = ("linear_128", (3 * 256 * 64 + 128 * 128 * 4) as u32);

/// What a block of a launch has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pub(crate) threads: u32,
    /// Bytes of shared memory that are asked for at the launch.
    pub(crate) shared: u32,
}

impl From<u32> for Block {
    fn from(threads: u32) -> Self {
        Self { threads, shared: 0 }
    }
}

/// Oldest compute capability: bf16 in the matrix units.
const OLDEST: i32 = 8;

/// From this compute capability on kernels can be launched before the work before them is done.
const EARLY: i32 = 9;

/// What a GPU cannot do, or did not.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no driver on this machine.
    #[error("this machine has no NVIDIA driver (libcuda.so.1 is not found)")]
    NoDriver,
    /// There is no such GPU.
    #[error("there is no GPU {wanted}: the driver has {count}")]
    NoDevice {
        /// The one asked for.
        wanted: String,
        /// How many there are.
        count: usize,
    },
    /// The GPU is too old.
    #[error("{name} has compute capability {major}.{minor}; 8.0 is needed, for bf16 in its matrix units")]
    TooOld {
        /// Its name.
        name: String,
        /// Compute capability.
        major: i32,
        /// Compute capability.
        minor: i32,
    },
    /// There is not so much memory.
    #[error("{need} bytes of GPU memory are needed and {free} are free")]
    OutOfMemory {
        /// Bytes asked for.
        need: usize,
        /// Bytes that were free.
        free: usize,
    },
    /// Values that do not fit each other.
    #[error("{0}")]
    Shape(String),
    /// The driver refused.
    #[error("{what}: {}", text(*source))]
    Driver {
        /// What was attempted.
        what: &'static str,
        /// Its answer.
        source: DriverError,
    },
}

fn text(error: DriverError) -> String {
    fn part(text: Result<&CStr, DriverError>) -> String {
        text.map_or_else(|_| "unknown".to_owned(), |text| text.to_string_lossy().into_owned())
    }
    format!("{} ({})", part(error.error_name()), part(error.error_string()))
}

/// A GPU's UUID as NVML writes it.
fn uuid(device: sys::CUdevice) -> Option<String> {
    let bytes = result::device::get_uuid(device).ok()?.bytes;
    let mut text = String::from("GPU");
    for (i, byte) in bytes.iter().enumerate() {
        if matches!(i, 0 | 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{:02x}", byte.cast_unsigned()));
    }
    Some(text)
}

fn driver<T>(what: &'static str, answer: Result<T, DriverError>) -> Result<T, Error> {
    answer.map_err(|source| Error::Driver { what, source })
}

/// Which GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// By its number among those that the driver shows.
    Number(usize),
    /// By its UUID as NVML and `nvidia-smi -L` write it: `GPU-` and hexadecimal digits.
    Uuid(String),
}

/// What a GPU's buffers and graphs need to live.
struct Context {
    primary: sys::CUcontext,
    device: sys::CUdevice,
    stream: sys::CUstream,
    modules: Vec<sys::CUmodule>,
}

// SAFETY: the driver takes calls from any thread, as long as the context is current there; `bind` sees to that.
unsafe impl Send for Context {}
// SAFETY: as above, and nothing in it changes.
unsafe impl Sync for Context {}

impl Context {
    /// Makes this the context of the calling thread.
    fn bind(&self) -> Result<(), Error> {
        // SAFETY: the context is held until this value ends.
        driver("use the GPU", unsafe { result::ctx::set_current(self.primary) })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        let _ = self.bind();
        // SAFETY: all of them are this value's own, and nothing that used them is left. A driver that fails here is past help.
        unsafe {
            let _ = result::stream::destroy(self.stream);
            for module in &self.modules {
                let _ = result::module::unload(*module);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// One GPU, used from the thread that opened it, or from one that has bound it since.
pub struct Gpu {
    context: Arc<Context>,
    kernels: HashMap<&'static str, sys::CUfunction>,
    name: String,
    /// Compute capability.
    capability: (i32, i32),
    /// Whether blocks have the shared memory of [`ROOMY`].
    roomy: bool,
    /// Whether a kernel may be launched before the work before it is done.
    early: bool,
}

// SAFETY: kernels are called from any thread that the context is current on, as `Context`.
unsafe impl Send for Gpu {}

impl Gpu {
    /// Opens a GPU.
    ///
    /// # Errors
    /// When there is no driver, no such GPU, or it is too old.
    pub fn open(which: &Which) -> Result<Self, Error> {
        // SAFETY: it looks for the library and does nothing else.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::NoDriver);
        }
        driver("start the driver", result::init())?;
        let count = driver("count GPUs", result::device::get_count())?;
        let devices = (0..count).map(|number| driver("find the GPU", result::device::get(number)));
        let devices = devices.collect::<Result<Vec<_>, _>>()?;
        let found = match which {
            Which::Number(number) => devices.get(*number).copied(),
            Which::Uuid(wanted) => devices.iter().copied().find(|device| uuid(*device).as_ref() == Some(wanted)),
        };
        let Some(device) = found else {
            let wanted = match which {
                Which::Number(number) => number.to_string(),
                Which::Uuid(uuid) => uuid.clone(),
            };
            return Err(Error::NoDevice { wanted, count: devices.len() });
        };
        let name = driver("name the GPU", result::device::get_name(device))?;
        let fact = |fact| {
            // SAFETY: the device is one of the driver's.
            driver("ask the GPU", unsafe { result::device::get_attribute(device, fact) })
        };
        let major = fact(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = fact(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if major < OLDEST {
            return Err(Error::TooOld { name, major, minor });
        }
        // SAFETY: the device is one of the driver's; the context is made current before anything else uses it. The kernels
        // are nvcc's own output.
        unsafe {
            let primary = driver("take the GPU", result::primary_ctx::retain(device))?;
            driver("use the GPU", result::ctx::set_current(primary))?;
            let (mut modules, mut kernels) = (Vec::new(), HashMap::new());
            for (image, names) in KERNELS {
                let module = driver("load the kernels", result::module::load_data(image.as_ptr().cast()))?;
                for name in names {
                    let c_name = CString::new(*name).expect("names of kernels have no zero byte");
                    kernels.insert(*name, driver("find a kernel", result::module::get_function(module, c_name))?);
                }
                modules.push(module);
            }
            let stream = driver("make a stream", result::stream::create(result::stream::StreamKind::NonBlocking))?;
            let roomy = fact(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
                >= ROOMY.1.cast_signed();
            if roomy {
                let more = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                let set = result::function::set_function_attribute(kernels[ROOMY.0], more, ROOMY.1.cast_signed());
                driver("give a kernel its memory", set)?;
            }
            let context = Arc::new(Context { primary, device, stream, modules });
            Ok(Self { context, kernels, name, capability: (major, minor), roomy, early: major >= EARLY })
        }
    }

    /// This GPU with the kernels that a chip with less shared memory has: so that they can be tested on others.
    #[must_use]
    pub fn frugal(self) -> Self {
        Self { roomy: false, ..self }
    }

    /// Whether blocks have the shared memory of [`ROOMY`].
    pub(crate) fn is_roomy(&self) -> bool {
        self.roomy
    }

    /// Makes the calling thread one that may use this GPU.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn bind(&self) -> Result<(), Error> {
        self.context.bind()
    }

    /// The GPU's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its compute capability.
    pub fn capability(&self) -> (i32, i32) {
        self.capability
    }

    /// Bytes of memory that are free, and in all.
    ///
    /// # Errors
    /// When the driver does not say.
    pub fn memory(&self) -> Result<(usize, usize), Error> {
        driver("measure the GPU's memory", result::mem_get_info())
    }

    /// Room for so many values, zeroed.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn zeroed<T: Copy>(&self, len: usize) -> Result<Buffer<T>, Error> {
        let bytes = len.saturating_mul(size_of::<T>()).max(1);
        let (free, _) = self.memory()?;
        if bytes > free {
            return Err(Error::OutOfMemory { need: bytes, free });
        }
        // SAFETY: the memory is this buffer's own from here on.
        unsafe {
            let at = match result::malloc_sync(bytes) {
                Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                    return Err(Error::OutOfMemory { need: bytes, free });
                }
                answer => driver("reserve GPU memory", answer)?,
            };
            let buffer = Buffer { at, len, context: Arc::clone(&self.context), values: PhantomData };
            driver("clear GPU memory", result::memset_d8_async(at, 0, bytes, self.context.stream))?;
            Ok(buffer)
        }
    }

    /// A copy of these values on the GPU.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn upload<T: Copy>(&self, values: &[T]) -> Result<Buffer<T>, Error> {
        let mut buffer = self.zeroed(values.len())?;
        self.write(&mut buffer, 0, values)?;
        Ok(buffer)
    }

    /// Writes values to a place of a buffer, and waits until they are there.
    ///
    /// # Errors
    /// When they do not fit, or the driver refuses.
    pub fn write<T: Copy>(&self, buffer: &mut Buffer<T>, at: usize, values: &[T]) -> Result<(), Error> {
        if at.checked_add(values.len()).is_none_or(|end| end > buffer.len) {
            return Err(Error::Shape(format!("{} values at {at} of {}", values.len(), buffer.len)));
        }
        // SAFETY: the buffer has room for all of them, and they stay until the copy is done.
        unsafe {
            let to = buffer.at + (at * size_of::<T>()) as u64;
            driver("copy to the GPU", result::memcpy_htod_async(to, values, self.context.stream))?;
        }
        self.wait()
    }

    /// Writes values' bytes, in the GPU's own order, to a place of a buffer, and waits until they are there.
    ///
    /// # Errors
    /// When they are no whole values or do not fit, or the driver refuses.
    pub fn write_bytes<T: Copy>(&self, buffer: &mut Buffer<T>, at: usize, bytes: &[u8]) -> Result<(), Error> {
        let count = bytes.len() / size_of::<T>();
        let whole = bytes.len().is_multiple_of(size_of::<T>());
        if !whole || at.checked_add(count).is_none_or(|end| end > buffer.len) {
            return Err(Error::Shape(format!("{} bytes at value {at} of {}", bytes.len(), buffer.len)));
        }
        // SAFETY: the buffer has room for all of them, and they stay until the copy is done.
        unsafe {
            let to = buffer.at + (at * size_of::<T>()) as u64;
            driver("copy to the GPU", result::memcpy_htod_async(to, bytes, self.context.stream))?;
        }
        self.wait()
    }

    /// Starts to copy the first `count` values of pinned memory over the first of a buffer.
    ///
    /// # Errors
    /// When there are not so many, or the driver refuses.
    ///
    /// # Safety
    /// The pinned values stay as they are until work after this was waited for.
    pub(crate) unsafe fn send<T: Copy>(&self, from: &Pinned<T>, to: &mut Buffer<T>, count: usize) -> Result<(), Error> {
        if count > from.len || count > to.len {
            return Err(Error::Shape(format!("{count} of {} values are copied over {}", from.len, to.len)));
        }
        // SAFETY: both have so many values; that they stay is the caller's.
        let answer = unsafe { result::memcpy_htod_async(to.at, &from[..count], self.context.stream) };
        driver("copy to the GPU", answer)
    }

    /// Copies the first values of a buffer over all of a slice, once all work before is done; without a detour if the slice is
    /// pinned memory.
    ///
    /// # Errors
    /// When that work failed, or there are too few values.
    pub fn fetch<T: Copy>(&self, from: &Buffer<T>, to: &mut [T]) -> Result<(), Error> {
        if to.len() > from.len {
            return Err(Error::Shape(format!("{} values are copied over {}", from.len, to.len())));
        }
        let stream = self.context.stream;
        // SAFETY: both have so many values, and the copy is waited for.
        driver("copy from the GPU", unsafe { result::memcpy_dtoh_async(to, from.at, stream) })?;
        self.wait()
    }

    /// Memory of this machine that the GPU reads and writes by itself, zeroed.
    ///
    /// # Errors
    /// When there is none.
    pub fn pinned<T: Copy>(&self, len: usize) -> Result<Pinned<T>, Error> {
        let bytes = len.saturating_mul(size_of::<T>()).max(1);
        // SAFETY: the memory is this value's own from here on; zero bytes are a value of the plain types that kernels take.
        unsafe {
            let at = driver("reserve pinned memory", result::malloc_host(bytes, 0))?;
            std::ptr::write_bytes(at.cast::<u8>(), 0, bytes);
            Ok(Pinned { at: at.cast(), len, context: Arc::clone(&self.context) })
        }
    }

    /// The values of a buffer, once all work before is done.
    ///
    /// # Errors
    /// When that work failed.
    pub fn download<T: Copy + Default>(&self, buffer: &Buffer<T>) -> Result<Vec<T>, Error> {
        let mut values = vec![T::default(); buffer.len];
        self.fetch(buffer, &mut values)?;
        Ok(values)
    }

    /// Waits until all work is done.
    ///
    /// # Errors
    /// When some of it failed.
    pub fn wait(&self) -> Result<(), Error> {
        // SAFETY: the stream is this context's own.
        driver("compute on the GPU", unsafe { result::stream::synchronize(self.context.stream) })
    }

    /// Copies the first values of one buffer over all of another.
    ///
    /// # Errors
    /// When there are too few of them, or the driver refuses.
    pub fn copy<T: Copy>(&self, from: &Buffer<T>, to: &mut Buffer<T>) -> Result<(), Error> {
        if from.len < to.len {
            return Err(Error::Shape(format!("{} values are copied over {}", from.len, to.len)));
        }
        let bytes = to.len * size_of::<T>();
        // SAFETY: both have so many bytes.
        driver("copy on the GPU", unsafe { result::memcpy_dtod_async(to.at, from.at, bytes, self.context.stream) })
    }

    /// Launches a kernel. `args` point to its arguments.
    ///
    /// # Safety
    /// The arguments are of the kernel's own types, and its buffers as long as it reads and writes.
    pub(crate) unsafe fn launch(
        &self,
        kernel: &str,
        grid: (u32, u32),
        block: impl Into<Block>,
        args: &mut [*mut c_void],
    ) -> Result<(), Error> {
        let Block { threads, shared } = block.into();
        let function = *self.kernels.get(kernel).expect("kernels are launched by names of the table");
        // SAFETY: the caller's.
        unsafe {
            // The kernels wait themselves for the work before them.
            let mut value: sys::CUlaunchAttributeValue = std::mem::zeroed();
            value.programmaticStreamSerializationAllowed = 1;
            let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            let mut early = sys::CUlaunchAttribute { id, pad: [0; 4], value };
            let config = sys::CUlaunchConfig {
                gridDimX: grid.0,
                gridDimY: grid.1,
                gridDimZ: 1,
                blockDimX: threads,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: shared,
                hStream: self.context.stream,
                attrs: &raw mut early,
                numAttrs: u32::from(self.early),
            };
            let launched = sys::cuLaunchKernelEx(&raw const config, function, args.as_mut_ptr(), std::ptr::null_mut());
            driver("launch a kernel", launched.result())
        }
    }

    /// Records what `work` launches, to be launched again at once.
    ///
    /// # Errors
    /// When the work does something that cannot be recorded, or fails.
    pub fn record(&self, work: impl FnOnce() -> Result<(), Error>) -> Result<Graph, Error> {
        let stream = self.context.stream;
        // SAFETY: the stream is this context's own; the recording is ended whatever the work did.
        unsafe {
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            driver("begin a recording", result::stream::begin_capture(stream, mode))?;
            let done = work();
            let graph = driver("end a recording", result::stream::end_capture(stream));
            done?;
            let graph = graph?;
            let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
            let ready = result::graph::instantiate(graph, flags);
            let _ = result::graph::destroy(graph);
            Ok(Graph { ready: driver("make a graph", ready)?, context: Arc::clone(&self.context) })
        }
    }

    /// Milliseconds that the GPU takes for `work`.
    ///
    /// # Errors
    /// When the work fails.
    pub fn time(&self, work: impl FnOnce() -> Result<(), Error>) -> Result<f32, Error> {
        let stream = self.context.stream;
        let event = || driver("make an event", result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT));
        let (before, after) = (event()?, event()?);
        // SAFETY: stream and events are ours, and both events are recorded before they are compared.
        unsafe {
            driver("record an event", result::event::record(before, stream))?;
            let done = work();
            driver("record an event", result::event::record(after, stream))?;
            self.wait()?;
            let took = driver("compare events", result::event::elapsed(before, after));
            let _ = (result::event::destroy(before), result::event::destroy(after));
            done?;
            took
        }
    }
}

/// Values in a GPU's memory.
pub struct Buffer<T> {
    pub(crate) at: sys::CUdeviceptr,
    len: usize,
    context: Arc<Context>,
    values: PhantomData<T>,
}

impl<T> Buffer<T> {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Memory of this machine that the GPU reads and writes by itself.
pub struct Pinned<T> {
    at: *mut T,
    len: usize,
    context: Arc<Context>,
}

// SAFETY: the memory is this value's own, as a vector's is.
unsafe impl<T: Send> Send for Pinned<T> {}

impl<T> std::ops::Deref for Pinned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: there are `len` values, set when the memory was reserved.
        unsafe { std::slice::from_raw_parts(self.at, self.len) }
    }
}

impl<T> std::ops::DerefMut for Pinned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and nobody else has it.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: the memory is this value's own; copies from it are waited for first.
        unsafe {
            let _ = result::stream::synchronize(self.context.stream);
            let _ = result::free_host(self.at.cast());
        }
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: the memory is this buffer's own; freeing waits for work that uses it.
        unsafe {
            let _ = result::stream::synchronize(self.context.stream);
            let _ = result::free_sync(self.at);
        }
    }
}

// SAFETY: a recording may be launched and ended from any thread that has its context, which its owner's `Gpu` binds.
unsafe impl Send for Graph {}

/// Recorded launches. The buffers they use must outlive it, which is its keeper's business.
pub struct Graph {
    ready: sys::CUgraphExec,
    context: Arc<Context>,
}

impl Graph {
    /// Launches all that was recorded.
    ///
    /// # Errors
    /// When the driver refuses.
    ///
    /// # Safety
    /// All buffers that the recorded launches use are still there.
    pub unsafe fn launch(&self) -> Result<(), Error> {
        // SAFETY: the graph and the stream are ours; the buffers are the caller's.
        driver("launch a graph", unsafe { result::graph::launch(self.ready, self.context.stream) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: the graph is this value's own.
        let _ = unsafe { result::graph::exec_destroy(self.ready) };
    }
}
