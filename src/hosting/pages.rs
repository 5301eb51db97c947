//! The report of a comparison of fleets.

use serde_json::Value;

use super::command::{Budget, End};
use super::extrapolation::FORMULA;
use super::findings::{Findings, Latency, Row};
use super::fleet::{Kind, Work};
use super::prices::Prices;
use super::report::{Axis, Block, Plot, Point, Report, Series, Table, digits};
use super::sender::Sender;
use super::statistics::{Spread, chance};

const MIB: f64 = (1u64 << 20) as f64;

fn called(kind: Kind) -> &'static str {
    match kind {
        Kind::Shared => "one base with adapters",
        Kind::Copies => "full models",
    }
}

fn working(work: Work) -> &'static str {
    match work {
        Work::Classify => "classification",
        Work::Generate => "generation",
    }
}

/// The median, and the range where there is one.
fn told(spread: Spread) -> String {
    let Spread { median, min, max } = spread;
    if min == max { digits(median) } else { format!("{} ({} to {})", digits(median), digits(min), digits(max)) }
}

fn scaled(spread: Spread, unit: f64) -> Spread {
    Spread { median: spread.median / unit, min: spread.min / unit, max: spread.max / unit }
}

fn table(columns: &[&str], rows: Vec<Vec<String>>) -> Block {
    Block::Table(Table { columns: columns.iter().map(|c| c.to_string()).collect(), rows })
}

fn point(x: f64, y: Spread) -> Point {
    Point { x, y: y.median, low: Some(y.min), high: Some(y.max) }
}

fn plot(title: String, x: &str, y: &str, log: bool, series: Vec<Series>) -> Block {
    let axis = |label: &str, log| Axis { label: label.into(), log };
    Block::Plot(Plot { title, x: axis(x, false), y: axis(y, log), series })
}

/// Tables and plots of everything, the summary first.
pub fn report(
    machine: &Value,
    settings: &Value,
    sender: &Sender,
    budgets: &[Budget],
    findings: &Findings,
    prices: &Prices,
) -> Report {
    let mut blocks = summary(findings, budgets, prices);
    blocks.extend(details(findings));
    blocks.extend(latencies(findings));
    blocks.extend(fullest(findings, budgets));
    blocks.extend(method(machine, settings, sender, findings, prices));
    blocks.extend(extrapolation(findings, prices));
    Report { title: "The cost of hosting many tasks: one base with adapters, or a full model each".into(), blocks }
}

/// What differs by more than the repetitions do, in words, and how often chance alone would have it so.
fn verdicts(findings: &Findings) -> Vec<String> {
    let mut all = vec![];
    let repetitions = findings.rows.iter().map(|r| r.repetitions).min().unwrap_or(0);
    // Numbers of one repetition have no range.
    let repeated = repetitions > 1;
    let by_chance = digits(chance(repetitions));
    let apart =
        format!("the ranges of {repetitions} repetitions are apart, as by chance alone in one case of {by_chance}");
    for tasks in findings.sizes() {
        let (Some(shared), Some(copies)) = (findings.row(Kind::Shared, tasks), findings.row(Kind::Copies, tasks))
        else {
            continue;
        };
        let (s, c) = (shared.tokens_per_second, copies.tokens_per_second);
        let said = if !repeated {
            let times = digits(s.median / c.median);
            format!("with adapters it has {times} times the throughput, seen once: how far that repeats is not known")
        } else if s.overlaps(&c) {
            "no difference in throughput is seen: the ranges of the repetitions overlap".to_string()
        } else if s.median > c.median {
            format!("one base with adapters has {} times the throughput ({apart})", digits(s.median / c.median))
        } else {
            format!("full models have {} times the throughput ({apart})", digits(c.median / s.median))
        };
        let memory = copies.loaded_bytes.median / shared.loaded_bytes.median;
        let takes = if memory >= 1.0 {
            format!("full models take {} times the memory", digits(memory))
        } else {
            format!("one base with adapters takes {} times the memory", digits(1.0 / memory))
        };
        let tasks = if tasks == 1 { "1 task".to_string() } else { format!("{tasks} tasks") };
        all.push(format!("{tasks}: {takes}; {said}."));
    }
    if !repeated {
        return all;
    }
    let (mut compared, mut slower, mut quicker) = (0, 0, vec![]);
    for copies in findings.latencies.iter().filter(|l| l.fleet == Kind::Copies) {
        let same = |l: &&Latency| {
            (l.fleet, l.tasks, l.popularity, l.work) == (Kind::Shared, copies.tasks, copies.popularity, copies.work)
                && l.rate == copies.rate
        };
        let Some((s, c)) = findings.latencies.iter().find(same).and_then(|shared| shared.p50.zip(copies.p50)) else {
            continue;
        };
        compared += 1;
        if s.overlaps(&c) {
            continue;
        }
        if s.median < c.median {
            slower += 1;
            continue;
        }
        let (work, rate, popularity) = (working(copies.work), digits(copies.rate), copies.popularity.name());
        let times = digits(s.median / c.median);
        quicker.push(format!("{work}, {} tasks, {rate} requests a second, {popularity}: {times} times", copies.tasks));
    }
    let list = if quicker.is_empty() { String::new() } else { format!(" ({})", quicker.join("; ")) };
    let expected = digits(compared as f64 / chance(repetitions));
    all.push(format!(
        "Of {compared} median latencies of both, the ranges are apart in {}, where chance alone would have it in {expected}: full \
         models answered quicker in {}{list}, one base with adapters in {slower}.",
        slower + quicker.len(),
        quicker.len()
    ));
    all
}

fn summary(findings: &Findings, budgets: &[Budget], prices: &Prices) -> Vec<Block> {
    let money = &prices.currency;
    let columns = [
        "tasks",
        "memory, MiB: base with adapters",
        "full models",
        "times",
        "a task's month: base with adapters",
        "full models",
        "tokens/s: base with adapters",
        "full models",
    ];
    let rows = findings.ratios.iter().filter_map(|ratio| {
        let (s, c) = (findings.row(Kind::Shared, ratio.tasks)?, findings.row(Kind::Copies, ratio.tasks)?);
        let memory = |r: &Row| digits(r.loaded_bytes.median / MIB);
        let month = |r: &Row| format!("{} {money}", digits(r.task_month));
        let tokens = |r: &Row| digits(r.tokens_per_second.median);
        let times = digits(ratio.memory);
        Some(vec![ratio.tasks.to_string(), memory(s), memory(c), times, month(s), month(c), tokens(s), tokens(c)])
    });
    let memory = |kind| {
        let rows = findings.rows.iter().filter(move |r| r.fleet == kind);
        rows.map(|r| point(r.tasks as f64, scaled(r.loaded_bytes, MIB))).collect()
    };
    let mut series: Vec<Series> =
        Kind::ALL.map(|kind| Series { name: called(kind).into(), points: memory(kind), dashed: false }).into();
    let last = findings.sizes().last().copied().unwrap_or(1) as f64;
    for fit in &findings.fits {
        let points = [0.0, last].map(|x| Point { x, y: fit.line.at(x) / MIB, low: None, high: None });
        series.push(Series { name: format!("{}, fitted", called(fit.fleet)), points: points.into(), dashed: true });
    }
    let cost = Kind::ALL.map(|kind| {
        let rows = findings.rows.iter().filter(|r| r.fleet == kind);
        let points = rows.map(|r| Point { x: r.tasks as f64, y: r.task_month, low: None, high: None }).collect();
        Series { name: called(kind).into(), points, dashed: false }
    });
    let fitting = budgets.iter().map(|b| format!("{}: {}", called(b.fleet), room(b)));
    let fitting = format!(
        "In {} MiB of memory fit, tasks of {}.",
        digits(budgets.first().map_or(0.0, |b| b.bytes as f64 / MIB)),
        fitting.collect::<Vec<_>>().join("; ")
    );
    vec![
        Block::Text(
            "Two ways to host N fine-tuned tasks, on the same machine, under the same requests: one server that holds the base \
             once and an adapter for each task, and one server for each task with a full model of its own. The engine is the \
             same; the full models' servers have no adapters."
                .into(),
        ),
        table(&columns, rows.collect()),
        Block::List(verdicts(findings)),
        Block::Text(fitting),
        plot("Memory over tasks".into(), "tasks", "MiB", false, series),
        plot("Cost of a task for a month".into(), "tasks", money, false, cost.into()),
    ]
}

fn room(budget: &Budget) -> String {
    let tried = budget.tried.last().map_or(0, |t| t.0);
    match (budget.end, budget.fitted()) {
        (End::Full, _) => format!("{} (tried)", budget.largest()),
        (_, Some(fitted)) => {
            let why =
                if budget.end == End::Machine { "the machine has no memory for more" } else { "no more were tried" };
            format!("{fitted} (extrapolated by the line through the {tried} that were tried; {why})")
        }
        _ => format!("at least {} (more were not tried)", budget.largest()),
    }
}

fn details(findings: &Findings) -> Vec<Block> {
    let columns = [
        "fleet, tasks",
        "processes",
        "ready, s",
        "one more task, s",
        "disk, MiB",
        "memory at start, MiB",
        "after the loads, MiB",
        "with full KV caches, at most, MiB",
        "tokens/s",
        "requests/s",
        "a million tokens",
        "errors",
    ];
    let rows = findings.rows.iter().map(|r| {
        vec![
            format!("{}, {}", called(r.fleet), r.tasks),
            r.processes.to_string(),
            told(r.ready_seconds),
            told(r.add_seconds),
            digits(r.disk_bytes as f64 / MIB),
            told(scaled(r.idle_bytes, MIB)),
            told(scaled(r.loaded_bytes, MIB)),
            r.full_bytes.map_or("-".into(), |bytes| told(scaled(bytes, MIB))),
            told(r.tokens_per_second),
            told(r.requests_per_second),
            digits(r.million_tokens),
            r.errors.to_string(),
        ]
    });
    let throughput = Kind::ALL.map(|kind| {
        let rows = findings.rows.iter().filter(|r| r.fleet == kind);
        let points = rows.map(|r| point(r.tasks as f64, r.tokens_per_second)).collect();
        Series { name: called(kind).into(), points, dashed: false }
    });
    let mut blocks = vec![
        Block::Heading("Each fleet".into()),
        Block::Text(
            "Medians of the repetitions, their range in brackets. Throughput is of a closed load over all tasks alike: tokens \
             read and generated by requests within the window; one that its end cuts counts by the share of its time before it. \
             Memory after the loads is what these have touched: a server's KV cache fills with all that it is asked in time, and \
             then it takes what the next column says at most."
                .into(),
        ),
        table(&columns, rows.collect()),
        plot("Throughput over tasks".into(), "tasks", "tokens/s", false, throughput.into()),
    ];
    if findings.rows.iter().any(|r| r.gpu_bytes.is_some()) {
        let rows = findings
            .rows
            .iter()
            .filter_map(|r| Some(vec![format!("{}, {}", called(r.fleet), r.tasks), told(scaled(r.gpu_bytes?, MIB))]));
        blocks.push(table(&["fleet, tasks", "GPU memory, MiB"], rows.collect()));
    }
    blocks
}

fn latencies(findings: &Findings) -> Vec<Block> {
    let columns = [
        "fleet, tasks, work",
        "tasks asked",
        "requests/s",
        "requests",
        "p50, ms",
        "p95, ms",
        "p99, ms",
        "first token p50, ms",
        "sent late at most, ms",
        "errors",
    ];
    let maybe = |spread: Option<Spread>| spread.map_or("-".into(), told);
    let rows = findings.latencies.iter().map(|l| {
        vec![
            format!("{}, {}, {}", called(l.fleet), l.tasks, working(l.work)),
            l.popularity.name().into(),
            digits(l.rate),
            l.requests.to_string(),
            maybe(l.p50),
            l.p95.map_or("-".into(), digits),
            l.p99.map_or("-".into(), digits),
            maybe(l.first_p50),
            l.late.map_or("-".into(), digits),
            l.errors.to_string(),
        ]
    });
    let mut blocks = vec![
        Block::Heading("Latency when requests arrive by themselves".into()),
        Block::Text(
            "An open load: requests arrive as a Poisson process does and are sent then, whatever became of those before. Times \
             run from the arrival, so that a sender that is late counts as a wait. A request that failed, or was not answered a minute \
             after the last arrival, has had no answer: a number that falls on one is \"-\". p50 is the median of the repetitions', \
             p95 and p99 are of all their requests, where there are 20 and 100 or more."
                .into(),
        ),
        table(&columns, rows.collect()),
    ];
    let sizes = findings.sizes();
    let chosen = [sizes.first(), sizes.last()];
    for work in [Work::Classify, Work::Generate] {
        let mut series = vec![];
        for tasks in chosen.into_iter().flatten().collect::<std::collections::BTreeSet<_>>() {
            for kind in Kind::ALL {
                let same = findings.latencies.iter().filter(|l| {
                    (l.fleet, l.tasks, l.work) == (kind, *tasks, work)
                        && l.popularity == super::traffic::Popularity::Uniform
                });
                let points: Vec<Point> = same.filter_map(|l| Some(point(l.rate, l.p50?))).collect();
                if !points.is_empty() {
                    series.push(Series { name: format!("{}, {tasks}", called(kind)), points, dashed: false });
                }
            }
        }
        if !series.is_empty() {
            let title = format!("Latency of a {} (p50), all tasks asked alike", working(work));
            blocks.push(plot(title, "requests/s", "ms", true, series));
        }
    }
    blocks
}

fn fullest(findings: &Findings, budgets: &[Budget]) -> Vec<Block> {
    let rows = budgets.iter().map(|b| {
        let last = b.tried.last().copied().unwrap_or_default();
        vec![called(b.fleet).into(), room(b), last.0.to_string(), digits(last.1 as f64 / MIB)]
    });
    let fits = findings.fits.iter().map(|f| {
        let (zero, slope) = (digits(f.line.at_zero / MIB), digits(f.line.slope / MIB));
        format!("{}: memory = {zero} MiB + {slope} MiB * tasks (least squares over the fleets above)", called(f.fleet))
    });
    vec![
        Block::Heading("How many tasks fit a budget of memory".into()),
        table(&["fleet", "tasks that fit", "most tried", "memory with these, MiB"], rows.collect()),
        Block::List(fits.collect()),
    ]
}

fn method(machine: &Value, settings: &Value, sender: &Sender, findings: &Findings, prices: &Prices) -> Vec<Block> {
    let lines = |value: &Value| serde_json::to_string_pretty(value).unwrap_or_default();
    let sender = format!(
        "The program that sends requests is not what is measured: beside a server that answers at once, on the same cores, it \
         sends and reads {} requests a second at most; at {} a second, twice the fastest rate above, 99 % are sent less than {} ms \
         late. In the loads above it took at most {} of one core, and the column \"sent late\" says how punctual it was.",
        digits(sender.most),
        digits(sender.rate),
        sender.late.map_or("-".into(), digits),
        digits(findings.sender_share)
    );
    let machine_price = &prices.machine;
    vec![
        Block::Heading("How it was measured".into()),
        Block::List(vec![
            "Fleets of different sizes have different mixes of classification and generation where the tasks are fewer than the \
             adapters they are made of: compare fleets of one size."
                .into(),
            "Every server is a process of its own, started with the same options, its files in the page cache. All servers of a \
             fleet start at the same time. Requests go straight to the server of their task: a router would come on top of \
             the full models' side."
                .into(),
            "Tasks are made of the adapters in --adapters, in turns; each has an adapter of its own content. Full models are the base \
             with the adapter added to its weights, in bf16, which is what a full fine-tune takes; the shared base is written in the \
             same form. Tasks of the same adapter have full models of the same content, each in a file and a process of its own."
                .into(),
            "Memory is PSS, the sum over a fleet's processes of /proc/PID/smaps_rollup: a page that several processes map, as those of \
             the program itself, is divided among them, so it counts once. This program maps them too and takes its share."
                .into(),
            "\"One more task\" is the time from an adapter's upload, or a server's start, until the new task has answered a \
             request; its files lie on the disk."
                .into(),
            "For the budget, tasks are added one by one until the memory is full; each answers a request. Full models beyond the \
             largest fleet above are started from the same files, each with memory of its own."
                .into(),
            sender,
        ]),
        Block::Text(format!(
            "Prices: {} of memory {} GiB at {} {} an hour, {} hours a month, {} for a gigabyte of disk a month. A million tokens \
             is an hour's price over the tokens of an hour under the closed load. A task's month is the share of the machine's \
             memory that its fleet takes, at its price, and the disk, divided by the tasks.",
            machine_price.name,
            digits(machine_price.memory_gib),
            digits(machine_price.hour),
            prices.currency,
            digits(prices.hours_per_month),
            digits(prices.disk_gb_month)
        )),
        Block::Code(format!("{}\n{}", lines(machine), lines(settings))),
    ]
}

fn extrapolation(findings: &Findings, prices: &Prices) -> Vec<Block> {
    let Some(a) = &findings.assumptions else { return vec![] };
    let gigabytes = |bytes: f64| digits(bytes / 1e9);
    let columns = [
        "base, GPU",
        "weights, GB",
        "KV, GB",
        "adapter, MB",
        "GPUs",
        "tasks: base with adapters",
        "full models",
        "a task's hour: base with adapters",
        "full models",
    ];
    let rows = findings.rooms.iter().map(|r| {
        vec![
            format!("{}, {}", r.model, r.gpu),
            gigabytes(r.weights),
            gigabytes(r.kv),
            digits(r.adapter / 1e6),
            r.gpus.to_string(),
            r.shared.to_string(),
            r.copies.to_string(),
            r.shared_hour.map_or("-".into(), |hour| format!("{} {}", digits(hour), prices.currency)),
            r.copies_hour.map_or("-".into(), |hour| format!("{} {}", digits(hour), prices.currency)),
        ]
    });
    vec![
        Block::Heading("Larger bases on GPUs".into()),
        Block::Notice("Extrapolated from sizes. Nothing in this section was measured but the two numbers that are named.".into()),
        table(&columns, rows.collect()),
        Block::Code(FORMULA.into()),
        Block::List(vec![
            format!("Weights, adapters, keys and values have {} bytes a number.", a.bytes_per_number),
            format!("Adapters have rank {} on all linear modules.", a.rank),
            format!("Each process has a KV cache of {} tokens.", a.kv_tokens),
            format!("{} % of a GPU's memory is used.", digits(a.used * 100.0)),
            format!(
                "A process takes {} GB beside these: what was measured above beside the weights, and {} GB for the driver, which is \
                 assumed.",
                gigabytes(a.overhead),
                gigabytes(0.5e9)
            ),
            format!(
                "An adapter takes {} MB beside its numbers, its names and the like: measured above, memory less the file.",
                digits(a.adapter_overhead / 1e6)
            ),
            "Only memory is counted: how many requests a second these tasks may have is not in it. A base that is larger than a GPU \
             is taken to be spread over several, which loramux does not do."
                .into(),
        ]),
    ]
}
