"""What loramux-train wrote, opened by transformers and PEFT: the numbers must be those of loramux.

    PYTHONPATH=… python3 tests/peft/round_trip.py CASES.json     # written by tests/it/train/round_trip.rs
"""

import json
import os
import sys

# PEFT would put adapters on a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import transformers
from peft import PeftModel

TOLERANCE = 1e-3


def open_model(directory, architecture, **options):
    """The model, of which nothing may be missing but a head that `options` ask for."""
    model, info = getattr(transformers, architecture).from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **options
    )
    missing = [name for name in info["missing_keys"] if not ("num_labels" in options and name == "score.weight")]
    assert not missing and not info["unexpected_keys"] and not info["mismatched_keys"], (directory, info)
    return model.eval()


def open_adapter(base, directory, labels):
    if labels:
        model = open_model(base, "LlamaForSequenceClassification", num_labels=len(labels))
    else:
        model = open_model(base, "LlamaForCausalLM")
    return PeftModel.from_pretrained(model, directory).eval()


@torch.no_grad()
def logits(model, sequences):
    """For each sequence: of every position from a language model, of the classes from a classification."""
    return [model(input_ids=torch.tensor([sequence])).logits[0] for sequence in sequences]


def distance(a, b):
    return max((a - b).abs().max().item() for a, b in zip(a, b, strict=True))


def check_trained(case, found, base):
    """Were nothing trained, or nothing of it used, all numbers would agree just as well."""
    untrained = logits(base, case["sequences"])
    moved = distance(found, untrained)
    assert moved > 100 * TOLERANCE, f"{case['name']}: {moved} from the base"
    if case["start"]:
        # Trained further, but from where it was to begin.
        start = logits(open_adapter(base.name_or_path, case["start"], None), case["sequences"])
        moved, whole = distance(found, start), distance(start, untrained)
        assert TOLERANCE < moved < whole / 2, f"{case['name']}: {moved} from its start, which is {whole} from the base"


def check_evaluation(case, found):
    """What the trainer found: the mean loss over examples or, of texts, over tokens; the answers to each class."""
    if case["labels"]:
        rows, truth = torch.stack(found), torch.tensor(case["classes"])
        confusion = torch.zeros(2 * [len(case["labels"])], dtype=torch.long)
        confusion.index_put_((truth, rows.argmax(1)), torch.tensor(1), accumulate=True)
        assert confusion.tolist() == case["confusion"], f"{case['name']}: {confusion}"
    else:
        rows = torch.cat([row[:-1] for row in found])
        truth = torch.tensor([token for sequence in case["sequences"] for token in sequence[1:]])
    loss = torch.nn.functional.cross_entropy(rows, truth).item()
    assert abs(loss - case["loss"]) < TOLERANCE, f"{case['name']}: the loss is {loss}, not {case['loss']}"


def check(case, base_directory):
    name, directory = case["name"], case["directory"]
    if case["adapter"]:
        model = open_adapter(base_directory, directory, case["labels"])
    else:
        config = transformers.AutoConfig.from_pretrained(directory)
        if case["labels"]:
            assert list(config.id2label.values()) == case["labels"], f"{name}: {config.id2label}"
        model = open_model(directory, config.architectures[0])
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        assert tokenizer(case["text"]).input_ids == case["tokens"], name
    found = logits(model, case["sequences"])
    if case["logits"]:
        served = [torch.tensor(numbers).reshape(row.shape) for numbers, row in zip(case["logits"], found)]
        off = distance(found, served)
        print(f"{name}: the logits are at most {off:.1e} from those served", file=sys.stderr)
        assert off < TOLERANCE, f"{name}: the logits are {off} from those served"
    if not case["labels"]:
        check_trained(case, found, open_model(base_directory, "LlamaForCausalLM"))
    check_evaluation(case, found)


cases = json.load(open(sys.argv[1]))
for case in cases["cases"]:
    check(case, cases["base"])
print("ok", len(cases["cases"]))
