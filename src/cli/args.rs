//! The command line.

use std::num::NonZeroU32;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::bytes::Bytes;
use super::client::Client;
use crate::Result;
use crate::base::DEFAULT_MODEL;
use crate::hosting::Lengths;
use crate::hosting::command::Options;
use crate::hosting::methods::{Kind, Size, Source};
use crate::server::Scope;

/// Serves one base LLM with many LoRA adapters: every request names its adapter, and all share every batch.
#[derive(Parser)]
#[command(name = "loramux", version)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Serve the base and its adapters over HTTP
    Serve(ServeArgs),
    /// Continue a prompt once, without a server
    Generate(GenerateArgs),
    /// Classify texts once, without a server
    Classify(ClassifyArgs),
    /// API keys of a server
    #[command(subcommand)]
    Keys(KeysCommand),
    /// Look at adapter directories, or manage the adapters of a running server
    #[command(subcommand)]
    Adapters(AdaptersCommand),
    /// Measure
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Make a base model local and print its path
    Fetch {
        /// Hub id, `org/name[@revision]`
        #[arg(default_value = DEFAULT_MODEL)]
        model: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// What the file holds on a CPU, bf16 on a GPU
    Auto,
    F32,
    Bf16,
    F16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Quantize {
    None,
    /// 8 bits a weight, multiplied in whole numbers with activations rounded to 8 bits (15 on a CPU with AMX)
    Q8,
    /// 4 bits a weight, one scale and minimum for 32 weights
    Q4,
}

#[derive(Args, Clone)]
pub struct ModelArgs {
    /// Base model: a Hugging Face directory, a .gguf file, or a hub id org/name[@revision]
    #[arg(long, env = "LORAMUX_MODEL", value_name = "SRC", default_value = DEFAULT_MODEL)]
    pub model: String,
    /// Folder of adapters, one folder each, named after it; only read. Repeatable; `:` separates several
    #[arg(long, env = "LORAMUX_ADAPTERS", value_name = "DIR", value_delimiter = ':')]
    pub adapters: Vec<PathBuf>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, env = "LORAMUX_DEVICE", default_value = "auto")]
    pub device: String,
    /// Numbers that weights are held in; products on a CPU are summed in f32, but for --quantize q8
    #[arg(long, env = "LORAMUX_DTYPE", value_enum, default_value = "auto")]
    pub dtype: Dtype,
    /// Quantise the base's matrices at load (CPU); q8 multiplies whole numbers, the fastest
    #[arg(long, env = "LORAMUX_QUANTIZE", value_enum, default_value = "none")]
    pub quantize: Quantize,
    /// Memory of the KV cache [default: 1GiB; on a GPU what --gpu-memory-utilization leaves beside the adapters]
    #[arg(long, env = "LORAMUX_KV_MEMORY", value_name = "SIZE")]
    pub kv_memory: Option<Bytes>,
    /// Memory of adapters that are ready for a batch [default: 1GiB; on a GPU what --kv-memory leaves, else a quarter]
    #[arg(long, env = "LORAMUX_ADAPTER_MEMORY", value_name = "SIZE")]
    pub adapter_memory: Option<Bytes>,
    /// Share of the GPU's memory to take, the weights with it; several servers on one GPU divide it
    #[arg(long, env = "LORAMUX_GPU_MEMORY_UTILIZATION", value_name = "SHARE", default_value_t = 0.9, value_parser = share)]
    pub gpu_memory_utilization: f64,
    /// Threads of the CPU kernels; 0 is one a core
    #[arg(long, env = "LORAMUX_THREADS", default_value_t = 0)]
    pub threads: usize,
}

/// How many times as much: not below 1.
fn factor(text: &str) -> Result<f64, String> {
    let factor = text.parse().ok().filter(|factor| *factor >= 1.0);
    factor.ok_or_else(|| format!("{text:?} is no factor; expected a number from 1 on, or inf"))
}

/// A share of something: more than 0, at most 1.
fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| *share > 0.0 && *share <= 1.0);
    share.ok_or_else(|| format!("{text:?} is no share; expected a number above 0 and up to 1, e.g. 0.9"))
}

#[derive(Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Where uploads live and survive restarts [default: loramux in the user's data directory]
    #[arg(long, env = "LORAMUX_STORE", value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Address and port
    #[arg(long, env = "LORAMUX_LISTEN", value_name = "ADDR", default_value = "127.0.0.1:8080")]
    pub listen: String,
    /// Name that clients may call the base by, beside its own and `base`; it goes before an adapter's. Repeatable; `,` separates
    /// several
    #[arg(long = "served-model-name", env = "LORAMUX_SERVED_MODEL_NAME", value_name = "NAME", value_delimiter = ',')]
    pub served_model_name: Vec<String>,
    /// Sequences in a step at most
    #[arg(long, env = "LORAMUX_MAX_SEQUENCES", default_value_t = 64)]
    pub max_sequences: usize,
    /// Tokens in a step at most, prompts and continuations together
    #[arg(long, env = "LORAMUX_MAX_BATCH_TOKENS", default_value_t = 512)]
    pub max_batch_tokens: usize,
    /// Of these, tokens of prompts at most where one that generates is not alone, as it waits for the whole step: fewer even
    /// out the time between tokens, more end long prompts sooner [default: 64 on a CPU, as --max-batch-tokens on a GPU]
    #[arg(long, env = "LORAMUX_MAX_PREFILL_TOKENS")]
    pub max_prefill_tokens: Option<usize>,
    /// Requests that wait at most; one more is answered 429
    #[arg(long, env = "LORAMUX_MAX_QUEUE", default_value_t = 1024)]
    pub max_queue: usize,
    /// How many times as long a step for tenants within their share may take because of tenants that want more than theirs,
    /// also that of a request that is expected, as its tenant asked in the last 10 seconds; inf bounds nothing. The lower, the less the latter's flood is noticed and the slower it is worked off
    #[arg(long, env = "LORAMUX_TENANT_SLOWDOWN", value_name = "FACTOR", default_value_t = 1.3, value_parser = factor)]
    pub tenant_slowdown: f64,
    /// Largest upload, also after unpacking
    #[arg(long, env = "LORAMUX_MAX_UPLOAD", value_name = "SIZE", default_value = "1GiB")]
    pub max_upload: Bytes,
    /// Seconds that requests in flight may go on after SIGTERM or SIGINT; then they are answered 503. A second signal
    /// stops at once
    #[arg(long, env = "LORAMUX_DRAIN_TIMEOUT", value_name = "SECONDS", default_value_t = 60)]
    pub drain_timeout: u64,
    /// Place that adapters are fetched from when they are asked for: s3://bucket/prefix, gs://…, az://… or https://…, each
    /// folder in it an adapter, named after it; or hf://owner/repository@revision, a repository on the hub, or hf://owner,
    /// each of an owner's. Keys and endpoints are read from AWS_*, GOOGLE_*, AZURE_* and HF_*. Repeatable; `,` separates
    /// several
    #[arg(long = "source", env = "LORAMUX_SOURCE", value_name = "URL", value_delimiter = ',', hide_env_values = true)]
    pub source: Vec<String>,
    /// Seconds from one look at a source for new adapters to the next
    #[arg(long, env = "LORAMUX_SOURCE_REFRESH", value_name = "SECONDS", default_value_t = 5,
        value_parser = clap::value_parser!(u64).range(1..))]
    pub source_refresh: u64,
    /// Adapters from sources that are kept in the store; those that were used least recently go first
    #[arg(long, env = "LORAMUX_SOURCE_CACHE", value_name = "SIZE", default_value = "10GiB")]
    pub source_cache: Bytes,
    /// Let clients name directories of this machine in /v1/load_lora_adapter
    #[arg(long, env = "LORAMUX_ALLOW_LOCAL_PATHS")]
    pub allow_local_paths: bool,
    /// Let uploads and adapters from sources bring chat templates other than the base's: programs that can take any amount of memory
    #[arg(long, env = "LORAMUX_ALLOW_UPLOADED_TEMPLATES")]
    pub allow_uploaded_templates: bool,
    /// TOML file of API keys, hashed, as `loramux keys new` makes it; read again when it changes. Without it everybody on this
    /// machine may do everything
    #[arg(long, env = "LORAMUX_KEYS", value_name = "FILE")]
    pub keys: Option<PathBuf>,
    /// Answer everybody who can reach a --listen that is not this machine's alone, under every name, without --keys
    #[arg(long, env = "LORAMUX_ALLOW_ANONYMOUS")]
    pub allow_anonymous: bool,
    /// Site whose pages may use the server from a browser (CORS), e.g. https://app.example; * is any. Repeatable; `,` separates
    /// several
    #[arg(long = "allow-origin", env = "LORAMUX_ALLOW_ORIGIN", value_name = "ORIGIN", value_delimiter = ',')]
    pub allow_origin: Vec<String>,
    /// Certificate chain in PEM, for HTTPS; read again when it changes
    #[arg(long, env = "LORAMUX_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Private key of the certificate in PEM
    #[arg(long, env = "LORAMUX_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Where changes of adapters are noted, a line of JSON each [default: the log]
    #[arg(long, env = "LORAMUX_AUDIT_LOG", value_name = "FILE")]
    pub audit_log: Option<PathBuf>,
    /// Seconds after which a request is answered 504; its header x-request-timeout can ask for less. 0 is never
    #[arg(long, env = "LORAMUX_REQUEST_TIMEOUT", value_name = "SECONDS", default_value_t = 0)]
    pub request_timeout: u64,
    /// TOML file with these options by their long names; flags and environment go first
    #[arg(long, env = "LORAMUX_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Name of an adapter in --adapters, or the path of an adapter directory; without it the base answers
    #[arg(long)]
    pub adapter: Option<String>,
    /// Put the prompt into the model's chat template as a user's message
    #[arg(long)]
    pub chat: bool,
    #[arg(long, default_value_t = 128)]
    pub max_tokens: usize,
    /// 0 is greedy
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f32,
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    #[arg(long)]
    pub seed: Option<u64>,
    /// End before this text; repeatable
    #[arg(long)]
    pub stop: Vec<String>,
    /// `-` reads standard input
    pub prompt: String,
}

#[derive(Args)]
pub struct ClassifyArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Name of an adapter in --adapters, or the path of an adapter directory, with a classification head; not needed where the
    /// base has one
    #[arg(long)]
    pub adapter: Option<String>,
    /// Texts; none reads one a line from standard input. One JSON object a line is printed
    pub inputs: Vec<String>,
}

#[derive(Args)]
pub struct ServerArgs {
    /// The server
    #[arg(long, env = "LORAMUX_URL", default_value = "http://127.0.0.1:8080")]
    pub url: String,
    /// API key, where the server asks for one
    #[arg(long, env = "LORAMUX_API_KEY", value_name = "KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Certificate in PEM to trust beside the well-known ones, for HTTPS
    #[arg(long, env = "LORAMUX_CA_CERT", value_name = "FILE")]
    pub ca_cert: Option<PathBuf>,
}

impl ServerArgs {
    pub fn client(&self) -> Result<Client> {
        Client::new(&self.url, self.api_key.as_deref(), self.ca_cert.as_deref())
    }
}

#[derive(Subcommand)]
pub enum KeysCommand {
    /// Make a key, put its hash into the file, and print the key: it cannot be read from there again
    New {
        /// The file that `serve --keys` reads; made where it is not there
        file: PathBuf,
        /// What logs call the key
        id: String,
        /// What the key is for
        #[arg(long, value_enum, value_delimiter = ',', required = true)]
        scopes: Vec<Scope>,
        /// Whose key it is: it sees this tenant's adapters and those of no tenant. Without it, it sees all
        #[arg(long, value_name = "NAME")]
        tenant: Option<String>,
        /// To generate, classify or tokenize
        #[arg(long, value_name = "N")]
        requests_per_minute: Option<NonZeroU32>,
        /// Of prompts and answers together
        #[arg(long, value_name = "N")]
        tokens_per_minute: Option<NonZeroU32>,
        /// Requests at the same time
        #[arg(long, value_name = "N")]
        max_concurrent: Option<NonZeroU32>,
        /// Until when it is good, e.g. 2030-01-31T00:00:00Z
        #[arg(long, value_name = "TIME")]
        expires: Option<toml::value::Datetime>,
    },
}

#[derive(Subcommand)]
pub enum AdaptersCommand {
    /// Adapters of a running server
    List {
        #[command(flatten)]
        server: ServerArgs,
    },
    /// What an adapter directory holds
    Inspect { directory: PathBuf },
    /// Check an adapter directory against a base
    Verify {
        directory: PathBuf,
        /// Base model, as for `serve`
        #[arg(long, env = "LORAMUX_MODEL", value_name = "SRC", default_value = DEFAULT_MODEL)]
        model: String,
    },
    /// Upload an adapter directory to a running server
    Push {
        name: String,
        directory: PathBuf,
        /// Only if the name stands for this generation now
        #[arg(long)]
        if_match: Option<String>,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Remove an uploaded adapter from a running server
    Rm {
        name: String,
        #[command(flatten)]
        server: ServerArgs,
    },
}

#[derive(Subcommand)]
pub enum BenchCommand {
    /// Load a running server with clients that each wait for their answer before they ask again
    Serve(BenchServeArgs),
    /// The same load on an engine in this program, without HTTP
    Engine(BenchEngineArgs),
    /// Compare hosting many tasks as adapters of one base with hosting a full model for each: memory, disk, time, throughput,
    /// latency, cost. Writes report.json, report.md and report.html; a run that was stopped goes on
    Hosting(BenchHostingArgs),
    /// Train each method on the same examples, and report accuracy, time, FLOPs, memory and storage beside each other
    Methods(BenchMethodsArgs),
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Spread {
    /// Each client keeps to one; the clients take turns with them
    Turns,
    /// Each request takes any of them
    Uniform,
    /// Each request takes any, the nth one n times less often than the first
    Zipf,
}

#[derive(Args)]
pub struct BenchServeArgs {
    #[command(flatten)]
    pub server: ServerArgs,
    #[command(flatten)]
    pub load: LoadArgs,
}

#[derive(Args)]
pub struct BenchEngineArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub load: LoadArgs,
}

#[derive(Args)]
pub struct BenchHostingArgs {
    /// Base model, as for `serve`; one whose full fine-tunes loramux-train could write
    #[arg(long, env = "LORAMUX_MODEL", value_name = "SRC", default_value = DEFAULT_MODEL)]
    pub model: String,
    /// Folder of the adapters that tasks are made of, in turns
    #[arg(long, value_name = "DIR", default_value = "adapters")]
    pub adapters: PathBuf,
    /// Numbers of tasks [default: 1,2,4,8,16; quick: 1,4]
    #[arg(long, value_delimiter = ',', value_name = "N")]
    pub tasks: Vec<usize>,
    /// Where the report goes, with what it is made of
    #[arg(long, value_name = "DIR", default_value = "hosting")]
    pub out: PathBuf,
    /// Options of every server, as one text
    #[arg(
        long,
        value_name = "OPTIONS",
        default_value = "--quantize q8 --kv-memory 256MiB",
        allow_hyphen_values = true
    )]
    pub serve_options: String,
    /// TOML file with what machines cost [default: examples]
    #[arg(long, value_name = "FILE")]
    pub prices: Option<PathBuf>,
    /// Requests a second that arrive, one load each [default: 0.3, 0.6 and 0.9 of what the smallest or the largest fleet of
    /// adapters answers, whichever is less]
    #[arg(long, value_delimiter = ',', value_name = "RATE")]
    pub rates: Vec<f64>,
    /// Seconds of each load [default: 20; quick: 4]
    #[arg(long)]
    pub seconds: Option<f64>,
    /// How often each fleet is started and measured [default: 3; quick: 1]
    #[arg(long)]
    pub repetitions: Option<usize>,
    /// Clients that find out what a fleet can do at most, each asking again when it has its answer
    #[arg(long, default_value_t = 16)]
    pub clients: usize,
    /// Words of a prompt or of a text to classify, from half to one and a half times as many
    #[arg(long, default_value_t = 48)]
    pub prompt_words: usize,
    /// Tokens that a request generates, from half to one and a half times as many
    #[arg(long, default_value_t = 32)]
    pub max_tokens: usize,
    /// Memory in which as many tasks as possible are hosted [default: 4GiB; quick: 1GiB]
    #[arg(long, value_name = "SIZE")]
    pub memory_budget: Option<Bytes>,
    /// Tasks that are tried there at most; more are extrapolated [default: 500; quick: 50]
    #[arg(long, value_name = "N")]
    pub budget_tasks: Option<usize>,
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Take what is over in less than five minutes on two cores
    #[arg(long)]
    pub quick: bool,
}

impl BenchHostingArgs {
    pub fn options(self) -> Options {
        let quick = |full, quick| if self.quick { quick } else { full };
        let mut tasks = self.tasks;
        if tasks.is_empty() {
            tasks = if self.quick { vec![1, 4] } else { vec![1, 2, 4, 8, 16] };
        }
        tasks.sort();
        tasks.dedup();
        Options {
            model: self.model,
            adapters: self.adapters,
            tasks,
            out: self.out,
            serve_options: self.serve_options.split_whitespace().map(String::from).collect(),
            prices: self.prices,
            rates: self.rates,
            seconds: self.seconds.unwrap_or(if self.quick { 4.0 } else { 20.0 }),
            repetitions: self.repetitions.unwrap_or(quick(3, 1)),
            clients: self.clients,
            lengths: Lengths { words: self.prompt_words, tokens: self.max_tokens },
            memory_budget: self.memory_budget.map_or(if self.quick { 1 << 30 } else { 4 << 30 }, |b| b.0),
            budget_tasks: self.budget_tasks.unwrap_or(quick(500, 50)),
            seed: self.seed,
        }
    }
}

#[derive(Args)]
pub struct LoadArgs {
    /// Clients at the same time
    #[arg(long, default_value_t = 8)]
    pub clients: usize,
    /// Requests of each client
    #[arg(long, default_value_t = 4)]
    pub requests: usize,
    /// Tokens that each request generates
    #[arg(long, default_value_t = 64)]
    pub max_tokens: usize,
    /// Tokens of each prompt
    #[arg(long, default_value_t = 64)]
    pub prompt_tokens: usize,
    /// Adapters to ask for; none is the base
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    pub ask: Vec<String>,
    /// Ask for all adapters that there are
    #[arg(long, conflicts_with = "ask")]
    pub ask_all: bool,
    /// How requests are spread over the adapters
    #[arg(long, value_enum, default_value_t = Spread::Turns)]
    pub spread: Spread,
    /// Seed of the choices and the prompts: another one's are in no cache
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct BenchMethodsArgs {
    /// Directory of the report. Finished runs are kept in it and not run again
    #[arg(long, value_name = "DIR", default_value = "bench-methods")]
    pub out: PathBuf,
    /// A classification: a file to learn from and one to hold out examples of, as loramux-train reads them; without the second
    /// they are held out of the first. Repeatable
    #[arg(long = "task", required = true, value_name = "NAME=TRAIN[,TEST]")]
    pub tasks: Vec<Source>,
    #[arg(long, value_enum, value_delimiter = ',', default_value = "lora,last-layers,head,full")]
    pub methods: Vec<Kind>,
    /// Numbers of examples to learn from [default: 50,200,1000,all; --quick: 16,32]
    #[arg(long, value_delimiter = ',', value_name = "SIZES")]
    pub sizes: Vec<Size>,
    /// Runs of each kind, with seeds from 0 on [default: 3; --quick: 2]
    #[arg(long)]
    pub seeds: Option<u64>,
    /// Passes over the examples [default: as many as show --shown examples; --quick: 2]
    #[arg(long)]
    pub epochs: Option<usize>,
    /// Examples that a run sees at least, some of them again, where there are no --epochs [default: 600]
    #[arg(long, conflicts_with = "epochs")]
    pub shown: Option<usize>,
    /// Examples of a step
    #[arg(long, default_value_t = 16)]
    pub batch_size: usize,
    /// Tokens of an example at most; what is over is cut off [default: 128; --quick: 32]
    #[arg(long)]
    pub max_length: Option<usize>,
    /// Evaluations of a run, the last of which counts [default: 4; --quick: 2]
    #[arg(long)]
    pub evaluations: Option<usize>,
    /// Runs at a time, each with its share of the cores. What a run takes is then told of that share
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub jobs: usize,
    /// Examples of each task to evaluate on, the same for all runs [default: 500; --quick: 40]
    #[arg(long)]
    pub held_out: Option<usize>,
    /// The accuracy until which time and FLOPs are told [default: 95 % of a task's best]
    #[arg(long)]
    pub target: Option<f64>,
    /// Few and short runs: minutes, and little to conclude
    #[arg(long)]
    pub quick: bool,
    /// Base model, as for loramux-train
    #[arg(long, env = "LORAMUX_MODEL", value_name = "SRC", default_value = DEFAULT_MODEL)]
    pub model: String,
    /// The trainer [default: loramux-train beside this program]
    #[arg(long, value_name = "PATH")]
    pub trainer: Option<PathBuf>,
    /// More options of the trainer for one method, e.g. --options "lora=--rank 16 --target-modules all-linear". Repeatable
    #[arg(long, value_name = "METHOD=OPTIONS")]
    pub options: Vec<String>,
    /// More options of the trainer for all methods, after --
    #[arg(last = true, value_name = "TRAINER OPTIONS")]
    pub more: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_above_0_and_up_to_1() {
        assert_eq!(["0.9", "1", "1e-3"].map(|text| share(text).ok()), [Some(0.9), Some(1.0), Some(1e-3)]);
        assert!(["0", "1.1", "-0.5", "nan", "90%", ""].iter().all(|text| share(text).is_err()));
    }

    #[test]
    fn a_factor_makes_nothing_shorter() {
        assert_eq!(["1", "1.3", "inf"].map(|text| factor(text).ok()), [Some(1.0), Some(1.3), Some(f64::INFINITY)]);
        assert!(["0.9", "-2", "nan", "", "2x"].iter().all(|text| factor(text).is_err()));
    }
}
