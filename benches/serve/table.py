"""Everything that the README says of speed beside other programs, and beside what it is to be, in one table.

    cargo build --release
    python3 -m pip install --requirement benches/serve/requirements.txt
    python3 benches/serve/llama.py --help      # says how to build llama.cpp and where the model comes from
    PYTHONPATH=PEFT python3 benches/serve/table.py --loramux target/release/loramux --llama build --work bench-work \\
        --model SmolLM2-135M-Instruct.Q4_1.gguf --texts reviews.csv

PEFT is the folder that `tests/peft/install.py` makes, reviews.csv what `recipes/data.py` makes of Rotten Tomatoes. It
measures with llama.py, adapters.py, classify.py, and `cargo bench --bench decode`; what is compared takes turns. Numbers
are medians of the repetitions, ratios those of the medians. A row that was not measured says why. All runs are in
`table.json` in the folder for work. `--quick` is to see that everything runs: its numbers are of no use.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import traceback
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import adapters
import llama
from report import busy, machine, markdown
from server import loramux, output, script

REPOSITORY = Path(__file__).resolve().parents[2]
QUANTIZE = "--quantize q8"
LLAMA_FORMATS = ["Q8_0", "Q4_0", "BF16"]
SERVER_FORMAT = "Q8_0"


class Row(NamedTuple):
    what: str
    unit: str
    # What the goal is for: a ratio or a difference of the two numbers, or loramux's alone.
    judged: str = "ratio"
    sense: str = "≥"
    goal: float | None = None


# For each part that is measured, its rows, in the order in which its function gives their numbers.
ROWS = {
    "steps": [
        Row(llama.decode_row(1), "tok/s", goal=1.2),
        Row(llama.decode_row(8), "tok/s", goal=2.5),
        Row(llama.decode_row(16), "tok/s"),
        Row(llama.decode_row(32), "tok/s", goal=3),
        Row(llama.PREFILL_ROW, "tok/s", goal=1.8),
    ],
    "servers": [
        Row(llama.row(1, 0), "tok/s"),
        Row(llama.row(8, 0), "tok/s"),
        Row(llama.row(8, 1), "tok/s"),
        Row(llama.row(8, 8), "tok/s", goal=7),
    ],
    "adapters": [
        Row("8 adapters, rank 16, all linear", "tok/s", goal=0.85),
        Row("8 adapters, rank 8, q and v", "tok/s", goal=0.95),
        Row("base over HTTP", "tok/s", goal=0.95),
        Row("memory beyond weights, KV cache and adapters", "MB", "value", "≤", 150),
        Row("ready after the start", "s", "value", "≤", 2),
    ],
    "many": [
        Row("any of 2,000 adapters, memory for 100", "tok/s", goal=0.7),
        Row("its slowest 1 % of requests", "ms", "ratio", "≤", 3),
        Row("a cold adapter's first token", "ms", "difference", "≤", 30),
        Row("slowest 1 % of gaps between others' tokens meanwhile", "ms", "ratio", "≤", 1.2),
    ],
    "classify": [Row("classification", "texts/s", goal=4)],
}


class Measured(NamedTuple):
    loramux: float
    peer: float | None = None
    peer_name: str = ""

    def judged(self, how):
        if how == "value":
            return self.loramux
        return self.loramux - self.peer if how == "difference" else self.loramux / self.peer


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loramux", required=True, type=Path, help="the program, a release build")
    parser.add_argument("--work", required=True, type=Path, help="folder for converted models, adapters and logs")
    parser.add_argument("--model", required=True, type=Path, help="a GGUF file of a Llama")
    parser.add_argument("--llama", type=Path, help="the build folder of llama.cpp")
    parser.add_argument("--decode", type=Path, help="the built benches/decode.rs; without it cargo builds it")
    parser.add_argument("--texts", type=Path, help="CSV with texts to classify in the first column, below a header")
    parser.add_argument("--adapters", type=Path, default=REPOSITORY / "adapters", help="folder of the one that classifies")
    parser.add_argument("--classifier", default="movie-reviews", help="the adapter that classifies")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, help="3 by default, once with --quick")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="PART", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--quick", action="store_true", help="once, with short loads")
    args = parser.parse_args()
    args.repetitions = args.repetitions or (1 if args.quick else 3)
    return args


def built_decode():
    """The program of benches/decode.rs."""
    command = ["cargo", "bench", "--bench", "decode", "--no-run", "--message-format", "json"]
    messages = llama.json_lines(output([*command, "--manifest-path", str(REPOSITORY / "Cargo.toml")]))
    made = (m["executable"] for m in messages if m.get("target", {}).get("name") == "decode" and m.get("executable"))
    return Path(next(made))


# Each of the parts gives the numbers of all its runs, for the record, and a `Measured` for each of its rows.


def llama_arguments(args):
    if not args.llama:
        raise RuntimeError("no --llama")
    words = ["--llama", args.llama, "--model", args.model, "--work", args.work, "--loramux", args.loramux]
    words += [f"--loramux-options={QUANTIZE}", "--threads", args.threads, "--repetitions", args.repetitions]
    words += ["--requests", 1 if args.quick else 3, "--max-tokens", 16 if args.quick else 64]
    words += ["--formats", *LLAMA_FORMATS, "--server-format", SERVER_FORMAT, "--decode-steps", 5 if args.quick else 15]
    return llama.arguments(list(map(str, words)))


def steps(args):
    given = llama_arguments(args)
    given.decode = args.decode or built_decode()
    rates = llama.measure_steps(given)
    measured = []
    for row in ROWS["steps"]:
        middle = {system: statistics.median(runs) for system, runs in rates[row.what].items()}
        own = middle.pop("loramux")
        best = max(middle, key=middle.get)
        measured.append(Measured(own, middle[best], f"llama.cpp, {best}"))
    return rates, measured


def servers(args):
    seen = llama.measure_servers(llama_arguments(args))
    middle = lambda row, system: statistics.median(rate for rate, _slowest in seen[row.what][system])
    name = f"llama-server, {SERVER_FORMAT}"
    both = lambda row: Measured(middle(row, f"loramux {QUANTIZE}"), middle(row, "llama.cpp"), name)
    return seen, [both(row) for row in ROWS["servers"]]


def adapters_arguments(args):
    words = ["--loramux", args.loramux, "--work", args.work, "--model", args.model]
    words += [f"--loramux-options={QUANTIZE} --threads {args.threads}"]
    words += ["--repetitions", args.repetitions, "--requests", 4 if args.quick else 16]
    words += ["--probes", 5 if args.quick else 40]
    return adapters.arguments(list(map(str, words)))


def middle_of(runs, *path):
    """The median of a number of reports of `loramux bench`."""
    numbers = []
    for run in runs:
        for key in path:
            run = run[key]
        numbers.append(run)
    return statistics.median(numbers)


def beside_base(args):
    result = adapters.beside_base(adapters_arguments(args))
    rate = {name: middle_of(runs, "tokens_per_second") for name, runs in result["runs"].items()}
    base = rate[adapters.BASE]
    return result, [
        Measured(rate[adapters.LINEAR], base, "the base alone"),
        Measured(rate[adapters.Q_AND_V], base, "the base alone"),
        Measured(base, rate[adapters.ENGINE], "the engine without HTTP"),
        Measured(statistics.median(result["resident_beyond"]) / 1e6),
        Measured(statistics.median(result["ready_s"])),
    ]


def over_many(args):
    result = adapters.over_many(adapters_arguments(args))
    runs = result["runs"]
    first = {kind: 1e3 * statistics.median(took) for kind, took in result["first_tokens"].items()}
    warm, cold = adapters.BESIDE["warm"], adapters.BESIDE["cold"]

    def both(name, other, peer, *path):
        return Measured(middle_of(runs[name], *path), middle_of(runs[other], *path), peer)

    return result, [
        both(adapters.MANY, adapters.ONE, "one adapter", "tokens_per_second"),
        both(adapters.MANY, adapters.ONE, "one adapter", "request_ms", "p99"),
        Measured(first["cold"], first["warm"], "a warm one's"),
        both(cold, warm, "beside a warm one's", "token_ms", "p99"),
    ]


def classify(args):
    if not args.texts:
        raise RuntimeError("no --texts")
    # Not all who measure the rest have PyTorch.
    from classify import measure

    options = [*QUANTIZE.split(), "--threads", str(args.threads)]
    count = 64 if args.quick else 640
    with loramux(args, args.model, [args.adapters], options) as server:
        rates = measure(server, args.classifier, args.texts, count, args.repetitions, args.threads)
    return rates, [Measured(*map(statistics.median, rates.values()), "transformers and PEFT")]


# Last what leaves threads of PyTorch in this process.
PARTS = {"steps": steps, "servers": servers, "adapters": beside_base, "many": over_many, "classify": classify}


def number(value):
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def line(row, measured):
    """A row of the table; `measured` is a `Measured`, or says why there is none."""
    goal = "" if row.goal is None else f"{row.sense} {row.goal:g}"
    if row.judged != "ratio":
        goal += f" {row.unit}"
    if isinstance(measured, str):
        return [row.what, f"not measured: {measured}", "", "", goal]
    judged = measured.judged(row.judged)
    if row.goal is not None:
        # As it is printed: what reads like the goal is the goal.
        shown = float(number(judged))
        goal += ", met" if (shown >= row.goal if row.sense == "≥" else shown <= row.goal) else ", missed"
    peer = "" if measured.peer is None else f"{number(measured.peer)} ({measured.peer_name})"
    ratio = {"ratio": number(judged), "difference": f"{judged:+.0f} {row.unit}", "value": ""}[row.judged]
    return [row.what, f"{number(measured.loramux)} {row.unit}", peer, ratio, goal]


def versions(args):
    """Of what is compared, as they say themselves."""
    found = [output([str(args.loramux), "--version"]).strip()]
    if args.llama:
        command = [str(args.llama / "bin" / "llama-server"), "--version"]
        try:
            said = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout
            found.append(f"llama.cpp {said.splitlines()[0].removeprefix('version: ')}")
        except (OSError, subprocess.CalledProcessError) as error:
            found.append(f"no llama.cpp ({error})")
    for package in ("torch", "transformers", "peft"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def why(error):
    """In a cell of a table."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 200 else f"{text[:200]} …").replace("|", "/")


def main():
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    about = [f"{date.today()}: {machine()}; {args.threads} threads; {args.model.name}", versions(args)]
    record, measured = {"about": about}, {}
    start, before = time.monotonic(), busy()
    for part, measure in PARTS.items():
        reason = f"--only {' '.join(args.only)}"
        if part in args.only:
            print(f"{part} …", file=sys.stderr)
            try:
                record[part], numbers = measure(args)
                measured[part] = numbers
                continue
            except Exception as error:
                traceback.print_exc()
                reason = why(error)
        measured[part] = [reason] * len(ROWS[part])
    others = (busy() - before) / (time.monotonic() - start)
    about.append(f"{args.repetitions} repetitions; other programs had {others:.2f} cores meanwhile")
    if args.quick:
        about.append("--quick: these numbers are of no use")
    (args.work / "table.json").write_text(json.dumps(record, ensure_ascii=False))
    print("\n".join(f"- {text}" for text in about), end="\n\n")
    lines = [line(*pair) for part, rows in ROWS.items() for pair in zip(rows, measured[part], strict=True)]
    print(markdown(["", "loramux", "beside", "ratio", "goal"], lines))


if __name__ == "__main__":
    script(main)
