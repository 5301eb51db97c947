"""Blends by PEFT: what follows a prompt, as log-probabilities of all tokens.

    PYTHONPATH=… python3 tests/peft/blends.py CASES.json     # written by tests/it/blends.rs; prints JSON
"""

import json
import os
import sys

# PEFT would put adapters on a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import transformers
from peft import PeftModel


@torch.no_grad()
def main():
    with open(sys.argv[1]) as file:
        asked = json.load(file)
    base = transformers.LlamaForCausalLM.from_pretrained(asked["base"], dtype=torch.float32)
    model = None
    for name, directory in asked["adapters"].items():
        if model is None:
            model = PeftModel.from_pretrained(base, directory, adapter_name=name).eval()
        else:
            model.load_adapter(directory, adapter_name=name)
    found = []
    for i, case in enumerate(asked["cases"]):
        merge = {key: case[key] for key in ["combination_type", "density", "majority_sign_method"] if case.get(key)}
        model.add_weighted_adapter(case["adapters"], case["weights"], adapter_name=f"blend{i}", **merge)
        model.set_adapter(f"blend{i}")
        logits = model(input_ids=torch.tensor([asked["prompt"]])).logits[0, -1]
        found.append(logits.log_softmax(0).tolist())
    print(json.dumps(found))


main()
