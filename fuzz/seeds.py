"""Makes the seeds of the fuzz targets from the fixtures: `python fuzz/seeds.py` (needs numpy and llama.cpp's package gguf)."""

import io
import json
import struct
import tarfile
import zipfile
from pathlib import Path

import gguf
import numpy as np

HERE = Path(__file__).parent
TINY = HERE.parent / "tests/fixtures/tiny"
ADAPTERS = ["qv_r4", "dora_r4", "lora_bias", "rank_alpha_pattern", "modules_to_save_norm", "embed_and_head", "seqcls"]


def seed(target, name, data):
    folder = HERE / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def shrunk(weights):
    """The weights' file without its numbers: a header and too few bytes, as most inputs will be."""
    return weights[: 8 + struct.unpack("<Q", weights[:8])[0]]


def files(name):
    folder = TINY / f"llama/adapter_{name}"
    return (folder / "adapter_config.json").read_bytes(), (folder / "adapter_model.safetensors").read_bytes()


def adapters():
    for name in ADAPTERS:
        config, weights = files(name)
        whole = len(weights) < 16_384
        data = struct.pack("<H", len(config)) + config + (weights if whole else shrunk(weights))
        seed("adapter", name, data)


def archives():
    config, weights = files("qv_r4")
    members = {"mine/adapter_config.json": config, "mine/adapter_model.safetensors": weights, "mine/README.md": b"#"}
    for name, mode in [("plain.tar", "w:"), ("packed.tar.gz", "w:gz")]:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode=mode) as tar:
            for path, content in members.items():
                info = tarfile.TarInfo(path)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        seed("archive", name, out.getvalue())
    for name, method in [("stored.zip", zipfile.ZIP_STORED), ("deflated.zip", zipfile.ZIP_DEFLATED)]:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", method) as archive:
            for path, content in members.items():
                archive.writestr(zipfile.ZipInfo(path), content, method)
        seed("archive", name, out.getvalue())


def small_base(path, matrix):
    """A Llama of one layer, its matrices in the given type."""
    writer = gguf.GGUFWriter(path, "llama")
    hidden = 256 if "K" in matrix.name else 32
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(hidden)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_context_length(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "ab", "<s>"])
    writer.add_token_merges(["a b"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_bos_token_id(3)
    writer.add_chat_template("{{ messages[0].content }}")
    random = np.random.default_rng(0)
    matrices = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    for name, rows in [("token_embd", 4)] + [(f"blk.0.{name}", hidden) for name in matrices]:
        numbers = random.standard_normal((rows, hidden)).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(numbers, matrix), raw_dtype=matrix)
    for name in ["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"]:
        writer.add_tensor(f"{name}.weight", np.ones(hidden, dtype=np.float32))
    write(writer)


def small_adapter(path):
    """LoRA on q of the tiny Llama's first layer, as llama.cpp's convert_lora_to_gguf.py names things."""
    config = json.loads((TINY / "llama/base/config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    random = np.random.default_rng(0)
    for name, shape in [("lora_a", (4, config["hidden_size"])), ("lora_b", (config["hidden_size"], 4))]:
        writer.add_tensor(f"blk.0.attn_q.weight.{name}", random.standard_normal(shape).astype(np.float32))
    write(writer)


def write(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ggufs():
    folder = HERE / "corpus/gguf"
    folder.mkdir(parents=True, exist_ok=True)
    types = gguf.GGMLQuantizationType
    for matrix in [types.F32, types.F16, types.BF16, types.Q4_0, types.Q4_1, types.Q5_0, types.Q5_1, types.Q8_0]:
        small_base(folder / f"base-{matrix.name.lower()}.gguf", matrix)
    small_adapter(folder / "adapter.gguf")


adapters()
archives()
ggufs()
