//! Products of tiles.

use super::TILE_BYTES;
use crate::cpu::amx::{TILE_ROWS, tile};

/// A product of tiles and where all of it lies: A tiles of rows, `num_tiles` beside each other, columns of B tiles.
pub(super) struct Product {
    pub(super) num_tiles: usize,
    pub(super) a: *const u8,
    /// Bytes from row to row, and from tile to tile.
    pub(super) a_stride: usize,
    pub(super) a_step: usize,
    pub(super) b: [*const u8; 4],
    pub(super) b_stride: usize,
    pub(super) b_step: usize,
    /// Whether sums start from what is there, not from zero.
    pub(super) continues: bool,
    pub(super) to: [*mut f32; 4],
    /// Numbers from row to row.
    pub(super) to_stride: usize,
}

impl Product {
    /// `R` tiles of rows, one or two, by `C` columns, up to four tiles of sums.
    ///
    /// # Safety
    /// The thread has tiles, and all lies where it says.
    #[inline(always)]
    pub(super) unsafe fn multiply<const R: usize, const C: usize>(&self) {
        const { assert!(R * C <= 4 && (R == 1 || C <= 2) && (R == 2 || C != 3)) };
        let to = |row: usize, column: usize| self.to[column].wrapping_add(row * TILE_ROWS * self.to_stride);
        let to_stride = self.to_stride * 4;
        /// Each tile of sums with its row and column.
        macro_rules! sums {
            ($work:ident) => {
                $work!("tmm0", 0, 0);
                if C > 1 {
                    $work!("tmm1", 0, 1);
                }
                if R == 2 {
                    $work!("tmm2", 1, 0);
                    if C > 1 {
                        $work!("tmm3", 1, 1);
                    }
                } else if C > 2 {
                    $work!("tmm2", 0, 2);
                    $work!("tmm3", 0, 3);
                }
            };
        }
        macro_rules! zero {
            ($sums:tt, $row:literal, $column:literal) => {
                tile!(zero $sums)
            };
        }
        macro_rules! load {
            ($sums:tt, $row:literal, $column:literal) => {
                tile!(load $sums, to($row, $column), to_stride)
            };
        }
        macro_rules! store {
            ($sums:tt, $row:literal, $column:literal) => {
                tile!(store $sums, to($row, $column), to_stride)
            };
        }
        let (mut a, mut b) = (self.a, self.b);
        // SAFETY: by contract.
        unsafe {
            if self.continues {
                sums!(load);
            } else {
                sums!(zero);
            }
            for _ in 0..self.num_tiles {
                tile!(load "tmm4", a, self.a_stride);
                tile!(load "tmm6", b[0], self.b_stride);
                tile!(bf16 "tmm0", "tmm4", "tmm6");
                if C > 1 {
                    tile!(load "tmm7", b[1], self.b_stride);
                    tile!(bf16 "tmm1", "tmm4", "tmm7");
                }
                if R == 2 {
                    tile!(load "tmm5", a.wrapping_add(TILE_ROWS * self.a_stride), self.a_stride);
                    tile!(bf16 "tmm2", "tmm5", "tmm6");
                    if C > 1 {
                        tile!(bf16 "tmm3", "tmm5", "tmm7");
                    }
                } else if C > 2 {
                    tile!(load "tmm6", b[2], self.b_stride);
                    tile!(bf16 "tmm2", "tmm4", "tmm6");
                    tile!(load "tmm7", b[3], self.b_stride);
                    tile!(bf16 "tmm3", "tmm4", "tmm7");
                }
                a = a.wrapping_add(self.a_step);
                b = b.map(|b| b.wrapping_add(self.b_step));
            }
            sums!(store);
        }
    }
}

/// Ones of bf16.
#[repr(C, align(64))]
pub(super) struct Ones(pub(super) [u16; TILE_BYTES / 2]);

pub(super) static ONES: Ones = Ones([0x3f80; TILE_BYTES / 2]);
