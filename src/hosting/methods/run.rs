//! One run of the trainer as a program of its own, and what it took.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Kind, Size, flops};
use crate::train::{Account, Evaluation};
use crate::{Error, Result};

/// Which run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    pub task: String,
    pub method: Kind,
    pub size: Size,
    pub seed: u64,
}

impl Key {
    /// The name of its file.
    pub fn file(&self) -> String {
        format!("{}-{}-{}-{}.json", self.task, self.method.name(), self.size, self.seed)
    }
}

/// A finished run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Run {
    #[serde(flatten)]
    pub key: Key,
    pub examples: usize,
    pub command: Vec<String>,
    /// From the start of the program to its end: with loading, evaluations and writing.
    pub wall_seconds: f64,
    /// Of all its threads, in user and system mode.
    pub cpu_seconds: Option<f64>,
    pub peak_memory_bytes: Option<u64>,
    /// Of the weights' file that it wrote.
    pub weights_bytes: u64,
    /// Which trainer, on which CPU, when.
    pub trainer_sha256: Option<String>,
    pub cpu: Option<String>,
    pub date: Option<String>,
    pub account: Account,
}

impl Run {
    /// The last evaluation, not the best, so that nothing is chosen by what was held out.
    pub fn last(&self) -> Option<&Evaluation> {
        self.account.history.evaluations.last()
    }

    pub fn accuracy(&self) -> Option<f64> {
        self.last().and_then(accuracy)
    }

    pub fn macro_f1(&self) -> Option<f64> {
        Some(self.last()?.confusion.as_ref()?.macro_f1())
    }

    pub fn flops(&self) -> f64 {
        flops::flops(&self.account, self.account.history.tokens)
    }

    /// The share of the class that most of what was held out is of.
    pub fn majority(&self) -> Option<f64> {
        let rows = &self.last()?.confusion.as_ref()?.0;
        let counts: Vec<usize> = rows.iter().map(|row| row.iter().sum()).collect();
        Some(*counts.iter().max()? as f64 / counts.iter().sum::<usize>().max(1) as f64)
    }

    /// What training took until the first evaluation of at least this accuracy.
    pub fn reached(&self, accuracy_wanted: f64) -> Option<Reached> {
        let mut evaluations = self.account.history.evaluations.iter();
        let first = evaluations.find(|e| accuracy(e).is_some_and(|a| a >= accuracy_wanted))?;
        let flops = flops::flops(&self.account, first.tokens);
        Some(Reached { seconds: first.seconds, cpu_seconds: first.cpu_seconds, flops })
    }
}

/// What training took until an accuracy was reached.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reached {
    pub seconds: f64,
    pub cpu_seconds: Option<f64>,
    pub flops: f64,
}

pub fn accuracy(evaluation: &Evaluation) -> Option<f64> {
    evaluation.confusion.as_ref().map(|c| c.accuracy())
}

/// What a program took.
#[derive(Debug)]
pub struct Usage {
    pub wall_seconds: f64,
    pub cpu_seconds: Option<f64>,
    pub peak_memory_bytes: Option<u64>,
}

/// How often a running program is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// Runs a program to its end; what it says goes to `log`. Dropped before that, it is killed.
pub async fn watch(mut command: Command, log: &Path) -> Result<Usage> {
    let name = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(log)?);
    let start = Instant::now();
    let child = command.spawn().map_err(|e| Error::bad_request(format!("{name} could not be started: {e}")))?;
    let mut running = Running { child, ended: false };
    let (status, mut usage) = loop {
        if let Some(end) = running.look()? {
            break end;
        }
        tokio::time::sleep(LOOK).await;
    };
    usage.wall_seconds = start.elapsed().as_secs_f64();
    if status.success() {
        return Ok(usage);
    }
    let said = fs::read_to_string(log).unwrap_or_default();
    let last: Vec<&str> = said.lines().rev().take(8).collect();
    let last: Vec<&str> = last.into_iter().rev().collect();
    let arguments: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
    Err(Error::internal(format!("{name} {}: {status}\n{}", arguments.join(" "), last.join("\n"))))
}

struct Running {
    child: Child,
    ended: bool,
}

impl Running {
    /// Whether it has ended, how, and what the system says that it took. Its time is the caller's to tell.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    fn look(&mut self) -> Result<Option<(ExitStatus, Usage)>> {
        use std::os::unix::process::ExitStatusExt;

        let mut status = 0;
        // SAFETY: it is a struct of numbers, for which 0 is a value.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: both places may be written, and the program is a child of this one whose end nobody has asked for yet.
        match unsafe { libc::wait4(self.child.id() as libc::pid_t, &mut status, libc::WNOHANG, &mut usage) } {
            0 => Ok(None),
            -1 => Err(std::io::Error::last_os_error().into()),
            _ => {
                self.ended = true;
                let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
                let usage = Usage {
                    wall_seconds: 0.0,
                    cpu_seconds: Some(seconds(usage.ru_utime) + seconds(usage.ru_stime)),
                    // Linux counts it in KiB.
                    peak_memory_bytes: u64::try_from(usage.ru_maxrss).ok().map(|kib| kib * 1024),
                };
                Ok(Some((ExitStatus::from_raw(status), usage)))
            }
        }
    }

    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    fn look(&mut self) -> Result<Option<(ExitStatus, Usage)>> {
        let Some(status) = self.child.try_wait()? else { return Ok(None) };
        self.ended = true;
        Ok(Some((status, Usage { wall_seconds: 0.0, cpu_seconds: None, peak_memory_bytes: None })))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The bytes of the weights in a directory that the trainer wrote.
pub fn weights_bytes(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for file in fs::read_dir(folder)? {
        let file = file?;
        if file.path().extension().is_some_and(|e| e == "safetensors") {
            bytes += file.metadata()?.len();
        }
    }
    Ok(bytes)
}

#[cfg(test)]
pub mod testing {
    use super::*;
    use crate::train::{Confusion, History, Multiplied};

    /// A run of two classes with evaluations of (seconds, tokens, right, all).
    pub fn account(evaluations: &[(u64, usize, usize, usize)]) -> Account {
        let evaluation = |(step, &(seconds, tokens, right, all)): (usize, &(u64, usize, usize, usize))| Evaluation {
            step: step + 1,
            loss: 0.5,
            confusion: Some(Confusion(vec![vec![right, all - right], vec![0, 0]])),
            seconds: seconds as f64,
            cpu_seconds: Some(2.0 * seconds as f64),
            tokens,
        };
        let evaluations: Vec<Evaluation> = evaluations.iter().enumerate().map(evaluation).collect();
        let last = evaluations.last().unwrap();
        let (seconds, tokens, step) = (last.seconds, last.tokens, last.step);
        let cpu_seconds = last.cpu_seconds;
        let losses = vec![0.5; step];
        let history = History { step, losses, evaluations, best: Some(0), seconds, cpu_seconds, tokens };
        Account {
            history,
            trained: 10,
            parameters: 1000,
            multiplied: Multiplied { forward: 900, again: 0, backward: 900, gradients: 9 },
            example_tokens: 50,
        }
    }

    pub fn run(method: Kind, size: usize, seed: u64, evaluations: &[(u64, usize, usize, usize)]) -> Run {
        Run {
            key: Key { task: "t".into(), method, size: Size::Some(size), seed },
            examples: size,
            command: vec![],
            wall_seconds: 1.0 + evaluations.last().unwrap().0 as f64,
            cpu_seconds: Some(2.0),
            peak_memory_bytes: Some(1 << 20),
            weights_bytes: if method.shares_base() { 100 } else { 2000 },
            trainer_sha256: None,
            cpu: None,
            date: None,
            account: account(evaluations),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_reached_at_the_first_evaluation_that_has_it() {
        let run = testing::run(Kind::Lora, 8, 0, &[(5, 100, 6, 10), (9, 200, 8, 10), (14, 300, 7, 10)]);
        let per_token = 2.0 * (900 + 900 + 9) as f64;
        let reached =
            |seconds, tokens| Some(Reached { seconds, cpu_seconds: Some(2.0 * seconds), flops: tokens * per_token });
        assert_eq!(run.reached(0.6), reached(5.0, 100.0));
        assert_eq!(run.reached(0.8), reached(9.0, 200.0));
        assert_eq!(run.reached(0.81), None);
        // The last one counts, though the second was better.
        assert_eq!((run.accuracy(), run.flops()), (Some(0.7), 300.0 * per_token));
    }

    #[tokio::test]
    async fn what_a_program_took_is_told_and_why_it_failed() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let shell = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        };
        let usage = watch(shell("exit 0"), &log).await.unwrap();
        assert!(usage.wall_seconds > 0.0);
        if cfg!(all(target_os = "linux", target_env = "gnu")) {
            assert!(usage.peak_memory_bytes.unwrap() > 100_000 && usage.cpu_seconds.is_some());
        }
        let error = watch(shell("echo no such thing >&2; exit 3"), &log).await.unwrap_err();
        assert!(error.message.contains("no such thing") && error.message.contains('3'), "{error}");
        assert!(watch(Command::new("/nowhere/at/all"), &log).await.unwrap_err().message.contains("/nowhere"));
    }

    /// Whoever stops waiting leaves nothing running.
    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_program_ends_with_whoever_waits_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let (log, id) = (folder.path().join("log"), folder.path().join("id"));
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$ > \"$0.new\"; mv \"$0.new\" \"$0\"; exec sleep 1000"]).arg(&id);
        let started = async {
            while !id.exists() {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            ended = watch(command, &log) => panic!("it has ended: {ended:?}"),
            _ = started => {}
        }
        let id = fs::read_to_string(&id).unwrap();
        assert!(!Path::new("/proc").join(id.trim()).exists());
    }
}
