//! What the measurements of fleets come to: everything the report says that is not a raw sample.

use std::collections::BTreeMap;

use serde::Serialize;

use super::command::{Budget, Cell};
use super::extrapolation::{Assumptions, Room, SHAPES};
use super::fleet::{Kind, Work};
use super::prices::Prices;
use super::statistics::{Line, Spread, quantile, tail};
use super::traffic::{Load, Popularity, Sample};

/// Bytes that a process on a GPU takes for the driver's sake, by assumption.
const CUDA_CONTEXT: f64 = 0.5e9;

/// One fleet of one size; of each number the median and range over the repetitions.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub fleet: Kind,
    pub tasks: usize,
    pub repetitions: usize,
    pub processes: usize,
    pub disk_bytes: u64,
    pub ready_seconds: Spread,
    pub add_seconds: Spread,
    /// PSS before the first request, and after all loads.
    pub idle_bytes: Spread,
    pub loaded_bytes: Spread,
    /// The latter with all memory of the KV caches in use, which a server fills in time whatever is asked of it; where the
    /// servers told what was free.
    pub full_bytes: Option<Spread>,
    /// Of these the weights of the bases, where the servers told.
    pub weights_bytes: Option<Spread>,
    pub gpu_bytes: Option<Spread>,
    /// Under the closed load: tokens read and generated, and requests, a second.
    pub tokens_per_second: Spread,
    pub requests_per_second: Spread,
    /// Price of a million tokens under the closed load, and of a task for a month.
    pub million_tokens: f64,
    pub task_month: f64,
    pub errors: usize,
}

/// Latency of one kind of work under one open load, in milliseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Latency {
    pub fleet: Kind,
    pub tasks: usize,
    pub popularity: Popularity,
    /// Requests a second that arrived.
    pub rate: f64,
    pub work: Work,
    pub requests: usize,
    pub errors: usize,
    /// Until the whole answer: of each repetition the median, and of these median and range. One that failed has had no
    /// answer: a number that falls on one is none.
    pub p50: Option<Spread>,
    /// Of all repetitions' requests together, where there are enough of them.
    pub p95: Option<f64>,
    pub p99: Option<f64>,
    /// Until the first token, of a generation.
    pub first_p50: Option<Spread>,
    /// By how much later than it arrived a request was sent, at most.
    pub late: Option<f64>,
}

/// Copies beside the shared base, of the same size: a ratio above 1 is what copies take more.
#[derive(Debug, Clone, Serialize)]
pub struct Ratio {
    pub tasks: usize,
    pub memory: f64,
    pub disk: f64,
    pub ready: f64,
    pub add: f64,
    pub tokens_per_second: f64,
    pub task_month: f64,
}

#[derive(Debug, Clone, Serialize)]
pub struct Fit {
    pub fleet: Kind,
    /// Of memory after the loads over tasks, in bytes.
    pub line: Line,
}

#[derive(Debug, Clone, Serialize)]
pub struct Findings {
    pub rows: Vec<Row>,
    pub ratios: Vec<Ratio>,
    pub latencies: Vec<Latency>,
    pub fits: Vec<Fit>,
    /// Of the extrapolation.
    pub assumptions: Option<Assumptions>,
    pub rooms: Vec<Room>,
    /// Processor time of the program that sent requests, as a share of one core, in the load where it was most.
    pub sender_share: f64,
}

impl Findings {
    pub fn of(cells: &[Cell], budgets: &[Budget], prices: &Prices) -> Self {
        let mut groups = BTreeMap::<(usize, u8), Vec<&Cell>>::new();
        for cell in cells {
            groups.entry((cell.tasks, (cell.fleet == Kind::Copies) as u8)).or_default().push(cell);
        }
        let rows: Vec<Row> = groups.values().filter_map(|cells| row(cells, prices)).collect();
        let find = |fleet, tasks| rows.iter().find(|r: &&Row| r.fleet == fleet && r.tasks == tasks);
        let ratios = rows.iter().filter(|r| r.fleet == Kind::Shared).filter_map(|shared| {
            let copies = find(Kind::Copies, shared.tasks)?;
            let of = |f: &dyn Fn(&Row) -> f64| f(copies) / f(shared);
            Some(Ratio {
                tasks: shared.tasks,
                memory: of(&|r| r.loaded_bytes.median),
                disk: of(&|r| r.disk_bytes as f64),
                ready: of(&|r| r.ready_seconds.median),
                add: of(&|r| r.add_seconds.median),
                tokens_per_second: of(&|r| r.tokens_per_second.median),
                task_month: of(&|r| r.task_month),
            })
        });
        let ratios = ratios.collect();
        let fits = Kind::ALL.into_iter().filter_map(|fleet| {
            let points = rows.iter().filter(|r| r.fleet == fleet);
            let points: Vec<_> = points.map(|r| (r.tasks as f64, r.loaded_bytes.median)).collect();
            Some(Fit { fleet, line: Line::through(&points)? })
        });
        let fits: Vec<Fit> = fits.collect();
        let assumptions = assumptions(&rows, budgets);
        let rooms = assumptions.iter().flat_map(|a| {
            SHAPES.iter().flat_map(move |shape| prices.gpus.iter().map(move |gpu| Room::of(shape, gpu, a)))
        });
        let rooms = rooms.collect();
        let loads = cells.iter().flat_map(|c| c.open.iter().map(|o| &o.load).chain([&c.saturated]));
        let sender_share = loads.map(|l| l.sender_cpu / l.span()).fold(0.0, f64::max);
        let latencies = groups.values().flat_map(|cells| latencies(cells)).collect();
        Findings { rows, ratios, latencies, fits, assumptions, rooms, sender_share }
    }

    pub fn row(&self, fleet: Kind, tasks: usize) -> Option<&Row> {
        self.rows.iter().find(|r| r.fleet == fleet && r.tasks == tasks)
    }

    /// Sizes of fleets.
    pub fn sizes(&self) -> Vec<usize> {
        self.ratios.iter().map(|r| r.tasks).collect()
    }
}

/// `cells` are repetitions of one.
fn row(cells: &[&Cell], prices: &Prices) -> Option<Row> {
    let first = cells.first()?;
    let spread = |f: &dyn Fn(&Cell) -> f64| Spread::of(cells.iter().map(|c| f(c)));
    let tokens = spread(&|c| c.saturated.tokens() / c.saturated.seconds)?;
    let loaded = spread(&|c| c.loaded.pss as f64)?;
    let loads = cells.iter().flat_map(|c| c.open.iter().map(|o| &o.load).chain([&c.saturated]));
    Some(Row {
        fleet: first.fleet,
        tasks: first.tasks,
        repetitions: cells.len(),
        processes: first.processes,
        disk_bytes: first.disk,
        ready_seconds: spread(&|c| c.ready)?,
        add_seconds: spread(&|c| c.add)?,
        idle_bytes: spread(&|c| c.idle.pss as f64)?,
        loaded_bytes: loaded,
        full_bytes: Spread::of(cells.iter().filter_map(|c| Some((c.loaded.pss + c.kv_free?) as f64))),
        weights_bytes: Spread::of(cells.iter().filter_map(|c| c.weights).map(|b| b as f64)),
        gpu_bytes: Spread::of(cells.iter().filter_map(|c| c.gpu_memory).map(|b| b as f64)),
        tokens_per_second: tokens,
        requests_per_second: spread(&|c| c.saturated.answered() / c.saturated.seconds)?,
        million_tokens: prices.million_tokens(tokens.median),
        task_month: prices.task_month(loaded.median, first.disk as f64, first.tasks),
        errors: loads.flat_map(|l| &l.samples).filter(|s| s.error.is_some()).count(),
    })
}

/// `cells` are repetitions of one, with the same open loads in the same order.
fn latencies(cells: &[&Cell]) -> Vec<Latency> {
    let Some(first) = cells.first() else { return vec![] };
    let mut all = vec![];
    for (i, open) in first.open.iter().enumerate() {
        let loads: Vec<&Load> = cells.iter().filter_map(|c| Some(&c.open.get(i)?.load)).collect();
        for work in [Work::Classify, Work::Generate] {
            let of = |f: &dyn Fn(&Sample) -> f64| -> Vec<Vec<f64>> {
                let samples = loads.iter().map(|l| l.samples.iter().filter(|s| s.work == work));
                samples.map(|samples| samples.map(f).collect()).collect()
            };
            // Leaving out what failed would make the fleet look quick, and so would the time until that was told.
            let waited = |s: &Sample, time: f64| if s.error.is_some() { f64::INFINITY } else { time };
            let (whole, first_token) = (of(&|s| waited(s, s.whole)), of(&|s| waited(s, s.first)));
            let late = of(&|s| s.late).concat();
            let requests = whole.iter().map(Vec::len).sum();
            if requests == 0 {
                continue;
            }
            let medians = |times: &[Vec<f64>]| {
                let each: Vec<f64> = times.iter().filter_map(|t| quantile(t, 0.5)).collect();
                Spread::of(each.iter().copied()).filter(|_| each.iter().all(|t| t.is_finite()))
            };
            let all_of = |q| tail(&whole.concat(), q).filter(|time| time.is_finite());
            let samples = loads.iter().flat_map(|l| &l.samples);
            all.push(Latency {
                fleet: first.fleet,
                tasks: first.tasks,
                popularity: open.popularity,
                rate: open.rate,
                work,
                requests,
                errors: samples.filter(|s| s.work == work && s.error.is_some()).count(),
                p50: medians(&whole),
                p95: all_of(0.95),
                p99: all_of(0.99),
                first_p50: if work == Work::Generate { medians(&first_token) } else { None },
                late: late.iter().copied().reduce(f64::max),
            });
        }
    }
    all
}

/// What the extrapolation takes from the measurements: the memory of a process beside its weights, and of an adapter beside its
/// file.
fn assumptions(rows: &[Row], budgets: &[Budget]) -> Option<Assumptions> {
    let tried = &budgets.iter().find(|b| b.fleet == Kind::Shared)?.tried;
    let points: Vec<(f64, f64)> = tried.iter().map(|&(tasks, bytes)| (tasks as f64, bytes as f64)).collect();
    let line = Line::through(&points)?;
    let shared = rows.iter().filter(|r| r.fleet == Kind::Shared);
    let disk: Vec<(f64, f64)> = shared.clone().map(|r| (r.tasks as f64, r.disk_bytes as f64)).collect();
    let on_disk = Line::through(&disk)?.slope;
    // Quantised, weights take fewer bytes than their file, so the server has to say how many. Where it has not, all counts:
    // more than it is, and in nobody's favour.
    let beside = shared.map(|r| r.idle_bytes.median - r.weights_bytes.map_or(0.0, |w| w.median));
    let program = beside.reduce(f64::min)?.max(0.0);
    Some(Assumptions {
        bytes_per_number: 2,
        rank: 16,
        kv_tokens: 4096,
        used: 0.9,
        overhead: program + CUDA_CONTEXT,
        adapter_overhead: (line.slope - on_disk).max(0.0),
    })
}
