//! Launches on an NVIDIA GPU.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, LaunchConfig, PushKernelArg};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Layout, Result, Storage, Tensor, bail};
use half::{bf16, f16};

use super::{Argument, Launch, Machine, Memory, Module};

impl Module {
    /// Its name among the device's modules, and its code.
    fn code(self) -> (&'static str, &'static str) {
        match self {
            Module::Lora => ("loramux-lora", include_str!(concat!(env!("OUT_DIR"), "/lora.ptx"))),
            Module::Attention => ("loramux-attention", include_str!(concat!(env!("OUT_DIR"), "/attention.ptx"))),
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

/// The GPU of a number, with one stream for all threads.
///
/// candle's default is a stream a thread, and nothing orders them: an adapter that one thread has just copied could be read
/// by another before it is there.
pub fn open(ordinal: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    // SAFETY: events order streams, and all that uses this device uses its one stream.
    unsafe { device.as_cuda_device()?.disable_event_tracking() };
    Ok(device)
}
