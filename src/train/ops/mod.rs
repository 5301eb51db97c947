//! Differentiable operations on rows of packed sequences.
//!
//! On a CPU each is one loop over f32 that keeps only what its backward pass needs; on other devices it is made of
//! candle's operations, whose gradients candle knows. Sequences lie one after the other in the rows, without padding.

mod attention;
mod linear;
mod loss;
mod norm;
mod rope;
mod swiglu;

pub use attention::attention;
pub use linear::frozen_linear;
pub use loss::{Targets, cross_entropy, linear_cross_entropy};
pub use norm::rms_norm;
pub use rope::{Rope, rope};
pub use swiglu::swiglu;

use candle_core::{CpuStorage, Layout, Result, Tensor, bail};

/// The numbers of a contiguous f32 tensor in memory.
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(data), Some((start, end))) => Ok(&data[start..end]),
        (CpuStorage::F32(_), None) => bail!("a contiguous tensor was expected"),
        _ => bail!("an f32 tensor was expected"),
    }
}

/// Runs `f` on the numbers of contiguous f32 tensors in memory.
fn with_slices<R, const N: usize>(tensors: [&Tensor; N], f: impl FnOnce([&[f32]; N]) -> R) -> Result<R> {
    let guards = tensors.map(Tensor::storage_and_layout);
    let mut slices = [&[][..]; N];
    for (slot, (storage, layout)) in slices.iter_mut().zip(&guards) {
        *slot = match &**storage {
            candle_core::Storage::Cpu(storage) => slice(storage, layout)?,
            _ => bail!("a tensor in memory was expected"),
        };
    }
    Ok(f(slices))
}

/// A matrix in memory, with the distances of its rows and of its columns.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    data: &'a [f32],
    row: usize,
    column: usize,
}

impl<'a> Matrix<'a> {
    /// Rows of `width` numbers, one after the other.
    fn rows(data: &'a [f32], width: usize) -> Self {
        Matrix { data, row: width, column: 1 }
    }

    /// The transpose of rows of `width` numbers.
    fn columns(data: &'a [f32], width: usize) -> Self {
        Matrix { data, row: 1, column: width }
    }

    fn covers(&self, rows: usize, columns: usize) -> bool {
        rows == 0 || columns == 0 || (rows - 1) * self.row + (columns - 1) * self.column < self.data.len()
    }
}

/// Rows of results, `stride` apart; they are added to what is there, or replace it.
struct Target<'a> {
    data: &'a mut [f32],
    stride: usize,
    add: bool,
}

/// `out (+)= alpha * a b` for `a` of `m` by `k` and `b` of `k` by `n`. The order of the sums does not depend on the number of
/// threads, so results repeat to the last bit.
///
/// # Panics
/// If a slice is too short.
fn multiply((m, n, k): (usize, usize, usize), a: Matrix, b: Matrix, alpha: f32, out: Target, parallel: bool) {
    assert!(a.covers(m, k) && b.covers(k, n) && m > 0 && n > 0);
    assert!((m - 1) * out.stride + n <= out.data.len());
    let parallelism = if parallel { gemm::Parallelism::Rayon(0) } else { gemm::Parallelism::None };
    // SAFETY: the asserts keep every access inside the slices; `out` is borrowed for writing.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.data.as_mut_ptr(),
            1,
            out.stride as isize,
            out.add,
            a.data.as_ptr(),
            a.column as isize,
            a.row as isize,
            b.data.as_ptr(),
            b.column as isize,
            b.row as isize,
            1.0f32,
            alpha,
            false,
            false,
            false,
            parallelism,
        )
    }
}

#[cfg(test)]
pub(super) mod testing {
    use candle_core::{Device, Result, Tensor, Var};

    /// Numbers in -1..1, the same for the same seed.
    pub fn numbers(seed: u64, count: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2) | 1;
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            })
            .collect()
    }

    pub fn var(seed: u64, shape: &[usize]) -> Var {
        let tensor = Tensor::from_vec(numbers(seed, shape.iter().product()), shape, &Device::Cpu).unwrap();
        Var::from_tensor(&tensor).unwrap()
    }

    /// Compares the gradients of `f`, a scalar, at `vars` with differences quotients, and `f` with `plain`, which is made
    /// of candle's own operations.
    pub fn check(vars: &[Var], f: impl Fn() -> Result<Tensor>, plain: impl Fn() -> Result<Tensor>) {
        let value = |t: Result<Tensor>| t.unwrap().to_scalar::<f32>().unwrap();
        let (got, want) = (value(f()), value(plain()));
        assert!((got - want).abs() < 1e-4 * (1.0 + want.abs()), "{got}, not {want}");
        let (grads, plain_grads) = (f().unwrap().backward().unwrap(), plain().unwrap().backward().unwrap());
        for (v, var) in vars.iter().enumerate() {
            let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let got = flat(grads.get(var).unwrap_or_else(|| panic!("variable {v} has no gradient")));
            let by_candle = flat(plain_grads.get(var).unwrap());
            let at = flat(var.as_tensor());
            let set = |numbers: Vec<f32>| {
                var.set(&Tensor::from_vec(numbers, var.shape(), &Device::Cpu).unwrap()).unwrap();
            };
            for i in 0..at.len() {
                let step = 1e-2;
                let moved = |by: f32| {
                    let mut numbers = at.clone();
                    numbers[i] += by;
                    set(numbers);
                    value(f())
                };
                let quotient = (moved(step) - moved(-step)) / (2.0 * step);
                set(at.clone());
                assert!(
                    (got[i] - by_candle[i]).abs() < 1e-4 * (1.0 + by_candle[i].abs()),
                    "variable {v}, {i}: {} {}",
                    got[i],
                    by_candle[i]
                );
                assert!(
                    (got[i] - quotient).abs() < 2e-2 * (1.0 + quotient.abs()),
                    "variable {v}, {i}: {} {quotient}",
                    got[i]
                );
            }
        }
    }
}
