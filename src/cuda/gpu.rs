//! Launches on an NVIDIA GPU, and memory that is written beside them.

use std::sync::Arc;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaEvent, CudaSlice, CudaStream, DevicePtr, LaunchConfig, PinnedHostSlice, PushKernelArg, result, sys,
};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Layout, Result, Storage, Tensor, bail};
use half::{bf16, f16};

use super::{Argument, Launch, Machine, Memory, Module, Uploads};

impl Module {
    /// Its name among the device's modules, and its code.
    fn code(self) -> (&'static str, &'static str) {
        match self {
            Module::Lora => ("loramux-lora", include_str!(concat!(env!("OUT_DIR"), "/lora.ptx"))),
            Module::Attention => ("loramux-attention", include_str!(concat!(env!("OUT_DIR"), "/attention.ptx"))),
            Module::Layer => ("loramux-layer", include_str!(concat!(env!("OUT_DIR"), "/layer.ptx"))),
            Module::Sampler => ("loramux-sampler", include_str!(concat!(env!("OUT_DIR"), "/sampler.ptx"))),
        }
    }
}

pub enum GpuMemory {
    Words(CudaSlice<u32>),
    Floats(CudaSlice<f32>),
}

impl Memory for GpuMemory {
    fn address(&self) -> u64 {
        match self {
            GpuMemory::Words(slice) => address(slice),
            GpuMemory::Floats(slice) => address(slice),
        }
    }
}

/// All work on a device is in one stream (see [`open`]), so nothing has to wait for what is done at an address.
fn address<T>(slice: &CudaSlice<T>) -> u64 {
    slice.device_ptr(slice.stream()).0
}

impl Machine for CudaDevice {
    type Memory = GpuMemory;

    fn upload(&self, words: &[u32]) -> Result<GpuMemory> {
        Ok(GpuMemory::Words(self.clone_htod(words)?))
    }

    fn reserve(&self, floats: usize) -> Result<GpuMemory> {
        // SAFETY: any bits are f32.
        Ok(GpuMemory::Floats(unsafe { self.alloc::<f32>(floats.max(1)) }?))
    }

    unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        let (module, code) = launch.module.code();
        let function = self.get_or_load_custom_func(launch.kernel, module, code)?;
        let mut builder = function.builder();
        for argument in launch.arguments {
            match argument {
                Argument::Address(address) => builder.arg(address),
                Argument::Word(word) => builder.arg(word),
                Argument::Float(float) => builder.arg(float),
            };
        }
        let [x, y, z] = launch.grid.map(|blocks| blocks as u32);
        let config = LaunchConfig { grid_dim: (x, y, z), block_dim: (launch.threads, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the caller's promise.
        unsafe { builder.launch(config) }.w()?;
        Ok(())
    }
}

/// Address of the first number.
pub fn storage_address(storage: &CudaStorage, layout: &Layout) -> Result<u64> {
    use candle_core::backend::BackendStorage;
    let dtype = storage.dtype();
    let start = match dtype {
        DType::F32 => address(storage.as_cuda_slice::<f32>()?),
        DType::F16 => address(storage.as_cuda_slice::<f16>()?),
        DType::BF16 => address(storage.as_cuda_slice::<bf16>()?),
        DType::U32 => address(storage.as_cuda_slice::<u32>()?),
        other => bail!("no kernels for {other:?}"),
    };
    Ok(start + (layout.start_offset() * dtype.size_in_bytes()) as u64)
}

/// Address of the first number of a tensor without gaps.
pub fn tensor_address(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cuda(storage) if layout.is_contiguous() => storage_address(storage, layout),
        _ => bail!("a tensor of shape {:?} is not in one piece on the GPU", tensor.shape()),
    }
}

/// Memory of a GPU that is written from pinned memory of the host.
pub struct PinnedUploads {
    memory: CudaSlice<u8>,
    launches: Arc<CudaStream>,
    copies: Arc<CudaStream>,
    /// Used in turns, so that one is filled while the other is copied; and when it has been copied.
    staging: [(PinnedHostSlice<u8>, CudaEvent); 2],
    next: usize,
}

impl PinnedUploads {
    /// Of so many bytes, at most `most` of which are written at a time.
    pub fn new(device: &CudaDevice, bytes: usize, most: usize) -> Result<Self> {
        let launches = device.cuda_stream();
        let context = launches.context();
        // SAFETY: any bits are bytes, and what is not written is not read.
        let memory = unsafe { device.alloc::<u8>(bytes.max(1)) }?;
        // The memory is there from a point of this stream on, which the other one knows nothing of.
        launches.synchronize().w()?;
        let copies = context.new_stream().w()?;
        let staging = || {
            // SAFETY: any bits are bytes, and `fill` writes them before they are copied.
            let slice = unsafe { context.alloc_pinned::<u8>(most.max(1)) }.w()?;
            Ok::<_, candle_core::Error>((slice, context.new_event(None).w()?))
        };
        let staging = [staging()?, staging()?];
        Ok(PinnedUploads { memory, launches, copies, staging, next: 0 })
    }
}

impl Uploads for PinnedUploads {
    fn start(&self) -> u64 {
        address(&self.memory)
    }

    fn after_launches(&mut self) -> Result<()> {
        let event = self.launches.record_event(None).w()?;
        self.copies.wait(&event).w()
    }

    unsafe fn write(&mut self, to: u64, bytes: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        let (slice, copied) = &mut self.staging[self.next];
        // What it held before has left. An event that was never recorded has happened.
        copied.synchronize().w()?;
        let staged = &mut slice.as_mut_slice().w()?[..bytes];
        fill(staged);
        self.copies.context().bind_to_thread().w()?;
        // SAFETY: the address is the caller's promise; the bytes stay until the event that is recorded next.
        unsafe { result::memcpy_htod_async(to, staged, self.copies.cu_stream()) }.w()?;
        copied.record(&self.copies).w()?;
        self.next = 1 - self.next;
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        self.copies.synchronize().w()
    }
}

impl Drop for PinnedUploads {
    fn drop(&mut self) {
        // The memory is freed in the other stream. What cannot be waited for has failed.
        let _ = self.copies.synchronize();
    }
}

/// The GPU of a number, with one stream for all threads.
///
/// candle's default is a stream a thread, and nothing orders them: what one thread has just copied could be read by another
/// before it is there. Only [`PinnedUploads`] have another stream, whose memory candle knows nothing of.
pub fn open(ordinal: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    let cuda = device.as_cuda_device()?;
    // SAFETY: events order streams, and all that uses this device uses its one stream.
    unsafe { cuda.disable_event_tracking() };
    // What a step frees stays mapped for the next one; else the driver takes it at each wait for a step's tokens.
    let mut all = u64::MAX;
    // SAFETY: the attribute is a u64.
    unsafe {
        let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        sys::cuMemPoolSetAttribute(pool(cuda)?, threshold, (&raw mut all).cast()).result().w()?;
    }
    Ok(device)
}

/// Gives memory that nothing uses back to the driver.
pub fn trim(device: &CudaDevice) -> Result<()> {
    // SAFETY: what is in use stays.
    unsafe { sys::cuMemPoolTrimTo(pool(device)?, 0) }.result().w()
}

/// The pool that candle's memory is of.
fn pool(device: &CudaDevice) -> Result<sys::CUmemoryPool> {
    let mut pool = std::ptr::null_mut();
    // SAFETY: `pool` may be written.
    unsafe { sys::cuDeviceGetDefaultMemPool(&mut pool, device.cuda_stream().context().cu_device()) }.result().w()?;
    Ok(pool)
}
