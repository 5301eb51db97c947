//! Runs of different seeds as one, and methods beside each other.

use serde::Serialize;

use super::run::{Reached, Run};
use super::{Kind, Size};
use crate::hosting::statistics::Spread;

/// `None` of nothing, and where a number is missing.
pub fn spread(numbers: impl Iterator<Item = Option<f64>>) -> Option<Spread> {
    Spread::of(numbers.collect::<Option<Vec<f64>>>()?)
}

/// The runs of one method on so many examples of a task.
#[derive(Debug, Clone, Serialize)]
pub struct Group {
    pub task: String,
    pub method: Kind,
    pub size: Size,
    pub examples: usize,
    pub seeds: usize,
    pub trained: usize,
    pub parameters: usize,
    /// `trained / parameters`.
    pub share: f64,
    pub accuracy: Option<Spread>,
    pub macro_f1: Option<Spread>,
    /// In steps.
    pub train_seconds: Option<Spread>,
    pub train_cpu_seconds: Option<Spread>,
    /// Of the whole program.
    pub wall_seconds: Option<Spread>,
    pub cpu_seconds: Option<Spread>,
    pub tokens: Option<Spread>,
    pub flops: Option<Spread>,
    pub peak_memory_bytes: Option<Spread>,
    pub weights_bytes: Option<Spread>,
    /// Whether the weights are hosted beside a base that other tasks share, or are a whole model.
    pub shares_base: bool,
    pub target: f64,
    /// Of how many seeds the target was reached; the times of these.
    pub reached: usize,
    pub seconds_to_target: Option<Spread>,
    pub cpu_seconds_to_target: Option<Spread>,
    pub flops_to_target: Option<Spread>,
}

/// A method beside the full fine-tune of the same task and size. Ratios are of medians, the method's over full's.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    pub task: String,
    pub size: Size,
    pub method: Kind,
    /// The method's median less full's.
    pub accuracy_difference: Option<f64>,
    pub accuracy: Verdict,
    pub train_seconds_ratio: Option<f64>,
    pub train_seconds: Verdict,
    /// In steps, which other programs lengthen less than its time.
    pub train_cpu_seconds_ratio: Option<f64>,
    /// Of the whole program.
    pub cpu_seconds_ratio: Option<f64>,
    pub flops_ratio: Option<f64>,
    pub peak_memory_ratio: Option<f64>,
    pub weights_ratio: Option<f64>,
    pub trained_ratio: f64,
}

/// What the ranges over the seeds say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// One seed has no range.
    Unknown,
    /// The ranges overlap.
    NoDifference,
    MethodMore,
    FullMore,
}

fn verdict(method: Option<&Spread>, full: Option<&Spread>, seeds: usize) -> Verdict {
    match (method, full) {
        (Some(method), Some(full)) if seeds > 1 => match method.overlaps(full) {
            true => Verdict::NoDifference,
            false if method.min > full.max => Verdict::MethodMore,
            false => Verdict::FullMore,
        },
        _ => Verdict::Unknown,
    }
}

/// Runs of the same kind together, in the order of their first ones. A task's target is `target`, or 95 % of the best median.
pub fn groups(runs: &[Run], target: Option<f64>) -> Vec<Group> {
    let mut kinds: Vec<(&str, Kind, Size)> = Vec::new();
    for run in runs {
        let kind = (run.key.task.as_str(), run.key.method, run.key.size);
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    let of = |(task, method, size): (&str, Kind, Size)| -> Vec<&Run> {
        let same = |run: &&Run| run.key.task == task && run.key.method == method && run.key.size == size;
        runs.iter().filter(same).collect()
    };
    let target = |task: &str| {
        let medians = kinds.iter().filter(|kind| kind.0 == task);
        let medians = medians.filter_map(|&kind| spread(of(kind).iter().map(|run| run.accuracy())));
        target.unwrap_or(0.95 * medians.map(|s| s.median).fold(0.0, f64::max))
    };
    kinds.iter().filter_map(|&kind| group(&of(kind), target(kind.0))).collect()
}

fn group(runs: &[&Run], target: f64) -> Option<Group> {
    let first = runs.first()?;
    let of = |number: &dyn Fn(&Run) -> Option<f64>| spread(runs.iter().map(|run| number(run)));
    let reached: Vec<Reached> = runs.iter().filter_map(|run| run.reached(target)).collect();
    let account = &first.account;
    Some(Group {
        task: first.key.task.clone(),
        method: first.key.method,
        size: first.key.size,
        examples: first.examples,
        seeds: runs.len(),
        trained: account.trained,
        parameters: account.parameters,
        share: account.trained as f64 / account.parameters.max(1) as f64,
        accuracy: of(&Run::accuracy),
        macro_f1: of(&Run::macro_f1),
        train_seconds: of(&|run| Some(run.account.history.seconds)),
        train_cpu_seconds: of(&|run| run.account.history.cpu_seconds),
        wall_seconds: of(&|run| Some(run.wall_seconds)),
        cpu_seconds: of(&|run| run.cpu_seconds),
        tokens: of(&|run| Some(run.account.history.tokens as f64)),
        flops: of(&|run| Some(run.flops())),
        peak_memory_bytes: of(&|run| run.peak_memory_bytes.map(|bytes| bytes as f64)),
        weights_bytes: of(&|run| Some(run.weights_bytes as f64)),
        shares_base: first.key.method.shares_base(),
        target,
        reached: reached.len(),
        seconds_to_target: Spread::of(reached.iter().map(|r| r.seconds)),
        cpu_seconds_to_target: spread(reached.iter().map(|r| r.cpu_seconds)),
        flops_to_target: Spread::of(reached.iter().map(|r| r.flops)),
    })
}

/// Each method beside the full fine-tune, where there is one.
pub fn comparisons(groups: &[Group]) -> Vec<Comparison> {
    let full = |group: &Group| {
        let same = |other: &&Group| other.task == group.task && other.size == group.size && other.method == Kind::Full;
        groups.iter().find(same)
    };
    let others = groups.iter().filter(|group| group.method != Kind::Full);
    others.filter_map(|group| Some(comparison(group, full(group)?))).collect()
}

fn comparison(group: &Group, full: &Group) -> Comparison {
    let ratio = |method: Option<Spread>, full: Option<Spread>| {
        let (method, full) = (method?.median, full?.median);
        (full > 0.0).then(|| method / full)
    };
    let seeds = group.seeds.min(full.seeds);
    Comparison {
        task: group.task.clone(),
        size: group.size,
        method: group.method,
        accuracy_difference: group.accuracy.zip(full.accuracy).map(|(method, full)| method.median - full.median),
        accuracy: verdict(group.accuracy.as_ref(), full.accuracy.as_ref(), seeds),
        train_seconds_ratio: ratio(group.train_seconds, full.train_seconds),
        train_seconds: verdict(group.train_seconds.as_ref(), full.train_seconds.as_ref(), seeds),
        train_cpu_seconds_ratio: ratio(group.train_cpu_seconds, full.train_cpu_seconds),
        cpu_seconds_ratio: ratio(group.cpu_seconds, full.cpu_seconds),
        flops_ratio: ratio(group.flops, full.flops),
        peak_memory_ratio: ratio(group.peak_memory_bytes, full.peak_memory_bytes),
        weights_ratio: ratio(group.weights_bytes, full.weights_bytes),
        trained_ratio: group.trained as f64 / full.trained.max(1) as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosting::methods::run::testing::run;

    #[test]
    fn a_missing_number_leaves_no_spread() {
        assert_eq!(spread([Some(3.0), Some(1.0)].into_iter()), Some(Spread { min: 1.0, median: 2.0, max: 3.0 }));
        assert_eq!((spread([Some(1.0), None].into_iter()), spread([].into_iter())), (None, None));
    }

    #[test]
    fn ranges_that_overlap_are_no_difference() {
        let spread = |min, max| Spread { min, median: (min + max) / 2.0, max };
        let say = |method, full, seeds| verdict(Some(&method), Some(&full), seeds);
        assert_eq!(say(spread(0.7, 0.8), spread(0.8, 0.9), 3), Verdict::NoDifference);
        assert_eq!(say(spread(0.7, 0.79), spread(0.8, 0.9), 3), Verdict::FullMore);
        assert_eq!(say(spread(0.8, 0.9), spread(0.7, 0.79), 3), Verdict::MethodMore);
        assert_eq!(say(spread(0.5, 0.5), spread(0.7, 0.7), 1), Verdict::Unknown);
        assert_eq!(verdict(None, Some(&spread(0.7, 0.8)), 3), Verdict::Unknown);
    }

    #[test]
    fn runs_become_groups_and_groups_are_compared() {
        let runs = [
            run(Kind::Lora, 8, 0, &[(4, 100, 5, 10), (8, 200, 7, 10)]),
            run(Kind::Full, 8, 0, &[(10, 100, 8, 10), (20, 200, 9, 10)]),
            run(Kind::Lora, 8, 1, &[(2, 100, 8, 10), (6, 300, 8, 10)]),
            run(Kind::Full, 8, 1, &[(10, 100, 9, 10), (30, 200, 10, 10)]),
            run(Kind::Lora, 16, 0, &[(9, 100, 8, 10)]),
        ];
        let groups = groups(&runs, Some(0.8));
        let kinds: Vec<_> = groups.iter().map(|g| (g.method, g.examples, g.seeds)).collect();
        assert_eq!(kinds, [(Kind::Lora, 8, 2), (Kind::Full, 8, 2), (Kind::Lora, 16, 1)]);
        assert_eq!(groups[0].accuracy, Some(Spread { min: 0.7, median: 0.75, max: 0.8 }));
        assert_eq!(groups[0].train_seconds.unwrap().median, 7.0);
        assert_eq!((groups[0].reached, groups[0].seconds_to_target.unwrap().median), (1, 2.0));
        assert_eq!((groups[1].reached, groups[1].seconds_to_target.unwrap().median), (2, 10.0));
        assert_eq!(groups[1].cpu_seconds_to_target.unwrap().median, 20.0);
        assert_eq!(groups[0].share, 0.01);

        let comparisons = comparisons(&groups);
        assert_eq!(comparisons.len(), 1);
        let c = &comparisons[0];
        assert_eq!((c.method, c.accuracy, c.train_seconds), (Kind::Lora, Verdict::FullMore, Verdict::FullMore));
        assert!((c.accuracy_difference.unwrap() + 0.2).abs() < 1e-12);
        assert_eq!((c.train_seconds_ratio, c.weights_ratio), (Some(7.0 / 25.0), Some(0.05)));
        assert_eq!(c.train_cpu_seconds_ratio, Some(7.0 / 25.0));
    }

    #[test]
    fn without_a_target_nearly_the_best_is_one() {
        let runs = [run(Kind::Lora, 8, 0, &[(4, 100, 6, 10)]), run(Kind::Full, 8, 0, &[(9, 100, 8, 10)])];
        let groups = groups(&runs, None);
        assert!(groups.iter().all(|g| (g.target - 0.76).abs() < 1e-12));
        assert_eq!((groups[0].reached, groups[1].reached), (0, 1));
    }
}
