//! Products of rows in f32 with packed weights, which become f32 on the way.
//!
//! Every output element is one chain of multiply-adds in ascending `k`, from 0 on. So on one kind of CPU its bits do not depend
//! on the rows beside it, and a product with weights in fewer bits has those of the product with the same numbers in f32.

use std::ops::Range;

use super::matmul::PackedMatrix;
use super::simd::{self, GROUP, LANES, Rows, Simd, Target};

#[cfg(target_arch = "x86_64")]
mod avx2;

/// Panels computed side by side, so that a CPU that waits for one chain of additions has others to go on with.
pub(super) const SIDE: usize = 4;
/// Rows that share one unpacking of the weights; their accumulators stay in the first-level cache.
const ROWS: usize = 48;

/// `scale * x Wᵀ` for some panels of a matrix.
pub(super) struct Task<'a> {
    pub matrix: &'a PackedMatrix,
    pub panels: Range<usize>,
    pub rows: usize,
    pub x: Rows<'a>,
    pub scale: f32,
    /// Begins with the first feature of the first panel.
    pub y: Target,
}

impl Task<'_> {
    /// Puts a panel's sums of some rows, `[rows, LANES]`, where they belong.
    ///
    /// # Safety
    /// As [`multiply`].
    #[inline(always)]
    unsafe fn put(&self, rows: Range<usize>, panel: usize, sums: &[f32]) {
        let features = LANES.min(self.matrix.n() - panel * LANES);
        for (row, sums) in rows.zip(sums.as_chunks().0) {
            // SAFETY: the caller's promise.
            unsafe { self.y.at(row, (panel - self.panels.start) * LANES).put(sums, features, self.scale) };
        }
    }
}

/// Computes a task.
///
/// # Safety
/// `y` is good for writing its elements, and nobody else touches them meanwhile.
///
/// # Panics
/// If `x` is too short, or the matrix is one that is multiplied in whole numbers.
pub(super) unsafe fn multiply(simd: Simd, task: &Task) {
    let (k, x) = (task.matrix.k(), task.x);
    assert!(task.rows == 0 || x.data.len() >= (task.rows - 1) * x.stride + k);
    assert!(task.panels.end <= task.matrix.panels());
    #[cfg(target_arch = "x86_64")]
    if simd == Simd::Avx2 {
        // SAFETY: the asserts, and the caller's promise; `Avx2` is only made where the CPU has the features.
        return unsafe { avx2::multiply(task) };
    }
    let (mut acc, mut scratch) = ([[0.0f32; ROWS * LANES]; SIDE], [0.0f32; GROUP * LANES]);
    let group = task.matrix.group_len();
    for row in (0..task.rows).step_by(ROWS) {
        let rows = ROWS.min(task.rows - row);
        for panel in task.panels.clone().step_by(SIDE) {
            let acc = &mut acc[..SIDE.min(task.panels.end - panel)];
            acc.iter_mut().for_each(|acc| acc[..rows * LANES].fill(0.0));
            for k0 in (0..k).step_by(group) {
                let len = group.min(k - k0);
                let x = Rows { data: &x.data[row * x.stride + k0..], stride: x.stride };
                for (p, acc) in acc.iter_mut().enumerate() {
                    let group = task.matrix.group(panel + p, k0, len);
                    simd::multiply_group(simd, rows, x, group, acc, LANES, &mut scratch);
                }
            }
            for (p, acc) in acc.iter().enumerate() {
                // SAFETY: the caller's promise.
                unsafe { task.put(row..row + rows, panel + p, acc) };
            }
        }
    }
}
