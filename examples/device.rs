//! What transformers and PEFT computed for the tiny models of every family, against a device: each adapter's logits at every
//! position, all adapters of a model in one step.
//!
//!     cargo run --release --example device -- tests/fixtures/tiny cpu f32
//!     device FIXTURES cuda bf16      # the program alone; benches/gpu.sh carries it to a machine with a GPU
//!
//! A line a model, in Markdown. Ends with 1 where something is further off than its budget.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use loramux::adapter::load;
use loramux::base::{BLOCK, Base, Decoder, DecoderOptions, Kernels, device};
use loramux::engine::{Model, Output, Runner, Work};
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

    /// How many prompts, and by how much the worst of them is off.
    fn compare(&self, device: &Device, dtype: DType) -> Result<(usize, f32)> {
        let config = &self.base.config;
        let options = DecoderOptions { device: device.clone(), kernels: Kernels::Tensor, format: None, dtype };
        let decoder = Arc::new(Decoder::load(config, &self.base.weights, options)?);
        let prompts = self.prompts(&decoder)?;
        let mut next = 0;
        let work: Vec<Work> = prompts
            .iter()
            .map(|(name, tokens, adapter)| {
                let blocks = tokens.len().div_ceil(BLOCK) as u32;
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
        let got = Runner::new(decoder, bytes)?.with_head(self.base.head.clone()).step(&work)?;
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
        Ok((prompts.len(), worst))
    }
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
        let (prompts, off) = Fixtures::open(Path::new(root), &model)?.compare(&device, dtype)?;
        let fits = off <= budget(dtype);
        good &= fits;
        let verdict = if fits { "ok" } else { "TOO FAR OFF" };
        println!(
            "| {model} | {} | {prompts} prompts | off by {off:.1e} of {:.0e} | {verdict} |",
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
