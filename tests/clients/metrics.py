"""The metrics, read by prometheus_client's parser and scraped by a real Prometheus."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import socket

from prometheus_client.parser import text_string_to_metric_families

URL, ADAPTER, PROMETHEUS = sys.argv[1:4]


def get(url):
    with urllib.request.urlopen(url) as answer:
        return answer.read().decode()


families = {f.name: f for f in text_string_to_metric_families(get(URL + "/metrics"))}
for name in [
    "loramux_requests", "loramux_request_seconds", "loramux_ttft_seconds", "loramux_token_seconds",
    "loramux_prompt_tokens", "loramux_generated_tokens", "loramux_batch_sequences", "loramux_batch_adapters",
    "loramux_queue_length", "loramux_kv_blocks", "loramux_adapters", "loramux_adapter_bytes",
    "loramux_adapter_load_seconds", "loramux_base_bytes", "vllm:num_requests_waiting", "vllm:num_requests_running",
    "vllm:kv_cache_usage_perc", "vllm:cache_config_info", "vllm:lora_requests_info",
]:
    assert name in families and families[name].samples, name
generated = {s.labels["adapter"]: s.value for s in families["loramux_generated_tokens"].samples if s.name.endswith("_total")}
assert generated[ADAPTER] >= 12 and generated["base"] >= 12, generated
config = families["vllm:cache_config_info"].samples[0].labels
assert int(config["block_size"]) > 0 and int(config["num_gpu_blocks"]) > 0, config
lora = families["vllm:lora_requests_info"].samples[0]
assert {"max_lora", "running_lora_adapters", "waiting_lora_adapters"} <= set(lora.labels) and lora.value > 1.6e9, lora
statuses = {(s.labels["route"], s.labels["status"]) for s in families["loramux_requests"].samples}
assert any(route == "/v1/completions" and status == "200" for route, status in statuses), statuses

# While a request runs its adapter is listed, and there is always exactly one series.
body = json.dumps({"model": ADAPTER, "prompt": "A long story:", "max_tokens": 150, "ignore_eos": True}).encode()
request = urllib.request.Request(URL + "/v1/completions", body, {"Content-Type": "application/json"})
running = threading.Thread(target=lambda: urllib.request.urlopen(request).read())
running.start()
listed = 0
while running.is_alive():
    scraped = {f.name: f for f in text_string_to_metric_families(get(URL + "/metrics"))}
    samples = scraped["vllm:lora_requests_info"].samples
    assert len(samples) == 1, samples
    if samples[0].labels["running_lora_adapters"] == ADAPTER:
        listed += 1
        assert scraped["vllm:num_requests_running"].samples[0].value == 1
    time.sleep(0.05)
running.join()
assert listed > 5, listed

with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
with tempfile.TemporaryDirectory() as folder:
    config = os.path.join(folder, "prometheus.yml")
    target = URL.split("//")[1]
    with open(config, "w") as f:
        f.write("scrape_configs:\n- job_name: loramux\n  scrape_interval: 1s\n  scrape_timeout: 1s\n"
                f"  static_configs:\n  - targets: ['{target}']\n")
    prometheus = subprocess.Popen(
        [PROMETHEUS, f"--config.file={config}", f"--storage.tsdb.path={folder}/data",
         f"--web.listen-address=127.0.0.1:{port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            time.sleep(0.5)
            try:
                query = f'loramux_generated_tokens_total{{adapter="{ADAPTER}"}}'
                url = f"http://127.0.0.1:{port}/api/v1/query?query=" + urllib.request.quote(query)
                result = json.loads(get(url))["data"]["result"]
                targets = json.loads(get(f"http://127.0.0.1:{port}/api/v1/targets"))["data"]["activeTargets"]
                if result and targets[0]["health"] == "up":
                    break
            except OSError:
                pass
        else:
            raise AssertionError("Prometheus has not scraped the server")
        assert float(result[0]["value"][1]) >= 12, result
    finally:
        prometheus.terminate()
        prometheus.wait()
print("ok")
