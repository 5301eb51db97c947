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


def small_base(path, matrix, *, hidden, context, pre, tokens, ends, template):
    """A Llama of one layer, its matrices in the given type. The last token begins texts, and ends them where `ends` says so.
    Returns the generator of its numbers, for adapters to go on with."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(hidden)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_context_length(context)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    last = len(tokens) - 1
    writer.add_token_types([1] * last + [3])
    writer.add_bos_token_id(last)
    if ends:
        writer.add_eos_token_id(last)
    writer.add_chat_template(template)
    random = np.random.default_rng(0)
    matrices = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    for name, rows in [("token_embd", len(tokens))] + [(f"blk.0.{name}", hidden) for name in matrices]:
        numbers = random.standard_normal((rows, hidden)).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(numbers, matrix), raw_dtype=matrix)
    for name in ["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"]:
        writer.add_tensor(f"{name}.weight", np.ones(hidden, dtype=np.float32))
    write(writer)
    return random


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
        small_base(
            folder / f"base-{matrix.name.lower()}.gguf",
            matrix,
            hidden=32,
            context=16,
            pre="smollm",
            tokens=["a", "b", "ab", "<s>"],
            ends=False,
            template="{{ messages[0].content }}",
        )
    small_adapter(folder / "adapter.gguf")


def byte_level():
    """GPT-2's alphabet: a character for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + rest.index(byte)) for byte in range(256)]


def host():
    """What the requests are sent to: a base that spells any text, byte by byte, and adapters for it."""
    folder = HERE / "host"
    (folder / "adapters").mkdir(parents=True, exist_ok=True)
    hidden = 32
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    random = small_base(
        folder / "base.gguf",
        gguf.GGMLQuantizationType.Q8_0,
        hidden=hidden,
        context=128,
        pre="gpt-2",
        tokens=[*byte_level(), "ab", "</s>"],
        ends=True,
        template=turns + "{% if add_generation_prompt %}<assistant>{% endif %}",
    )
    pair = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    lora = {f"{pair}A.weight": (2, hidden), f"{pair}B.weight": (hidden, 2)}
    head = {"base_model.model.score.weight": (3, hidden)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    classes = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    for name, shapes, more in [("lora", lora, {}), ("head", lora | head, classes)]:
        adapter = folder / "adapters" / name
        adapter.mkdir(exist_ok=True)
        (adapter / "adapter_config.json").write_text(json.dumps(config | more))
        tensors = {key: random.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
        (adapter / "adapter_model.safetensors").write_bytes(safetensors(tensors))


def safetensors(tensors):
    header, data = {}, b""
    for name, numbers in tensors.items():
        end = len(data) + numbers.nbytes
        header[name] = {"dtype": "F32", "shape": numbers.shape, "data_offsets": [len(data), end]}
        data += numbers.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def uploads():
    """Requests with a form and with an archive; the others in corpus/request are written by hand."""
    files = {name: (HERE / "host/adapters/lora" / name).read_bytes() for name in CONFIG_AND_WEIGHTS}
    form = b""
    for field, name, content in [
        ("name", None, b"mine"),
        ("config", "adapter_config.json", files["adapter_config.json"]),
        ("weights", "adapter_model.safetensors", files["adapter_model.safetensors"]),
    ]:
        named = f'; filename="{name}"' if name else ""
        form += f'--b\r\nContent-Disposition: form-data; name="{field}"{named}\r\n\r\n'.encode() + content + b"\r\n"
    head = b"POST /v1/adapters\nContent-Type: multipart/form-data; boundary=b\n\n"
    seed("request", "upload-form", head + form + b"--b--\r\n")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    seed("request", "upload-archive", b'PUT /v1/adapters/mine\nIf-None-Match: *\n\n' + out.getvalue())


def texts():
    """What bases and adapters say about texts: files with a zero byte between them."""
    base = TINY / "llama/base"
    tokenizer, settings = [(base / name).read_bytes() for name in ["tokenizer.json", "tokenizer_config.json"]]
    # Shorter, so that more of the wrong bytes are elsewhere than in the words.
    short = json.loads(tokenizer)
    short["model"]["vocab"] = dict(list(short["model"]["vocab"].items())[:8])
    short = json.dumps(short).encode()
    for family in ["llama", "qwen3", "gemma2", "bert", "gpt2"]:
        config = (TINY / family / "base/config.json").read_bytes()
        seed("base", family if family == "llama" else f"refused-{family}", b"\0".join([config, tokenizer, settings]))
    seed("language", "tokenizer", b"\0".join([tokenizer.replace(b'"t200"', b'"new"'), settings]))
    seed("language", "settings", b"\0".join([b"", b'{"eos_token": {"content": "t9"}, "chat_template": "{{ eos_token }}"}']))
    seed("language", "short", b"\0".join([short, settings]))


CONFIG_AND_WEIGHTS = ["adapter_config.json", "adapter_model.safetensors"]

adapters()
archives()
ggufs()
host()
uploads()
texts()
