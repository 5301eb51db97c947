//! Prometheus metrics of the whole process.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{
    Encoder, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

/// Adapter names that get a label value of their own; later ones are counted under `other`.
const MAX_ADAPTER_LABELS: usize = 1000;

/// Every metric, registered once. Engine and registry set what they know; the server counts requests.
pub struct Metrics {
    registry: Registry,
    adapter_labels: Mutex<HashSet<String>>,
    demand: Arc<Mutex<Demand>>,
    pub requests: IntCounterVec,
    pub request_seconds: HistogramVec,
    pub ttft_seconds: Histogram,
    pub token_seconds: Histogram,
    pub prompt_tokens: IntCounterVec,
    pub generated_tokens: IntCounterVec,
    pub batch_sequences: Histogram,
    pub batch_adapters: Histogram,
    pub queue_length: IntGauge,
    pub kv_blocks: IntGaugeVec,
    pub kv_block_bytes: IntGauge,
    pub preemptions: IntCounter,
    pub yields: IntCounter,
    pub adapters: IntGaugeVec,
    pub adapter_bytes: IntGaugeVec,
    pub adapter_load_seconds: HistogramVec,
    pub source_adapters: IntGaugeVec,
    pub source_errors: IntCounterVec,
    pub base_bytes: IntGauge,
    vllm_waiting: IntGauge,
    pub vllm_running: IntGauge,
    pub vllm_kv_usage: prometheus::Gauge,
    pub vllm_cache_config: IntGaugeVec,
}

/// Who asks for adapters: what `vllm:lora_requests_info` and `vllm:num_requests_waiting` tell.
#[derive(Default)]
struct Demand {
    max: usize,
    running: String,
    waiting: BTreeSet<String>,
    /// Requests that wait in the engine.
    queued: usize,
    /// Requests that wait for an adapter to be loaded, by its name.
    cold: BTreeMap<String, usize>,
    /// Unix time of the last change.
    changed: f64,
}

impl Demand {
    fn count(&self) -> usize {
        self.queued + self.cold.values().sum::<usize>()
    }
}

/// `vllm:lora_requests_info`: one series, whose labels say who asks for adapters now. It is made for each scrape: a
/// `GaugeVec` would need its old series removed, and takes series for the same whose labels spell the same together.
struct LoraRequests {
    demand: Arc<Mutex<Demand>>,
}

impl LoraRequests {
    fn gauge() -> GaugeVec {
        let help = "Adapters with running and waiting requests; the value is a Unix time";
        let labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"];
        GaugeVec::new(Opts::new("vllm:lora_requests_info", help), &labels).expect("name and labels are valid")
    }
}

impl Collector for LoraRequests {
    fn desc(&self) -> Vec<&Desc> {
        static GAUGE: LazyLock<GaugeVec> = LazyLock::new(LoraRequests::gauge);
        GAUGE.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let demand = self.demand.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting: BTreeSet<&String> = demand.waiting.iter().chain(demand.cold.keys()).collect();
        let waiting = waiting.into_iter().cloned().collect::<Vec<_>>().join(",");
        let gauge = Self::gauge();
        gauge.with_label_values(&[&demand.max.to_string(), &demand.running, &waiting]).set(demand.changed);
        gauge.collect()
    }
}

/// A request that waits for an adapter to be loaded.
pub struct Cold {
    metrics: Arc<Metrics>,
    name: String,
}

impl Drop for Cold {
    fn drop(&mut self) {
        self.metrics.change_demand(|demand| match demand.cold.get_mut(&self.name) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(demand.cold.remove(&self.name)),
        });
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    pub fn new() -> Self {
        let registry = Registry::new();
        let seconds = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];
        let counts = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];
        // Names and labels are constants, so registration can only fail by a mistake in this function.
        macro_rules! register {
            ($metric:expr) => {{
                let metric = $metric.expect("metric name and labels are valid");
                registry.register(Box::new(metric.clone())).expect("metric names are distinct");
                metric
            }};
        }
        let counter = |name, help, labels: &[&str]| IntCounterVec::new(Opts::new(name, help), labels);
        let gauge = |name, help, labels: &[&str]| IntGaugeVec::new(Opts::new(name, help), labels);
        let histogram = |name, help, buckets: &[f64]| {
            Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))
        };
        let histograms = |name, help, labels: &[&str]| {
            HistogramVec::new(HistogramOpts::new(name, help).buckets(seconds.to_vec()), labels)
        };
        let demand = Arc::<Mutex<Demand>>::default();
        let requests = LoraRequests { demand: demand.clone() };
        registry.register(Box::new(requests)).expect("metric names are distinct");
        Metrics {
            adapter_labels: Mutex::default(),
            demand,
            requests: register!(counter(
                "loramux_requests_total",
                "Requests answered",
                &["route", "adapter", "status"]
            )),
            request_seconds: register!(histograms(
                "loramux_request_seconds",
                "Time from a request's arrival to the last byte of its answer",
                &["route"]
            )),
            ttft_seconds: register!(histogram(
                "loramux_ttft_seconds",
                "Time from a request's arrival in the engine to its first token",
                &seconds
            )),
            token_seconds: register!(histogram("loramux_token_seconds", "Time between a sequence's tokens", &seconds)),
            prompt_tokens: register!(counter("loramux_prompt_tokens_total", "Prompt tokens taken in", &["adapter"])),
            generated_tokens: register!(counter("loramux_generated_tokens_total", "Tokens generated", &["adapter"])),
            batch_sequences: register!(histogram("loramux_batch_sequences", "Sequences in a step", &counts)),
            batch_adapters: register!(histogram("loramux_batch_adapters", "Distinct adapters in a step", &counts)),
            queue_length: register!(IntGauge::new("loramux_queue_length", "Requests that wait")),
            kv_blocks: register!(gauge(
                "loramux_kv_blocks",
                "Blocks of the KV cache: used, cached (unused but still holding a prefix) or free",
                &["state"]
            )),
            kv_block_bytes: register!(IntGauge::new("loramux_kv_block_bytes", "Bytes of a block of the KV cache")),
            preemptions: register!(IntCounter::new(
                "loramux_preemptions_total",
                "Sequences put back into the queue for want of KV cache blocks"
            )),
            yields: register!(IntCounter::new(
                "loramux_yields_total",
                "Sequences of a tenant beyond its share put back into the queue to make room for another tenant's"
            )),
            adapters: register!(gauge("loramux_adapters", "Adapters by memory tier", &["tier"])),
            adapter_bytes: register!(gauge("loramux_adapter_bytes", "Bytes of adapters by memory tier", &["tier"])),
            adapter_load_seconds: register!(histograms(
                "loramux_adapter_load_seconds",
                "Time to make an adapter ready for a batch",
                &["from"]
            )),
            source_adapters: register!(gauge(
                "loramux_source_adapters",
                "Adapters that a source was found to have",
                &["source"]
            )),
            source_errors: register!(counter(
                "loramux_source_errors_total",
                "Times that a source, or an adapter of it, could not be read",
                &["source"]
            )),
            base_bytes: register!(IntGauge::new("loramux_base_bytes", "Bytes of the base model's weights in memory")),
            vllm_waiting: register!(IntGauge::new("vllm:num_requests_waiting", "Requests that wait")),
            vllm_running: register!(IntGauge::new("vllm:num_requests_running", "Requests in the running batch")),
            vllm_kv_usage: register!(prometheus::Gauge::new(
                "vllm:kv_cache_usage_perc",
                "Share of the KV cache's blocks in use, 0 to 1"
            )),
            vllm_cache_config: register!(gauge(
                "vllm:cache_config_info",
                "Shape of the KV cache",
                &["block_size", "num_gpu_blocks"]
            )),
            registry,
        }
    }

    /// The label value for an adapter: its name, or `other` once there are too many names; `base` without an adapter.
    pub fn adapter_label<'a>(&self, adapter: Option<&'a str>) -> &'a str {
        let Some(name) = adapter else { return "base" };
        let mut labels = self.adapter_labels.lock().unwrap_or_else(|e| e.into_inner());
        if labels.contains(name) {
            return name;
        }
        if labels.len() >= MAX_ADAPTER_LABELS {
            return "other";
        }
        labels.insert(name.to_string());
        name
    }

    /// Counts a request for an adapter that is not in memory yet as waiting, until the guard is dropped.
    pub fn cold(self: &Arc<Self>, name: &str) -> Cold {
        self.change_demand(|demand| *demand.cold.entry(name.to_string()).or_default() += 1);
        Cold { metrics: self.clone(), name: name.to_string() }
    }

    /// Sets how many requests wait in the engine.
    pub fn set_waiting(&self, waiting: usize) {
        let mut demand = self.demand.lock().unwrap_or_else(PoisonError::into_inner);
        demand.queued = waiting;
        self.vllm_waiting.set(demand.count() as i64);
    }

    /// Sets which adapters the engine's requests run on and wait for.
    pub fn set_lora_requests(&self, max: usize, running: &[&str], waiting: &[&str]) {
        self.change_demand(|demand| {
            demand.max = max;
            demand.running = running.join(",");
            demand.waiting = waiting.iter().map(|name| name.to_string()).collect();
        });
    }

    fn change_demand(&self, change: impl FnOnce(&mut Demand)) {
        let mut demand = self.demand.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut demand);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        demand.changed = now.as_secs_f64();
        self.vllm_waiting.set(demand.count() as i64);
    }

    /// The text exposition format.
    pub fn render(&self) -> String {
        text(&self.registry.gather())
    }

    /// What is counted for single adapters, of those that `called` gives a name, under that name.
    pub fn render_of(&self, called: impl Fn(&str) -> Option<&str>) -> String {
        let mut families = self.registry.gather();
        for family in &mut families {
            family.mut_metric().retain_mut(|metric| {
                let label = metric.mut_label().iter_mut().find(|label| label.name() == "adapter");
                label.is_some_and(|label| match called(label.value()).map(str::to_string) {
                    Some(name) => {
                        label.set_value(name);
                        true
                    }
                    None => false,
                })
            });
        }
        families.retain(|family| !family.get_metric().is_empty());
        text(&families)
    }
}

fn text(families: &[MetricFamily]) -> String {
    let mut out = Vec::new();
    if let Err(e) = TextEncoder::new().encode(families, &mut out) {
        tracing::error!("metrics could not be written: {e}");
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_single_adapters_only_some_are_told() {
        let metrics = Metrics::new();
        for adapter in ["base", "a", "b@x", "c@y"] {
            metrics.prompt_tokens.with_label_values(&[adapter]).inc();
            metrics.requests.with_label_values(&["/v1/generate", adapter, "200"]).inc();
        }
        let text = metrics.render_of(|adapter| adapter.strip_suffix("@x"));
        let series: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        let expected = [
            "loramux_prompt_tokens_total{adapter=\"b\"} 1",
            "loramux_requests_total{adapter=\"b\",route=\"/v1/generate\",status=\"200\"} 1",
        ];
        assert_eq!(series, expected);
    }

    #[test]
    fn requests_for_cold_adapters_wait_too() {
        let metrics = Arc::new(Metrics::new());
        let series = |metrics: &Metrics| {
            let text = metrics.render();
            let lines: Vec<&str> = text.lines().filter(|l| l.starts_with("vllm:lora_requests_info{")).collect();
            assert_eq!(lines.len(), 1, "{text}");
            let waiting = text.lines().find_map(|l| l.strip_prefix("vllm:num_requests_waiting ")).unwrap();
            (lines[0].rsplit_once('}').unwrap().0.to_string(), waiting.parse().unwrap())
        };
        let expected = |running: &str, waiting: &str| {
            format!(
                "vllm:lora_requests_info{{max_lora=\"8\",running_lora_adapters=\"{running}\",waiting_lora_adapters=\"{waiting}\""
            )
        };
        metrics.set_lora_requests(8, &["a"], &["c"]);
        metrics.set_waiting(2);
        assert_eq!(series(&metrics), (expected("a", "c"), 2));
        let (one, two) = (metrics.cold("b"), metrics.cold("b"));
        assert_eq!(series(&metrics), (expected("a", "b,c"), 4));
        drop(one);
        metrics.set_lora_requests(8, &["a", "c"], &[]);
        metrics.set_waiting(0);
        assert_eq!(series(&metrics), (expected("a,c", "b"), 1));
        drop(two);
        assert_eq!(series(&metrics), (expected("a,c", ""), 0));
        // Labels that spell the same together.
        metrics.set_lora_requests(8, &[], &["a"]);
        assert_eq!(series(&metrics).0, expected("", "a"));
        metrics.set_lora_requests(8, &["a"], &[]);
        assert_eq!(series(&metrics).0, expected("a", ""));
    }
}
