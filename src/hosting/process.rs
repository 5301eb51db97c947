//! A `loramux serve` of its own process, and the memory it takes.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::cli::Client;
use crate::{Error, Result};

/// How long a server may take to listen, and then to load its model.
const PATIENCE: Duration = Duration::from_secs(600);

/// Lines of its log that an error shows.
const LOG: usize = 12;

/// Memory of processes in bytes, as the kernel tells it in `/proc/PID/smaps_rollup`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// Resident pages; those that several processes map count in each.
    pub rss: u64,
    /// Resident pages, each divided by the number of processes that map it.
    pub pss: u64,
    /// Resident pages of no file.
    pub anonymous: u64,
}

impl Memory {
    pub fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = fs::read_to_string(&path).map_err(|e| Error::unavailable(format!("{path}: {e}")))?;
        Self::parse(&text).ok_or_else(|| Error::unavailable(format!("{path} lacks Rss, Pss or Anonymous")))
    }

    fn parse(text: &str) -> Option<Self> {
        let kibibytes = |key: &str| {
            let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
            line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
        };
        Some(Memory {
            rss: kibibytes("Rss")? << 10,
            pss: kibibytes("Pss")? << 10,
            anonymous: kibibytes("Anonymous")? << 10,
        })
    }
}

impl std::iter::Sum for Memory {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Memory::default(), |a, b| Memory {
            rss: a.rss + b.rss,
            pss: a.pss + b.pss,
            anonymous: a.anonymous + b.anonymous,
        })
    }
}

/// Bytes that the machine could still give to programs.
pub fn available() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").map_err(|e| Error::unavailable(format!("/proc/meminfo: {e}")))?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kibibytes = line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    Ok(kibibytes.ok_or_else(|| Error::unavailable("/proc/meminfo lacks MemAvailable"))? << 10)
}

/// Bytes of GPU memory that processes have, as the driver tells; `None` where there is no driver or it knows none of them.
pub fn gpu_memory(processes: &[u32]) -> Option<u64> {
    let query = ["--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"];
    let output = Command::new("nvidia-smi").args(query).stderr(Stdio::null()).output().ok()?;
    gpu_mebibytes(&String::from_utf8_lossy(&output.stdout), processes).map(|mebibytes| mebibytes << 20)
}

/// The sum over the lines `pid, MiB` of these processes.
fn gpu_mebibytes(text: &str, processes: &[u32]) -> Option<u64> {
    let lines = text.lines().filter_map(|line| {
        let (id, mebibytes) = line.split_once(',')?;
        let known = id.trim().parse().is_ok_and(|id: u32| processes.contains(&id));
        known.then(|| mebibytes.trim().parse::<u64>().ok())?
    });
    lines.reduce(|a, b| a + b)
}

/// The number that a server's metrics give `series`, with its labels.
fn value(metrics: &str, series: &str) -> Result<u64> {
    let of_line = |line: &str| line.strip_prefix(series)?.strip_prefix(' ')?.trim().parse::<f64>().ok();
    let value = metrics.lines().find_map(of_line);
    value.map(|value| value as u64).ok_or_else(|| Error::unavailable(format!("the server's metrics lack {series}")))
}

/// Options in the user's environment are for programs of theirs. Where models lie is the same for all.
pub fn forget_options(command: &mut Command) {
    let ours = |name: &str| name.starts_with("LORAMUX_") && name != "LORAMUX_CACHE";
    for (name, _) in std::env::vars_os().filter(|(name, _)| ours(&name.to_string_lossy())) {
        command.env_remove(name);
    }
}

/// A running server; it ends when this is dropped.
pub struct Process {
    child: Child,
    pub client: Client,
    spawned: Instant,
    log: Arc<Mutex<VecDeque<String>>>,
}

impl Process {
    /// Starts `program serve OPTIONS` on a port of its own, and waits until it listens; its model loads still.
    pub fn spawn(program: &Path, options: &[String], store: &Path) -> Result<Self> {
        let mut command = Command::new(program);
        forget_options(&mut command);
        let spawned = Instant::now();
        let mut child = command
            .args(["serve", "--listen", "127.0.0.1:0", "--store"])
            .arg(store)
            .args(options)
            .env("LORAMUX_LOG", "info")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| Error::unavailable(format!("{}: {e}", program.display())))?;
        let log = Arc::new(Mutex::new(VecDeque::new()));
        let (sender, address) = mpsc::channel();
        let lines = BufReader::new(child.stderr.take().ok_or_else(|| Error::internal("no standard error"))?).lines();
        let kept = log.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(std::result::Result::ok) {
                if let Some((_, url)) = line.split_once("listening on ") {
                    // Nobody waits for a second one.
                    let _ = sender.send(url.trim().to_string());
                }
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                kept.push_back(line);
                if kept.len() > LOG {
                    kept.pop_front();
                }
            }
        });
        let url = address.recv_timeout(PATIENCE).unwrap_or_default();
        let mut process = Process { child, client: Client::new("http://unknown", None, None)?, spawned, log };
        if url.is_empty() {
            return Err(process.failed("it does not listen"));
        }
        process.client = Client::new(&url, None, None)?;
        Ok(process)
    }

    /// Waits until requests are answered; the time since its start.
    pub async fn ready(&mut self) -> Result<Duration> {
        loop {
            let answer = self.client.http.get(self.client.at("/health/ready")).send().await;
            if answer.is_ok_and(|a| a.status().is_success()) {
                return Ok(self.spawned.elapsed());
            }
            if self.child.try_wait()?.is_some() {
                return Err(self.failed("it has stopped"));
            }
            if self.spawned.elapsed() > PATIENCE {
                return Err(self.failed("it does not become ready"));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub fn memory(&self) -> Result<Memory> {
        Memory::of(self.child.id())
    }

    /// Bytes of its base's weights in memory, as it tells.
    pub async fn weights(&self) -> Result<u64> {
        value(&self.metrics().await?, "loramux_base_bytes")
    }

    /// Bytes of its KV cache that hold nothing, as it tells: no more than these wait for being touched.
    pub async fn kv_free(&self) -> Result<u64> {
        let metrics = self.metrics().await?;
        Ok(value(&metrics, "loramux_kv_blocks{state=\"free\"}")? * value(&metrics, "loramux_kv_block_bytes")?)
    }

    async fn metrics(&self) -> Result<String> {
        let answer = self.client.send(self.client.http.get(self.client.at("/metrics"))).await?;
        answer.text().await.map_err(Error::unavailable)
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    fn failed(&mut self, what: &str) -> Error {
        // Its last lines are on their way when it has just ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        std::thread::sleep(Duration::from_millis(50));
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let lines: Vec<&str> = log.iter().map(String::as_str).collect();
        Error::unavailable(format!("loramux serve: {what}:\n{}", lines.join("\n")))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_what_the_kernel_tells() {
        let text = "55d0-7ffe ---p 00000000 00:00 0 [rollup]\nRss:  2048 kB\nPss:  1536 kB\nPss_Anon: 9 kB\n\
                    Private_Dirty: 7 kB\nAnonymous:  1024 kB\n";
        let memory = Memory::parse(text).unwrap();
        assert_eq!(memory, Memory { rss: 2 << 20, pss: 3 << 19, anonymous: 1 << 20 });
        assert_eq!(Memory::parse("Rss: 1 kB\nPss_Anon: 9 kB\n"), None);
        let sum: Memory = [memory, memory].into_iter().sum();
        assert_eq!(sum.pss, 3 << 20);
    }

    #[test]
    fn numbers_are_what_the_server_tells() {
        let text = "# HELP loramux_base_bytes Bytes of the base\n# TYPE loramux_base_bytes gauge\nloramux_base_bytes 143000000\n\
            loramux_kv_blocks{state=\"free\"} 7\n";
        assert_eq!(value(text, "loramux_base_bytes").unwrap(), 143_000_000);
        assert_eq!(value(text, "loramux_kv_blocks{state=\"free\"}").unwrap(), 7);
        assert!(value(text, "loramux_kv_blocks").is_err() && value(text, "loramux_base").is_err());
    }

    #[test]
    fn of_a_gpu_only_these_processes_count() {
        let text = "101, 500\n7, 9000\n102, 250\n103, [N/A]\n";
        assert_eq!(gpu_mebibytes(text, &[101, 102, 103]), Some(750));
        assert_eq!(gpu_mebibytes(text, &[1]), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_program_sees_its_own() {
        let before = Memory::of(std::process::id()).unwrap();
        // The allocator may have as much of what other tests freed; and these may free some meanwhile.
        let mut taken = memmap2::MmapMut::map_anon(256 << 20).unwrap();
        taken.fill(1);
        let after = Memory::of(std::process::id()).unwrap();
        assert!(after.anonymous >= before.anonymous + (128 << 20), "{before:?} {after:?}");
        drop(taken);
        assert!(available().unwrap() > 1 << 20);
    }
}
