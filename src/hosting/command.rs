//! `loramux bench hosting`: both fleets, one after the other, under the same traffic.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::findings::Findings;
use super::fleet::{Fleet, Kind, Setup};
use super::methods::sha256;
use super::prices::Prices;
use super::process::{self, Memory};
use super::record::{self, Record};
use super::report::Block;
use super::sender::{self, Sender};
use super::statistics::Line;
use super::traffic::{self, Lengths, Load, Popularity, Source};
use super::{machine, pages};
use crate::{Error, Result, output};

/// What is to be measured.
#[derive(Debug, Clone)]
pub struct Options {
    pub model: String,
    /// Folder of the adapters that tasks are made of.
    pub adapters: PathBuf,
    /// Sizes of fleets, in ascending order.
    pub tasks: Vec<usize>,
    pub out: PathBuf,
    /// Options of every server.
    pub serve_options: Vec<String>,
    pub prices: Option<PathBuf>,
    /// Requests a second; none: shares of what the smallest and the largest shared fleet can both answer.
    pub rates: Vec<f64>,
    /// How long each load is put on a fleet.
    pub seconds: f64,
    pub repetitions: usize,
    /// Of the closed load.
    pub clients: usize,
    pub lengths: Lengths,
    /// How much memory the largest fleets may take, in bytes.
    pub memory_budget: u64,
    /// Tasks that are tried at most to fill it.
    pub budget_tasks: usize,
    pub seed: u64,
}

/// Shares of the capacity that are asked for where no rates are given: easy, busy, close to all.
const SHARES: [f64; 3] = [0.3, 0.6, 0.9];

/// One fleet of one size, measured once.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cell {
    pub fleet: Kind,
    pub tasks: usize,
    pub repetition: usize,
    pub processes: usize,
    /// Bytes of what it is served from.
    pub disk: u64,
    /// Seconds from its start until every server answered.
    pub ready: f64,
    /// Before the first request.
    pub idle: Memory,
    /// Of that the weights of its bases, in bytes, as its servers tell; not known of what earlier versions measured.
    #[serde(default)]
    pub weights: Option<u64>,
    /// After all loads.
    pub loaded: Memory,
    /// What then was free of its KV caches, in bytes; not known of what earlier versions measured.
    #[serde(default)]
    pub kv_free: Option<u64>,
    /// By what it was measured; not known of what earlier versions measured.
    #[serde(default)]
    pub origin: Option<Origin>,
    /// Of its processes on GPUs, in bytes.
    pub gpu_memory: Option<u64>,
    pub saturated: Load,
    pub open: Vec<Open>,
    /// Seconds until one more task had answered a request.
    pub add: f64,
}

/// What a folder that was measured in parts may have several of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// SHA-256 of the program, and of the adapters' weights by their folders' names.
    pub program: String,
    pub adapters: BTreeMap<String, String>,
    /// The processor's model.
    pub cpu: Option<String>,
}

impl Origin {
    fn now(adapters: &Path) -> Result<Self> {
        let mut sums = BTreeMap::new();
        for folder in std::fs::read_dir(adapters)? {
            let folder = folder?;
            for file in ["adapter_model.safetensors", "adapter_model.bin", "adapter_model.gguf"] {
                if let Ok(bytes) = std::fs::read(folder.path().join(file)) {
                    sums.insert(folder.file_name().to_string_lossy().into_owned(), sha256(&bytes));
                }
            }
        }
        let program = sha256(&std::fs::read(std::env::current_exe()?)?);
        Ok(Origin { program, adapters: sums, cpu: machine()["cpu"].as_str().map(str::to_string) })
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Open {
    /// Requests a second.
    pub rate: f64,
    pub popularity: Popularity,
    pub load: Load,
}

/// How many tasks a fleet has when it fills the budget.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Budget {
    pub fleet: Kind,
    pub bytes: u64,
    /// Tasks, and the fleet's memory (PSS) with them.
    pub tried: Vec<(usize, u64)>,
    /// Why no more were tried.
    pub end: End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// One more takes more than the budget.
    Full,
    /// The machine has no memory for one more.
    Machine,
    /// As many were tried as was asked for.
    Tried,
}

impl Budget {
    /// The most tasks that were seen to fit.
    pub fn largest(&self) -> usize {
        self.tried.iter().filter(|(_, bytes)| *bytes <= self.bytes).map(|(tasks, _)| *tasks).max().unwrap_or(0)
    }

    /// Where not all that fits was tried: what fits by the line through what was.
    pub fn fitted(&self) -> Option<u64> {
        let points: Vec<(f64, f64)> = self.tried.iter().map(|&(n, bytes)| (n as f64, bytes as f64)).collect();
        (self.end != End::Full).then(|| Line::through(&points)?.fits(self.bytes as f64))?
    }
}

/// Measures what `options` say, and writes `report.json`, `report.md` and `report.html` in their folder. What a stopped run
/// has measured there is not measured again.
pub async fn run(options: Options) -> Result<()> {
    check(&options)?;
    let prices = Prices::read(options.prices.as_deref())?;
    let settings = json!({
        "model": options.model, "adapters": options.adapters, "serve_options": options.serve_options,
        "rates": options.rates, "seconds": options.seconds, "clients": options.clients, "lengths": options.lengths,
        "memory_budget": options.memory_budget, "budget_tasks": options.budget_tasks, "seed": options.seed,
    });
    let record = Record::open(&options.out.join("measured"), &settings)?;
    // Sizes and repetitions are not among the settings: a folder of fewer may grow.
    let cells = (0..options.repetitions).flat_map(|r| options.tasks.iter().enumerate().map(move |(i, &n)| (r, i, n)));
    // Each kind goes first as often as the other: what else the machine does may change with time.
    let turns = |(r, i, n): (usize, usize, usize)| {
        let [shared, copies] = Kind::ALL;
        let kinds = if (r + i) % 2 == 0 { [shared, copies] } else { [copies, shared] };
        kinds.map(|kind| (r, n, kind))
    };
    let cells: Vec<(usize, usize, Kind)> = cells.flat_map(turns).collect();
    let bar = ProgressBar::new(cells.len() as u64 + 4);
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed_precise}, {eta} left: {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(Duration::from_secs(1));
    let most = *options.tasks.last().unwrap_or(&1);
    let folder = options.out.join("work");
    let serve = options.serve_options.clone();
    let say = |what| bar.set_message(what);
    let setup = Setup::prepare(&options.model, &options.adapters, most + 1, &folder, serve, say)?;
    let rates = rates(&options, &setup, &record, &bar).await?;
    bar.inc(1);
    let sender = match record.find::<Sender>("sender")? {
        Some(sender) => sender,
        None => {
            bar.set_message("the program that sends, alone");
            let fastest = rates.iter().copied().fold(0.0, f64::max);
            let measured = sender::measure(fastest, options.lengths, options.seed).await?;
            record.put("sender", &measured)?;
            measured
        }
    };
    bar.inc(1);
    let origin = Origin::now(&options.adapters)?;
    let mut measured = vec![];
    for (repetition, tasks, kind) in cells {
        bar.set_message(format!("{}, {tasks} tasks, repetition {}", kind.name(), repetition + 1));
        let name = format!("{}-{tasks:04}-{repetition}", kind.name());
        let cell = match record.find::<Cell>(&name)? {
            Some(cell) => cell,
            None => {
                let mut cell = cell(&options, &setup, kind, tasks, repetition, &rates).await?;
                cell.origin = Some(origin.clone());
                record.put(&name, &cell)?;
                cell
            }
        };
        measured.push(cell);
        bar.inc(1);
    }
    measured.sort_by_key(|cell| (cell.repetition, cell.tasks, cell.fleet == Kind::Copies));
    let mut budgets = vec![];
    for kind in Kind::ALL {
        bar.set_message(format!("{}: how many fit", kind.name()));
        let name = format!("budget-{}", kind.name());
        let budget = match record.find::<Budget>(&name)? {
            Some(budget) => budget,
            None => {
                let budget = budget(&options, &setup, kind, &bar).await?;
                record.put(&name, &budget)?;
                budget
            }
        };
        budgets.push(budget);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let findings = Findings::of(&measured, &budgets, &prices);
    let mut settings = settings;
    settings["tasks"] = json!(options.tasks);
    settings["repetitions"] = json!(options.repetitions);
    let report: Value = json!({
        "machine": machine(), "settings": settings, "rates": rates, "prices": prices, "findings": findings,
        "sender": sender, "budgets": budgets, "cells": measured,
    });
    let mut pages = pages::report(&report["machine"], &report["settings"], &sender, &budgets, &findings, &prices);
    if measured.iter().any(|cell| cell.origin != measured[0].origin) {
        let what = "Measured in parts, by programs, with adapters or on processors that differ: see \"origin\" in report.json.";
        pages.blocks.insert(0, Block::Notice(what.into()));
    }
    record::write(&options.out.join("report.json"), &report.to_string())?;
    record::write(&options.out.join("report.md"), &pages.markdown())?;
    record::write(&options.out.join("report.html"), &pages.html()?)?;
    // Gigabytes, which another run makes again.
    std::fs::remove_dir_all(&folder)?;
    output::line(pages.markdown())
}

fn check(options: &Options) -> Result<()> {
    let positive = [
        ("--tasks", options.tasks.first().copied().unwrap_or(0)),
        ("--repetitions", options.repetitions),
        ("--clients", options.clients),
        ("--budget-tasks", options.budget_tasks),
        ("--prompt-words", options.lengths.words),
        ("--max-tokens", options.lengths.tokens),
    ];
    if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
        return Err(Error::bad_request(format!("{name} must be 1 or more")));
    }
    match options.rates.iter().chain([&options.seconds]).find(|x| !x.is_finite() || **x <= 0.0) {
        Some(x) => Err(Error::bad_request(format!("--rates and --seconds must be above 0; one is {x}"))),
        None => Ok(()),
    }
}

/// Rates of the open loads, in requests a second.
async fn rates(options: &Options, setup: &Setup, record: &Record, bar: &ProgressBar) -> Result<Vec<f64>> {
    if !options.rates.is_empty() {
        return Ok(options.rates.clone());
    }
    if let Some(rates) = record.find("rates")? {
        return Ok(rates);
    }
    // Fleets of other sizes have other mixes of work; the rates are for all of them.
    let mut capacity = f64::INFINITY;
    for tasks in [options.tasks[0], options.tasks[options.tasks.len() - 1]] {
        bar.set_message(format!("what a server with {tasks} tasks can answer"));
        let (fleet, _) = Fleet::start(setup, Kind::Shared, tasks, &[]).await?;
        fleet.touch().await?;
        let mut source = Source::new(options.seed, Popularity::Uniform, tasks, options.lengths)?;
        let load = traffic::closed(&fleet, &mut source, options.clients, window(options)).await;
        // Of all requests until the last answer, so that a window that is shorter than a request says something too.
        let good = load.samples.iter().filter(|s| s.error.is_none()).count();
        if good == 0 {
            let seen = load.samples.iter().find_map(|s| s.error.as_deref()).unwrap_or("none was sent");
            return Err(Error::unavailable(format!("no request was answered: {seen}")));
        }
        capacity = capacity.min(good as f64 / load.span());
    }
    // Two digits say enough.
    let round = |x: f64| format!("{x:.1e}").parse().unwrap_or(x);
    let rates = SHARES.map(|share| round(capacity * share)).to_vec();
    record.put("rates", &rates)?;
    Ok(rates)
}

fn window(options: &Options) -> Duration {
    Duration::from_secs_f64(options.seconds)
}

async fn cell(
    options: &Options,
    setup: &Setup,
    kind: Kind,
    tasks: usize,
    repetition: usize,
    rates: &[f64],
) -> Result<Cell> {
    let (mut fleet, ready) = Fleet::start(setup, kind, tasks, &[]).await?;
    let idle = fleet.memory()?;
    let weights = Some(fleet.weights().await?);
    fleet.touch().await?;
    // Both fleets get the same requests, and each repetition others: what was asked before would come from the cache.
    let mut seed = options.seed.wrapping_add(1 + repetition as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut source = |popularity| {
        seed = seed.wrapping_add(1);
        Source::new(seed, popularity, tasks, options.lengths)
    };
    let saturated = traffic::closed(&fleet, &mut source(Popularity::Uniform)?, options.clients, window(options)).await;
    let mut open = vec![];
    // Of one task there is one popularity.
    let popularities = if tasks == 1 { &[Popularity::Uniform][..] } else { &[Popularity::Uniform, Popularity::Zipf] };
    for &popularity in popularities {
        for &rate in rates {
            let load = traffic::open(&fleet, &mut source(popularity)?, rate, window(options)).await?;
            open.push(Open { rate, popularity, load });
        }
    }
    let (loaded, kv_free) = (fleet.memory()?, Some(fleet.kv_free().await?));
    let (processes, gpu_memory) = (fleet.processes(), process::gpu_memory(&fleet.process_ids()));
    let add = fleet.add().await?;
    let disk = setup.disk(kind, tasks)?;
    Ok(Cell {
        fleet: kind,
        tasks,
        repetition,
        processes,
        disk,
        ready,
        idle,
        weights,
        loaded,
        kv_free,
        origin: None,
        gpu_memory,
        saturated,
        open,
        add,
    })
}

/// Adds tasks to a fleet until its memory is full.
async fn budget(options: &Options, setup: &Setup, kind: Kind, bar: &ProgressBar) -> Result<Budget> {
    let mut more = vec![];
    // A server may hold all adapters that the budget has room for.
    if kind == Kind::Shared && !options.serve_options.iter().any(|o| o.starts_with("--adapter-memory")) {
        more = vec!["--adapter-memory".to_string(), options.memory_budget.to_string()];
    }
    let (mut fleet, _) = Fleet::start(setup, kind, 1, &more).await?;
    fleet.touch().await?;
    let mut tried = vec![];
    let end = loop {
        let memory = fleet.memory()?.pss;
        tried.push((fleet.tasks(), memory));
        bar.set_message(format!("{}: {} tasks take {} MiB", kind.name(), fleet.tasks(), memory >> 20));
        if memory > options.memory_budget {
            break End::Full;
        }
        if fleet.tasks() >= options.budget_tasks {
            break End::Tried;
        }
        // Room for what the next one takes while it loads.
        let one = tried[0].1;
        if kind == Kind::Copies && process::available()? < 3 * one {
            break End::Machine;
        }
        fleet.add().await?;
    };
    Ok(Budget { fleet: kind, bytes: options.memory_budget, tried, end })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_a_budget_was_seen_or_is_fitted() {
        let budget = |tried: &[(usize, u64)], end| Budget { fleet: Kind::Copies, bytes: 100, tried: tried.into(), end };
        let full = budget(&[(1, 40), (2, 80), (3, 120)], End::Full);
        assert_eq!((full.largest(), full.fitted()), (2, None));
        let cut = budget(&[(1, 40), (2, 42), (3, 44)], End::Tried);
        assert_eq!((cut.largest(), cut.fitted()), (3, Some(31)));
        assert_eq!(budget(&[(1, 200)], End::Full).largest(), 0);
    }
}
