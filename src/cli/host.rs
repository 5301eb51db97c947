//! The base, its adapters and the engine, put together from the command line's options.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use candle_core::{DType, Device};

use super::args::{Dtype, ModelArgs, Quantize};
use crate::adapter::{Registry, RegistryOptions, Remote};
use crate::base::budget::{Budget, Division, Step, Wishes};
use crate::base::device::Memory;
use crate::base::matmul::Format;
use crate::base::parallel;
use crate::base::{Base, Decoder, DecoderOptions, Kernels, Language, device};
use crate::engine::{Engine, EngineOptions, MAX_SCORE_LOGITS, Runner};
use crate::lora::Pool;
use crate::metrics::Metrics;
use crate::{Error, Result, memory};

/// [`Limits::max_prefill_tokens`] of a CPU, where twice the tokens take twice the time. With fewer, what a step costs in any
/// case is more than a small part of it.
const CPU_PREFILL_TOKENS: usize = 64;

/// Limits that only a server has.
pub struct Limits {
    pub store: PathBuf,
    pub max_sequences: usize,
    pub max_batch_tokens: usize,
    /// `None` is what suits the device.
    pub max_prefill_tokens: Option<usize>,
    pub max_queue: usize,
    pub tenant_slowdown: f64,
    pub max_upload: u64,
    /// Whether uploads and adapters of sources may bring chat templates.
    pub uploaded_templates: bool,
    /// URLs of places to fetch adapters from.
    pub sources: Vec<String>,
    pub source_refresh: Duration,
    pub source_cache: u64,
}

/// Everything that answers requests.
pub struct Host {
    pub base_id: String,
    pub language: Language,
    pub registry: Arc<Registry>,
    pub engine: Engine,
    pub metrics: Arc<Metrics>,
    /// What the weights are held in, for people.
    pub dtype: String,
    /// `cpu` or `cuda`.
    pub device_name: &'static str,
    /// The base; an adapter is packed to match it.
    pub decoder: Arc<Decoder>,
    /// Classes of the base's own head.
    pub labels: Option<Vec<String>>,
}

impl Host {
    pub fn start(args: &ModelArgs, limits: Limits) -> Result<Self> {
        if args.threads > 0 {
            // Fails only where the pool is there already; then its size stands.
            let _ = rayon::ThreadPoolBuilder::new().num_threads(args.threads).build_global();
            parallel::set_threads(args.threads);
        }
        // Enough for the rows of a large step.
        memory::keep(64 << 20);
        let device = device::open(&args.device)?;
        // Before the model, since these may be wrong.
        let sources = limits.sources.iter().map(|url| Remote::open(url)).collect::<Result<Vec<_>>>()?;
        let base = Base::open(&args.model)?;
        let kernels = Kernels::for_device(&device);
        let (format, dtype) = formats(args, &device)?;
        let wishes = Wishes {
            kv: args.kv_memory.map(|bytes| bytes.0),
            adapters: args.adapter_memory.map(|bytes| bytes.0),
            utilization: args.gpu_memory_utilization,
            step: Step {
                rows: limits.max_batch_tokens,
                logits: MAX_SCORE_LOGITS / base.config.vocab_size.max(1) + limits.max_sequences,
            },
        };
        let before = device::memory(&device)?;
        if let Some(Memory { total, free }) = before {
            device::check_heads(&base.config)?;
            // What cannot fit is said before the weights are loaded.
            let weights = device::weights(&base.config, dtype);
            let told = [total, free.saturating_sub(weights), weights];
            Budget::new(&base.config, dtype, wishes.step, told).divide(&wishes)?;
        }
        let metrics = Arc::new(Metrics::new());
        let device_name = if device.is_cpu() { "cpu" } else { "cuda" };
        tracing::info!("loading {} on {}", base.id, device_name);
        let held = DecoderOptions { device, kernels, format, dtype };
        let decoder = Arc::new(Decoder::load(&base.config, &base.weights, held)?);
        memory::release();
        metrics.base_bytes.set(decoder.bytes() as i64);
        metrics.kv_block_bytes.set(decoder.kv_block_bytes() as i64);
        tracing::info!("weights take {:.1} MB", decoder.bytes() as f64 / 1e6);
        let memory = divide(&decoder, &wishes, before)?;
        let language = base.language();
        let registry = Registry::open(
            RegistryOptions {
                decoder: decoder.clone(),
                language: language.clone(),
                base: base.id.clone(),
                directories: args.adapters.clone(),
                store: limits.store,
                memory: memory.adapters as usize,
                pool: Pool::open(&decoder, memory.adapters)?,
                max_upload: limits.max_upload,
                uploaded_templates: limits.uploaded_templates,
                sources,
                source_refresh: limits.source_refresh,
                source_cache: limits.source_cache,
            },
            metrics.clone(),
        )?;
        let described = match format {
            Some(f) => format!("{f:?}").to_lowercase(),
            None if kernels == Kernels::Tensor => dtype.as_str().to_string(),
            None => decoder.stored_as(),
        };
        let options = EngineOptions {
            max_sequences: limits.max_sequences,
            max_batch_tokens: limits.max_batch_tokens,
            max_prefill_tokens: limits.max_prefill_tokens.unwrap_or(match device_name {
                "cpu" => CPU_PREFILL_TOKENS,
                _ => limits.max_batch_tokens,
            }),
            max_queue: limits.max_queue,
            tenant_slowdown: limits.tenant_slowdown,
            eos_tokens: base.config.eos_tokens.clone(),
        };
        let labels = base.head.as_ref().map(|head| head.labels.clone());
        let runner = Runner::new(decoder.clone(), memory.kv as usize)?.with_head(base.head);
        let engine = Engine::start(Box::new(runner), base.tokenizer, options, metrics.clone())?;
        Ok(Host {
            base_id: base.id,
            language,
            registry,
            engine,
            metrics,
            dtype: described,
            device_name,
            decoder,
            labels,
        })
    }
}

/// Memory of the KV cache and of adapters, when the weights are there. `before` is what a GPU had without them.
fn divide(decoder: &Decoder, wishes: &Wishes, before: Option<Memory>) -> Result<Division> {
    let (Some(before), Some(Memory { total, free })) = (before, device::memory(&decoder.options().device)?) else {
        const DEFAULT: u64 = 1 << 30;
        return Ok(Division { kv: wishes.kv.unwrap_or(DEFAULT), adapters: wishes.adapters.unwrap_or(DEFAULT) });
    };
    let weights = before.free.saturating_sub(free).max(decoder.bytes() as u64);
    let budget = Budget::new(decoder.config(), decoder.options().dtype, wishes.step, [total, free, weights]);
    let division = budget.divide(wishes)?;
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    tracing::info!(
        "of the GPU's {:.1} GiB the weights take {:.1}, a step {:.1}, adapters {:.1} and the KV cache {:.1}",
        gib(total),
        gib(weights),
        gib(budget.step),
        gib(division.adapters),
        gib(division.kv)
    );
    Ok(division)
}

/// Format of packed matrices, and numbers of tensors.
fn formats(args: &ModelArgs, device: &Device) -> Result<(Option<Format>, DType)> {
    let quantised = match args.quantize {
        Quantize::None => None,
        Quantize::Q8 => Some(Format::Int8),
        Quantize::Q4 => Some(Format::Q4),
    };
    if quantised.is_some() && !device.is_cpu() {
        return Err(Error::bad_request("--quantize works on a CPU; on a GPU choose --dtype"));
    }
    if quantised.is_some() && args.dtype != Dtype::Auto {
        return Err(Error::bad_request("--quantize and --dtype both choose how weights are held; give one of them"));
    }
    Ok(match args.dtype {
        Dtype::Auto => (quantised, DType::BF16),
        Dtype::F32 => (Some(Format::F32), DType::F32),
        Dtype::Bf16 => (Some(Format::Bf16), DType::BF16),
        Dtype::F16 => (Some(Format::F16), DType::F16),
    })
}

/// `loramux` in the user's data directory.
pub fn default_store() -> Result<PathBuf> {
    let data = std::env::var_os("XDG_DATA_HOME").filter(|d| !d.is_empty()).map(PathBuf::from);
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".local/share"));
    let data =
        data.or_else(home).ok_or_else(|| Error::bad_request("neither --store nor HOME says where uploads live"))?;
    Ok(data.join("loramux").join("adapters"))
}
