//! The delta as an operation of candle's, with the plain formula for a CPU beside the kernels for a GPU.

use std::ops::Range;

use candle_core::{CpuStorage, InplaceOp2, Layout, Result, WithDType, bail};

use super::packed::{Finish, PackedSite, Vector};

/// `y = gain * (y + scale * (x Aᵀ) Bᵀ) + shift` in place, for the rows of each segment: `x` is `[rows, in_features]`, `y` is
/// `[rows, out_features]`, both without gaps and in the numbers of the factors. Sums are in f32, and `y` is rounded once.
pub(super) struct AddDelta<'a> {
    sites: Vec<(&'a Range<usize>, &'a PackedSite)>,
    #[cfg(feature = "cuda")]
    tiles: Option<OnGpu<'a>>,
}

/// The launches, and the address of the step's words.
#[cfg(feature = "cuda")]
type OnGpu<'a> = (&'a super::tiles::SiteTiles, u64);

impl<'a> AddDelta<'a> {
    /// For a CPU.
    pub fn plain(sites: Vec<(&'a Range<usize>, &'a PackedSite)>) -> Self {
        AddDelta {
            sites,
            #[cfg(feature = "cuda")]
            tiles: None,
        }
    }

    #[cfg(feature = "cuda")]
    pub fn on_gpu(tiles: OnGpu<'a>) -> Self {
        AddDelta { sites: vec![], tiles: Some(tiles) }
    }

    fn add<T: WithDType>(&self, y: &mut [T], y_layout: &Layout, x: &[T], x_layout: &Layout) -> Result<()> {
        let ((rows, width), (_, k)) = (y_layout.shape().dims2()?, x_layout.shape().dims2()?);
        let (Some((y_from, y_to)), Some((x_from, x_to))) =
            (y_layout.contiguous_offsets(), x_layout.contiguous_offsets())
        else {
            bail!("rows have gaps")
        };
        let (y, x) = (&mut y[y_from..y_to], &x[x_from..x_to]);
        let float = |x: &T| x.to_f64() as f32;
        let sum = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let vector = |v: &Option<Vector>| v.as_ref().map(|v| numbers(v.tensor())).transpose();
        for &(own, site) in &self.sites {
            if site.width != width || own.end > rows {
                bail!("y is [{rows}, {width}]; the adapter of rows {own:?} has {} outputs", site.width);
            }
            let a = site.a.as_ref().map(|a| numbers(a.tensor())).transpose()?.unwrap_or_default();
            let parts = site.parts.iter().map(|part| Ok((part, numbers(part.b.tensor())?)));
            let parts = parts.collect::<Result<Vec<_>>>()?;
            let finishes = site.finishes.iter().map(|f| Ok((f, vector(&f.gain)?, vector(&f.shift)?)));
            let finishes = finishes.collect::<Result<Vec<_>>>()?;
            for row in own.clone() {
                let x: Vec<f32> = x[row * k..][..k].iter().map(float).collect();
                let y = &mut y[row * width..][..width];
                let mut out: Vec<f32> = y.iter().map(float).collect();
                let h: Vec<f32> = a.chunks_exact(k).map(|a| sum(a, &x)).collect();
                for (part, b) in &parts {
                    let rank = part.b.tensor().dims()[1];
                    for (j, b) in b.chunks_exact(rank).enumerate() {
                        out[part.column + j] += part.scale * sum(b, &h[part.rank_start..]);
                    }
                }
                for (Finish { columns, .. }, gain, shift) in &finishes {
                    let out = &mut out[columns.clone()];
                    gain.iter().for_each(|gain| out.iter_mut().zip(gain).for_each(|(y, g)| *y *= g));
                    shift.iter().for_each(|shift| out.iter_mut().zip(shift).for_each(|(y, s)| *y += s));
                }
                y.iter_mut().zip(out).for_each(|(y, out)| *y = T::from_f64(f64::from(out)));
            }
        }
        Ok(())
    }
}

/// A tensor's numbers, row by row.
fn numbers(tensor: &candle_core::Tensor) -> Result<Vec<f32>> {
    tensor.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1()
}

impl InplaceOp2 for AddDelta<'_> {
    fn name(&self) -> &'static str {
        "lora-delta"
    }

    fn cpu_fwd(&self, y: &mut CpuStorage, y_layout: &Layout, x: &CpuStorage, x_layout: &Layout) -> Result<()> {
        match (y, x) {
            (CpuStorage::F32(y), CpuStorage::F32(x)) => self.add(y, y_layout, x, x_layout),
            (CpuStorage::F16(y), CpuStorage::F16(x)) => self.add(y, y_layout, x, x_layout),
            (CpuStorage::BF16(y), CpuStorage::BF16(x)) => self.add(y, y_layout, x, x_layout),
            _ => bail!("rows are in f32, f16 or bf16, all of them"),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        y: &mut candle_core::CudaStorage,
        y_layout: &Layout,
        x: &candle_core::CudaStorage,
        x_layout: &Layout,
    ) -> Result<()> {
        use candle_core::backend::BackendStorage;

        use crate::cuda::gpu::storage_address;
        let Some((tiles, words)) = &self.tiles else { bail!("the delta is laid out for a CPU") };
        if !(y_layout.is_contiguous() && x_layout.is_contiguous()) {
            bail!("rows have gaps");
        }
        let (_, width) = y_layout.shape().dims2()?;
        let (to, from) = (storage_address(y, y_layout)?, storage_address(x, x_layout)?);
        // SAFETY: the tiles are of these rows, and `BatchDelta` borrows the adapters that they point into.
        unsafe { tiles.launch(y.device(), *words, from, to, width) }
    }
}
