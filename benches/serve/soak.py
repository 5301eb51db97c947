"""`loramux serve` for half an hour at twice what it can do, with clients that vanish, read slowly, and send nonsense.

    cargo build --release
    python3 benches/serve/soak.py --loramux target/release/loramux --work soak-work
    python3 benches/serve/soak.py --loramux target/release/loramux --work soak-work --minutes 3    # memory still grows

It takes Linux, Python 3.11 and nothing else. It serves copies of the adapters in `adapters/`, more than memory has room for,
and first measures what the server can do: how many requests of clients are answered that always have the next one ready.
Then requests arrive by themselves (Poisson) at `--load` times that rate: chats, completions, classifications and
generations in three dialects, streamed or not, some with a schema, some with a deadline, over adapters by Zipf's law. Beside
them are awkward clients, and uploads, replacements and removals of adapters. None waits for the server: times run from
when a request was due.

What has to hold is in the table at the end; where something does not, it says so and exits with 1. All numbers, also
those of each request, are in `soak.json` in the folder for work.
"""

import argparse
import asyncio
import json
import math
import os
import random
import shlex
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from client import Client, answer, message
from report import busy, machine, markdown
from server import loramux, script
from traffic import BASE, PROBES, Adapter, Awkward, Changes, Traffic, Wrong, outcome, said

REPOSITORY = Path(__file__).resolve().parents[2]
# Names that adapters come and go under, and how many clients change them, each its own.
CHANGING = [f"changing-{i}" for i in range(8)]
CHANGERS = 4
# Seconds between two looks at the process, at most.
EVERY = 5
# Seconds in which each request has to be answered, whatever it is; more where the queue alone takes a part of it.
PATIENCE = 120
# What a request may take at most, as a multiple of the time in which as many as fit the queue are answered.
LATENCY_FACTOR = 2
# Of the resident memory, as a share.
GROWTH = 0.02
# Seconds after which threads have ended that wait for work for a while.
SETTLE = 12
# What must be gone when all is answered.
LEFT = ["running", "waiting", "queue", "KV blocks in use", "adapters held", "uploads", "stored without a name"]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loramux", required=True, type=Path, help="the program, a release build")
    parser.add_argument("--work", required=True, type=Path, help="folder for adapters, logs and soak.json")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the one that --adapters are for")
    parser.add_argument("--adapters", type=Path, default=REPOSITORY / "adapters", help="folder of those that are copied")
    parser.add_argument("--copies", type=int, default=25, help="of each adapter")
    parser.add_argument("--adapter-memory", default="96MiB", help="less than the copies take")
    parser.add_argument("--max-sequences", type=int, default=8)
    parser.add_argument("--max-queue", type=int, default=32)
    parser.add_argument("--loramux-options", default="--quantize q8 --kv-memory 256MiB", help="more of `loramux serve`'s")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--load", type=float, default=2.0, help="as a multiple of what the server can do")
    parser.add_argument("--awkward", type=float, default=0.2, help="awkward clients for each request")
    parser.add_argument("--changes", type=float, default=0.5, help="uploads and removals a second")
    parser.add_argument("--capacity-seconds", type=float, default=60, help="in which it is measured what the server can do")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def copies(args):
    """A folder of adapters: of each original so many that say the same, and are told apart by their generations alone."""
    originals = sorted(path.parent for path in args.adapters.glob("*/adapter_config.json"))
    folder = args.work / "adapters"
    shutil.rmtree(folder, ignore_errors=True)
    adapters = []
    for original in originals:
        for i in range(args.copies):
            copy = folder / f"{original.name}-{i}"
            copy.mkdir(parents=True)
            config = {**json.loads((original / "adapter_config.json").read_text()), "revision": f"copy {i}"}
            (copy / "adapter_config.json").write_text(json.dumps(config))
            for name in ("adapter_model.safetensors", "labels.json"):
                if (original / name).exists():
                    (copy / name).symlink_to((original / name).resolve())
            adapters.append(Adapter(copy.name, original.name, (original / "labels.json").exists()))
    return folder, adapters


def upload_files(args, original):
    """{field of the form: bytes}."""
    names = {"config": "adapter_config.json", "weights": "adapter_model.safetensors", "labels": "labels.json"}
    paths = {field: args.adapters / original / name for field, name in names.items()}
    return {field: path.read_bytes() for field, path in paths.items() if path.exists()}


def errors(log):
    """Lines of the server's log that tell of an error of its own, or of a panic."""
    lines = log.read_text(errors="replace").splitlines()
    return [line for line in lines if "ERROR" in line or "panicked" in line]


def tell(what):
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


class Process:
    """What /proc tells of the server."""

    def __init__(self, pid):
        self.folder = Path(f"/proc/{pid}")

    def look(self):
        rollup = dict(line.split(":") for line in (self.folder / "smaps_rollup").read_text().splitlines()[1:])
        kilobytes = lambda name: 1024 * int(rollup[name].split()[0])
        return {
            "resident": kilobytes("Rss"),
            "anonymous": kilobytes("Anonymous"),
            "descriptors": len(os.listdir(self.folder / "fd")),
            "threads": len(os.listdir(self.folder / "task")),
        }

    def cpu(self):
        """Seconds on a core so far."""
        fields = (self.folder / "stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def own_cpu():
    return sum(os.times()[:2])


class Sent(NamedTuple):
    """A request, when it was due, and what became of it."""

    due: float
    # Seconds that it was sent too late.
    late: float
    # Seconds from when it was due to the last byte of its answer.
    took: float
    kind: str
    sequences: int
    # Of the answer; 0: none, or a wrong one.
    status: int


class Soak:
    """One run of all of it, on one event loop."""

    def __init__(self, args, server, adapters):
        self.args, self.server = args, server
        self.client, self.process = Client(server.address), Process(server.process.pid)
        self.adapters, self.expected, self.traffic = adapters, {}, None
        self.start, self.patience = time.monotonic(), PATIENCE
        self.failures, self.sent, self.samples = [], [], []
        self.awkward_ends, self.arrivals = Counter(), random.Random(args.seed + 1)
        self.due = 0  # Requests.
        self.changers, self.changes, self.result = [], Counter(), {}

    def now(self):
        return time.monotonic() - self.start

    def fail(self, kind, what):
        self.failures.append({"at": round(self.now(), 2), "kind": kind, "what": str(what)[:1000]})

    async def metrics(self):
        got = await self.client.ask("GET", "/metrics")
        lines = [line.rsplit(" ", 1) for line in got.body.decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    async def say(self, number, adapter):
        """What a probe says."""
        path, body = PROBES[number]
        got = await self.client.post(path, {**body, "adapter": adapter})
        if got.status != 200:
            raise RuntimeError(f"a probe of {adapter} was answered {got.status} {got.body[:300]}")
        return said(got)

    async def learn(self):
        """What each probe says on each original, in an idle server."""
        originals = {adapter.original: adapter for adapter in [BASE, *self.adapters]}
        for original, adapter in originals.items():
            for number, (path, _) in enumerate(PROBES):
                if adapter.classifies or path != "/v1/classify":
                    self.expected[original, number] = await self.say(number, adapter.name)
        self.traffic = Traffic(self.args.seed, self.adapters, CHANGING, self.expected)

    async def send(self, request, due=None):
        """One well-formed request, and its end."""
        begun = self.now()
        due = begun if due is None else due
        status, headers = 0, {"x-request-timeout": f"{request.deadline:.2f}"} if request.deadline else {}
        try:
            got = await asyncio.wait_for(self.client.post(request.path, request.body, headers), self.patience)
            status = outcome(request, got)
        except TimeoutError:
            self.fail(request.kind, f"no answer within {self.patience:.0f} s")
        except (Wrong, OSError, EOFError, ValueError) as e:
            self.fail(request.kind, f"{e!r} to {json.dumps(request.body)[:200]}")
        self.sent.append(Sent(due, begun - due, self.now() - due, request.kind, request.sequences, status))
        return status

    def come(self, due):
        self.due += 1
        return self.send(self.traffic.well_formed(), due)

    async def be_awkward(self, client):
        try:
            end = await asyncio.wait_for(client(), self.patience)
        except (Wrong, OSError, EOFError, ValueError, TimeoutError) as e:
            end = "wrong"
            self.fail(client.__name__, repr(e))
        self.awkward_ends[f"{client.__name__.replace('_', ' ')}: {end}"] += 1

    async def capacity(self):
        """Closed loop: as many clients as there are places, twice, each with one request after the other."""
        start, seconds = self.now(), self.args.capacity_seconds
        begun, until = start + seconds / 4, start + seconds

        async def client():
            while self.now() < until:
                await self.send(self.traffic.well_formed())

        used = [self.process.cpu(), busy(), own_cpu()]
        await asyncio.gather(*(client() for _ in range(2 * self.args.max_sequences)))
        # What comes first finds an empty cache, what comes last has the server for itself.
        counted = [s for s in self.sent if s.status == 200 and begun <= s.due + s.took < until]
        self.sent.clear()
        self.result["capacity"] = {
            "requests_per_second": len(counted) / (until - begun),
            "sequences_per_second": sum(s.sequences for s in counted) / (until - begun),
            "cores": self.cores(used, self.now() - start),
        }
        if not counted:
            raise RuntimeError(f"in {seconds:g} s nothing was answered; failures: {self.failures[:3]}")
        # Some shorter than the time in the queue, some longer.
        turn = self.args.max_queue / self.result["capacity"]["sequences_per_second"]
        self.traffic.deadlines = 0.1 * turn, 2 * turn
        self.patience = max(PATIENCE, 5 * turn)

    def cores(self, before, seconds):
        """Cores in use by the server, by this script, and by others."""
        server, others, own = self.process.cpu() - before[0], busy() - before[1], own_cpu() - before[2]
        return {"server": server / seconds, "script": own / seconds, "others": (others - server) / seconds}

    async def arrive(self, rate, until, make):
        """Starts `make(due)` at times of a Poisson process. None waits for another, and none is left out: one whose time is
        over is started at once."""
        due, tasks = self.now(), set()
        while (due := due + self.arrivals.expovariate(rate)) < until:
            if (early := due - self.now()) > 0:
                await asyncio.sleep(early)
            task = asyncio.create_task(make(due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def change(self, changer, until):
        """Changes of adapters, one after the other."""
        while self.now() < until:
            await asyncio.sleep(self.arrivals.expovariate(self.args.changes / CHANGERS))
            try:
                self.changes[await asyncio.wait_for(changer.one(), self.patience)] += 1
            except (Wrong, OSError, EOFError, ValueError, TimeoutError) as e:
                self.fail("change of adapters", repr(e))

    async def sample(self, until):
        """Looks at the process and its metrics now and then."""
        due = self.now()
        while due < until:
            await asyncio.sleep(max(0, due - self.now()))
            due += min(EVERY, until / 40)
            if self.server.process.poll() is not None:
                raise RuntimeError(f"the server has ended with {self.server.process.returncode}; see its log")
            try:
                metrics = await asyncio.wait_for(self.metrics(), PATIENCE)
            except (OSError, EOFError, TimeoutError) as e:
                self.fail("metrics", repr(e))
                continue
            names = {
                "running": "vllm:num_requests_running",
                "waiting": "vllm:num_requests_waiting",
                "queue": "loramux_queue_length",
                "kv_used": 'loramux_kv_blocks{state="used"}',
                "kv_free": 'loramux_kv_blocks{state="free"}',
                "adapters": 'loramux_adapters{tier="device"}',
                "adapter_bytes": 'loramux_adapter_bytes{tier="device"}',
                "loads": 'loramux_adapter_load_seconds_count{from="disk"}',
            }
            seen = {name: metrics[full] for name, full in names.items()}
            self.samples.append({"at": round(self.now(), 1), **self.process.look(), **seen})
            if len(self.samples) % 12 == 0:
                counts = dict(sorted(Counter(s.status for s in self.sent).items()))
                tell(f"{self.samples[-1]} {counts}, {len(self.failures)} failures")

    async def load(self):
        """Open loop."""
        args, seconds = self.args, 60 * self.args.minutes
        rate = args.load * self.result["capacity"]["requests_per_second"]
        files = {original: upload_files(args, original) for original in {a.original for a in self.adapters}}
        awkward = Awkward(self.traffic, self.client)
        names = [CHANGING[i::CHANGERS] for i in range(CHANGERS)]
        self.changers = [Changes(self.traffic, self.client, own, files) for own in names]
        self.start, used = time.monotonic(), [self.process.cpu(), busy(), own_cpu()]
        await asyncio.gather(
            self.arrive(rate, seconds, self.come),
            self.arrive(rate * args.awkward, seconds, lambda _: self.be_awkward(awkward.one())),
            *(self.change(changer, seconds) for changer in self.changers),
            self.sample(seconds),
        )
        self.result["load"] = {"requests_per_second": rate, "seconds": seconds, "cores": self.cores(used, self.now())}

    async def idle(self):
        """What is left when nobody asks: metrics and the process. Waits for threads and connections to end."""
        self.client.close()
        await asyncio.sleep(SETTLE)
        metrics = await self.metrics()
        self.client.close()
        adapters = json.loads(self.server.get("/v1/adapters"))["adapters"]
        stored = {folder: len(os.listdir(self.args.work / "store" / folder)) for folder in ("incoming", "names", "objects")}
        return {
            "running": metrics["vllm:num_requests_running"],
            "waiting": metrics["vllm:num_requests_waiting"],
            "queue": metrics["loramux_queue_length"],
            "KV blocks in use": metrics['loramux_kv_blocks{state="used"}'],
            "adapters held": sum(adapter["in_flight"] for adapter in adapters),
            "uploads": stored["incoming"],
            "stored without a name": stored["objects"] - stored["names"],
            **self.process.look(),
        }

    async def probes(self):
        """How many probes say what they did at first, and of how many; names that were uploaded are among them."""
        names = {adapter.original: adapter.name for adapter in [BASE, *self.adapters]}
        expected = self.expected.items()
        same = [await self.say(number, names[original]) == value for (original, number), value in expected]
        for changer in self.changers:
            for name in changer.names:
                try:
                    await changer.holds(name)
                    same.append(True)
                except Wrong as e:
                    self.fail("change of adapters", repr(e))
                    same.append(False)
        return same.count(True), len(same)

    async def end(self):
        """SIGTERM beside streams that run: how many of them come to their end, of how many, and the exit code."""
        streams = []
        for _ in range(self.args.max_sequences):
            reader, writer = await self.client.connect()
            body = {"prompt": self.traffic.words(5, 5), "max_tokens": 60, "ignore_eos": True, "stream": True}
            writer.write(message("POST", "/v1/generate", json.dumps(body).encode()))
            streams.append((reader, writer))
        while (await self.metrics())["vllm:num_requests_running"] < len(streams):
            await asyncio.sleep(0.05)
        self.server.process.send_signal(signal.SIGTERM)
        ended = await asyncio.gather(*(answer(reader) for reader, _ in streams), return_exceptions=True)
        whole = sum(not isinstance(a, BaseException) and a.status == 200 and a.events()[-1] == "[DONE]" for a in ended)
        return whole, len(streams), await asyncio.to_thread(self.server.process.wait, 90)

    async def run(self):
        await self.learn()
        await self.capacity()
        tell(self.result["capacity"])
        before = await self.idle()
        await self.load()
        tell("the last request has its answer")
        after = await self.idle()
        tell(after)
        self.result |= {"before": before, "after": after, "probes": await self.probes()}
        tell("stopping")
        self.result["end"] = await asyncio.wait_for(self.end(), PATIENCE)


class Check(NamedTuple):
    what: str
    found: str
    # What it is to be.
    goal: str
    holds: bool


def quantile(values, q):
    return sorted(values)[min(len(values) - 1, math.ceil(q * len(values)) - 1)]


def checks(args, soak):
    """Everything that has to hold."""
    result, sent, samples = soak.result, soak.sent, soak.samples
    seconds, before, after = result["load"]["seconds"], result["before"], result["after"]
    answered, refused = ([s for s in sent if s.status == status] for status in (200, 429))
    kinds = Counter(failure["kind"] for failure in soak.failures)
    yield Check(
        "wrong answers and ends",
        ", ".join([str(len(soak.failures)), *(f"{kind}: {count}" for kind, count in kinds.items())]),
        "0",
        not soak.failures,
    )
    yield Check("errors in the log", str(len(result["log"])), "0", not result["log"])

    rate, planned = len(sent) / seconds, result["load"]["requests_per_second"]
    yield Check(
        "requests sent, of those due; a second",
        f"{len(sent)} of {soak.due}; {rate:.2f}",
        f"all; {args.load:g} times what it can do, {planned:.2f}",
        len(sent) == soak.due and abs(rate / planned - 1) < max(0.1, 4 / math.sqrt(planned * seconds)),
    )
    behind = [s.late for s in sent]
    yield Check(
        "sent too late by: p99, most",
        f"{1e3 * quantile(behind, 0.99):.0f} ms, {1e3 * max(behind):.0f} ms",
        "p99 at most 250 ms",
        quantile(behind, 0.99) <= 0.25,
    )
    share, excess = len(refused) / len(sent), max(0, 1 - 1 / args.load)
    yield Check(
        "refused with 429",
        f"{len(refused)}, {100 * share:.0f} %",
        f"at least {50 * excess:.0f} %, half of the excess, or it was no such load",
        share >= excess / 2,
    )
    cores = [" ".join(f"{name} {used:.2f}" for name, used in result[of]["cores"].items()) for of in ("capacity", "load")]
    yield Check("cores in use: measuring what it can do; under the load", "; ".join(cores), "", True)
    capacity = result["capacity"]["sequences_per_second"]
    done = sum(s.sequences for s in answered if s.due + s.took < seconds) / seconds
    yield Check("sequences answered a second", f"{done:.2f}", f"half of {capacity:.2f} or more", done >= capacity / 2)
    # The time until the last of a full queue has its turn, and until as many as run at the same time are done.
    turn = (args.max_queue + args.max_sequences) / (min(capacity, done) or math.nan)
    took = [s.took / s.sequences for s in answered] or [math.inf]
    p50, p99 = quantile(took, 0.5), quantile(took, 0.99)
    yield Check("latency for a sequence, p50", f"{p50:.2f} s", f"at most {turn:.2f} s, a full queue's", p50 <= turn)
    yield Check(
        "latency for a sequence, p99 (most)",
        f"{p99:.2f} s ({max(took):.2f} s)",
        f"at most {LATENCY_FACTOR} times that, {LATENCY_FACTOR * turn:.2f} s",
        p99 <= LATENCY_FACTOR * turn,
    )

    part = lambda start, end: [s for s in samples if start * seconds <= s["at"] < end * seconds]
    tenths = [part(i / 10, (i + 1) / 10) for i in range(10)]
    loads = min(tenth[-1]["loads"] - tenth[0]["loads"] for tenth in tenths)
    yield Check("adapters loaded in each tenth of the time", f"{loads:.0f} or more", "some", loads > 0)
    # The tenth after a third of the time, in which caches fill, and the last tenth.
    medians = lambda what: [statistics.median(s[what] for s in part(*of)) for of in ((1 / 3, 1 / 3 + 0.1), (0.9, 2))]
    early, late = medians("resident")
    yield Check(
        "resident memory, after a third and at the end",
        f"{early / 2**20:.1f} MiB, {late / 2**20:.1f} MiB: {100 * (late / early - 1):+.2f} %",
        f"at most {100 * GROWTH:g} % more",
        late <= early * (1 + GROWTH),
    )
    for what, more in {"descriptors": 8, "threads": 4}.items():
        early, late = medians(what)
        yield Check(f"{what}, the same", f"{early:.0f}, {late:.0f}", f"at most {more} more", late <= early + more)
    for what in ("descriptors", "threads"):
        yield Check(
            f"{what}, before and after the load, idle",
            f"{before[what]}, {after[what]}",
            "no more",
            after[what] <= before[what],
        )
    yield Check(
        f"after the load: {', '.join(LEFT)}",
        ", ".join(f"{after[what]:.0f}" for what in LEFT),
        "0",
        not any(after[what] for what in LEFT),
    )
    same, probes = result["probes"]
    yield Check("probes that say after the load what they did before", f"{same} of {probes}", "all", same == probes)
    whole, streams, code = result["end"]
    yield Check(
        "streams that end well after SIGTERM; exit code",
        f"{whole} of {streams}; {code}",
        "all; 0",
        whole == streams and code == 0,
    )


def record(args, soak, found):
    """Writes all that is known."""
    outcomes = {kind: dict(Counter(s.status for s in soak.sent if s.kind == kind)) for kind in {s.kind for s in soak.sent}}
    rows = [[round(value, 3) if isinstance(value, float) else value for value in sent] for sent in soak.sent]
    whole = {
        "machine": machine(),
        "options": vars(args),
        "checks": [check._asdict() for check in found],
        **soak.result,
        "outcomes": outcomes,
        "awkward": dict(sorted(soak.awkward_ends.items())),
        "changes": soak.changes,
        "failures": soak.failures,
        "samples": soak.samples,
        "sent": {"fields": Sent._fields, "rows": rows},
    }
    (args.work / "soak.json").write_text(json.dumps(whole, default=str))


def main():
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(args.work / "store", ignore_errors=True)
    folder, adapters = copies(args)
    options = ["--adapter-memory", args.adapter_memory, "--max-sequences", str(args.max_sequences)]
    options += ["--max-queue", str(args.max_queue), *shlex.split(args.loramux_options)]
    with loramux(args, args.model, [folder], options) as server:
        soak = Soak(args, server, adapters)
        try:
            asyncio.run(soak.run())
        except BaseException:
            record(args, soak, [])
            raise
    soak.result["log"] = errors(args.work / "loramux.log")
    found = list(checks(args, soak))
    record(args, soak, found)
    for failure in soak.failures[:50]:
        tell(f"after {failure['at']:.0f} s, {failure['kind']}: {failure['what']}")
    print(markdown(["", "found", "to be", ""], [[c.what, c.found, c.goal, "" if c.holds else "**no**"] for c in found]))
    if not all(check.holds for check in found):
        sys.exit("does not hold: " + "; ".join(check.what for check in found if not check.holds))


if __name__ == "__main__":
    script(main)
