//! Tokens drawn where the logits are: on a GPU by a kernel (`src/cuda/kernels/sampler.cu`), so that a token leaves it and not
//! the logits of a vocabulary; on a CPU where they were written.

use std::cell::RefCell;

use candle_core::{DType, Tensor};

use crate::Result;
use crate::base::{Rows, parallel};
use crate::engine::draw::Draw;

/// A draw from a row of logits, of which `vocab` are those of tokens.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    pub row: usize,
    pub vocab: usize,
    pub draw: &'a Draw,
}

/// Tokens from some rows of logits, in ascending order, each at most once, and on a GPU none by typical-p, for which the kernel
/// would have to sort. `None` is of a row that has a NaN or whose largest logit is not finite. What the rows hold then means
/// nothing.
pub fn draw_tokens(logits: &mut Rows, rows: &[Row]) -> Result<Vec<Option<u32>>> {
    match logits {
        Rows::Host { data, width } => Ok(on_host(data, *width, rows)),
        // A copy, or memory of nobody else by now: drawing overwrites it.
        Rows::Device(logits) => on_device(&logits.to_dtype(DType::F32)?.contiguous()?, rows),
    }
}

fn on_host(logits: &mut [f32], width: usize, rows: &[Row]) -> Vec<Option<u32>> {
    thread_local! {
        static CANDIDATES: RefCell<Vec<(f32, u32)>> = const { RefCell::new(vec![]) };
    }
    let mut next = rows.iter().peekable();
    let own = |(i, numbers)| Some((next.next_if(|row| row.row == i)?, numbers));
    let own: Vec<(&Row, &mut [f32])> = logits.chunks_exact_mut(width).enumerate().filter_map(own).collect();
    assert_eq!(own.len(), rows.len(), "rows that are not there, or not in order");
    parallel::map(own, |(row, numbers)| {
        CANDIDATES.with_borrow_mut(|candidates| row.draw.token(&mut numbers[..row.vocab], candidates).ok())
    })
}

fn on_device(logits: &Tensor, rows: &[Row]) -> Result<Vec<Option<u32>>> {
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = logits.device() {
        return on_gpu(device, logits, rows);
    }
    let mut candidates = vec![];
    let token = |row: &Row| {
        let mut own = logits.narrow(0, row.row, 1)?.narrow(1, 0, row.vocab)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(row.draw.token(&mut own, &mut candidates).ok())
    };
    rows.iter().map(token).collect()
}

#[cfg(feature = "cuda")]
fn on_gpu(device: &candle_core::CudaDevice, logits: &Tensor, rows: &[Row]) -> Result<Vec<Option<u32>>> {
    use crate::cuda::gpu::tensor_address;
    use crate::cuda::{Machine, Memory};

    let (_, width) = logits.dims2()?;
    let tiles = tiles::DrawTiles::new(rows);
    let words = device.upload(&tiles.words)?;
    let tokens = Tensor::zeros(rows.len(), DType::U32, logits.device())?;
    // SAFETY: the rows are of these logits, and there are as many tokens.
    unsafe { tiles.launch(device, words.address(), tensor_address(logits)?, width, tensor_address(&tokens)?) }?;
    Ok(tokens.to_vec1()?.into_iter().map(known).collect())
}

/// What the kernel gives in place of a token.
#[cfg(any(feature = "cuda", test))]
const NO_TOKEN: u32 = u32::MAX;

#[cfg(any(feature = "cuda", test))]
fn known(token: u32) -> Option<u32> {
    (token != NO_TOKEN).then_some(token)
}

/// The launch.
#[cfg(any(feature = "cuda", test))]
mod tiles {
    use candle_core::{Result, bail};

    use super::Row;
    use crate::cuda::{Argument, Launch, Machine, Module, Tiles};
    use crate::engine::draw::Edit;

    pub const DRAW_THREADS: u32 = 1024;

    #[derive(Debug)]
    pub struct DrawTiles {
        pub words: Vec<u32>,
        tiles: Tiles,
        edits: Tiles,
    }

    impl DrawTiles {
        pub fn new(rows: &[Row]) -> Self {
            let (mut tiles, mut edits) = (vec![], vec![]);
            for &Row { row, vocab, draw } in rows {
                let first = edits.len();
                let word = |e: &Edit| [e.token, e.bias.to_bits(), u32::from(e.seen), e.penalty.to_bits()];
                edits.extend(draw.edits.iter().map(word));
                // As many as there are is all.
                let top_k = if draw.top_k < vocab { draw.top_k } else { 0 };
                tiles.push([
                    row as u32,
                    vocab as u32,
                    first as u32,
                    draw.edits.len() as u32,
                    draw.repetition_penalty.to_bits(),
                    draw.temperature.to_bits(),
                    draw.floor().to_bits(),
                    top_k as u32,
                    draw.top_p.to_bits(),
                    draw.place as u32,
                    (draw.place >> 32) as u32,
                    0,
                ]);
            }
            let mut words = vec![];
            let (tiles, edits) = (Tiles::append(&mut words, &tiles), Tiles::append(&mut words, &edits));
            DrawTiles { words, tiles, edits }
        }

        /// Draws. `logits` is where the rows of `width` numbers are, `tokens` where as many tokens as rows go.
        ///
        /// # Safety
        /// They are there, and `words` is where the words lie.
        pub unsafe fn launch<M: Machine>(
            &self,
            machine: &M,
            words: u64,
            logits: u64,
            width: usize,
            tokens: u64,
        ) -> Result<()> {
            if width >= 1 << 23 {
                bail!("{width} tokens; the sums of the kernel are of up to 2^23");
            }
            let grid = [self.tiles.count, 1, 1];
            let [logits, tokens] = [logits, tokens].map(Argument::Address);
            let (tiles, edits) = (self.tiles.address(words), self.edits.address(words));
            let arguments = &[tiles, edits, logits, tokens, Argument::Word(width as u32)];
            // SAFETY: these are the parameters of the kernel in sampler.cu; the rest is the caller's promise.
            unsafe {
                machine.launch(&Launch {
                    module: Module::Sampler,
                    kernel: "draw_tokens",
                    grid,
                    threads: DRAW_THREADS,
                    arguments,
                })
            }
        }
    }
}

#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
mod tests {
    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;
    use crate::cuda::emulator::{Emulator, SAMPLER};
    use crate::cuda::{Machine, Memory};
    use crate::engine::draw::Edit;

    fn emulated(machine: &Emulator, logits: &[Vec<f32>], draws: &[(usize, Draw)]) -> Result<Vec<Option<u32>>> {
        let width = logits.iter().map(Vec::len).max().unwrap();
        // What a row has after its own vocabulary is not read.
        let padded = logits.iter().flat_map(|row| row.iter().copied().chain(std::iter::repeat(f32::NAN)).take(width));
        let all = Tensor::from_vec(padded.collect::<Vec<_>>(), (logits.len(), width), &Device::Cpu).unwrap();
        let rows: Vec<Row> =
            draws.iter().map(|(row, draw)| Row { row: *row, vocab: logits[*row].len(), draw }).collect();
        let tiles = tiles::DrawTiles::new(&rows);
        let words = machine.upload(&tiles.words).unwrap();
        let tokens = machine.upload(&vec![7; rows.len()]).unwrap();
        let at = machine.copy(&all).unwrap();
        // SAFETY: all of it is there.
        unsafe { tiles.launch(machine, words.address(), at, width, tokens.address()) }?;
        Ok(machine.words(&tokens).into_iter().map(known).collect())
    }

    fn draws() -> impl Strategy<Value = Draw> {
        let bias = prop_oneof![9 => -4f32..4.0, 1 => Just(f32::NEG_INFINITY)];
        let edits = prop::collection::btree_map(0u32..400, (bias, any::<bool>(), -2f32..2.0), 0..12);
        (
            edits,
            prop_oneof![Just(1.0f32), 0.5f32..2.0],
            prop_oneof![Just(0.0f32), 0.05f32..2.0, Just(1e-40)],
            prop_oneof![Just(0.0f32), 0.0f32..1.0],
            prop_oneof![Just(0usize), Just(1), 1usize..40, 200usize..3000],
            prop_oneof![Just(1.0f32), 0.0f32..1.0],
            0u64..1 << 53,
        )
            .prop_map(|(edits, repetition_penalty, temperature, min_p, top_k, top_p, place)| {
                let edit = |(token, (bias, seen, penalty))| Edit { token, bias, seen, penalty };
                let edits = edits.into_iter().map(edit).collect();
                Draw { edits, repetition_penalty, temperature, min_p, top_k, top_p, place, ..Draw::default() }
            })
    }

    /// Numbers among which many are the same, as bf16 makes them, or few.
    fn row() -> impl Strategy<Value = Vec<f32>> {
        let number = prop_oneof![20 => -12f32..12.0, 1 => Just(f32::NEG_INFINITY)];
        (prop::bool::ANY, prop::collection::vec(number, 1..2200)).prop_map(|(is_coarse, mut row)| {
            row[0] = row[0].max(-20.0);
            if is_coarse {
                row.iter_mut().for_each(|x| *x = (*x * 2.0).round() / 2.0);
            }
            row
        })
    }

    /// Tokens that the definition gives for thresholds and places that differ by what rounding may make of them.
    fn expected(draw: &Draw, row: &[f32]) -> Vec<u32> {
        let near = [(0.0, 0i64), (0.0, 1), (0.0, -1), (1.0, 0), (-1.0, 0)].map(|(p, place)| {
            let place = draw.place.saturating_add_signed(place << 32).min((1 << 53) - 1);
            let top_p = if draw.top_p < 1.0 { draw.top_p * (1.0 + p * 1e-6) } else { 1.0 };
            Draw { place, top_p, ..draw.clone() }
        });
        near.iter().map(|draw| draw.token(&mut row.to_vec(), &mut vec![]).unwrap()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn the_emulated_kernel_draws_as_the_definition(
            cases in prop::collection::vec((row(), draws()), 1..4),
            seed in any::<u64>(),
        ) {
            let (rows, draws): (Vec<_>, Vec<_>) = cases.into_iter().unzip();
            // The last row first.
            let draws: Vec<(usize, Draw)> = draws.into_iter().enumerate().rev().collect();
            let tokens = emulated(&Emulator::new(SAMPLER, seed), &rows, &draws).unwrap();
            for (token, (row, draw)) in tokens.iter().zip(&draws) {
                let expected = expected(draw, &rows[*row]);
                prop_assert!(token.is_some_and(|t| expected.contains(&t)), "drew {token:?}, not {expected:?}: {draw:?}");
            }
        }
    }

    #[test]
    fn rows_of_no_numbers_are_told() {
        let machine = Emulator::new(SAMPLER, 3);
        for temperature in [0.0, 1.0] {
            let draw = |row| (row, Draw { temperature, ..Draw::default() });
            for wrong in [f32::NAN, -f32::NAN, f32::INFINITY] {
                let rows = vec![vec![1.0, 2.0], vec![0.0, wrong, 1.0]];
                let tokens = emulated(&machine, &rows, &[draw(1), draw(0)]).unwrap();
                assert!(tokens[0].is_none() && tokens[1].is_some(), "{wrong}: {tokens:?}");
            }
            assert_eq!(emulated(&machine, &[vec![f32::NEG_INFINITY; 3]], &[draw(0)]).unwrap(), [None]);
        }
        // The lowest of equals, whatever the sign of nothing.
        let greedy = Draw { temperature: 0.0, ..Draw::default() };
        assert_eq!(emulated(&machine, &[vec![-1.0, -0.0, 0.0]], &[(0, greedy)]).unwrap(), [Some(1)]);
    }

    #[test]
    fn mistakes_in_the_kernel_are_found() {
        let row: Vec<f32> = (0..1500).map(|i| ((i * 37) % 101) as f32 / 20.0).collect();
        let draw = |i: u64| Draw { top_k: 200, top_p: 0.8, place: i * ((1 << 53) / 9), ..Draw::default() };
        let draws: Vec<(usize, Draw)> = (0..9).map(|i| (i as usize, draw(i))).collect();
        let rows = vec![row; draws.len()];
        let good = |machine: &Emulator| {
            let tokens = emulated(machine, &rows, &draws)?;
            let mut pairs = tokens.iter().zip(&draws);
            let is_expected = |(token, (row, draw)): (&Option<u32>, &(usize, Draw))| {
                token.is_some_and(|token| expected(draw, &rows[*row]).contains(&token))
            };
            Ok::<_, crate::Error>(pairs.all(is_expected))
        };
        assert!(good(&Emulator::new(SAMPLER, 1)).unwrap());
        for (from, to) in [
            ("  __syncthreads();  // All know the warp that has the token.\n", ""),
            ("  __syncthreads();  // The token is there.\n", ""),
            ("  __syncthreads();  // All have read it.\n", ""),
            ("if (lane >= step) upto += other", "upto += other"),
            ("token <= kept.last", "token < kept.last"),
            ("before + upto >= wanted", "before + upto > wanted"),
            ("(wanted - before + each - 1) / each", "(wanted - before) / each"),
        ] {
            let found = good(&Emulator::mistaken(SAMPLER, &[(from, to)]));
            assert!(!found.unwrap_or(false), "{from:?} became {to:?}, and nobody noticed");
        }
    }

    #[test]
    fn sizes_are_those_of_the_kernel() {
        let threads = tiles::DRAW_THREADS;
        assert!(SAMPLER.contains(&format!("constexpr unsigned DRAW_THREADS = {threads};")));
    }
}
