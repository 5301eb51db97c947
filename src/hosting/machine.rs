//! Where and with what something was measured.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use chrono::{DateTime, SecondsFormat};
use serde_json::{Value, json};

/// What the kernels here and elsewhere choose their code by.
const FLAGS: [&str; 20] = [
    "sse4_2",
    "avx",
    "f16c",
    "fma",
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
];

/// The CPU's model and flags, the cores this process may use, the memory in bytes, the kernel, the version of loramux, the
/// date and the command. What the system does not tell is null.
pub fn machine() -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let (model, flags) = cpu(&info);
    let kernel = Some(read("/proc/sys/kernel/osrelease").trim().to_string()).filter(|k| !k.is_empty());
    json!({
        "cpu": model,
        "cpu_flags": flags,
        "cores": std::thread::available_parallelism().ok().map(usize::from),
        "memory_bytes": memory(&read("/proc/meminfo")),
        "system": std::env::consts::OS,
        "kernel": kernel,
        "loramux": env!("CARGO_PKG_VERSION"),
        "date": date(SystemTime::now()),
        "command": std::env::args().collect::<Vec<_>>(),
    })
}

/// The first processor's model and those of its flags that matter here, of Linux's `/proc/cpuinfo`.
fn cpu(info: &str) -> (Option<&str>, Vec<&'static str>) {
    let value = |name: &str| {
        let line = info.lines().filter_map(|line| line.split_once(':')).find(|(key, _)| key.trim() == name);
        line.map(|(_, value)| value.trim())
    };
    let found: Vec<&str> = value("flags").or(value("Features")).unwrap_or_default().split_whitespace().collect();
    (value("model name"), FLAGS.into_iter().filter(|flag| found.contains(flag)).collect())
}

/// All memory, of Linux's `/proc/meminfo`.
fn memory(info: &str) -> Option<u64> {
    let kib = info.lines().find_map(|line| line.strip_prefix("MemTotal:"))?.trim().strip_suffix("kB")?;
    kib.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// RFC 3339, in UTC.
fn date(time: SystemTime) -> Option<String> {
    let seconds = time.duration_since(UNIX_EPOCH).ok()?.as_secs();
    Some(DateTime::from_timestamp(seconds.try_into().ok()?, 0)?.to_rfc3339_opts(SecondsFormat::Secs, true))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_system_tells() {
        let info =
            "processor\t: 0\nmodel name\t: Some CPU @ 2GHz\nflags\t\t: fpu avx2 fma avx512_vnni\n\nprocessor\t: 1\n";
        assert_eq!(cpu(info), (Some("Some CPU @ 2GHz"), vec!["fma", "avx2", "avx512_vnni"]));
        assert_eq!(cpu("Features : fp asimd i8mm\n"), (None, vec!["asimd", "i8mm"]));
        assert_eq!(cpu(""), (None, vec![]));
        assert_eq!(memory("MemTotal:       16384 kB\nMemFree: 1 kB\n"), Some(16384 * 1024));
        assert_eq!(memory("MemTotal: much\n"), None);
        assert_eq!(date(UNIX_EPOCH + Duration::from_secs(951_782_400)).unwrap(), "2000-02-29T00:00:00Z");
    }

    #[test]
    fn this_machine_is_told() {
        let machine = machine();
        assert_eq!(machine["loramux"], env!("CARGO_PKG_VERSION"));
        assert!(machine["cores"].as_u64().unwrap() >= 1 && !machine["command"].as_array().unwrap().is_empty());
        if cfg!(target_os = "linux") {
            assert!(machine["memory_bytes"].as_u64().unwrap() > 1 << 20 && machine["kernel"].is_string());
        }
    }
}
