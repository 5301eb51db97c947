"""How many texts of a CSV file an adapter classifies as their labels say: `python score.py LORAMUX ADAPTER CSV`.

With a column `kind` also for each kind.
"""

import csv
import json
import subprocess
import sys
from collections import Counter


def main():
    program, adapter, path = sys.argv[1:]
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # The program takes a text a line.
    texts = "".join(" ".join(row["text"].split()) + "\n" for row in rows)
    command = [program, "classify", "--adapter", adapter]
    answers = subprocess.run(command, input=texts, stdout=subprocess.PIPE, check=True, text=True, encoding="utf-8").stdout
    right, all_of = Counter(), Counter()
    for row, answer in zip(rows, answers.splitlines(), strict=True):
        for kind in {"all", row.get("kind", "all")}:
            all_of[kind] += 1
            right[kind] += json.loads(answer)["label"] == row["label"]
    for kind, count in all_of.most_common():
        print(f"{kind}: {right[kind]} of {count}, {right[kind] / count:.3f}")


main()
