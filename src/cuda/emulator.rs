//! Runs the kernels on the host: `kernels/emulator.hpp`, compiled when a test first asks for it.

use std::cell::{Cell, RefCell};
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, OnceLock};

use candle_core::{DType, Result, Tensor, bail};
use libloading::Library;

use super::{Argument, Launch, Machine, Memory};

type Emulate = unsafe extern "C" fn(*const c_char, *const u32, u32, *mut *mut c_void, u64) -> *const c_char;

/// Memory that ends, but for what aligns its start to 16 bytes, where a page begins that nobody may touch.
pub struct Guarded {
    map: *mut c_void,
    mapped: usize,
    start: *mut u8,
    bytes: usize,
}

const PAGE: usize = 4096;

impl Guarded {
    fn new(bytes: usize) -> Self {
        let inside = bytes.next_multiple_of(PAGE);
        let mapped = inside + PAGE;
        // SAFETY: a new mapping, whose last page is taken out of use.
        let map = unsafe {
            let (read_write, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let map = libc::mmap(std::ptr::null_mut(), mapped, read_write, private, -1, 0);
            assert_ne!(map, libc::MAP_FAILED);
            assert_eq!(libc::mprotect(map.add(inside), PAGE, libc::PROT_NONE), 0);
            map
        };
        // SAFETY: inside the mapping.
        let start = unsafe { map.cast::<u8>().add(inside - bytes.next_multiple_of(16)) };
        Guarded { map, mapped, start, bytes }
    }

    fn of(data: &[u8]) -> Self {
        let memory = Guarded::new(data.len());
        // SAFETY: as many bytes are there.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), memory.start, data.len()) };
        memory
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: its own memory, which no kernel writes meanwhile.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`.
        unsafe { libc::munmap(self.map, self.mapped) };
    }
}

impl Memory for Guarded {
    fn address(&self) -> u64 {
        self.start as u64
    }
}

pub struct Emulator {
    library: Library,
    /// The tensors that were copied.
    copies: RefCell<Vec<Guarded>>,
    seed: Cell<u64>,
}

const HEADERS: [(&str, &str); 2] =
    [("common.cuh", include_str!("kernels/common.cuh")), ("emulator.hpp", include_str!("kernels/emulator.hpp"))];
pub const LORA: &str = include_str!("kernels/lora.cu");
pub const ATTENTION: &str = include_str!("kernels/attention.cu");
pub const LAYER: &str = include_str!("kernels/layer.cu");
pub const SAMPLER: &str = include_str!("kernels/sampler.cu");

/// Compiles a source that includes the headers.
fn compile(source: &str, folder: &Path) -> Library {
    for (name, text) in HEADERS.into_iter().chain([("kernels.cpp", source)]) {
        std::fs::write(folder.join(name), text).unwrap();
    }
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let mut command = Command::new(&compiler);
    // The libraries of a process are to have nothing in common.
    command.args(["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-gnu-unique"]);
    command.args(["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "kernels.cpp", "-o", "kernels.so"]);
    match command.current_dir(folder).status() {
        Ok(status) => assert!(status.success(), "{command:?}: {status}"),
        Err(e) => panic!("the kernels are tested by a C++ compiler, c++ or what CXX names: {compiler:?}: {e}"),
    }
    // SAFETY: our own library, which does nothing when it is loaded.
    unsafe { Library::new(folder.join("kernels.so")) }.unwrap()
}

impl Emulator {
    /// With the kernels of `source`, `seed` deciding which thread is when.
    pub fn new(source: &'static str, seed: u64) -> Self {
        static FOLDERS: Mutex<Vec<(String, tempfile::TempDir)>> = Mutex::new(vec![]);
        let mut folders = FOLDERS.lock().unwrap();
        if !folders.iter().any(|(of, _)| of == source) {
            let folder = tempfile::tempdir().unwrap();
            compile(source, folder.path());
            folders.push((source.into(), folder));
        }
        let folder = &folders.iter().find(|(of, _)| of == source).unwrap().1;
        // SAFETY: as in `compile`.
        let library = unsafe { Library::new(folder.path().join("kernels.so")) }.unwrap();
        Emulator { library, copies: RefCell::new(vec![]), seed: Cell::new(seed) }
    }

    /// Of a source with mistakes: each line `from`, which is there once, is `to`.
    pub fn mistaken(source: &str, changes: &[(&str, &str)]) -> Self {
        let mut changed = source.to_string();
        for (from, to) in changes {
            assert_eq!(changed.matches(from).count(), 1, "{from}");
            changed = changed.replace(from, to);
        }
        let folder = tempfile::tempdir().unwrap();
        Emulator { library: compile(&changed, folder.path()), copies: RefCell::new(vec![]), seed: Cell::new(1) }
    }

    /// The address of a copy of a tensor's numbers.
    pub fn copy(&self, tensor: &Tensor) -> Result<u64> {
        let bits: Vec<u8> = match tensor.dtype() {
            DType::F32 => tensor.flatten_all()?.to_vec1::<f32>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
            DType::F16 => tensor.flatten_all()?.to_vec1::<half::f16>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
            DType::BF16 => {
                tensor.flatten_all()?.to_vec1::<half::bf16>()?.iter().flat_map(|x| x.to_le_bytes()).collect()
            }
            other => bail!("no kernels for {other:?}"),
        };
        let copy = Guarded::of(&bits);
        let address = copy.address();
        self.copies.borrow_mut().push(copy);
        Ok(address)
    }

    /// What became of uploaded words.
    pub fn words(&self, memory: &Guarded) -> Vec<u32> {
        memory.bytes().chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    /// What became of a copied tensor, in f32.
    pub fn read(&self, address: u64, like: &Tensor) -> Vec<f32> {
        let copies = self.copies.borrow();
        let bytes = copies.iter().find(|copy| copy.address() == address).expect("it was copied").bytes();
        let half = |b: &[u8]| [b[0], b[1]];
        match like.dtype() {
            DType::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            DType::F16 => bytes.chunks_exact(2).map(|b| half::f16::from_le_bytes(half(b)).to_f32()).collect(),
            _ => bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes(half(b)).to_f32()).collect(),
        }
    }
}

impl Machine for Emulator {
    type Memory = Guarded;

    fn upload(&self, words: &[u32]) -> Result<Guarded> {
        Ok(Guarded::of(&words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>()))
    }

    fn reserve(&self, floats: usize) -> Result<Guarded> {
        Ok(Guarded::of(&vec![0xff; 4 * floats]))
    }

    unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        // The library has one machine.
        static RUNNING: OnceLock<Mutex<()>> = OnceLock::new();
        let _running = RUNNING.get_or_init(Mutex::default).lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut arguments: Vec<*mut c_void> = launch
            .arguments
            .iter()
            .map(|argument| match argument {
                Argument::Address(x) => std::ptr::from_ref(x).cast_mut().cast(),
                Argument::Word(x) => std::ptr::from_ref(x).cast_mut().cast(),
                Argument::Float(x) => std::ptr::from_ref(x).cast_mut().cast(),
            })
            .collect();
        let grid = launch.grid.map(|blocks| blocks as u32);
        let name = CString::new(launch.kernel).expect("names are plain");
        self.seed.set(self.seed.get().wrapping_add(1));
        // SAFETY: this is its type in emulator.hpp; of the rest the caller's promise.
        let error = unsafe {
            let emulate = self.library.get::<Emulate>(b"emulate").expect("the header has it");
            emulate(name.as_ptr(), grid.as_ptr(), launch.threads, arguments.as_mut_ptr(), self.seed.get())
        };
        if !error.is_null() {
            // SAFETY: a literal of the header.
            bail!("{:?}, {}: {}", launch.module, launch.kernel, unsafe { CStr::from_ptr(error) }.to_string_lossy());
        }
        Ok(())
    }
}
