"""What a tenant notices of another one that floods the server: the times of its requests alone, and beside the flood.

    cargo build --release
    python3 benches/serve/tenants.py --loramux target/release/loramux --work bench-work \\
        --model SmolLM2-135M-Instruct.Q4_1.gguf --loramux-options='--quantize q8 --max-sequences 8'

A few clients of one tenant ask `loramux serve` one request after the other; then the same beside 50 times as many clients of
another tenant, in turns. The table holds medians over the repetitions; the JSON before it has every run.
"""

import argparse
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import time
from pathlib import Path

from report import machine, markdown
from server import loramux, output, script


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loramux", required=True, type=Path, help="the program, a release build")
    parser.add_argument("--work", required=True, type=Path, help="folder for keys and logs")
    parser.add_argument("--model", required=True, type=Path, help="as for `loramux serve`")
    parser.add_argument("--loramux-options", default="", help="more of `loramux serve`'s")
    parser.add_argument("--clients", type=int, default=2, help="of the tenant that is looked at")
    parser.add_argument("--times", type=int, default=50, help="as many clients of the other")
    parser.add_argument("--requests", type=int, default=40, help="of each client that is looked at, in a run")
    parser.add_argument("--flood-requests", type=int, default=40, help="of each other client; they must outlast a run")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=3)
    return parser.parse_args()


def load(args, server, key, clients, requests, seed):
    """`loramux bench serve` as a command and its environment."""
    command = [str(args.loramux), "bench", "serve", "--json", "--url", f"http://{server.address}", "--seed", str(seed)]
    command += ["--clients", str(clients), "--requests", str(requests)]
    command += ["--prompt-tokens", str(args.prompt_tokens), "--max-tokens", str(args.max_tokens)]
    return command, {**os.environ, "LORAMUX_API_KEY": key}


def measured(args, server, key, seed):
    command, environment = load(args, server, key, args.clients, args.requests, seed)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr}")
    return json.loads(done.stdout)


@contextlib.contextmanager
def flood(args, server, key, seed):
    """The other tenant's requests, from when its queue is full to the end of the block."""
    command, environment = load(args, server, key, args.clients * args.times, args.flood_requests, seed)
    with open(args.work / "flood.log", "w") as log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as one:
        try:
            start = time.monotonic()
            while server.metric("loramux_queue_length") < args.clients * args.times / 2:
                if one.poll() is not None or time.monotonic() > start + 300:
                    raise RuntimeError(f"the flood does not come; see {log.name}")
                time.sleep(0.2)
            yield
            if one.poll() is not None:
                raise RuntimeError(f"the flood has ended; see {log.name}")
        finally:
            one.kill()


def main():
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    keys = args.work / "keys.toml"
    keys.unlink(missing_ok=True)
    new = lambda tenant: output([str(args.loramux), "keys", "new", str(keys), tenant, "--scopes", "infer", "--tenant", tenant])
    one, other = (new(tenant).strip() for tenant in ("one", "other"))
    reader = output([str(args.loramux), "keys", "new", str(keys), "reader", "--scopes", "metrics"]).strip()
    runs = {"alone": [], "beside the flood": []}
    options = ["--keys", str(keys), *shlex.split(args.loramux_options)]
    with loramux(args, args.model, [], options) as server:
        server.key = reader
        for i in range(args.repetitions):
            runs["alone"].append(measured(args, server, one, 2 * i + 1))
            with flood(args, server, other, 1000 + i):
                runs["beside the flood"].append(measured(args, server, one, 2 * i + 2))
            while server.metric("vllm:num_requests_running") > 0:
                time.sleep(0.1)
    print(json.dumps({"machine": machine(), "options": vars(args), "runs": runs}, default=str))
    told = lambda name, what, q: statistics.median(run[what][q] for run in runs[name])
    columns = [("request_ms", "p50"), ("request_ms", "p99"), ("ttft_ms", "p99"), ("token_ms", "p99")]
    lines = [[name, *(f"{told(name, *column):.0f}" for column in columns)] for name in runs]
    lines.append(["ratio", *(f"{told('beside the flood', *c) / told('alone', *c):.2f}" for c in columns)])
    print(markdown(["ms", *(f"{what.split('_')[0]} {q}" for what, q in columns)], lines))


if __name__ == "__main__":
    script(main)
