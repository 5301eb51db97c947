//! Attention by candle-flash-attn (FlashAttention-2, arXiv 2307.08691), with the feature `flash-attn`: in bf16 and f16, over
//! the paged cache, prompts and decoding alike. Its pages are of more positions than our blocks, so the cache's blocks are
//! pages then, and the rest of a step sees the blocks that a page is made of.

use std::borrow::Cow;

use candle_core::{DType, Device};

use crate::base::ModelConfig;

/// Positions of a page: the fewest that it takes.
pub const PAGE: usize = 32;

/// Whether it computes a model's attention.
pub fn attends(config: &ModelConfig, device: &Device, dtype: DType) -> bool {
    let suits = matches!(dtype, DType::BF16 | DType::F16) && config.head_dim.is_multiple_of(8);
    cfg!(feature = "flash-attn") && device.is_cuda() && suits
}

/// The blocks that some larger blocks are made of, `count` each.
pub fn parts(blocks: &[u32], count: usize) -> Cow<'_, [u32]> {
    match count as u32 {
        1 => Cow::Borrowed(blocks),
        count => blocks.iter().flat_map(|block| count * block..count * (block + 1)).collect(),
    }
}

/// What the kernels are told of sequences.
#[cfg(any(feature = "flash-attn", test))]
#[derive(Debug, PartialEq)]
struct Lengths {
    /// Rows before each sequence, and of all; positions likewise.
    rows: Vec<u32>,
    positions: Vec<u32>,
    most_rows: usize,
    most_positions: usize,
    /// Pages, as many for each sequence.
    pages: Vec<u32>,
}

#[cfg(any(feature = "flash-attn", test))]
impl Lengths {
    /// The sequences cover all rows, in order.
    fn new(sequences: &[crate::base::SequenceRows]) -> Self {
        let per_page = PAGE / crate::base::BLOCK;
        let length = |s: &crate::base::SequenceRows| s.start + s.rows.len();
        let most_positions = sequences.iter().map(length).max().unwrap_or(0);
        let most_rows = sequences.iter().map(|s| s.rows.len()).max().unwrap_or(0);
        let (mut rows, mut positions, mut pages) = (vec![0], vec![0], vec![]);
        for s in sequences {
            let (before, count) = (positions[positions.len() - 1], length(s).div_ceil(PAGE));
            rows.push(s.rows.end as u32);
            positions.push(before + length(s) as u32);
            let of_page = |i: usize| s.blocks.get(i * per_page).map_or(0, |block| block / per_page as u32);
            pages.extend((0..most_positions.div_ceil(PAGE)).map(|i| if i < count { of_page(i) } else { 0 }));
        }
        Lengths { rows, positions, most_rows, most_positions, pages }
    }
}

/// On a GPU, once for all layers of a step.
#[cfg(feature = "flash-attn")]
pub(super) mod tensors {
    use candle_core::{DType, Device, Tensor};

    use super::PAGE;
    use crate::base::SequenceRows;
    use crate::base::paged::Heads;
    use crate::{Error, Result};

    pub struct Lengths {
        rows: Tensor,
        positions: Tensor,
        most_rows: usize,
        most_positions: usize,
        pages: Tensor,
    }

    /// Whether the kernels run on this device. They are for the compute capability that the program was built for, and
    /// candle-flash-attn does not tell when a launch fails.
    pub fn check(device: &Device) -> Result<()> {
        let heads =
            Heads { kv_heads: 1, group: 1, head_dim: 64, causal: true, window: None, scale: 1.0, softcap: None };
        let numbers = |x: f32, rows| Tensor::full(x, (rows, heads.head_dim), device)?.to_dtype(DType::BF16);
        let lengths = Lengths::new(&[SequenceRows { rows: 0..1, start: 0, blocks: &[0, 1] }], device)?;
        // Of one position, what it sees is that position's value.
        let attended = lengths.attend(&heads, &numbers(1.0, 1)?, [&numbers(0.5, PAGE)?, &numbers(3.0, PAGE)?])?;
        let attended = attended.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        if attended.iter().all(|&x| x == 3.0) {
            return Ok(());
        }
        Err(Error::bad_request(
            "the attention of the feature flash-attn does not run on this GPU; build the program with CUDA_COMPUTE_CAP as the \
             GPU's compute capability, or without the feature",
        ))
    }

    impl Lengths {
        pub fn new(sequences: &[SequenceRows], device: &Device) -> Result<Self> {
            let lengths = super::Lengths::new(sequences);
            let shape = (sequences.len(), lengths.most_positions.div_ceil(PAGE));
            Ok(Lengths {
                rows: Tensor::new(lengths.rows, device)?,
                positions: Tensor::new(lengths.positions, device)?,
                most_rows: lengths.most_rows,
                most_positions: lengths.most_positions,
                pages: Tensor::from_vec(lengths.pages, shape, device)?,
            })
        }

        /// `q` and the result are `[rows, heads * head_dim]`, keys and values `[positions, kv_heads * head_dim]`.
        pub fn attend(&self, heads: &Heads, q: &Tensor, [keys, values]: [&Tensor; 2]) -> Result<Tensor> {
            let &Heads { kv_heads, group, head_dim, causal, window, scale, softcap } = heads;
            let (rows, width) = q.dims2()?;
            let paged = |t: &Tensor| t.reshape((t.dims()[0] / PAGE, PAGE, kv_heads, head_dim));
            let q = q.reshape((rows, kv_heads * group, head_dim))?;
            // Of a window of n positions n - 1 lie to the left.
            let (left, right) = (window.map(|n| n - 1), causal.then_some(0));
            let attended = candle_flash_attn::flash_attn_varlen_paged_windowed(
                &q,
                &paged(keys)?,
                &paged(values)?,
                &self.rows,
                &self.positions,
                &self.pages,
                None,
                self.most_rows,
                self.most_positions,
                scale,
                left,
                right,
                PAGE,
                softcap,
            )?;
            Ok(attended.reshape((rows, width))?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::SequenceRows;

    #[test]
    fn a_page_is_made_of_blocks() {
        assert_eq!(*parts(&[3, 0, 5], 2), [6, 7, 0, 1, 10, 11]);
        assert_eq!(*parts(&[3, 0], 1), [3, 0]);
    }

    #[test]
    fn lengths_and_pages_are_those_of_the_sequences() {
        let blocks = [parts(&[4, 1, 7], 2), parts(&[2], 2)];
        // One decodes position 69, in the third page; the other is a prompt of 20.
        let sequences = [
            SequenceRows { rows: 0..1, start: 69, blocks: &blocks[0] },
            SequenceRows { rows: 1..21, start: 0, blocks: &blocks[1] },
        ];
        let lengths = Lengths::new(&sequences);
        assert_eq!((lengths.rows, lengths.positions), (vec![0, 1, 21], vec![0, 70, 90]));
        assert_eq!((lengths.most_rows, lengths.most_positions), (20, 70));
        assert_eq!(lengths.pages, [4, 1, 7, 2, 0, 0]);
        // A slot is the same by pages as by blocks.
        assert_eq!(sequences[0].slot(69), 7 * PAGE + 69 % PAGE);
    }
}
