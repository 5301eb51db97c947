"""What adapters cost a running server: eight of them against none, many against one, cold ones against warm ones.

    cargo build --release
    pip install --requirement benches/serve/requirements.txt
    python3 benches/serve/adapters.py --loramux target/release/loramux --work bench-work \\
        --model SmolLM2-135M-Instruct.Q4_1.gguf --loramux-options='--quantize q8'

It writes random adapters, starts `loramux serve` with room for a part of them, and sends the loads of `loramux bench serve`,
in turns, so that a slow minute of the machine hits all alike. The tables hold medians; the JSON before them has every run.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import shlex
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
from gguf import GGUFReader

QV, ALL = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GGUF_NAMES = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
CLIENTS = 8
SEEDS = itertools.count(1)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loramux", required=True, type=Path, help="the program, a release build")
    parser.add_argument("--work", required=True, type=Path, help="folder for adapters and logs")
    parser.add_argument("--model", required=True, help="a GGUF file of a Llama")
    parser.add_argument("--loramux-options", default="", help="more of `loramux serve`'s")
    parser.add_argument("--many", type=int, default=2000, help="adapters of the traffic over many")
    parser.add_argument("--room", type=int, default=100, help="of these, so many fit into memory")
    parser.add_argument("--rank", type=int, default=8, help="of these, on q and v")
    parser.add_argument("--requests", type=int, default=16, help="of each client in a run")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=3)
    return parser.parse_args()


def write_adapter(folder, shapes, rank, targets, seed):
    """Random factors in bf16, as PEFT saves them."""
    random = numpy.random.default_rng(seed)
    header, parts, end = {}, [], 0
    for (layer, module), (outputs, inputs) in shapes.items():
        if module not in targets:
            continue
        block = "self_attn" if module in ALL[:4] else "mlp"
        for factor, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            numbers = random.normal(0, 0.02, shape).astype(numpy.float32).view(numpy.uint32) >> 16
            parts.append(numbers.astype(numpy.uint16).tobytes())
            name = f"base_model.model.model.layers.{layer}.{block}.{module}.lora_{factor}.weight"
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + len(parts[-1])]}
            end += len(parts[-1])
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"".join([struct.pack("<Q", len(text)), text, *parts]))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def shapes_of(model):
    """{(layer, module): (outputs, inputs)} of the linear layers."""
    modules = dict(zip(GGUF_NAMES, ALL))
    tensors = [(t.name.split("."), t.shape) for t in GGUFReader(model).tensors if t.name.startswith("blk.")]
    found = {(int(n[1]), modules[n[2]]): (int(s[1]), int(s[0])) for n, s in tensors if n[2] in modules}
    return dict(sorted(found.items()))


def write_adapters(args, shapes):
    """{kind: names} of adapters, a folder of each kind: those that are compared with the base, and the many."""
    kinds = {"linear": (8, 16, ALL), "qv": (8, 8, QV), f"many-r{args.rank}": (args.many, args.rank, QV)}
    for kind, (count, rank, targets) in kinds.items():
        for i in range(count):
            folder = args.work / kind / f"{kind}-{i}"
            if not folder.exists():
                part = args.work / "part"
                subprocess.run(["rm", "-rf", part], check=True)
                write_adapter(part, shapes, rank, targets, (count + rank) * 10_000 + i)
                folder.parent.mkdir(exist_ok=True)
                part.rename(folder)
    return {kind: [f"{kind}-{i}" for i in range(count)] for kind, (count, _, _) in kinds.items()}


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@contextlib.contextmanager
def server(args, folders, options):
    """Yields the port and the process, and stops it after the block. `ready` is how long it took to answer."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [str(args.loramux), "serve", "--model", args.model, "--device", "cpu", "--listen", f"127.0.0.1:{port}"]
    command += ["--store", str(args.work / "store"), *options, *shlex.split(args.loramux_options)]
    for folder in folders:
        command += ["--adapters", str(folder)]
    start = time.monotonic()
    with open(args.work / "loramux.log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            while True:
                with contextlib.suppress(OSError):
                    if get(port, "/health/ready")[0] == 200:
                        break
                if process.poll() is not None or time.monotonic() > start + 300:
                    sys.exit(f"{shlex.join(command)} does not answer; see {log.name}")
                time.sleep(0.01)
            process.ready = time.monotonic() - start
            yield port, process
        finally:
            process.terminate()


def memory(port):
    """Bytes of adapters in memory."""
    lines = get(port, "/metrics")[1].decode().splitlines()
    return int(next(line.split()[-1] for line in lines if line.startswith('loramux_adapter_bytes{tier="device"}')))


def load(args, port, *options):
    """The report of `loramux bench serve`, or without a port of `loramux bench engine`."""
    command = [str(args.loramux), "bench"]
    if port:
        command += ["serve", "--url", f"http://127.0.0.1:{port}"]
    else:
        command += ["engine", "--model", args.model, "--device", "cpu", *shlex.split(args.loramux_options)]
    command += ["--json", "--clients", str(CLIENTS), "--seed", str(next(SEEDS))]
    command += ["--requests", str(args.requests), "--prompt-tokens", str(args.prompt_tokens)]
    command += ["--max-tokens", str(args.max_tokens), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{shlex.join(command)} failed: {done.stderr}")
    return json.loads(done.stdout)


def first_token(args, port, name):
    """Seconds until a request's answer with one token is there."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        prompt = f"{time.monotonic_ns()} " + "word " * (args.prompt_tokens // 2)
        body = json.dumps({"model": name, "prompt": prompt, "max_tokens": 1, "temperature": 0})
        start = time.monotonic()
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(f"{name}: {response.status} {answer[:500]}")
        return time.monotonic() - start
    finally:
        connection.close()


def probed(args, port, neighbours, names):
    """A load of other clients, and meanwhile a request with each of `names` in turn: the load's report, and first tokens."""
    took, ended = [], threading.Event()

    def probe():
        for name in names:
            if ended.is_set():
                return
            took.append(first_token(args, port, name))
            time.sleep(0.1)

    thread = threading.Thread(target=probe)
    thread.start()
    report = load(args, port, "--ask", ",".join(neighbours))
    ended.set()
    thread.join()
    return report, took


def resident(process):
    """MB in use."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return round(int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) * 1024 / 1e6)


def beside_base(args, kinds, runs):
    """The base alone, eight adapters of two kinds, and the base on an engine without a server; memory and time to start."""
    folders, facts = [args.work / kind for kind in ("linear", "qv")], {"ready_s": [], "resident_mb": []}
    for _ in range(args.repetitions):
        with server(args, folders, []) as (port, process):
            facts["ready_s"].append(process.ready)
            runs.setdefault("base", []).append(load(args, port))
            facts["resident_mb"].append(resident(process))
            for kind, row in (("linear", "8 adapters, rank 16, all linear"), ("qv", "8 adapters, rank 8, q and v")):
                runs.setdefault(row, []).append(load(args, port, "--ask", ",".join(kinds[kind])))
        runs.setdefault("base, engine alone", []).append(load(args, None))
    return facts


def over_many(args, many, each, runs):
    """All traffic on one adapter and over many; first tokens of warm and of cold adapters beside other clients."""
    first_tokens = {"warm": [], "cold": []}
    fresh = iter(many[::-1])
    with server(args, [args.work / f"many-r{args.rank}"], ["--adapter-memory", str(each * args.room)]) as (port, process):
        first_token(args, port, many[0])
        for _ in range(args.repetitions):
            runs.setdefault("one adapter", []).append(load(args, port, "--ask", many[0]))
            options = ["--ask-all", "--spread", "uniform"]
            runs.setdefault(f"{args.many} adapters, room for {args.room}", []).append(load(args, port, *options))
            for kind, took in first_tokens.items():
                names = [many[0]] * 40 if kind == "warm" else [next(fresh) for _ in range(40)]
                report, seen = probed(args, port, many[: CLIENTS - 1], names)
                runs.setdefault(f"7 adapters, beside {kind} ones", []).append(report)
                took += seen
        return first_tokens, {"resident_mb_of_many": resident(process)}


def main():
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    kinds = write_adapters(args, shapes_of(args.model))
    many, runs = kinds[f"many-r{args.rank}"], {}
    with server(args, [args.work / f"many-r{args.rank}"], []) as (port, _):
        first_token(args, port, many[0])
        each = memory(port)
    facts = {"bytes_each": each} | beside_base(args, kinds, runs)
    first_tokens, more = over_many(args, many, each, runs)
    print(json.dumps({**facts, **more, "runs": runs, "first_tokens": first_tokens}), end="\n\n")
    rate = lambda name: statistics.median(run["tokens_per_second"] for run in runs[name])
    p99 = lambda name, what: statistics.median(run[what]["p99"] for run in runs[name])
    print("| traffic of 8 clients | tok/s | request p99 | between tokens p99 |\n|---|---|---|---|")
    for name in runs:
        print(f"| {name} | {rate(name):.0f} | {p99(name, 'request_ms'):.0f} ms | {p99(name, 'token_ms'):.1f} ms |")
    for kind, took in first_tokens.items():
        took = sorted(1e3 * t for t in took)
        print(f"{kind}: first token after {statistics.median(took):.0f} ms, p90 {took[len(took) * 9 // 10]:.0f} ms")
    print(f"ready after {statistics.median(facts['ready_s']):.2f} s; {facts['resident_mb']} MB resident with base traffic")


main()
