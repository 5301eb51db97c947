"""Losses and gradients that transformers and PEFT give for the tiny llama: tests/fixtures/tiny/llama/gradients.*

    pip install torch 'transformers==4.57.*' 'peft==0.21.*'
    python3 tests/tools/reference_gradients.py
"""

import json
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

FOLDER = Path(__file__).parent.parent / "fixtures" / "tiny" / "llama"
PROMPTS = json.loads((FOLDER / "expected.json").read_text())["prompts"]
CLASSES = [1, 0, 1]


def gradients(model, prefix, out):
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            name = name.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", "")
            name = name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
            out[f"{prefix}.{name}"] = parameter.grad.clone()


def language_loss(model):
    """The mean loss of each token of the prompts given those before it."""
    total = sum(len(p) - 1 for p in PROMPTS)
    loss = 0
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        logits = model(input_ids=ids).logits[0, :-1]
        loss = loss + torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum") / total
    return loss


def main():
    losses, tensors = {}, {}
    base = LlamaForCausalLM.from_pretrained(FOLDER / "base", attn_implementation="eager")
    model = PeftModel.from_pretrained(base, FOLDER / "adapter_all_r8", is_trainable=True)
    loss = language_loss(model)
    loss.backward()
    losses["generate"] = loss.item()
    gradients(model, "generate", tensors)

    base = LlamaForCausalLM.from_pretrained(FOLDER / "base", attn_implementation="eager")
    model = PeftModel.from_pretrained(base, FOLDER / "adapter_dora_r4", is_trainable=True)
    loss = language_loss(model)
    loss.backward()
    losses["dora"] = loss.item()
    gradients(model, "dora", tensors)

    with safe_open(FOLDER / "adapter_seqcls" / "adapter_model.safetensors", "pt") as file:
        rows = file.get_tensor("base_model.model.score.weight").shape[0]
    base = LlamaForSequenceClassification.from_pretrained(FOLDER / "base", num_labels=rows, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, FOLDER / "adapter_seqcls", is_trainable=True)
    loss = 0
    for prompt, label in zip(PROMPTS, CLASSES):
        logits = model(input_ids=torch.tensor([prompt])).logits
        loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor([label])) / len(PROMPTS)
    loss.backward()
    losses["classify"] = loss.item()
    gradients(model, "classify", tensors)

    # What full fine-tuning would move.
    model = LlamaForCausalLM.from_pretrained(FOLDER / "base", attn_implementation="eager")
    loss = language_loss(model)
    loss.backward()
    losses["full"] = loss.item()
    gradients(model, "full", tensors)

    save_file({name: t.contiguous() for name, t in tensors.items()}, FOLDER / "gradients.safetensors")
    (FOLDER / "gradients.json").write_text(json.dumps({"losses": losses, "classes": CLASSES}, indent=1) + "\n")


main()
