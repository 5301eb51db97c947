//! The report of the runs.

use super::flops::FORMULA;
use super::run::{Run, accuracy};
use super::summary::{self, Comparison, Group, Verdict};
use super::{Kind, Options, Size, flops};
use crate::hosting::report::{Axis, Block, Plot, Point, Report, Series, Table, compact};
use crate::hosting::statistics::Spread;
use crate::hosting::statistics::chance;

/// What the report is made of.
pub struct Measured<'a> {
    pub options: &'a Options,
    pub machine: &'a serde_json::Value,
    /// Each task's name, examples and examples held out.
    pub tasks: Vec<(&'a str, usize, usize)>,
    pub runs: &'a [Run],
    pub groups: &'a [Group],
    pub comparisons: &'a [Comparison],
    /// What a reader has to know of the conditions.
    pub notices: Vec<String>,
}

fn percent(share: f64) -> String {
    format!("{:.3}", 100.0 * share).trim_end_matches('0').trim_end_matches('.').to_string() + " %"
}

fn bytes(number: f64) -> String {
    format!("{}B", compact(number))
}

/// The median, and the range where there is one.
fn spread(spread: Option<Spread>, write: &dyn Fn(f64) -> String) -> String {
    let Some(Spread { min, median, max }) = spread else { return "–".into() };
    let (low, high) = (write(min), write(max));
    if low == high { write(median) } else { format!("{} ({low} to {high})", write(median)) }
}

fn score(number: f64) -> String {
    format!("{number:.3}")
}

fn seconds(number: f64) -> String {
    if number < 100.0 { format!("{number:.1} s") } else { format!("{number:.0} s") }
}

fn strings<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_string).into()
}

pub fn report(measured: &Measured) -> Report {
    let mut blocks = introduction(measured);
    blocks.push(Block::Heading("Reading".into()));
    blocks.push(Block::List(reading(measured)));
    for &(task, examples, held_out) in &measured.tasks {
        blocks.push(Block::Heading(format!("Task {task}")));
        let groups: Vec<&Group> = measured.groups.iter().filter(|group| group.task == task).collect();
        let majority = measured.runs.iter().find(|run| run.key.task == task).and_then(Run::majority);
        let always = majority.map_or(String::new(), |m| format!(" Always to say the most frequent class is {m:.3}."));
        blocks.push(Block::Text(format!("{examples} examples to choose from, {held_out} held out.{always}")));
        blocks.push(Block::Table(stored(&groups)));
        blocks.push(Block::Text("Accuracy on what is held out, after the last step, by examples learned from:".into()));
        blocks.push(Block::Table(accuracies(&groups)));
        blocks.push(Block::Table(costs(&groups)));
        blocks.push(Block::Plot(over_examples(task, &groups)));
        blocks.extend(over_effort(task, measured.runs, &groups).into_iter().map(Block::Plot));
    }
    blocks.extend(method(measured));
    Report { title: "Transfer learning and full fine-tuning, measured".into(), blocks }
}

fn introduction(measured: &Measured) -> Vec<Block> {
    let Options { model, seeds, .. } = measured.options;
    let times = if *seeds == 1 { "once".to_string() } else { format!("with {seeds} seeds") };
    let kinds: Vec<&str> = measured.options.methods.iter().map(|method| method.kind.name()).collect();
    let text = format!(
        "{} of {model}, each trained {times} ({} runs) on the same examples. Cells have the median over the seeds and, \
         in brackets, the smallest and largest. A seed decides which examples are learned from, in which order, and the \
         numbers that new parts begin with; what is held out is the same for all.",
        kinds.join(", "),
        measured.runs.len()
    );
    let machine = measured.machine;
    let told = |key: &str| machine[key].as_str().unwrap_or("unknown").to_string();
    let memory = machine["memory_bytes"].as_f64().map_or("unknown".into(), bytes);
    let place = format!(
        "{}, {} cores, {memory} of memory, {} {}; loramux {}; {}.",
        told("cpu"),
        machine["cores"],
        told("system"),
        told("kernel"),
        told("loramux"),
        told("date")
    );
    let mut blocks = vec![Block::Text(text), Block::Text(place)];
    blocks.extend(measured.notices.iter().cloned().map(Block::Notice));
    blocks
}

/// What the numbers say, for each task and size.
fn reading(measured: &Measured) -> Vec<String> {
    let mut lines: Vec<String> = measured.comparisons.iter().filter_map(|c| compared(c, measured.groups)).collect();
    if lines.is_empty() {
        lines.push("There is no full fine-tune to compare with.".into());
    }
    for group in measured.groups {
        let majority = measured.runs.iter().find(|run| run.key.task == group.task).and_then(Run::majority);
        if group.accuracy.zip(majority).is_some_and(|(accuracy, majority)| accuracy.median <= majority) {
            let (name, examples) = (group.method.name(), group.examples);
            lines.push(format!(
                "{}, {examples} examples: {name} has learned nothing that shows: it is right no more often than one who always \
                 says the most frequent class.",
                group.task
            ));
        }
    }
    for &(task, _, held_out) in &measured.tasks {
        let best = measured.groups.iter().filter(|g| g.task == task).filter_map(|g| g.accuracy);
        let best = best.map(|s| s.median).fold(0.0, f64::max);
        let (low, high) = interval(best, held_out as f64);
        lines.push(format!(
            "{task}: what is held out is a sample, too: an accuracy of {best:.3} on {held_out} examples stands for one of \
             {low:.3} to {high:.3} (95 %). It is the same sample for all methods, so differences are known better than that."
        ));
    }
    lines
}

/// Wilson's interval of a share that was seen in `count` examples, for 95 %.
fn interval(share: f64, count: f64) -> (f64, f64) {
    let z = 1.96f64;
    let middle = share + z * z / (2.0 * count);
    let half = z * (share * (1.0 - share) / count + z * z / (4.0 * count * count)).sqrt();
    let scale = 1.0 + z * z / count;
    ((middle - half) / scale, (middle + half) / scale)
}

fn compared(c: &Comparison, groups: &[Group]) -> Option<String> {
    let find = |method: Kind| groups.iter().find(|g| g.task == c.task && g.size == c.size && g.method == method);
    let (group, full) = (find(c.method)?, find(Kind::Full)?);
    let name = c.method.name();
    let points = c.accuracy_difference.map_or("–".into(), |d| format!("{:.1} points", 100.0 * d.abs()));
    // As many seeds as the one has that has fewer.
    let seeds = group.seeds.min(full.seeds);
    let by_chance = compact(chance(seeds));
    let apart = format!("the ranges over {seeds} seeds are apart, as by chance alone in one case of {by_chance}");
    let verdict = match c.accuracy {
        Verdict::Unknown => "the spread is not known, so neither is whether they differ".to_string(),
        Verdict::NoDifference => format!("no difference seen (the ranges over {} seeds overlap)", group.seeds),
        Verdict::MethodMore => format!("{name} is better, by {points} between the medians ({apart})"),
        Verdict::FullMore => format!("full is better, by {points} between the medians ({apart})"),
    };
    let ratio = |ratio: Option<f64>| ratio.map_or("–".into(), compact);
    let time = if c.train_seconds == Verdict::NoDifference { " (no difference seen)" } else { "" };
    Some(format!(
        "{}, {} examples: {name} {} against full {}: {verdict}. Of full's time in steps {name} took {}{time}, of its CPU time in \
         them {}, of its FLOPs {}, of its peak memory {}; of its parameters {name} trained {}, of its bytes it stores {}.",
        c.task,
        group.examples,
        spread(group.accuracy, &score),
        spread(full.accuracy, &score),
        ratio(c.train_seconds_ratio),
        ratio(c.train_cpu_seconds_ratio),
        ratio(c.flops_ratio),
        ratio(c.peak_memory_ratio),
        compact(c.trained_ratio),
        ratio(c.weights_ratio),
    ))
}

/// The group of each method with the most examples, in the order of the groups.
fn largest<'a>(groups: &[&'a Group]) -> Vec<&'a Group> {
    let mut found: Vec<&Group> = Vec::new();
    for &group in groups {
        match found.iter_mut().find(|other| other.method == group.method) {
            Some(other) if other.examples < group.examples => *other = group,
            Some(_) => {}
            None => found.push(group),
        }
    }
    found
}

fn stored(groups: &[&Group]) -> Table {
    let row = |group: &&Group| {
        let weights = spread(group.weights_bytes, &bytes);
        let hosted = if group.shares_base { "an adapter beside a shared base" } else { "a whole model" };
        vec![
            group.method.name().into(),
            compact(group.trained as f64),
            percent(group.share),
            weights,
            hosted.to_string(),
        ]
    };
    Table {
        columns: strings([
            "method",
            "trained numbers",
            "of all",
            "weights stored for the task",
            "to host for the task",
        ]),
        rows: largest(groups).iter().map(row).collect(),
    }
}

fn accuracies(groups: &[&Group]) -> Table {
    let mut sizes: Vec<(usize, Size)> = groups.iter().map(|group| (group.examples, group.size)).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let row = |method: Kind| {
        let cell = |&(_, size): &(usize, Size)| {
            let found = groups.iter().find(|group| group.method == method && group.size == size);
            spread(found.and_then(|group| group.accuracy), &score)
        };
        std::iter::once(method.name().to_string()).chain(sizes.iter().map(cell)).collect()
    };
    let mut columns = vec!["method".to_string()];
    columns.extend(sizes.iter().map(|(examples, _)| format!("{examples} examples")));
    Table { columns, rows: largest(groups).iter().map(|group| row(group.method)).collect() }
}

fn costs(groups: &[&Group]) -> Table {
    let target = groups.first().map_or(String::new(), |group| format!("{:.3}", group.target));
    let mut columns = strings([
        "method, examples",
        "time in steps",
        "CPU time in steps",
        "whole run",
        "its CPU time",
        "tokens",
        "FLOPs",
    ]);
    let to = |what: &str| format!("{what} to {target}");
    columns.extend(["peak memory".into(), to("time"), to("CPU time"), to("FLOPs"), "macro-F1".into()]);
    let mut sorted = groups.to_vec();
    sorted.sort_by_key(|group| group.examples);
    let row = |group: &&Group| {
        let reached = |text: String| match group.reached {
            0 => "not reached".to_string(),
            n if n < group.seeds => format!("{text}, {n} of {}", group.seeds),
            _ => text,
        };
        vec![
            format!("{}, {}", group.method.name(), group.examples),
            spread(group.train_seconds, &seconds),
            spread(group.train_cpu_seconds, &seconds),
            spread(group.wall_seconds, &seconds),
            spread(group.cpu_seconds, &seconds),
            spread(group.tokens, &compact),
            spread(group.flops, &compact),
            spread(group.peak_memory_bytes, &bytes),
            reached(spread(group.seconds_to_target, &seconds)),
            reached(spread(group.cpu_seconds_to_target, &seconds)),
            reached(spread(group.flops_to_target, &compact)),
            spread(group.macro_f1, &score),
        ]
    };
    Table { columns, rows: sorted.iter().map(row).collect() }
}

fn axis(label: &str, log: bool) -> Axis {
    Axis { label: label.into(), log }
}

fn point(x: f64, y: Spread) -> Point {
    Point { x, y: y.median, low: Some(y.min), high: Some(y.max) }
}

fn over_examples(task: &str, groups: &[&Group]) -> Plot {
    let series = |method: Kind| {
        let own = groups.iter().filter(|group| group.method == method);
        let points = own.filter_map(|group| Some(point(group.examples as f64, group.accuracy?))).collect();
        Series { name: method.name().into(), points, dashed: false }
    };
    Plot {
        title: format!("{task}: what more examples give"),
        x: axis("examples learned from", true),
        y: axis("accuracy", false),
        series: largest(groups).iter().map(|group| series(group.method)).collect(),
    }
}

/// The accuracy at each evaluation over what had been spent until then, for the most examples.
fn over_effort(task: &str, runs: &[Run], groups: &[&Group]) -> Vec<Plot> {
    let plot = |title: &str, label: &str, effort: &dyn Fn(&Run, usize) -> Option<f64>| {
        let series = |group: &&Group| {
            let same =
                |run: &&Run| run.key.task == group.task && run.key.method == group.method && run.key.size == group.size;
            let own: Vec<&Run> = runs.iter().filter(same).collect();
            let evaluations = own.iter().map(|run| run.account.history.evaluations.len()).min().unwrap_or(0);
            let one = |i: usize| {
                let x = summary::spread(own.iter().map(|run| effort(run, i)))?.median;
                let at = |run: &&Run| accuracy(run.account.history.evaluations.get(i)?);
                Some(point(x, summary::spread(own.iter().map(at))?))
            };
            Series {
                name: group.method.name().into(),
                points: (0..evaluations).filter_map(one).collect(),
                dashed: false,
            }
        };
        let chosen = largest(groups);
        let examples = chosen.iter().map(|group| group.examples).max().unwrap_or(0);
        Plot {
            title: format!("{task}, {examples} examples: {title}"),
            x: axis(label, true),
            y: axis("accuracy", false),
            series: chosen.iter().map(series).collect(),
        }
    };
    let evaluation = |run: &Run, i: usize| run.account.history.evaluations.get(i).cloned();
    vec![
        plot("what more computing gives", "FLOPs", &|run, i| {
            Some(flops::flops(&run.account, evaluation(run, i)?.tokens))
        }),
        plot("what more CPU time gives", "CPU seconds in steps", &|run, i| evaluation(run, i)?.cpu_seconds),
    ]
}

/// How it was measured.
fn method(measured: &Measured) -> Vec<Block> {
    let options = measured.options;
    let recipe = &options.recipe;
    let epochs = match recipe.epochs {
        Some(epochs) => format!("{epochs} epochs"),
        None => format!("as many epochs as show {} examples, 1 at least", recipe.shown),
    };
    let mut items = vec![
        format!(
            "{epochs}; {} examples a step; the first {} tokens of a text; {} evaluations a run, the last of which counts, not \
             the best.",
            recipe.batch_size, recipe.max_length, recipe.evaluations
        ),
        "In steps: the time of forward and backward passes and of the optimiser; for the head, of the base's one pass over \
         the examples too. Whole run: from the program's start to its end, with loading, evaluations and writing."
            .into(),
        "CPU time is of all threads of the trainer: in steps by its own clock (CLOCK_PROCESS_CPUTIME_ID), that of the \
         whole run and peak memory as the system counts them for its parent (wait4: ru_utime, ru_stime, ru_maxrss); no peak is \
         told below the benchmark program's own size, and none has what a GPU holds."
            .into(),
        "FLOPs are computed, not measured. The learning rates are the trainer's defaults for each method unless options say \
         otherwise; how those were found, and at what cost, is not known here."
            .into(),
    ];
    if recipe.jobs > 1 {
        items.push(format!(
            "{} runs at a time, each with its share of the cores: times are those of that share, beside other runs that use \
             the same memory.",
            recipe.jobs
        ));
    }
    for method in options.methods.iter().filter(|method| !method.more.is_empty()) {
        items.push(format!("{} has the options {}.", method.kind.name(), method.more.join(" ")));
    }
    if !recipe.more.is_empty() {
        items.push(format!("All methods have the options {}.", recipe.more.join(" ")));
    }
    let mut blocks = vec![Block::Heading("How it was measured".into()), Block::List(items)];
    blocks.push(Block::Code(FORMULA.into()));
    let commands = measured.runs.iter().filter(|run| run.key.seed == 0).map(|run| run.command.join(" "));
    blocks.push(Block::Text("The commands of the first seed:".into()));
    blocks.push(Block::Code(commands.collect::<Vec<_>>().join("\n")));
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosting::methods::Recipe;
    use crate::hosting::methods::run::testing::run;

    fn markdown(runs: &[Run]) -> String {
        let recipe = Recipe {
            epochs: None,
            shown: 600,
            batch_size: 16,
            max_length: 8,
            evaluations: 4,
            held_out: 10,
            jobs: 1,
            more: vec![],
        };
        let options = Options {
            out: "out".into(),
            tasks: vec![],
            methods: vec![],
            sizes: vec![],
            seeds: 2,
            trainer: "t".into(),
            model: "m".into(),
            recipe,
            target: Some(0.8),
        };
        let groups = summary::groups(runs, options.target);
        let comparisons = summary::comparisons(&groups);
        let measured = Measured {
            options: &options,
            machine: &serde_json::Value::Null,
            tasks: vec![("t", 100, 10)],
            runs,
            groups: &groups,
            comparisons: &comparisons,
            notices: vec![],
        };
        let report = report(&measured);
        assert!(report.html().unwrap().contains("what more examples give"));
        report.markdown()
    }

    #[test]
    fn the_reading_says_what_the_numbers_say() {
        let lora = |seed, right| run(Kind::Lora, 8, seed, &[(2, 100, right, 10)]);
        let full = |seed, right| run(Kind::Full, 8, seed, &[(4, 100, right, 10)]);
        let better = markdown(&[lora(0, 6), lora(1, 7), full(0, 8), full(1, 9)]);
        assert!(better.contains("full is better, by 20.0 points"), "{better}");
        assert!(
            better.contains("Of full's time in steps lora took 0.5, of its CPU time in them 0.5, of its FLOPs 1,"),
            "{better}"
        );
        assert!(
            better.contains("| lora, 8 |") && better.contains("| not reached | not reached | not reached |"),
            "{better}"
        );
        assert!(better.contains("of its bytes it stores 0.05."), "{better}");
        let same = markdown(&[lora(0, 6), lora(1, 9), full(0, 8), full(1, 9)]);
        assert!(same.contains("no difference seen (the ranges over 2 seeds overlap)"), "{same}");
        assert!(same.contains("| lora | 0.750 (0.600 to 0.900) |"), "{same}");
        let once = markdown(&[lora(0, 6), full(0, 8)]);
        assert!(once.contains("the spread is not known"), "{once}");
        assert!(markdown(&[lora(0, 6)]).contains("no full fine-tune to compare with"));
        // All that was held out is of one class here.
        assert!(markdown(&[lora(0, 6)]).contains("t, 8 examples: lora has learned nothing that shows"));
    }

    #[test]
    fn a_share_has_an_interval() {
        let near =
            |(low, high): (f64, f64), want: (f64, f64)| (low - want.0).abs() < 1e-3 && (high - want.1).abs() < 1e-3;
        assert!(near(interval(0.8, 100.0), (0.711, 0.867)), "{:?}", interval(0.8, 100.0));
        assert!(near(interval(1.0, 60.0), (0.940, 1.0)), "{:?}", interval(1.0, 60.0));
    }
}
