//! The command line of `loramux-train`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::network::FAMILY;
use super::schedule::Decay;
use super::trainer::Metric;
use crate::base::{DEFAULT_MODEL, Projection};

/// Trains adapters for loramux, and partial and full fine-tunes to compare them with.
#[derive(Parser)]
#[command(name = "loramux-train", version)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Low-rank pairs beside the frozen base (a PEFT adapter)
    Lora(LoraArgs),
    /// The last decoder layers, the final norm and the head (a model directory)
    LastLayers {
        /// How many layers
        #[arg(long, default_value_t = 2)]
        layers: usize,
        #[command(flatten)]
        train: TrainArgs,
    },
    /// A classification head alone (a PEFT adapter)
    Head {
        #[command(flatten)]
        train: TrainArgs,
    },
    /// Everything (a model directory)
    Full {
        #[command(flatten)]
        train: TrainArgs,
    },
    /// A small Llama from nothing, on plain texts (a model directory)
    Pretrain(PretrainArgs),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Task {
    /// Learn the class of a text
    Classify,
    /// Learn to continue texts, prompts or chats
    Generate,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    Bf16,
    F32,
}

#[derive(Args)]
pub struct LoraArgs {
    #[arg(long, default_value_t = 8)]
    pub rank: usize,
    /// Scale of the pairs: alpha / rank [default: twice the rank]
    #[arg(long)]
    pub alpha: Option<f64>,
    /// Scale by alpha / sqrt(rank)
    #[arg(long)]
    pub rslora: bool,
    /// Share of the pairs' inputs left out at random in each step
    #[arg(long, default_value_t = 0.0)]
    pub dropout: f64,
    /// Train magnitudes beside the pairs (DoRA); slower
    #[arg(long)]
    pub dora: bool,
    /// Projections with a pair: names such as q_proj,v_proj, or all-linear
    #[arg(long, value_delimiter = ',', default_value = "q_proj,v_proj")]
    pub target_modules: Vec<String>,
    /// Go on from this adapter, e.g. one trained on plain text first; same rank and modules
    #[arg(long, value_name = "DIR")]
    pub init_adapter: Option<PathBuf>,
    #[command(flatten)]
    pub train: TrainArgs,
}

#[derive(Args)]
pub struct TrainArgs {
    #[arg(long, value_enum)]
    pub task: Task,
    /// Base model: a Hugging Face directory, a .gguf file, or a hub id org/name[@revision]
    #[arg(long, env = "LORAMUX_MODEL", value_name = "SRC", default_value = DEFAULT_MODEL)]
    pub model: String,
    #[command(flatten)]
    pub run: RunArgs,
    /// Column of the class [default: the one that looks like it]
    #[arg(long)]
    pub label_column: Option<String>,
    /// Another name for a class, e.g. --label-name 0=negative; repeatable
    #[arg(long, value_name = "VALUE=NAME")]
    pub label_name: Vec<String>,
    /// Let each class weigh the same, however many examples it has
    #[arg(long)]
    pub balance: bool,
    /// What decides which evaluation is the best [default: accuracy of a classification, loss of texts]
    #[arg(long, value_enum)]
    pub metric: Option<Metric>,
}

#[derive(Args)]
pub struct PretrainArgs {
    #[command(flatten)]
    pub shape: ShapeArgs,
    #[command(flatten)]
    pub run: RunArgs,
}

/// What a new model is like.
#[derive(Args, Debug, Clone)]
pub struct ShapeArgs {
    /// Decoder layers
    #[arg(long, default_value_t = 4)]
    pub layers: usize,
    /// Numbers of a token's hidden state
    #[arg(long, default_value_t = 256)]
    pub hidden_size: usize,
    /// Attention heads
    #[arg(long, default_value_t = 4)]
    pub heads: usize,
    /// Heads of keys and values, each for as many of the others [default: as many as --heads]
    #[arg(long)]
    pub kv_heads: Option<usize>,
    /// Numbers between a layer's two feed-forward products [default: 8/3 of --hidden-size, to a multiple of 32]
    #[arg(long)]
    pub intermediate_size: Option<usize>,
    /// Longest sequence, in tokens
    #[arg(long, default_value_t = 512)]
    pub context: usize,
    /// Give the output layer weights of its own, instead of the embedding's
    #[arg(long)]
    pub untie_embeddings: bool,
    /// Make a byte-level BPE tokenizer of so many tokens at most from --data
    #[arg(long, default_value_t = 4096)]
    pub vocab_size: usize,
    /// Take this tokenizer.json instead
    #[arg(long, value_name = "FILE", conflicts_with = "vocab_size")]
    pub tokenizer: Option<PathBuf>,
}

/// What all kinds of training have.
#[derive(Args)]
pub struct RunArgs {
    /// Examples: .csv, .tsv, .tab, .jsonl, .parquet, .txt, or a folder with a folder of .txt files for each class
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    pub data: Vec<PathBuf>,
    /// Examples to evaluate on; without it a share of the data is held out
    #[arg(long, num_args = 1.., value_name = "FILE")]
    pub eval: Vec<PathBuf>,
    /// Share of the data held out where there is no --eval; 0 evaluates nothing
    #[arg(long, default_value_t = 0.1)]
    pub eval_share: f64,
    /// Train on so many of the examples, chosen at random
    #[arg(long)]
    pub limit: Option<usize>,
    /// Column of the text [default: the one that looks like it]
    #[arg(long)]
    pub text_column: Option<String>,
    /// Leave rows with an empty text out instead of refusing them
    #[arg(long)]
    pub skip_empty: bool,
    /// Tokens of a sequence at most: of a classification what is over is cut off, other texts go on in the next sequence
    /// [default: 512, or the model's context if that is less; pretrain: the context]
    #[arg(long)]
    pub max_length: Option<usize>,
    /// Directory to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Replace --out if it is there
    #[arg(long)]
    pub overwrite: bool,
    /// Upload the adapter to the loramux server at this URL when it is written (lora, head)
    #[arg(long, value_name = "URL")]
    pub push: Option<String>,
    /// Upload it under this name [default: that of --out]
    #[arg(long, value_name = "NAME", requires = "push")]
    pub push_name: Option<String>,
    /// API key for --push, where the server asks for one
    #[arg(long, env = "LORAMUX_API_KEY", value_name = "KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Certificate in PEM to trust beside the well-known ones, for --push to HTTPS
    #[arg(long, env = "LORAMUX_CA_CERT", value_name = "FILE")]
    pub ca_cert: Option<PathBuf>,
    /// Numbers in the weights' file
    #[arg(long, value_enum, default_value = "bf16")]
    pub dtype: Dtype,
    #[arg(long, default_value_t = 3)]
    pub epochs: usize,
    /// Examples of a step
    #[arg(long, default_value_t = 16)]
    pub batch_size: usize,
    /// Tokens computed at a time; a step of more is done in parts that add up to the same
    #[arg(long, default_value_t = 2048)]
    pub max_batch_tokens: usize,
    /// Where it is trained: auto, cpu, cuda or cuda:N
    #[arg(long, env = "LORAMUX_DEVICE", default_value = "auto")]
    pub device: String,
    /// Numbers that frozen weights and layers are computed in [default: bf16 on a GPU, f32 on a CPU, where there is no other].
    /// What is trained is f32
    #[arg(long, value_enum)]
    pub compute: Option<Dtype>,
    /// Keep only each layer's input for the backward pass and compute the rest again: less memory, more time (CPU)
    #[arg(long)]
    pub checkpoint_activations: bool,
    /// [default: 5e-4; full and last-layers: 5e-5; head: 5e-3; pretrain: 1e-3]
    #[arg(long)]
    pub learning_rate: Option<f64>,
    /// How the rate goes after the warm-up
    #[arg(long, value_enum, default_value = "linear")]
    pub schedule: Decay,
    /// Share of the steps in which the rate goes up
    #[arg(long, default_value_t = 0.06)]
    pub warmup: f64,
    #[arg(long, default_value_t = 0.0)]
    pub weight_decay: f64,
    /// Largest norm of a step's gradient; 0 is any
    #[arg(long, default_value_t = 1.0)]
    pub max_norm: f64,
    /// Share of the target that goes to all classes alike
    #[arg(long, default_value_t = 0.0)]
    pub label_smoothing: f32,
    /// Steps between evaluations; 0 is one after each epoch
    #[arg(long, default_value_t = 0)]
    pub eval_every: usize,
    /// End after so many evaluations without a better one; 0 never does
    #[arg(long, default_value_t = 0)]
    pub patience: usize,
    /// Steps between checkpoints; 0 writes one only when interrupted
    #[arg(long, default_value_t = 100)]
    pub checkpoint_every: usize,
    /// Go on from the checkpoint of a run that was interrupted or killed
    #[arg(long)]
    pub resume: bool,
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Threads; 0 is one a core
    #[arg(long, env = "LORAMUX_THREADS", default_value_t = 0)]
    pub threads: usize,
}

impl PretrainArgs {
    /// The model, and its training as one on texts.
    pub fn split(self) -> (ShapeArgs, TrainArgs) {
        let PretrainArgs { shape, mut run } = self;
        // A new model learns well at rates that would make a trained one forget.
        run.learning_rate.get_or_insert(1e-3);
        run.max_length.get_or_insert(shape.context);
        let train = TrainArgs {
            task: Task::Generate,
            model: String::new(),
            run,
            label_column: None,
            label_name: vec![],
            balance: false,
            metric: None,
        };
        (shape, train)
    }
}

/// The projections that names such as `q_proj` mean.
pub fn projections(names: &[String]) -> Result<Vec<Projection>, String> {
    if names.iter().any(|n| n == "all-linear") {
        return Ok(FAMILY.projections().collect());
    }
    let known = || FAMILY.projections().map(|p| FAMILY.short_name(p)).collect::<Vec<_>>().join(", ");
    let find = |name: &String| {
        let found = FAMILY.projections().find(|p| FAMILY.short_name(*p) == name);
        found.ok_or_else(|| format!("--target-modules has {name:?}; expected some of {}, or all-linear", known()))
    };
    let mut all: Vec<Projection> = names.iter().map(find).collect::<Result<_, _>>()?;
    all.sort();
    all.dedup();
    Ok(all)
}
