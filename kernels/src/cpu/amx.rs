//! Tiles: registers of 16 rows of 64 bytes, and products of them (Intel, "Architecture Instruction Set Extensions", AMX).
//!
//! A product takes rows of activations (tile A, 16 rows of 16 words), words of weights (tile B, 16 words of 16 outputs), and
//! adds to sums (tile C, 16 rows of 16 outputs): a word is a pair of bf16 or four bytes, as panels hold them. Sums of bf16
//! are one chain for each output, words in ascending order, whatever else is in a tile; sums of bytes are exact.
//!
//! The state of the tiles belongs to a thread and must be asked of the system. [`Tiles`] is what a thread holds
//! while it uses them. Compilers never touch tiles, so what one [`tile`] leaves in them is there for the next.

use std::arch::asm;
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Rows of a tile, and words of a row.
pub(crate) const TILE_ROWS: usize = 16;

/// Bytes of a row.
pub(crate) const ROW_BYTES: usize = 64;

/// Bytes of a tile.
pub(crate) const TILE_BYTES: usize = TILE_ROWS * ROW_BYTES;

/// Whether the processor has tiles of bf16 and bytes, and the system lets this process use them: asked for once.
pub(crate) fn is_available() -> bool {
    static IS_AVAILABLE: OnceLock<bool> = OnceLock::new();
    *IS_AVAILABLE.get_or_init(|| {
        const BF16: u32 = 1 << 22;
        const TILE: u32 = 1 << 24;
        const INT8: u32 = 1 << 25;
        let all = BF16 | TILE | INT8;
        // `Isa` has seen to it that there is a leaf 7.
        std::arch::x86_64::__cpuid_count(7, 0).edx & all == all && ask_for_tiles()
    })
}

/// Asks the system for the tiles' data in this process's threads: it is large, so it is not kept for everyone.
#[cfg(target_os = "linux")]
fn ask_for_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: a request that changes nothing but what later signals and switches of threads save.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn ask_for_tiles() -> bool {
    false
}

/// What a thread's tiles are set to, in the form that `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

const NUM_TILES: usize = 8;

/// A thread's tiles, all zero at first. Given back when it is dropped, so that the system need
/// not save them.
pub(crate) struct Tiles {
    /// Tiles stay with their thread.
    is_of_this_thread: PhantomData<*const ()>,
}

impl Tiles {
    /// Some 50 ns with the giving back. Tiles 4 and 5 have rows of `depth` words, 6 and 7 so many rows, as products of that depth
    /// need them; all else is full.
    ///
    /// # Safety
    /// [`is_available`]; this thread holds no other.
    pub(crate) unsafe fn take(depth: u8) -> Self {
        debug_assert!(usize::from(depth) <= TILE_ROWS);
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..NUM_TILES].fill(ROW_BYTES as u16);
        config.rows[..NUM_TILES].fill(TILE_ROWS as u8);
        config.row_bytes[4..6].fill(u16::from(depth) * 4);
        config.rows[6..8].fill(depth);
        // SAFETY: the instruction is there, by contract, and reads 64 bytes.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                config = in(reg) &raw const config,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags),
            );
        }
        Self { is_of_this_thread: PhantomData }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the thread has tiles, or `take` was called against its contract.
        unsafe {
            asm!(
                "tilerelease",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags),
            );
        }
    }
}

/// One instruction on tiles by name, inside a thread's [`Tiles`]:
///
/// * `tile!(zero "tmm0")`: becomes zero
/// * `tile!(load "tmm4", pointer, stride)`: 16 rows of 64 bytes, `stride` bytes apart
/// * `tile!(store "tmm0", pointer, stride)`
/// * `tile!(bf16 "tmm0", "tmm4", "tmm5")`: the first += pairs of bf16 of the second times those of the third
/// * `tile!(i8u8 "tmm0", "tmm4", "tmm5")`: the first += signed bytes of the second times unsigned ones of the third
macro_rules! tile {
    (zero $tile:tt) => {
        std::arch::asm!(concat!("tilezero ", $tile), out($tile) _, options(nostack, preserves_flags, nomem))
    };
    (load $tile:tt, $from:expr, $stride:expr) => {
        std::arch::asm!(
            concat!("tileloadd ", $tile, ", [{from} + {stride}*1]"),
            from = in(reg) $from,
            stride = in(reg) $stride,
            out($tile) _,
            options(nostack, preserves_flags, readonly),
        )
    };
    (store $tile:tt, $to:expr, $stride:expr) => {
        std::arch::asm!(
            concat!("tilestored [{to} + {stride}*1], ", $tile),
            to = in(reg) $to,
            stride = in(reg) $stride,
            options(nostack, preserves_flags),
        )
    };
    (bf16 $sums:tt, $a:tt, $b:tt) => {
        std::arch::asm!(
            concat!("tdpbf16ps ", $sums, ", ", $a, ", ", $b),
            out($sums) _,
            options(nostack, preserves_flags, nomem),
        )
    };
    (i8u8 $sums:tt, $a:tt, $b:tt) => {
        std::arch::asm!(
            concat!("tdpbsud ", $sums, ", ", $a, ", ", $b),
            out($sums) _,
            options(nostack, preserves_flags, nomem),
        )
    };
}
pub(crate) use tile;
