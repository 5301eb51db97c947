//! The `loramux-train` program: options to a run, a run to a directory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use candle_core::DType;
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use rand::seq::SliceRandom;
use sha2::{Digest, Sha256};

use super::args::{self, Cli, Command, LoraArgs, RunArgs, ShapeArgs, Task, TrainArgs};
use super::card::{self, Card};
use super::examples::{self, Columns, Example, Goal};
use super::export::{Export, taken};
use super::network::{Held, LoraOptions, Method, Network};
use super::optimizer::AdamWOptions;
use super::pretrain;
use super::push::Push;
use super::random;
use super::table::{self, Record};
use super::trainer::{Account, Ended, Evaluation, Event, Metric, Trainer, TrainerOptions};
use crate::base::{Base, Head, device};
use crate::signals::Signals;
use crate::{Error, Result, memory, output};

/// Largest rank, as the server takes it.
const MAX_RANK: usize = 4096;
/// Most epochs, and most examples of a step; keeps their products in range.
const MAX_COUNT: usize = 1 << 20;

/// Time between lines on how far a run is, where no bar can be drawn.
const TELL: Duration = Duration::from_secs(60);

/// Parses the command line and runs it. The result goes to stdout, everything else to stderr.
pub fn run() -> Result<()> {
    memory::keep(usize::MAX);
    crate::cli::log_to_stderr();
    match Cli::parse().command {
        Command::Lora(args) => {
            let method = Method::Lora(lora(&args)?);
            train(args.train, &method, args.init_adapter.map_or(Start::Base, Start::Adapter))
        }
        Command::LastLayers { layers, train: args } => train(args, &Method::LastLayers(layers), Start::Base),
        Command::Head { train: args } => train(args, &Method::Head, Start::Base),
        Command::Full { train: args } => train(args, &Method::Full, Start::Base),
        Command::Pretrain(args) => {
            let (shape, args) = args.split();
            train(args, &Method::Full, Start::Nothing(shape))
        }
    }
}

/// What a run begins with.
enum Start {
    /// The base as it is.
    Base,
    /// The base with this adapter.
    Adapter(PathBuf),
    /// A new model.
    Nothing(ShapeArgs),
}

fn lora(args: &LoraArgs) -> Result<LoraOptions> {
    let alpha = args.alpha.unwrap_or(2.0 * args.rank as f64);
    let wrong = |what: String| Err(Error::bad_request(what));
    if !(1..=MAX_RANK).contains(&args.rank) {
        return wrong(format!("--rank is {}; expected 1 to {MAX_RANK}", args.rank));
    }
    if !(0.0..1.0).contains(&args.dropout) {
        return wrong(format!("--dropout is {}; expected 0 or more and less than 1", args.dropout));
    }
    if !alpha.is_finite() || alpha <= 0.0 {
        return wrong(format!("--alpha is {alpha}; expected more than 0"));
    }
    let targets = args::projections(&args.target_modules).map_err(Error::bad_request)?;
    let LoraArgs { rank, rslora, dropout, dora, .. } = *args;
    Ok(LoraOptions { rank, alpha, rslora, dropout, dora, targets })
}

fn push(args: &TrainArgs, method: &Method, name: &str) -> Result<Option<Push>> {
    let Some(url) = &args.run.push else { return Ok(None) };
    if !makes_adapter(method) {
        let what = "--push uploads an adapter, and this makes a model; serve that with loramux serve --model DIR";
        return Err(Error::bad_request(what));
    }
    let (key, trusted) = (args.run.api_key.as_deref(), args.run.ca_cert.as_deref());
    Push::new(url, args.run.push_name.as_deref().unwrap_or(name), key, trusted).map(Some)
}

fn makes_adapter(method: &Method) -> bool {
    matches!(method, Method::Lora(_) | Method::Head)
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The examples of a run.
struct Data {
    train: Vec<Example>,
    eval: Vec<Example>,
    labels: Option<Vec<String>>,
    /// For the card.
    notes: Vec<String>,
}

fn columns(args: &TrainArgs, base: &Base) -> Result<Columns> {
    let run = &args.run;
    let mut rename = BTreeMap::new();
    for pair in &args.label_name {
        let (value, name) = pair.split_once('=').ok_or_else(|| {
            Error::bad_request(format!("--label-name is {pair:?}; expected VALUE=NAME, e.g. 0=negative"))
        })?;
        rename.insert(value.to_string(), name.to_string());
    }
    let context = base.config.context;
    let max_length = run.max_length.unwrap_or(context.min(512));
    if !(2..=context).contains(&max_length) {
        return Err(Error::bad_request(format!("--max-length is {max_length}; expected 2 to the model's {context}")));
    }
    Ok(Columns {
        text: run.text_column.clone(),
        label: args.label_column.clone(),
        rename,
        skip_empty: run.skip_empty,
        max_length,
    })
}

/// The sequences of a run. `records` are those of `--data`.
fn data(args: &TrainArgs, base: &Base, records: &[Record]) -> Result<Data> {
    let run = &args.run;
    let columns = columns(args, base)?;
    let names = |files: &[PathBuf]| files.iter().map(|f| name_of(f)).collect::<Vec<_>>().join(", ");
    let mut labels: Option<Vec<String>> = None;
    let mut pieces = None;
    let mut read = |files: &[PathBuf], records: &[Record]| -> Result<Vec<Example>> {
        if args.task == Task::Generate {
            let texts = examples::texts(base, records, &columns)?;
            pieces = Some(texts.pieces);
            return Ok(texts.examples);
        }
        let read = examples::classified(base, records, &columns, labels.as_deref())?;
        if read.cut > 0 {
            tracing::warn!("{}: {} texts were cut to {} tokens", names(files), read.cut, columns.max_length);
        }
        labels = Some(read.labels);
        Ok(read.examples)
    };
    let mut train = read(&run.data, records)?;
    let mut notes = vec![format!("{}: {}", names(&run.data), card::count(&train))];
    let eval = if run.eval.is_empty() {
        if !(0.0..1.0).contains(&run.eval_share) {
            let what = format!("--eval-share is {}; expected 0 or more and less than 1", run.eval_share);
            return Err(Error::bad_request(what));
        }
        match &pieces {
            Some(pieces) => examples::split_texts(&mut train, pieces, run.eval_share, run.seed),
            None => examples::split(&mut train, run.eval_share, run.seed),
        }
    } else {
        read(&run.eval, &table::read(&run.eval)?)?
    };
    if let Some(limit) = run.limit.filter(|&limit| limit < train.len()) {
        train.shuffle(&mut random(run.seed, "limit", 0));
        train.truncate(limit);
        notes.push(format!("trained on {limit} of them: {}", card::count(&train)));
    }
    let absent = absent(&train, labels.as_deref().unwrap_or_default());
    if !absent.is_empty() {
        tracing::warn!("no example of {} is left to train on, so that is not learned", absent.join(", "));
    }
    let from = if run.eval.is_empty() { "of the same files".to_string() } else { names(&run.eval) };
    notes.push(format!("held out ({from}): {}", card::count(&eval)));
    if train.is_empty() {
        return Err(Error::bad_request("no examples are left to train on; lower --eval-share"));
    }
    Ok(Data { train, eval, labels, notes })
}

/// The classes that none of the examples is of.
fn absent(examples: &[Example], labels: &[String]) -> Vec<String> {
    let is_there = |class: usize| examples.iter().any(|e| e.goal == Goal::Class(class as u32));
    labels.iter().enumerate().filter(|(class, _)| !is_there(*class)).map(|(_, label)| label.clone()).collect()
}

fn options(args: &TrainArgs, method: &Method, data: &Data, fingerprint: String) -> Result<TrainerOptions> {
    let run = &args.run;
    for (name, number) in [("--epochs", run.epochs), ("--batch-size", run.batch_size)] {
        if !(1..=MAX_COUNT).contains(&number) {
            return Err(Error::bad_request(format!("{name} is {number}; expected 1 to {MAX_COUNT}")));
        }
    }
    let learning_rate = run.learning_rate.unwrap_or(match method {
        Method::Lora(_) => 5e-4,
        Method::Head => 5e-3,
        Method::Full | Method::LastLayers(_) => 5e-5,
    });
    if !learning_rate.is_finite() || learning_rate <= 0.0 {
        return Err(Error::bad_request(format!("--learning-rate is {learning_rate}; expected more than 0")));
    }
    if !(0.0..=1.0).contains(&run.warmup) || !(0.0..1.0).contains(&run.label_smoothing) {
        return Err(Error::bad_request("--warmup and --label-smoothing are shares, from 0 to 1"));
    }
    let metric = match (args.metric, args.task) {
        (Some(metric @ (Metric::Accuracy | Metric::MacroF1)), Task::Generate) => {
            return Err(Error::bad_request(format!(
                "--metric {metric:?} is for classifications; texts have only the loss"
            )));
        }
        (Some(metric), _) => metric,
        (None, Task::Classify) => Metric::Accuracy,
        (None, Task::Generate) => Metric::Loss,
    };
    Ok(TrainerOptions {
        epochs: run.epochs,
        batch_size: run.batch_size,
        max_batch_tokens: run.max_batch_tokens.max(1),
        learning_rate,
        decay: run.schedule,
        warmup: run.warmup,
        adamw: AdamWOptions { weight_decay: run.weight_decay, ..AdamWOptions::default() },
        max_norm: run.max_norm,
        smoothing: run.label_smoothing,
        class_weights: if args.balance { balanced(data) } else { vec![] },
        metric,
        eval_every: run.eval_every,
        patience: run.patience,
        checkpoint_every: run.checkpoint_every,
        checkpoint: checkpoint_path(&run.out),
        fingerprint,
        seed: run.seed,
    })
}

/// `examples / (classes * examples of the class)`, scikit-learn's `balanced`. A class that is only evaluated weighs 1.
fn balanced(data: &Data) -> Vec<f32> {
    let classes = data.labels.as_ref().map_or(0, Vec::len);
    let mut counts = vec![0usize; classes];
    for example in &data.train {
        if let Goal::Class(class) = example.goal {
            counts[class as usize] += 1;
        }
    }
    let weight = |&n: &usize| if n == 0 { 1.0 } else { data.train.len() as f32 / (classes * n) as f32 };
    counts.iter().map(weight).collect()
}

/// The checkpoint lies beside the output and is removed when that is written.
fn checkpoint_path(out: &Path) -> PathBuf {
    out.with_file_name(format!("{}.checkpoint.safetensors", name_of(out)))
}

/// What decides a run's numbers: options and data.
fn settings(args: &TrainArgs, method: &Method, start: &Start) -> Vec<(&'static str, String)> {
    let run = &args.run;
    let mut all = match start {
        Start::Base | Start::Adapter(_) => vec![("method", format!("{method:?}")), ("model", args.model.clone())],
        Start::Nothing(shape) => vec![("method", "pretrain".into()), ("model", pretrain::describe(shape))],
    };
    all.extend([
        ("task", format!("{:?}", args.task).to_lowercase()),
        ("epochs", run.epochs.to_string()),
        ("batch size", run.batch_size.to_string()),
        ("learning rate", run.learning_rate.map_or("default".into(), |r| r.to_string())),
        ("schedule", format!("{:?}, warm-up {}", run.schedule, run.warmup).to_lowercase()),
        ("weight decay", run.weight_decay.to_string()),
        ("largest norm", run.max_norm.to_string()),
        ("label smoothing", run.label_smoothing.to_string()),
        ("balance", args.balance.to_string()),
        ("longest sequence", run.max_length.map_or("default".into(), |n| n.to_string())),
        ("tokens at a time", run.max_batch_tokens.to_string()),
        ("evaluations", format!("every {} steps, patience {}, metric {:?}", run.eval_every, run.patience, args.metric)),
        ("seed", run.seed.to_string()),
    ]);
    all
}

fn fingerprint(settings: &[(&str, String)], data: &Data, init: Option<&Path>) -> Result<String> {
    let mut hash = Sha256::new();
    for example in data.train.iter().chain(&data.eval) {
        example.tokens.iter().for_each(|t| hash.update(t.to_le_bytes()));
        hash.update(format!("{:?}", example.goal));
    }
    if let Some(init) = init {
        hash.update(crate::adapter::generation_of(init)?.as_str());
    }
    let data: String = hash.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect();
    let settings: Vec<String> = settings.iter().map(|(name, value)| format!("{name}={value}")).collect();
    Ok(format!("{}; data={data}", settings.join("; ")))
}

/// Where the options say that it is to be trained, and in which numbers.
fn held(run: &RunArgs) -> Result<Held> {
    let device = device::open(&run.device)?;
    let dtype = match run.compute {
        None if device.is_cpu() => DType::F32,
        None | Some(args::Dtype::Bf16) => DType::BF16,
        Some(args::Dtype::F32) => DType::F32,
    };
    match device.is_cpu() && dtype != DType::F32 {
        true => Err(Error::bad_request("--compute bf16 needs a GPU (--device cuda); a CPU trains in f32")),
        false => Ok(Held { device, dtype }),
    }
}

fn train(mut args: TrainArgs, method: &Method, start: Start) -> Result<()> {
    if args.run.threads > 0 {
        // Fails only where the pool is there already; then its size stands.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(args.run.threads).build_global();
    }
    if *method == Method::Head && args.task == Task::Generate {
        return Err(Error::bad_request("head trains a classification; use --task classify"));
    }
    let name = name_of(&args.run.out);
    let push = push(&args, method, &name)?;
    if args.run.out.exists() && !args.run.overwrite {
        return Err(taken(&args.run.out));
    }
    let records = table::read(&args.run.data)?;
    let base = match &start {
        Start::Base | Start::Adapter(_) => Base::open(&args.model)?,
        Start::Nothing(shape) => {
            // Named, it is all that is read of a record, also of one with a prompt or a chat.
            let column = examples::text_column(&records, &args.run.text_column)?;
            let texts = examples::plain(&records, &column, args.run.skip_empty)?;
            args.run.text_column = Some(column);
            pretrain::model(shape, &texts, args.run.seed, &name)?
        }
    };
    let run = &args.run;
    let held = held(run)?;
    let data = data(&args, &base, &records)?;
    drop(records);
    let labels = data.labels.as_ref().map(Vec::len);
    let mut network = Network::new(&base, method, labels, &held, &mut random(run.seed, "weights", 0))?;
    if run.checkpoint_activations {
        network.checkpoint_activations()?;
    }
    let init = if let Start::Adapter(folder) = &start { Some(folder.as_path()) } else { None };
    if let Some(init) = init {
        let mut adapter = crate::adapter::load(init, &base.config, &base.id)?.adapter;
        if let (Some(head), Some(labels)) = (&mut adapter.head, &data.labels) {
            in_order_of(head, labels);
        }
        network.start_from(&adapter).map_err(|e| e.context(format!("--init-adapter {}", init.display())))?;
    }
    let mut settings = settings(&args, method, &start);
    if held.dtype != DType::F32 {
        settings.push(("computed in", held.dtype.as_str().into()));
    }
    let options = options(&args, method, &data, fingerprint(&settings, &data, init)?)?;
    let checkpoint = options.checkpoint.clone();
    std::fs::create_dir_all(run.out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))?;
    data.notes.iter().for_each(|note| tracing::info!("{note}"));
    let trained: usize = network.trained().iter().map(|(_, v)| v.elem_count()).sum();
    let mut trainer = Trainer::new(&network, options, &data.train, &data.eval)?;
    if run.resume && trainer.resume()? {
        tracing::info!("going on after step {} of {}", trainer.history().step, trainer.steps());
    } else if !run.resume && checkpoint.exists() {
        return Err(Error::bad_request(format!(
            "{} is left of a run that was interrupted; go on with it with --resume, or remove it",
            checkpoint.display()
        )));
    }
    let ended = watched(&mut trainer)?;
    if ended == Ended::Interrupted {
        let what = format!("interrupted after step {}; the same command with --resume goes on", trainer.history().step);
        return Err(Error::unavailable(what));
    }
    let history = trainer.history();
    let card = Card {
        name: &name,
        base: if let Start::Nothing(_) = start { None } else { Some(&base.id) },
        adapter: makes_adapter(method),
        settings,
        data: data.notes.clone(),
        labels: data.labels.as_deref(),
        trained,
        parameters: network.parameters(),
    };
    let account = Account {
        history: history.clone(),
        trained,
        parameters: card.parameters,
        multiplied: network.multiplied(),
        example_tokens: data.train.iter().map(|e| e.tokens.len()).sum(),
    };
    let history_json = serde_json::to_string_pretty(&account).map_err(Error::internal)?;
    let texts = vec![
        ("README.md", card.markdown(history)),
        ("curves.svg", card::curves(history)?),
        ("history.json", history_json),
    ];
    let dtype = if run.dtype == args::Dtype::Bf16 { DType::BF16 } else { DType::F32 };
    let export = Export { base: &base, network: &network, method, labels: data.labels.as_deref(), dtype, texts };
    export.write(&run.out, run.overwrite)?;
    let _ = std::fs::remove_file(&checkpoint);
    if let Some(best) = history.best.map(|b| &history.evaluations[b]) {
        report(best, data.labels.as_deref());
    }
    output::line(run.out.display())?;
    push.map_or(Ok(()), |push| push.upload(&run.out))
}

/// Puts the classes of a head in the order of `labels`, where they are the same. Ours are sorted; other programs number them as
/// they like.
fn in_order_of(head: &mut Head, labels: &[String]) {
    let found: Option<Vec<usize>> = labels.iter().map(|l| head.labels.iter().position(|own| own == l)).collect();
    let Some(rows) = found.filter(|rows| rows.len() == head.labels.len()) else { return };
    let hidden = head.weight.len() / head.labels.len();
    head.weight = rows.iter().flat_map(|&row| &head.weight[row * hidden..][..hidden]).copied().collect();
    head.bias = head.bias.as_ref().map(|bias| rows.iter().map(|&row| bias[row]).collect());
    head.labels = labels.to_vec();
}

fn report(best: &Evaluation, labels: Option<&[String]>) {
    tracing::info!("best, after step {}: {}", best.step, card::describe(best));
    if let (Some(labels), Some(confusion)) = (labels, &best.confusion) {
        eprint!("{}", card::confusion_table(labels, confusion));
    }
}

/// Runs with a progress bar. SIGINT or SIGTERM ends it after the step with a checkpoint; a second one at once.
fn watched(trainer: &mut Trainer) -> Result<Ended> {
    let stop = Arc::new(AtomicBool::new(false));
    let asked = stop.clone();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let mut signals = runtime.block_on(async { Signals::new() })?;
    runtime.spawn(async move {
        loop {
            signals.next().await;
            if asked.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
            eprintln!("stopping after this step; once more to stop at once");
        }
    });
    let bar = ProgressBar::new(trainer.steps() as u64);
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} steps, {msg}, {eta} left");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_position(trainer.history().step as u64);
    bar.reset_eta();
    let (mut mean, mut tokens, start) = (None::<f32>, 0, std::time::Instant::now());
    let mut told = start;
    let ended = trainer.run(&stop, &mut |event| match event {
        Event::Step { step, loss, tokens: more } => {
            // A running mean, since single losses jump.
            let smooth = mean.map_or(loss, |m| 0.95 * m + 0.05 * loss);
            mean = Some(smooth);
            tokens += more;
            bar.set_position(step as u64);
            let message = format!("loss {smooth:.4}, {:.0} tokens/s", tokens as f64 / start.elapsed().as_secs_f64());
            if bar.is_hidden() && told.elapsed() >= TELL {
                tracing::info!("step {step} of {}: {message}", bar.length().unwrap_or(0));
                told = std::time::Instant::now();
            }
            bar.set_message(message);
        }
        Event::Evaluated(evaluation) => {
            bar.suspend(|| tracing::info!("step {}: {}", evaluation.step, card::describe(evaluation)));
        }
        Event::Saved => {}
    });
    bar.finish_and_clear();
    runtime.shutdown_background();
    ended
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_without_an_example_is_told_and_weighs_1() {
        let train: Vec<Example> = [0, 0, 0, 2].map(|c| Example { tokens: vec![1], goal: Goal::Class(c) }).into();
        let labels: Vec<String> = ["a", "b", "c"].map(String::from).into();
        assert_eq!(absent(&train, &labels), ["b"]);
        assert!(absent(&train, &[]).is_empty());
        let data = Data { train, eval: vec![], labels: Some(labels), notes: vec![] };
        assert_eq!(balanced(&data), [4.0 / 9.0, 1.0, 4.0 / 3.0]);
    }

    #[test]
    fn a_heads_classes_are_found_by_their_names() {
        let labels = |names: &[&str]| names.iter().map(|n| n.to_string()).collect::<Vec<_>>();
        let head = || Head {
            weight: vec![1.0, 2.0, 3.0, 4.0],
            bias: Some(vec![5.0, 6.0]),
            labels: labels(&["positive", "negative"]),
        };
        let mut turned = head();
        in_order_of(&mut turned, &labels(&["negative", "positive"]));
        assert_eq!((turned.weight, turned.bias), (vec![3.0, 4.0, 1.0, 2.0], Some(vec![6.0, 5.0])));
        assert_eq!(turned.labels, labels(&["negative", "positive"]));
        // Classes of other names stay where they are.
        for names in [&["a", "b"][..], &["negative"], &["negative", "neutral", "positive"]] {
            let mut same = head();
            in_order_of(&mut same, &labels(names));
            assert_eq!((same.weight, same.labels), (head().weight, head().labels), "{names:?}");
        }
    }
}
