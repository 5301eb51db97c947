"""What adapters cost a running server: eight of them against none, many against one, cold ones against warm ones.

    cargo build --release
    pip install --requirement benches/serve/requirements.txt
    python3 benches/serve/adapters.py --loramux target/release/loramux --work bench-work \\
        --model SmolLM2-135M-Instruct.Q4_1.gguf --loramux-options='--quantize q8'

It writes random adapters, starts `loramux serve` with room for a part of them, and sends the loads of `loramux bench serve`,
a part of each in turn, so that a slow minute of the machine hits all alike. The tables hold medians of the parts; the JSON
before them has all.
"""

import argparse
import itertools
import json
import shlex
import statistics
import threading
import time
from pathlib import Path

from files import ALL, QV, linear_layers, whole, write_peft_adapter
from report import markdown
from server import loramux, output, script

CLIENTS = 8
SEEDS = itertools.count(1)
# Bytes. Little, so that a load writes nearly all of it: the rest is not in use when memory is looked at.
KV_MEMORY = 48 << 20
# Parts of a run.
TURNS = 4

# What the runs are called.
BASE, ENGINE = "base", "base, engine alone"
LINEAR, Q_AND_V = "8 adapters, rank 16, all linear", "8 adapters, rank 8, q and v"
ONE, MANY = "one adapter", "any of many adapters"
BESIDE = {"warm": "7 adapters, beside warm ones", "cold": "7 adapters, beside cold ones"}


def arguments(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loramux", required=True, type=Path, help="the program, a release build")
    parser.add_argument("--work", required=True, type=Path, help="folder for adapters and logs")
    parser.add_argument("--model", required=True, type=Path, help="a GGUF file of a Llama")
    parser.add_argument("--loramux-options", default="", help="more of `loramux serve`'s")
    parser.add_argument("--many", type=int, default=2000, help="adapters of the traffic over many")
    parser.add_argument("--room", type=int, default=100, help="of these, so many fit into memory")
    parser.add_argument("--rank", type=int, default=8, help="of these, on q and v")
    parser.add_argument("--requests", type=int, default=16, help="of each client in a run")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--probes", type=int, default=40, help="first tokens of warm adapters in a run, and of cold ones")
    parser.add_argument("--repetitions", type=int, default=3)
    return parser.parse_args(words)


def folder_of(args, kind, count, rank, targets):
    """A folder of random adapters, and their names."""
    layers = linear_layers(args.model)
    names = [f"{kind}-{i}" for i in range(count)]
    write = lambda i: lambda part: write_peft_adapter(part, layers, rank, targets, (count + rank) * 10_000 + i)
    for i, name in enumerate(names):
        whole(args.work / kind / name, write(i))
    return args.work / kind, names


def serve(args, folders, *options):
    return loramux(args, args.model, folders, [*options, *shlex.split(args.loramux_options)])


def adapter_bytes(server):
    """Of adapters in memory."""
    return int(server.metric('loramux_adapter_bytes{tier="device"}'))


def kv_bytes(server):
    """Of the blocks of the KV cache that hold something; at least so many have been written."""
    blocks = {state: server.metric(f'loramux_kv_blocks{{state="{state}"}}') for state in ("used", "cached", "free")}
    return KV_MEMORY * (1 - blocks["free"] / sum(blocks.values()))


def load(args, server, *options, requests=None):
    """The report of `loramux bench serve`, or without a server of `loramux bench engine`."""
    command = [str(args.loramux), "bench"]
    if server:
        command += ["serve", "--url", f"http://{server.address}"]
    else:
        command += ["engine", "--model", str(args.model), "--device", "cpu", *shlex.split(args.loramux_options)]
    command += ["--json", "--clients", str(CLIENTS), "--seed", str(next(SEEDS))]
    command += ["--requests", str(requests or args.requests), "--prompt-tokens", str(args.prompt_tokens)]
    return json.loads(output([*command, "--max-tokens", str(args.max_tokens), *options]))


def asking(args, server, *options):
    """What gives the report of a load of so many requests of each client."""
    return lambda requests: load(args, server, *options, requests=requests)


def first_token(args, server, name):
    """Seconds until a request's answer with one token is there."""
    prompt = f"{time.monotonic_ns()} " + "word " * (args.prompt_tokens // 2)
    start = time.monotonic()
    server.post("/v1/completions", {"model": name, "prompt": prompt, "max_tokens": 1, "temperature": 0})
    return time.monotonic() - start


def probed(args, server, neighbours, names, requests):
    """A load of other clients, and meanwhile a request with each of `names` in turn: the load's report, and first tokens."""
    took, ended = [], threading.Event()

    def probe():
        for name in names:
            if ended.is_set():
                return
            took.append(first_token(args, server, name))
            time.sleep(0.1)

    thread = threading.Thread(target=probe)
    thread.start()
    report = load(args, server, "--ask", ",".join(neighbours), requests=requests)
    ended.set()
    thread.join()
    return report, took


def in_turns(args, loads, runs):
    """Adds to `runs`, {name: reports}, those of `loads`, {name: what `asking` makes}."""
    for turn in range(TURNS):
        for name in list(loads)[:: -1 if turn % 2 else 1]:
            runs.setdefault(name, []).append(loads[name](max(1, args.requests // TURNS)))


def beside_base(args):
    """The base alone, on an engine without a server as well, and eight adapters of two kinds: {"runs": {name: reports}},
    the seconds until the server was ready, its bytes in memory after the base's traffic, and those of them that are not
    weights, KV cache or adapters."""
    linear, linear_names = folder_of(args, "linear", 8, 16, ALL)
    qv, qv_names = folder_of(args, "qv", 8, 8, QV)
    result = {"runs": {}, "ready_s": [], "resident": [], "resident_beyond": []}
    for _ in range(args.repetitions):
        with serve(args, [linear, qv], "--kv-memory", str(KV_MEMORY)) as server:
            result["ready_s"].append(server.ready)
            load(args, server)
            resident = server.resident()
            held = server.metric("loramux_base_bytes") + kv_bytes(server) + adapter_bytes(server)
            result["resident"].append(resident)
            result["resident_beyond"].append(resident - held)
            loads = {BASE: asking(args, server), ENGINE: asking(args, None)}
            for kind, names in (LINEAR, linear_names), (Q_AND_V, qv_names):
                loads[kind] = asking(args, server, "--ask", ",".join(names))
                # What comes first pays for loading.
                loads[kind](2)
            in_turns(args, loads, result["runs"])
    return result


def over_many(args):
    """All traffic on one adapter, and over many of which few fit into memory; first tokens of warm and of cold adapters
    beside other clients: {"runs": {name: reports}, "first_tokens": {"warm" or "cold": seconds}}, an adapter's bytes."""
    folder, many = folder_of(args, f"many-r{args.rank}", args.many, args.rank, QV)
    with serve(args, [folder]) as server:
        first_token(args, server, many[0])
        each = adapter_bytes(server)
    result = {"runs": {}, "first_tokens": {kind: [] for kind in BESIDE}, "bytes_each": each}
    fresh = iter(many[::-1])
    with serve(args, [folder], "--adapter-memory", str(each * args.room)) as server:
        first_token(args, server, many[0])

        def beside(kind):
            def run(requests):
                probes = max(1, args.probes // TURNS)
                names = [many[0] if kind == "warm" else next(fresh) for _ in range(probes)]
                report, took = probed(args, server, many[: CLIENTS - 1], names, requests)
                result["first_tokens"][kind] += took
                return report

            return run

        any_of_many = ["--ask-all", "--spread", "uniform"]
        loads = {ONE: asking(args, server, "--ask", many[0]), MANY: asking(args, server, *any_of_many)}
        loads |= {name: beside(kind) for kind, name in BESIDE.items()}
        for _ in range(args.repetitions):
            in_turns(args, loads, result["runs"])
    return result


def main():
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    beside, many = beside_base(args), over_many(args)
    runs = beside.pop("runs") | many.pop("runs")
    print(json.dumps({**beside, **many, "runs": runs}), end="\n\n")
    rate = lambda name: f"{statistics.median(run['tokens_per_second'] for run in runs[name]):.0f}"
    p99 = lambda name, what: f"{statistics.median(run[what]['p99'] for run in runs[name]):.1f} ms"
    header = [f"traffic of {CLIENTS} clients", "tok/s", "request p99", "between tokens p99"]
    print(markdown(header, [[name, rate(name), p99(name, "request_ms"), p99(name, "token_ms")] for name in runs]))
    print(f"many: {args.many}, with memory for {args.room}")
    for kind, took in many["first_tokens"].items():
        took = sorted(1e3 * t for t in took)
        print(f"{kind}: first token after {statistics.median(took):.0f} ms, p90 {took[len(took) * 9 // 10]:.0f} ms")
    megabytes = lambda name: f"{statistics.median(beside[name]) / 1e6:.0f} MB"
    print(f"ready after {statistics.median(beside['ready_s']):.2f} s")
    print(f"{megabytes('resident')} resident after base traffic, {megabytes('resident_beyond')} beyond weights and KV cache")


if __name__ == "__main__":
    script(main)
