//! The two ways to host tasks that are compared: one base with their adapters, and a full model for each.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use futures::future::try_join_all;
use serde::{Deserialize, Serialize};

use super::copy;
use super::process::{Memory, Process};
use super::traffic::{self, Hosts};
use crate::base::Base;
use crate::cli::{self, Client};
use crate::{Error, Result, adapter};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// One server with all adapters.
    Shared,
    /// A server for each task, without adapters.
    Copies,
}

impl Kind {
    pub const ALL: [Kind; 2] = [Kind::Shared, Kind::Copies];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Shared => "shared",
            Kind::Copies => "copies",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Work {
    Classify,
    Generate,
}

/// An adapter that tasks are made of.
struct Origin {
    directory: PathBuf,
    work: Work,
}

/// What fleets are made of: tasks without end, which take turns with the adapters that they are made of. Each has an adapter
/// of its own, some as full models.
pub struct Setup {
    /// The `loramux` program.
    program: PathBuf,
    folder: PathBuf,
    origins: Vec<Origin>,
    /// How many tasks have a full model of their own, of each adapter one or more.
    copies: usize,
    /// Options of every server.
    options: Vec<String>,
}

impl Setup {
    /// Makes what fleets of up to `copies` tasks need, in `folder`: from each adapter in the folder `adapters` full models, the
    /// base with the adapter added to it. What is there already stays.
    pub fn prepare(
        model: &str,
        adapters: &Path,
        copies: usize,
        folder: &Path,
        options: Vec<String>,
        mut progress: impl FnMut(String),
    ) -> Result<Self> {
        let named = |e: std::io::Error| Error::bad_request(format!("--adapters {}: {e}", adapters.display()));
        let mut sources = vec![];
        for entry in fs::read_dir(adapters).map_err(named)? {
            sources.push(entry.map_err(named)?.path());
        }
        sources.retain(|path| adapter::is_adapter(path));
        sources.sort();
        if sources.is_empty() {
            return Err(Error::bad_request(format!("--adapters {}: it holds no adapter", adapters.display())));
        }
        let base = Base::open(model)?;
        let program = std::env::current_exe()?;
        let copies = copies.max(sources.len());
        let mut setup = Setup { program, folder: folder.into(), origins: vec![], copies, options };
        progress("writing the base".into());
        whole(&setup.base(), |out| copy::write(&base, None, out))?;
        for (task, directory) in sources.into_iter().enumerate() {
            let of = |e: Error| e.context(directory.display());
            let adapter = adapter::load(&directory, &base.config, &base.id).map_err(of)?.adapter;
            let has_head = adapter.head.is_some() || base.head.is_some();
            let work = if has_head { Work::Classify } else { Work::Generate };
            setup.origins.push(Origin { directory: directory.clone(), work });
            progress(format!("writing {} as a full model", directory.display()));
            whole(&setup.copy(task), |out| copy::write(&base, Some(&adapter), out)).map_err(of)?;
        }
        for task in setup.origins.len()..copies {
            progress(format!("copying full model {} of {copies}", task + 1));
            let first = setup.copy(task % setup.origins.len());
            whole(&setup.copy(task), |out| copy_files(&first, out))?;
        }
        Ok(setup)
    }

    fn origin(&self, task: usize) -> &Origin {
        &self.origins[task % self.origins.len()]
    }

    fn name(&self, task: usize) -> String {
        let short = self.origin(task).directory.file_name().unwrap_or_default().to_string_lossy();
        format!("task-{:03}-{short}", task + 1)
    }

    /// The base in the same form as the copies.
    fn base(&self) -> PathBuf {
        self.folder.join("base")
    }

    /// A task's full model. A task beyond those that have one of their own shares that of another one of its adapter.
    fn copy(&self, task: usize) -> PathBuf {
        let owner = if task < self.copies { task } else { task % self.origins.len() };
        self.folder.join("copies").join(self.name(owner))
    }

    /// A task's adapter, made when it is first needed.
    fn adapter(&self, task: usize) -> Result<PathBuf> {
        let out = self.folder.join("adapters").join(self.name(task));
        let (origin, variant) = (self.origin(task), (task / self.origins.len()) as u16);
        whole(&out, |out| {
            copy_files(&origin.directory, out)?;
            vary(&out.join("adapter_model.safetensors"), variant)
        })
        .map_err(|e| e.context(origin.directory.display()))?;
        Ok(out)
    }

    /// Bytes of the files that a fleet of `tasks` tasks is served from.
    pub fn disk(&self, kind: Kind, tasks: usize) -> Result<u64> {
        match kind {
            Kind::Shared => (0..tasks).try_fold(size(&self.base())?, |n, task| Ok(n + size(&self.adapter(task)?)?)),
            Kind::Copies => (0..tasks).try_fold(0, |n, task| Ok(n + size(&self.copy(task))?)),
        }
    }

    fn spawn(&self, model: &Path, adapters: Option<&Path>, more: &[String], store: &str) -> Result<Process> {
        let path = |p: &Path| p.display().to_string();
        let mut options = vec!["--model".to_string(), path(model)];
        if let Some(adapters) = adapters {
            options.extend(["--adapters".to_string(), path(adapters)]);
        }
        options.extend(self.options.iter().chain(more).cloned());
        Process::spawn(&self.program, &options, &self.folder.join("stores").join(store))
    }
}

/// Changes the last bits of two numbers of a file of adapter weights, by `variant`: a server keeps adapters of the same content
/// only once.
fn vary(path: &Path, variant: u16) -> Result<()> {
    let mut bytes = fs::read(path)?;
    let header = bytes.first_chunk().map_or(0, |length: &[u8; 8]| u64::from_le_bytes(*length));
    // The first numbers of the first tensor. Of bf16, the shortest of all, the low seven bits of a number are its mantissa's.
    let first = usize::try_from(header).ok().and_then(|header| header.checked_add(8));
    match first.and_then(|first| bytes.get_mut(first..first.checked_add(5)?)) {
        Some(numbers) => {
            numbers[0] ^= (variant & 0x7f) as u8;
            numbers[4] ^= (variant >> 7 & 0x7f) as u8;
        }
        None => return Err(Error::unprocessable(format!("{}: it holds no numbers", path.display()))),
    }
    Ok(fs::write(path, bytes)?)
}

/// Makes a directory that is there whole or not at all.
fn whole(out: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if out.exists() {
        return Ok(());
    }
    let parent = out.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent)?;
    let stage = tempfile::tempdir_in(parent)?;
    let made = stage.path().join("made");
    make(&made)?;
    Ok(fs::rename(made, out)?)
}

fn copy_files(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

/// Bytes of the files of a directory.
fn size(directory: &Path) -> Result<u64> {
    fs::read_dir(directory)?.try_fold(0, |n, entry| Ok(n + entry?.metadata()?.len()))
}

/// Running servers, and who of them has which task.
pub struct Fleet<'a> {
    setup: &'a Setup,
    kind: Kind,
    tasks: usize,
    processes: Vec<Process>,
}

impl<'a> Fleet<'a> {
    /// Starts the servers of the first `tasks` tasks at the same time, with `more` options; the seconds until all answer.
    pub async fn start(setup: &'a Setup, kind: Kind, tasks: usize, more: &[String]) -> Result<(Self, f64)> {
        // A server reads the whole folder that it is given, so it gets one with these tasks alone.
        let served = setup.folder.join("served");
        for leftover in [&served, &setup.folder.join("stores")] {
            if leftover.exists() {
                fs::remove_dir_all(leftover)?;
            }
        }
        if kind == Kind::Shared {
            fs::create_dir_all(&served)?;
            for task in 0..tasks {
                copy_files(&setup.adapter(task)?, &served.join(setup.name(task)))?;
            }
        }
        let start = Instant::now();
        let processes = match kind {
            Kind::Shared => vec![setup.spawn(&setup.base(), Some(&served), more, "shared")?],
            Kind::Copies => {
                (0..tasks).map(|t| setup.spawn(&setup.copy(t), None, more, &setup.name(t))).collect::<Result<_>>()?
            }
        };
        let mut fleet = Fleet { setup, kind, tasks, processes };
        try_join_all(fleet.processes.iter_mut().map(Process::ready)).await?;
        let seconds = start.elapsed().as_secs_f64();
        Ok((fleet, seconds))
    }

    pub fn tasks(&self) -> usize {
        self.tasks
    }

    pub fn processes(&self) -> usize {
        self.processes.len()
    }

    pub fn process_ids(&self) -> Vec<u32> {
        self.processes.iter().map(Process::id).collect()
    }

    /// Of all servers together.
    pub fn memory(&self) -> Result<Memory> {
        self.processes.iter().map(Process::memory).sum()
    }

    /// Bytes of the bases' weights in the memory of all servers, as these tell.
    pub async fn weights(&self) -> Result<u64> {
        Ok(try_join_all(self.processes.iter().map(Process::weights)).await?.into_iter().sum())
    }

    /// Bytes of the KV caches of all servers that hold nothing yet, as these tell.
    pub async fn kv_free(&self) -> Result<u64> {
        Ok(try_join_all(self.processes.iter().map(Process::kv_free)).await?.into_iter().sum())
    }

    /// Asks every task once, so that what is made at the first request is there.
    pub async fn touch(&self) -> Result<()> {
        for task in 0..self.tasks {
            traffic::ask(self, &traffic::Request::shortest(task)).await?;
        }
        Ok(())
    }

    /// Adds the next task, whose files lie on the disk, to the running fleet; the seconds until it has answered a request.
    pub async fn add(&mut self) -> Result<f64> {
        let (setup, task) = (self.setup, self.tasks);
        let (adapter, copy) = (setup.adapter(task)?, setup.copy(task));
        let start = Instant::now();
        match self.kind {
            Kind::Shared => {
                cli::push(&self.processes[0].client, &setup.name(task), &adapter, None).await?;
            }
            Kind::Copies => {
                self.processes.push(setup.spawn(&copy, None, &[], &setup.name(task))?);
                self.processes[task].ready().await?;
            }
        }
        self.tasks += 1;
        traffic::ask(self, &traffic::Request::shortest(task)).await?;
        Ok(start.elapsed().as_secs_f64())
    }
}

impl Hosts for Fleet<'_> {
    fn target(&self, task: usize) -> (&Client, Option<String>) {
        match self.kind {
            Kind::Shared => (&self.processes[0].client, Some(self.setup.name(task))),
            Kind::Copies => (&self.processes[task].client, None),
        }
    }

    fn work(&self, task: usize) -> Work {
        self.setup.origin(task).work
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_of_one_adapter_are_of_different_content() {
        let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tiny/llama/");
        let (folder, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in ["adapter_qv_r4", "adapter_seqcls"] {
            copy_files(&Path::new(fixture).join(name), &folder.path().join(name)).unwrap();
        }
        let base = format!("{fixture}base");
        let setup = Setup::prepare(&base, folder.path(), 3, out.path(), vec![], |_| {}).unwrap();
        assert_eq!([0, 1, 2].map(|t| setup.origin(t).work), [Work::Generate, Work::Classify, Work::Generate]);
        let opened = Base::open(&base).unwrap();
        let load = |t: usize| adapter::load(&setup.adapter(t).unwrap(), &opened.config, &opened.id).unwrap().adapter;
        let all: std::collections::BTreeSet<_> = (0..600).step_by(2).map(|t| load(t).generation).collect();
        assert_eq!(all.len(), 300);
        let (first, last) = (load(0), load(598));
        for (a, b) in first.pairs.values().zip(last.pairs.values()) {
            assert!(a.a.iter().zip(&b.a).all(|(x, y)| (x - y).abs() <= x.abs() / 64.0));
        }
        let size = |kind, tasks| setup.disk(kind, tasks).unwrap();
        assert_eq!(size(Kind::Copies, 3) - size(Kind::Copies, 2), size(Kind::Copies, 1));
        assert_eq!(size(Kind::Shared, 3) - size(Kind::Shared, 2), size(Kind::Shared, 1) - size(Kind::Shared, 0));
        assert!(setup.copy(2) != setup.copy(0));
        // What is shared is of the same adapter.
        assert_eq!([3, 4].map(|t| setup.copy(t)), [1, 0].map(|t| setup.copy(t)));
        let few = Setup::prepare(&base, folder.path(), 1, &out.path().join("few"), vec![], |_| {}).unwrap();
        assert!((0..5).all(|t| few.copy(t).join("model.safetensors").exists()));
    }
}
