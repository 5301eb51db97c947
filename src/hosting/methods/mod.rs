//! Transfer learning beside full fine-tuning: each method trained on the same examples and measured.
//!
//! - [`bench`](mod@bench): the runs that are asked for, and what is written of them
//! - [`task`]: examples to learn from, and those held out for all
//! - [`run`]: one run of the trainer as a program of its own, and what it took
//! - [`flops`]: the arithmetic of a run, by a formula
//! - [`summary`]: runs of different seeds as one, and methods beside each other
//! - [`document`]: the report

mod bench;
mod document;
mod flops;
mod run;
mod summary;
mod task;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

pub use bench::bench;
pub(super) use task::sha256;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// Directory of the report and of the finished runs.
    pub out: PathBuf,
    pub tasks: Vec<Source>,
    pub methods: Vec<Method>,
    pub sizes: Vec<Size>,
    /// Runs of each kind, with seeds from 0 on.
    pub seeds: u64,
    pub trainer: PathBuf,
    pub model: String,
    pub recipe: Recipe,
    /// The accuracy whose time is told; without it, 95 % of a task's best.
    pub target: Option<f64>,
}

/// How each run is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// Passes over the examples; `None` is as many as show `shown` examples, and 1 at least.
    pub epochs: Option<usize>,
    pub shown: usize,
    pub batch_size: usize,
    /// Tokens of an example at most.
    pub max_length: usize,
    /// Evaluations of a run, spread evenly; the last one counts.
    pub evaluations: usize,
    /// Examples of each task to evaluate on.
    pub held_out: usize,
    /// Runs at a time, each with its share of the cores.
    #[serde(default = "one")]
    pub jobs: usize,
    /// More options of the trainer, for all methods.
    pub more: Vec<String>,
}

fn one() -> usize {
    1
}

impl Recipe {
    fn epochs(&self, examples: usize) -> usize {
        self.epochs.unwrap_or_else(|| self.shown.div_ceil(examples.max(1)).max(1))
    }

    /// Steps between evaluations.
    fn eval_every(&self, examples: usize) -> usize {
        let steps = self.epochs(examples) * examples.div_ceil(self.batch_size.max(1));
        steps.div_ceil(self.evaluations.max(1)).max(1)
    }
}

/// A task and its files.
#[derive(Debug, Clone)]
pub struct Source {
    pub name: String,
    pub train: PathBuf,
    /// Without it, some of `train` are held out.
    pub test: Option<PathBuf>,
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no task; expected NAME=TRAIN or NAME=TRAIN,TEST");
        let (name, files) = text.split_once('=').ok_or_else(wrong)?;
        let (train, test) = files.split_once(',').map_or((files, None), |(train, test)| (train, Some(test)));
        // It is a part of files' names.
        let named = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.');
        if !named || train.is_empty() || test.is_some_and(str::is_empty) {
            return Err(format!("{}; a name has letters, digits, _ and .", wrong()));
        }
        Ok(Source { name: name.into(), train: train.into(), test: test.map(Into::into) })
    }
}

/// What is trained, with more options of the trainer for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Method {
    pub kind: Kind,
    pub more: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    Lora,
    LastLayers,
    Head,
    Full,
}

impl Kind {
    /// The trainer's name for it.
    fn name(self) -> &'static str {
        match self {
            Kind::Lora => "lora",
            Kind::LastLayers => "last-layers",
            Kind::Head => "head",
            Kind::Full => "full",
        }
    }

    /// Whether its result is hosted beside a base that others share.
    fn shares_base(self) -> bool {
        matches!(self, Kind::Lora | Kind::Head)
    }
}

/// How many examples are learned from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Size {
    Some(usize),
    All,
}

impl Size {
    /// Of so many examples.
    fn examples(self, all: usize) -> usize {
        match self {
            Size::Some(n) => n,
            Size::All => all,
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Size::Some(n) => write!(f, "{n}"),
            Size::All => write!(f, "all"),
        }
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(n) if n > 0 => Ok(Size::Some(n)),
            _ if text == "all" => Ok(Size::All),
            _ => Err(format!("{text:?} is no number of examples; expected one above 0, or all")),
        }
    }
}

impl From<Size> for String {
    fn from(size: Size) -> Self {
        size.to_string()
    }
}

impl TryFrom<String> for Size {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

fn check(options: &Options) -> Result<()> {
    let wrong = |what: &str| Err(Error::bad_request(what));
    let Recipe { epochs, batch_size, max_length, evaluations, held_out, jobs, .. } = options.recipe;
    if options.tasks.is_empty() || options.methods.is_empty() || options.sizes.is_empty() || options.seeds == 0 {
        return wrong("one task, one method, one size and one seed are needed at least");
    }
    if epochs == Some(0) || batch_size == 0 || max_length == 0 || evaluations == 0 || held_out == 0 || jobs == 0 {
        return wrong("--epochs, --batch-size, --max-length, --evaluations, --held-out and --jobs must be 1 or more");
    }
    if options.target.is_some_and(|target| !(0.0..=1.0).contains(&target)) {
        return wrong("--target is an accuracy, from 0 to 1");
    }
    let mut names: Vec<&str> = options.tasks.iter().map(|task| task.name.as_str()).collect();
    names.sort_unstable();
    if names.windows(2).any(|pair| pair[0] == pair[1]) {
        return wrong("two tasks have the same name");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_and_sizes_are_read() {
        let task: Source = "news=a/train.csv,a/test.csv".parse().unwrap();
        assert_eq!((task.name.as_str(), task.train), ("news", "a/train.csv".into()));
        assert_eq!(task.test, Some("a/test.csv".into()));
        assert_eq!("news=a.csv".parse::<Source>().unwrap().test, None);
        for wrong in ["news", "=a.csv", "news=", "news=a,", "../x=a.csv", "a-b=c"] {
            assert!(wrong.parse::<Source>().is_err(), "{wrong}");
        }
        assert_eq!(["7".parse(), "all".parse()], [Ok(Size::Some(7)), Ok(Size::All)]);
        assert!("0".parse::<Size>().is_err() && "-1".parse::<Size>().is_err());
    }

    #[test]
    fn few_examples_are_shown_more_often() {
        let recipe = |epochs| Recipe {
            epochs,
            shown: 600,
            batch_size: 16,
            max_length: 8,
            evaluations: 4,
            held_out: 1,
            jobs: 1,
            more: vec![],
        };
        assert_eq!([50, 200, 7000].map(|n| recipe(None).epochs(n)), [12, 3, 1]);
        assert_eq!([50, 7000].map(|n| recipe(Some(2)).epochs(n)), [2, 2]);
        // 12 epochs of 4 steps; 2 of 438.
        assert_eq!((recipe(None).eval_every(50), recipe(Some(2)).eval_every(7000)), (12, 219));
        assert_eq!(recipe(Some(1)).eval_every(1), 1);
    }
}
