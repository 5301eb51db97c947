"""Classification of sentences: a running loramux with an adapter, and transformers with PEFT on a model of its shape.

    make serve     # in another terminal; or `loramux serve --adapters adapters`
    python3 -m pip install torch transformers peft
    python3 benches/serve/classify.py --texts reviews.csv --adapter movie-reviews

The two take turns. PEFT gets as many tokens in batches of 32 sorted by length, with a mask, and random weights: speed does
not depend on the numbers. loramux gets the sentences as they come, in requests of 32 by two clients, and none twice: it
would find those in its cache.
"""

import argparse
import csv
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import peft
import torch
import transformers

from server import Server, script


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", required=True, help="CSV with the texts in the first column, below a header")
    parser.add_argument("--adapter", required=True, help="with a classification head")
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--count", type=int, default=640, help="texts of a repetition")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def loramux(server, adapter, texts):
    """Texts a second."""
    ask = lambda part: len(server.post("/v1/classify", {"input": part, "adapter": adapter})["results"])
    parts = [texts[i : i + 32] for i in range(0, len(texts), 32)]
    start = time.perf_counter()
    with ThreadPoolExecutor(2) as clients:
        answered = sum(clients.map(ask, parts))
    return answered / (time.perf_counter() - start)


def model():
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, num_labels=2, pad_token_id=0, tie_word_embeddings=True,
    )
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(transformers.LlamaForSequenceClassification(config), lora).eval()


def with_peft(classifier, lengths):
    start = time.perf_counter()
    with torch.no_grad():
        for i in range(0, len(lengths), 32):
            batch = torch.tensor(lengths[i : i + 32])
            mask = (torch.arange(int(batch.max())) < batch[:, None]).long()
            classifier(input_ids=torch.randint(1, 49152, mask.shape) * mask, attention_mask=mask)
    return len(lengths) / (time.perf_counter() - start)


def measure(server, adapter, texts, count, repetitions, threads):
    """{"loramux" or "PEFT": texts a second of each repetition}. `texts` is a CSV file; a repetition has `count` of them."""
    torch.set_num_threads(threads)
    with open(texts, newline="") as file:
        texts = [row[0] for row in csv.reader(file)][1:]
    warm, rest = texts[:32], texts[32:]
    if len(rest) < count * repetitions:
        raise RuntimeError(f"there are {len(texts)} texts; {32 + count * repetitions} are needed")
    length = lambda text: len(server.post("/tokenize", {"prompt": text})["tokens"])
    classifier = model()
    loramux(server, adapter, warm), with_peft(classifier, [32] * 32)
    rates = {"loramux": [], "PEFT": []}
    for start in range(0, count * repetitions, count):
        part = rest[start : start + count]
        rates["loramux"].append(loramux(server, adapter, part))
        rates["PEFT"].append(with_peft(classifier, sorted(map(length, part), reverse=True)))
    return rates


def main():
    args = arguments()
    server = Server(urlsplit(args.url).netloc)
    rates = measure(server, args.adapter, args.texts, args.count, args.repetitions, args.threads)
    print(json.dumps(rates))
    print("texts/s:", {name: round(statistics.median(runs), 1) for name, runs in rates.items()})


if __name__ == "__main__":
    script(main)
