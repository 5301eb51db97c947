//! The tiles of AMX: registers of up to 16 rows of 64 bytes, and what they need before they are used.
//!
//! Rust has no stable names for the instructions, and the compiler itself never uses these registers.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::OnceLock;

/// Rows of a tile, and bytes of its rows.
pub const ROWS: usize = 16;
pub const BYTES: usize = 64;

/// What tiles multiply, by the bit of CPUID's EDX that says that they can.
#[derive(Clone, Copy)]
pub enum Numbers {
    Bf16 = 22,
    Int8 = 25,
}

/// Whether the CPU multiplies these numbers and the system lets this process use the tiles.
pub fn multiply(numbers: Numbers) -> bool {
    /// AMX-TILE.
    const TILES: u32 = 24;
    static ALLOWED: OnceLock<bool> = OnceLock::new();
    let has = |bit: u32| __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx >> bit & 1 == 1;
    has(TILES) && has(numbers as u32) && *ALLOWED.get_or_init(is_allowed)
}

/// Asks the system for the tiles' registers, which take more room than a process is given by itself.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn is_allowed() -> bool {
    /// Linux's `ARCH_REQ_XCOMP_PERM`, and the number of the tiles' data.
    const REQUEST: (libc::c_long, libc::c_long) = (0x1023, 18);
    // SAFETY: the call changes what this process may do, and how much room the system wants for handling signals.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST.0, REQUEST.1) == 0 }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn is_allowed() -> bool {
    false
}

/// What `ldtilecfg` reads: rows of the tiles and bytes of their rows.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Gives the first tiles of this thread so many rows of so many bytes, until [`release`].
///
/// # Panics
/// If there are no such tiles.
///
/// # Safety
/// [`multiply`] says that there are tiles.
pub unsafe fn shape(tiles: &[(usize, usize)]) {
    let mut shapes = Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    for (i, &(rows, bytes)) in tiles.iter().enumerate() {
        assert!(i < 8 && (1..=ROWS).contains(&rows) && (4..=BYTES).contains(&bytes) && bytes.is_multiple_of(4));
        (shapes.rows[i], shapes.row_bytes[i]) = (rows as u8, bytes as u16);
    }
    // SAFETY: the assert: these are shapes that tiles can have.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &shapes, options(nostack, readonly)) };
}

/// Forgets what is in the tiles, which the system then need not keep when it stops this thread.
///
/// # Safety
/// [`multiply`] says that there are tiles.
pub unsafe fn release() {
    // SAFETY: the caller's promise.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}
