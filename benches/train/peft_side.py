"""One training run of transformers and PEFT, for compare.py: settings as JSON in, measurements as JSON out."""

import csv
import json
import os
import random
import sys
import time

# A CPU is measured.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

SETTINGS = json.loads(sys.argv[1])


def examples(tokenizer):
    """Token ids, as loramux gives them to a head (BOS in front), and classes."""
    with open(SETTINGS["data"], newline="") as file:
        rows = list(csv.DictReader(file))
    classes = sorted({row["label"] for row in rows})
    ids = [[tokenizer.bos_token_id, *tokenizer(row["text"]).input_ids] for row in rows]
    return [(tokens, classes.index(row["label"])) for tokens, row in zip(ids, rows)]


def batches(rows):
    order = random.Random(SETTINGS["seed"])
    order.shuffle(rows)
    if SETTINGS["order"] == "length":
        rows.sort(key=lambda row: len(row[0]))
    size = SETTINGS["batch_size"]
    cut = [rows[i : i + size] for i in range(0, len(rows), size)]
    order.shuffle(cut)
    return cut


def network(pad):
    model = AutoModelForSequenceClassification.from_pretrained(
        SETTINGS["base"], num_labels=2, dtype=torch.float32, pad_token_id=pad, use_cache=False
    )
    if SETTINGS["method"] == "lora":
        config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(model, config)
    elif SETTINGS["method"] == "head":
        model.requires_grad_(False)
        model.score.requires_grad_(True)
    return model.train()


def padded(batch, pad):
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.full((len(batch), longest), pad)
    mask = torch.zeros_like(ids)
    for row, (tokens, _) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([label for _, label in batch])}


def main():
    torch.set_num_threads(SETTINGS["threads"])
    torch.manual_seed(SETTINGS["seed"])
    tokenizer = AutoTokenizer.from_pretrained(SETTINGS["base"])
    pad = tokenizer.pad_token_id
    steps = batches(examples(tokenizer))
    model = network(pad)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=SETTINGS["rate"], weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.06 * len(steps)), len(steps))
    losses, timed_tokens, start = [], 0, 0.0
    for step, batch in enumerate(steps):
        if step == SETTINGS["warm_up"]:
            start = time.perf_counter()
        loss = model(**padded(batch, pad)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step >= SETTINGS["warm_up"]:
            timed_tokens += sum(len(ids) for ids, _ in batch)
    seconds = time.perf_counter() - start
    tokens = sum(len(ids) for batch in steps for ids, _ in batch)
    result = {"timed_tokens": timed_tokens, "seconds": seconds, "tokens": tokens, "loss": sum(losses) / len(losses)}
    print(json.dumps(result))


main()
