//! The runs that are asked for, and what is written of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use futures::{StreamExt, TryFutureExt, TryStreamExt, stream};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::document::{self, Measured};
use super::flops::FORMULA;
use super::run::{self, Key, Run};
use super::task::{Data, Task, sha256};
use super::{Kind, Method, Options, Recipe, Size, check, summary};
use crate::hosting::process::forget_options;
use crate::hosting::{machine, record};
use crate::{Error, Result, output};

/// What runs must have in common to stand in one report. Tasks and methods may be added later.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Settings {
    model: String,
    trainer: String,
    recipe: Recipe,
    tasks: BTreeMap<String, Data>,
    /// The options of each.
    methods: BTreeMap<Kind, Vec<String>>,
}

impl Settings {
    /// Adds the tasks and methods of a directory's earlier settings, or says what is not the same.
    fn join(&mut self, earlier: Settings) -> Result<(), String> {
        let (then, now) = (json!(earlier), json!(self));
        for key in ["model", "trainer"] {
            differ(key, &then[key], &now[key])?;
        }
        for key in now["recipe"].as_object().into_iter().flatten().map(|(key, _)| key) {
            differ(key, &then["recipe"][key], &now["recipe"][key])?;
        }
        for (name, data) in earlier.tasks {
            let now = self.tasks.entry(name.clone()).or_insert_with(|| data.clone());
            differ(&format!("the data of {name}"), &json!(data), &json!(now))?;
        }
        for (kind, more) in earlier.methods {
            let now = self.methods.entry(kind).or_insert_with(|| more.clone());
            differ(&format!("the options of {}", kind.name()), &json!(more), &json!(now))?;
        }
        Ok(())
    }
}

fn differ(what: &str, then: &Value, now: &Value) -> Result<(), String> {
    if then == now { Ok(()) } else { Err(format!("{what} was {then} and is now {now}")) }
}

/// Trains what has not been trained yet, and writes `report.json`, `report.md` and `report.html`. Dropped before its
/// end, it leaves the finished runs to the next one.
pub async fn bench(options: Options) -> Result<()> {
    check(&options)?;
    let runs = options.out.join("runs");
    fs::create_dir_all(&runs).map_err(|e| Error::bad_request(format!("{}: {e}", options.out.display())))?;
    let data = options.out.join("data");
    let tasks = options.tasks.iter().map(|source| Task::prepare(source, options.recipe.held_out, &data));
    let tasks = tasks.collect::<Result<Vec<_>>>()?;
    let settings = settings(&options, &tasks)?;
    let settings = agree(&options.out.join("settings.json"), settings)?;

    let planned = plan(&options, &tasks);
    let bar = ProgressBar::new(planned.len() as u64);
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} runs, {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    tracing::info!("{} runs; what is finished stays in {} when interrupted", planned.len(), runs.display());
    let trainer = sha256(&fs::read(&options.trainer)?);
    let run = |key: Key| async {
        let file = runs.join(key.file());
        let name = format!("{}, {}, {} examples, seed {}", key.task, key.method.name(), key.size, key.seed);
        let run = match read(&file, &key)? {
            Some(run) => run,
            None => {
                bar.set_message(name.clone());
                let task = tasks.iter().find(|task| task.name == key.task);
                let task = task.ok_or_else(|| Error::internal(format!("{} is planned without a task", key.task)))?;
                let mut run = train(&options, task, key).await.map_err(|e| e.context(&name))?;
                run.trainer_sha256 = Some(trainer.clone());
                record::write(&file, &serde_json::to_string(&run).map_err(Error::internal)?)?;
                let accuracy = run.accuracy().unwrap_or(f64::NAN);
                bar.suspend(|| tracing::info!("{name}: accuracy {accuracy:.3}, {:.1} s", run.wall_seconds));
                run
            }
        };
        bar.inc(1);
        Ok::<_, Error>(run)
    };
    // A long run keeps none of those after it waiting.
    let placed = planned.into_iter().enumerate().map(|(place, key)| run(key).map_ok(move |run| (place, run)));
    let finished: BTreeMap<usize, Run> =
        stream::iter(placed).buffer_unordered(options.recipe.jobs).try_collect().await?;
    let finished: Vec<Run> = finished.into_values().collect();
    bar.finish_and_clear();
    report(&options, &tasks, &settings, &finished)
}

fn settings(options: &Options, tasks: &[Task]) -> Result<Settings> {
    let version = Command::new(&options.trainer).arg("--version").output();
    let version = version.map_err(|e| Error::bad_request(format!("--trainer {}: {e}", options.trainer.display())))?;
    if !version.status.success() {
        return Err(Error::bad_request(format!("--trainer {} has no --version", options.trainer.display())));
    }
    Ok(Settings {
        model: options.model.clone(),
        trainer: String::from_utf8_lossy(&version.stdout).trim().to_string(),
        recipe: options.recipe.clone(),
        tasks: tasks.iter().map(|task| (task.name.clone(), task.data.clone())).collect(),
        methods: options.methods.iter().map(|method| (method.kind, method.more.clone())).collect(),
    })
}

/// Writes the settings, or refuses those that do not go with what `path` holds already.
fn agree(path: &Path, mut settings: Settings) -> Result<Settings> {
    if let Some(earlier) = record::read::<Settings>(path)? {
        settings.join(earlier).map_err(|what| {
            let folder = path.parent().unwrap_or(path).display();
            Error::bad_request(format!("{folder} holds runs of other settings: {what}; choose another --out"))
        })?;
    }
    record::write(path, &serde_json::to_string_pretty(&settings).map_err(Error::internal)?)?;
    Ok(settings)
}

/// All runs, in an order in which those interrupted early have all methods of few examples.
fn plan(options: &Options, tasks: &[Task]) -> Vec<Key> {
    let mut sizes = options.sizes.clone();
    sizes.sort();
    let mut planned = Vec::new();
    for seed in 0..options.seeds {
        for &size in &sizes {
            for task in tasks {
                // More than there are is all of them.
                let size = if size >= Size::Some(task.data.examples) { Size::All } else { size };
                for &Method { kind: method, .. } in &options.methods {
                    let key = Key { task: task.name.clone(), method, size, seed };
                    if !planned.contains(&key) {
                        planned.push(key);
                    }
                }
            }
        }
    }
    planned
}

/// The run in a file, if it is there.
fn read(file: &Path, key: &Key) -> Result<Option<Run>> {
    let run = record::read::<Run>(file)?;
    match run {
        Some(run) if run.key != *key => {
            Err(Error::bad_request(format!("{} is of another run; remove it to run it again", file.display())))
        }
        run => Ok(run),
    }
}

async fn train(options: &Options, task: &Task, key: Key) -> Result<Run> {
    let folder = tempfile::Builder::new().prefix(".run-").tempdir_in(&options.out)?;
    let out = folder.path().join("out");
    let examples = key.size.examples(task.data.examples);
    let recipe = &options.recipe;
    let mut arguments: Vec<String> = vec![key.method.name().into()];
    let mut add = |name: &str, value: String| arguments.extend([format!("--{name}"), value]);
    add("task", "classify".into());
    add("model", options.model.clone());
    add("data", task.train.display().to_string());
    add("eval", task.held_out.display().to_string());
    if let Size::Some(limit) = key.size {
        add("limit", limit.to_string());
    }
    add("seed", key.seed.to_string());
    add("epochs", recipe.epochs(examples).to_string());
    add("batch-size", recipe.batch_size.to_string());
    add("max-length", recipe.max_length.to_string());
    if recipe.jobs > 1 {
        let cores = std::thread::available_parallelism()?.get();
        add("threads", (cores / recipe.jobs).max(1).to_string());
    }
    add("eval-every", recipe.eval_every(examples).to_string());
    // A run that is interrupted begins anew, so that its times are of one piece.
    add("checkpoint-every", "0".into());
    arguments.extend(recipe.more.iter().cloned());
    let own = options.methods.iter().find(|method| method.kind == key.method);
    arguments.extend(own.into_iter().flat_map(|method| method.more.iter().cloned()));
    let mut command = Command::new(&options.trainer);
    forget_options(&mut command);
    command.args(&arguments).arg("--out").arg(&out);
    let usage = run::watch(command, &folder.path().join("log")).await?;
    let account = record::read(&out.join("history.json"))?;
    let account = account.ok_or_else(|| Error::internal("the trainer wrote no history.json"))?;
    let machine = machine();
    let text = |name: &str| machine[name].as_str().map(str::to_string);
    Ok(Run {
        examples,
        command: std::iter::once("loramux-train".to_string()).chain(arguments).collect(),
        wall_seconds: usage.wall_seconds,
        cpu_seconds: usage.cpu_seconds,
        peak_memory_bytes: usage.peak_memory_bytes,
        weights_bytes: run::weights_bytes(&out)?,
        trainer_sha256: None,
        cpu: text("cpu"),
        date: text("date"),
        account,
        key,
    })
}

fn report(options: &Options, tasks: &[Task], settings: &Settings, runs: &[Run]) -> Result<()> {
    let machine = machine();
    let groups = summary::groups(runs, options.target);
    let comparisons = summary::comparisons(&groups);
    let measured = Measured {
        options,
        machine: &machine,
        tasks: tasks.iter().map(|task| (task.name.as_str(), task.data.examples, task.data.held_out)).collect(),
        runs,
        groups: &groups,
        comparisons: &comparisons,
        notices: notices(runs, machine["cores"].as_f64().map(|cores| cores / options.recipe.jobs as f64)),
    };
    let document = document::report(&measured);
    let all = json!({ "machine": machine, "settings": settings, "flops": FORMULA, "groups": groups,
        "comparisons": comparisons, "notices": measured.notices, "runs": runs });
    let path = |name: &str| options.out.join(name);
    record::write(&path("report.json"), &(serde_json::to_string_pretty(&all).map_err(Error::internal)? + "\n"))?;
    record::write(&path("report.md"), &document.markdown())?;
    record::write(&path("report.html"), &document.html()?)?;
    output::line(path("report.html").display())
}

/// What makes times of the runs less comparable. `cores` are those of a run.
fn notices(runs: &[Run], cores: Option<f64>) -> Vec<String> {
    let mut notices = Vec::new();
    let different = |of: &dyn Fn(&Run) -> Option<&str>| -> Vec<String> {
        runs.iter().map(|run| of(run).unwrap_or("unknown").to_string()).collect::<BTreeSet<_>>().into_iter().collect()
    };
    let cpus = different(&|run| run.cpu.as_deref());
    if cpus.len() > 1 {
        notices.push(format!("Runs are of different machines, so times do not compare: {}.", cpus.join("; ")));
    }
    let builds = different(&|run| run.trainer_sha256.as_deref()).len();
    if builds > 1 {
        notices.push(format!("Runs are of {builds} builds of the trainer, so times may not compare."));
    }
    let busy = runs.iter().filter_map(|run| Some(run.cpu_seconds? / (run.wall_seconds * cores?)));
    let busy: Vec<f64> = busy.filter(|share| share.is_finite()).collect();
    if let Some(least) = busy.iter().copied().reduce(f64::min) {
        let mean = busy.iter().sum::<f64>() / busy.len() as f64;
        notices.push(format!(
            "The trainer had {:.0} % of its cores' time on average, {:.0} % in the run with least. Where other programs share \
             the cores, times are longer than they would be alone, CPU times less so.",
            100.0 * mean,
            100.0 * least
        ));
    }
    notices
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosting::methods::Source;
    use crate::hosting::methods::run::testing;

    fn recipe() -> Recipe {
        Recipe {
            epochs: Some(1),
            shown: 600,
            batch_size: 16,
            max_length: 8,
            evaluations: 4,
            held_out: 10,
            jobs: 1,
            more: vec![],
        }
    }

    fn data(examples: usize) -> Data {
        Data { examples, held_out: 10, train_sha256: "a".into(), held_out_sha256: "b".into() }
    }

    fn settings() -> Settings {
        Settings {
            model: "m".into(),
            trainer: "loramux-train 1".into(),
            recipe: recipe(),
            tasks: [("a".to_string(), data(5))].into(),
            methods: [(Kind::Lora, vec![])].into(),
        }
    }

    #[test]
    fn a_directory_takes_more_tasks_but_no_other_settings() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("settings.json");
        agree(&path, settings()).unwrap();
        agree(&path, settings()).unwrap();
        let mut other = settings();
        other.tasks = [("b".to_string(), data(7))].into();
        other.methods = [(Kind::Full, vec!["--weight-decay".to_string(), "0.1".into()])].into();
        let both = agree(&path, other).unwrap();
        assert_eq!((both.tasks.len(), both.methods.len()), (2, 2));
        // What was there first still counts.
        let refused = |change: &dyn Fn(&mut Settings)| {
            let mut changed = settings();
            change(&mut changed);
            agree(&path, changed).unwrap_err().message
        };
        for (change, word) in [
            (&(|s: &mut Settings| s.model = "n".into()) as &dyn Fn(&mut Settings), "model was \"m\" and is now \"n\""),
            (&|s| s.recipe.epochs = None, "epochs was 1 and is now null"),
            (&|s| s.trainer = "loramux-train 2".into(), "trainer"),
            (&|s| s.tasks = [("a".to_string(), data(6))].into(), "the data of a"),
            (&|s| s.methods = [(Kind::Full, vec![])].into(), "the options of full"),
        ] {
            let message = refused(change);
            assert!(message.contains("other settings") && message.contains(word), "{message}");
        }
        assert_eq!(record::read::<Settings>(&path).unwrap().unwrap(), both);
    }

    #[test]
    fn finished_runs_are_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let run = testing::run(Kind::Lora, 8, 3, &[(5, 100, 6, 10), (9, 200, 8, 10)]);
        let file = folder.path().join(run.key.file());
        assert!(read(&file, &run.key).unwrap().is_none());
        record::write(&file, &serde_json::to_string(&run).unwrap()).unwrap();
        let again = read(&file, &run.key).unwrap().unwrap();
        assert_eq!((json!(again), again.flops(), again.accuracy()), (json!(run), run.flops(), Some(0.8)));
        let other = Key { seed: 4, ..run.key };
        assert!(read(&file, &other).unwrap_err().message.contains("another run"));
        fs::write(&file, "{\"task\": ").unwrap();
        assert!(read(&file, &other).unwrap_err().message.contains("t-lora-8-3.json"));
    }

    #[test]
    fn small_runs_come_first_and_more_than_all_is_all() {
        let options = Options {
            out: "out".into(),
            tasks: Vec::<Source>::new(),
            methods: [Kind::Lora, Kind::Full].map(|kind| Method { kind, more: vec![] }).into(),
            sizes: vec![Size::All, Size::Some(50), Size::Some(20)],
            seeds: 2,
            trainer: "t".into(),
            model: "m".into(),
            recipe: recipe(),
            target: None,
        };
        let task = Task { name: "a".into(), train: "x".into(), held_out: "y".into(), data: data(50) };
        let planned: Vec<String> = plan(&options, &[task]).iter().map(Key::file).collect();
        let expected = ["a-lora-20-0", "a-full-20-0", "a-lora-all-0", "a-full-all-0"];
        assert_eq!(planned[..4], expected.map(|name| format!("{name}.json")));
        assert_eq!(planned.len(), 8);
    }

    #[test]
    fn what_does_not_compare_is_told() {
        let of = |cpu: &str, trainer: &str, cpu_seconds: f64| Run {
            cpu: Some(cpu.into()),
            trainer_sha256: Some(trainer.into()),
            cpu_seconds: Some(cpu_seconds),
            wall_seconds: 10.0,
            ..testing::run(Kind::Lora, 8, 0, &[(9, 200, 8, 10)])
        };
        let same = notices(&[of("a", "x", 20.0), of("a", "x", 10.0)], Some(2.0));
        assert!(
            same.len() == 1 && same[0].contains("75 %") && same[0].contains("50 % in the run with least"),
            "{same:?}"
        );
        let mixed = notices(&[of("a", "x", 20.0), of("b", "y", 20.0)], None);
        assert!(mixed.len() == 2 && mixed[0].contains("a; b") && mixed[1].contains("2 builds"), "{mixed:?}");
    }
}
