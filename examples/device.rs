//! What transformers and PEFT computed for the tiny models of every family, against a device: each adapter's logits at every
//! position, all adapters of a model in one step.
//!
//!     cargo run --release --example device -- tests/fixtures/tiny cpu f32
//!     device FIXTURES cuda bf16      # the program alone; benches/gpu.sh carries it to a machine with a GPU
//!
//! A line a model, in Markdown. Tokens are drawn on the device as well, and compared with those that the definition draws from
//! the device's own logits. Ends with 1 where something is further off than its budget.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use loramux::adapter::load;
use loramux::base::{Base, Decoder, DecoderOptions, Kernels, device};
use loramux::engine::{Computed, Draw, Edit, Model, Output, Runner, Work};
use loramux::lora::{PackedAdapter, Pool};
use loramux::{Error, Result};

/// How far a prompt's logits may be off: the root mean square of the differences, over that of the logits. What candle's
/// products on a CPU are off in f16 is within the budget of f16; bf16 is eight times as coarse.
fn budget(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 1e-4,
        DType::F16 => 2e-2,
        _ => 8.0 * 2e-2,
    }
}

/// One prompt: what it is called in the file of logits, its tokens and its adapter.
type Prompt = (String, Vec<u32>, Option<Arc<PackedAdapter>>);

struct Fixtures {
    folders: Vec<PathBuf>,
    base: Base,
    prompts: Vec<Vec<u32>>,
    logits: HashMap<String, Tensor>,
}

impl Fixtures {
    fn open(root: &Path, model: &str) -> Result<Self> {
        let folders = [root.join(model), root.join("variants").join(model)];
        let folders: Vec<PathBuf> = folders.into_iter().filter(|folder| folder.exists()).collect();
        let told = std::fs::read(folders[0].join("expected.json"))?;
        let told: serde_json::Value = serde_json::from_slice(&told).map_err(Error::internal)?;
        let mut logits = HashMap::new();
        for folder in &folders {
            logits.extend(candle_core::safetensors::load(folder.join("expected.safetensors"), &Device::Cpu)?);
        }
        let base = folders[0].join("base");
        Ok(Fixtures {
            base: Base::open(&base.to_string_lossy())?,
            prompts: serde_json::from_value(told["prompts"].clone()).map_err(Error::internal)?,
            folders,
            logits,
        })
    }

    /// Every prompt of every adapter whose logits are known.
    fn prompts(&self, decoder: &Decoder) -> Result<Vec<Prompt>> {
        let mut names: Vec<&str> = self.logits.keys().filter_map(|name| name.strip_suffix(".logits.0")).collect();
        names.sort_unstable();
        // As a server has them: on pages of a GPU.
        let pool = Pool::open(decoder, 256 << 20)?;
        let mut all = vec![];
        for name in names {
            let folder = format!("adapter_{}", name.strip_prefix("x.").unwrap_or(name));
            let adapter = match self.folders.iter().map(|f| f.join(&folder)).find(|path| path.exists()) {
                Some(path) => {
                    let adapter = load(&path, &self.base.config, &self.base.id)?.adapter;
                    Some(Arc::new(PackedAdapter::on(adapter, decoder, pool.as_ref())?))
                }
                None if name == "base" => None,
                None => return Err(Error::not_found(format!("{folder} in {:?}", self.folders))),
            };
            // Prompts of adapters with new tokens have some of them, as tests/fixtures/variants.py says.
            let new = name.starts_with("resized");
            let token = |(j, &token): (usize, &u32)| if new && j % 3 == 0 { 256 + j as u32 % 4 } else { token };
            let prompt = |(i, tokens): (usize, &Vec<u32>)| {
                let tokens = tokens.iter().enumerate().map(token).collect();
                (format!("{name}.logits.{i}"), tokens, adapter.clone())
            };
            all.extend(self.prompts.iter().enumerate().map(prompt));
        }
        Ok(all)
    }

    /// How many prompts, by how much the worst of them is off, and how many tokens were drawn right, of how many.
    fn compare(&self, device: &Device, dtype: DType) -> Result<(usize, f32, [usize; 2])> {
        let config = &self.base.config;
        let options = DecoderOptions { device: device.clone(), kernels: Kernels::Tensor, format: None, dtype };
        let decoder = Arc::new(Decoder::load(config, &self.base.weights, options)?);
        let prompts = self.prompts(&decoder)?;
        let mut next = 0;
        let work: Vec<Work> = prompts
            .iter()
            .map(|(name, tokens, adapter)| {
                let blocks = tokens.len().div_ceil(decoder.kv_block_size()) as u32;
                next += blocks;
                let heads = self.logits[name].dims().len() == 1;
                Work {
                    tokens: tokens.clone(),
                    start: 0,
                    blocks: (next - blocks..next).collect(),
                    adapter: adapter.clone(),
                    output: if heads { Output::Head } else { Output::Logits(tokens.len()) },
                }
            })
            .collect();
        let bytes = next as usize * decoder.kv_block_bytes();
        let mut runner = Runner::new(decoder, bytes)?.with_head(self.base.head.clone());
        let got = runner.step(&work)?;
        let mut worst = 0f32;
        for ((name, ..), got) in prompts.iter().zip(&got) {
            let want = self.logits[name].flatten_all()?.to_vec1::<f32>()?;
            let square = |numbers: &mut dyn Iterator<Item = f32>| numbers.map(|x| x * x).sum::<f32>();
            let off = square(&mut got.iter().zip(&want).map(|(got, want)| got - want));
            let off = (off / square(&mut want.iter().copied())).sqrt();
            // Not a number is as far off as can be.
            worst = if off <= worst { worst } else { off };
            if got.len() != want.len() {
                return Err(Error::internal(format!("{name}: {} logits, not {}", got.len(), want.len())));
            }
        }
        let rows: Vec<usize> = (0..work.len()).filter(|&i| work[i].output != Output::Head).collect();
        if rows.is_empty() {
            return Ok((prompts.len(), worst, [0, 0]));
        }
        let drawing: Vec<Work> = rows.iter().map(|&i| Work { output: Output::LastLogits, ..work[i].clone() }).collect();
        let logits = runner.step(&drawing)?;
        let draws: Vec<Draw> = (0..rows.len()).map(draw).collect();
        let wanted: Vec<_> = draws.iter().cloned().map(Some).collect();
        let drawn = runner.step_and_draw(&drawing, &wanted)?;
        let is_right = |((computed, draw), logits): &((&Computed, &Draw), &Vec<f32>)| match computed {
            Computed::Token(Some(token)) => nearly(draw)
                .iter()
                .any(|draw| draw.token(&mut logits.to_vec(), &mut vec![]).is_ok_and(|expected| expected == *token)),
            _ => false,
        };
        let right = drawn.iter().zip(&draws).zip(&logits).filter(is_right).count();
        Ok((prompts.len(), worst, [right, rows.len()]))
    }
}

/// One of some kinds of draws.
fn draw(i: usize) -> Draw {
    let edit = |token| Edit { token, bias: 1.5, seen: true, penalty: 0.25 };
    let place = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11;
    let plain = Draw { place, ..Draw::default() };
    match i % 5 {
        0 => Draw { temperature: 0.0, ..plain },
        1 => Draw { edits: (0..40).map(edit).collect(), repetition_penalty: 1.3, ..plain },
        2 => Draw { top_k: 20, temperature: 0.7, ..plain },
        3 => Draw { top_p: 0.8, ..plain },
        _ => Draw { min_p: 0.05, top_k: 50, top_p: 0.9, ..plain },
    }
}

/// Draws that differ by what rounding may make of one.
fn nearly(draw: &Draw) -> Vec<Draw> {
    let near = |(p, place): (f32, i64)| {
        let place = draw.place.saturating_add_signed(place << 34).min((1 << 53) - 1);
        let top_p = if draw.top_p < 1.0 { draw.top_p * (1.0 + p * 1e-5) } else { 1.0 };
        Draw { place, top_p, ..draw.clone() }
    };
    [(0.0, 0), (0.0, 1), (0.0, -1), (1.0, 0), (-1.0, 0)].map(near).into()
}

fn run(arguments: &[String]) -> Result<bool> {
    let [root, device, dtype] = arguments else {
        return Err(Error::bad_request("usage: device FIXTURES cpu|cuda|cuda:N f32|bf16|f16"));
    };
    let device = device::open(device)?;
    let dtype: DType = dtype.parse().map_err(|_| Error::bad_request(format!("{dtype} is not f32, bf16 or f16")))?;
    let folders = std::fs::read_dir(root)?.collect::<Result<Vec<_>, _>>()?;
    let names = folders.iter().filter_map(|entry| entry.file_name().into_string().ok());
    let mut models: Vec<String> = names.filter(|name| Path::new(root).join(name).join("base").exists()).collect();
    models.sort_unstable();
    let mut good = !models.is_empty();
    for model in models {
        let (prompts, off, [right, drawn]) = Fixtures::open(Path::new(root), &model)?.compare(&device, dtype)?;
        let fits = off <= budget(dtype) && right == drawn;
        good &= fits;
        let verdict = if fits { "ok" } else { "TOO FAR OFF" };
        println!(
            "| {model} | {} | {prompts} prompts, {drawn} tokens | off by {off:.1e} of {:.0e}; {right} tokens as defined | {verdict} |",
            dtype.as_str(),
            budget(dtype)
        );
    }
    Ok(good)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::from(2)
        }
    }
}
