"""Keeps the most important ranks of an adapter: `python compress.py ADAPTER OUT RANK` (needs PyTorch and safetensors).

Each pair's product B A is cut to its largest singular values (Eckart and Young), which makes the file smaller.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def cut(a, b, rank):
    """Factors of `rank` whose product is the nearest to `b a`, each with the root of the singular values."""
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(rb @ ra.T)
    root = s[:rank].sqrt()
    return root[:, None] * (vt[:rank] @ qa.T), (qb @ u[:, :rank]) * root


def main():
    source, out, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    tensors = load_file(source / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        other = name.replace(".lora_A.", ".lora_B.")
        a, b = cut(tensors[name].float(), tensors[other].float(), rank)
        kind = tensors[name].dtype
        tensors[name], tensors[other] = a.to(kind).contiguous(), b.to(kind).contiguous()
    if out != source:
        shutil.copytree(source, out)
    # The scale stays what it was.
    config["lora_alpha"] *= rank / config["r"]
    config["r"] = rank
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})


main()
