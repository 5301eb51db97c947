"""Keeps the most important ranks of an adapter, or of the mean of several that were trained alike but for how long or from
which seed: `python compress.py OUT RANK ADAPTER...` (needs PyTorch and safetensors).

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
    out, rank, sources = Path(sys.argv[1]), int(sys.argv[2]), [Path(source) for source in sys.argv[3:]]
    tensors, *others = [load_file(source / "adapter_model.safetensors") for source in sources]
    config = json.loads((sources[0] / "adapter_config.json").read_text())
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        other = name.replace(".lora_A.", ".lora_B.")
        kind = tensors[name].dtype
        # The mean of the products is the product of all factors side by side.
        a = torch.cat([each[name].float() for each in [tensors, *others]])
        b = torch.cat([each[other].float() for each in [tensors, *others]], dim=1) / len(sources)
        a, b = cut(a, b, rank)
        tensors[name], tensors[other] = a.to(kind).contiguous(), b.to(kind).contiguous()
    if out not in sources:
        shutil.copytree(sources[0], out)
    # The scale stays what it was.
    config["lora_alpha"] *= rank / config["r"]
    config["r"] = rank
    # The card's numbers are of what was trained.
    many = f"The mean of {len(sources)} adapters was taken, of which this is the first's card. " if others else ""
    told = f"{many}The pairs were then cut to rank {rank} by `recipes/compress.py`.\n\n"
    card = (out / "README.md").read_text()
    (out / "README.md").write_text(card.replace("## Result\n", f"{told}## Result\n", 1))
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})


main()
