"""Adapters with random numbers for a GGUF file of a Llama: speed does not depend on the numbers."""

import json
import shutil
import struct

import numpy
from gguf import GGUFReader, GGUFType, GGUFWriter

# The linear layers, as GGUF calls them: as PEFT does.
MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ALL, QV = list(MODULES), ["attn_q", "attn_v"]


def whole(path, write):
    """`path`, which `write` makes unless it is there. A run that was broken off leaves no half of it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"part-{path.name}")
        shutil.rmtree(part, ignore_errors=True)
        write(part)
        part.rename(path)
    return path


def linear_layers(model):
    """[(layer, module, outputs, inputs)], in the order of the layers; the module's name is GGUF's."""
    tensors = [(t.name.split("."), t.shape) for t in GGUFReader(model).tensors if t.name.startswith("blk.")]
    return sorted((int(n[1]), n[2], int(s[1]), int(s[0])) for n, s in tensors if n[2] in MODULES)


def write_gguf_adapter(path, layers, rank, seed):
    """For all linear layers, in f32, as convert_lora_to_gguf.py writes it by default."""
    random = numpy.random.default_rng(seed)
    factor = lambda *shape: random.normal(0, 0.02, shape).astype(numpy.float32)
    writer = GGUFWriter(path, "llama")
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", rank)
    for layer, module, outputs, inputs in layers:
        writer.add_tensor(f"blk.{layer}.{module}.weight.lora_a", factor(rank, inputs))
        writer.add_tensor(f"blk.{layer}.{module}.weight.lora_b", factor(outputs, rank))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_peft_adapter(folder, layers, rank, targets, seed):
    """For some linear layers, in bf16, as PEFT saves it."""
    random = numpy.random.default_rng(seed)
    header, parts, end = {}, [], 0
    for layer, module, outputs, inputs in layers:
        if module not in targets:
            continue
        for factor, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            numbers = random.normal(0, 0.02, shape).astype(numpy.float32).view(numpy.uint32) >> 16
            parts.append(numbers.astype(numpy.uint16).tobytes())
            name = f"base_model.model.model.layers.{layer}.{MODULES[module]}.lora_{factor}.weight"
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + len(parts[-1])]}
            end += len(parts[-1])
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"".join([struct.pack("<Q", len(text)), text, *parts]))
    names = [MODULES[target].split(".")[1] for target in targets]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
