"""Classifications and adapters for them, made by transformers and PEFT, and what they say of texts, as probabilities.

    PYTHONPATH=… python3 tests/peft/classifications.py FOLDER     # by tests/it/classifications.rs; writes there, prints JSON
"""

import json
import os
import sys
from pathlib import Path

# PEFT would put adapters on a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

WORDS = "the a film book was is not good bad great dull story of and but it un ##believ ##able ##ly ##s , .".split()
TEXTS = [
    "the book was great",
    "it is a dull story , not good .",
    "unbelievably bad",
    "",
    "the story of the film was good but the book is great , and it is not dull . " * 6,
    "good",
]
ADAPTERS = {
    "all": {"target_modules": "all-linear", "r": 8},
    "dora": {"target_modules": ["query", "value", "dense"], "r": 4, "use_dora": True},
    "biases": {"target_modules": ["key", "intermediate.dense"], "r": 4, "bias": "all", "use_rslora": True},
    "own_biases": {"target_modules": ["query", "pooler.dense"], "r": 4, "bias": "lora_only"},
    "lora_bias": {"target_modules": ["value", "pooler.dense"], "r": 4, "lora_bias": True},
    "norms": {"target_modules": ["query"], "r": 4, "modules_to_save": ["LayerNorm", "classifier"]},
    "layer": {"target_modules": ["dense"], "r": 4, "layers_to_transform": [1]},
    "embedding": {"target_modules": ["word_embeddings", "value"], "r": 4},
}


def shake(parameters, seed):
    """Numbers in place of what an untrained model has."""
    torch.manual_seed(seed)
    for parameter in parameters:
        parameter.data += torch.randn_like(parameter) * (0.4 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.2)


def tokenizer(folder):
    """BERT's, which puts [CLS] before a text and [SEP] after it."""
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    return transformers.BertTokenizerFast(vocab_file=str(vocabulary))


@torch.no_grad()
def classify(model, tokens):
    # GPT-2 would take the tokens' types for words.
    texts = [tokens(text, return_tensors="pt").input_ids for text in TEXTS]
    return [model(input_ids=text).logits[0].softmax(0).tolist() for text in texts]


def old_names(folder):
    """Calls the norms' weights what the first BERT models do."""
    path = folder / "model.safetensors"
    renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(path)
    for new, old in renamed.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def bert(**options):
    return transformers.BertConfig(max_position_embeddings=160, attn_implementation="eager", **options)


def decoder(family, **options):
    """A small classification of a family of decoders."""
    common = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    common |= {"intermediate_size": 96, "head_dim": 12, "max_position_embeddings": 160} | options
    # The first token is BOS already; the last of a text counts, and padding has to be known.
    tokens = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**common, **tokens, attn_implementation="eager", num_labels=3)
    return getattr(transformers, f"{family}ForSequenceClassification"), config


def kinds():
    names = {0: "bad", 1: "fair", 2: "good", 3: "great"}
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 100}
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    large = {"hidden_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 72}
    gpt2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 160}
    return {
        "bert": (transformers.BertForSequenceClassification,
                 bert(**sizes, hidden_act="gelu_new", id2label=names, label2id={v: k for k, v in names.items()})),
        "bert_language": (transformers.BertForPreTraining, bert(**large, layer_norm_eps=1e-6, type_vocab_size=3)),
        "bert_bare": (transformers.BertModel, bert(**small, hidden_act="relu")),
        "llama": decoder("Llama"),
        "mistral": decoder("Mistral", sliding_window=16),
        "qwen2": decoder("Qwen2"),
        "qwen3": decoder("Qwen3"),
        "gemma2": decoder("Gemma2", query_pre_attn_scalar=12),
        "phi3": decoder("Phi3"),
        "gpt2": decoder("GPT2", **gpt2),
    }


def main():
    folder = Path(sys.argv[1])
    tokens = tokenizer(folder)
    found = []
    for seed, (name, (kind, config)) in enumerate(kinds().items()):
        base = folder / name / "base"
        config.vocab_size = len(tokens)
        model = kind(config)
        shake(model.parameters(), seed)
        model.save_pretrained(base)
        tokens.save_pretrained(base)
        if name == "bert_language":
            old_names(base)

        def load():
            load = transformers.AutoModelForSequenceClassification.from_pretrained
            return load(base, attn_implementation="eager").eval()

        probabilities, labels = {}, {}
        if "ForSequenceClassification" in kind.__name__:
            probabilities[""] = classify(load(), tokens)
            labels[""] = list(config.id2label.values())
        adapters = ADAPTERS if name.startswith("bert") else {"all": ADAPTERS["all"]}
        for number, (adapter, options) in enumerate(adapters.items()):
            tuned = get_peft_model(load(), LoraConfig(task_type="SEQ_CLS", lora_alpha=12, **options))
            shake([p for p in tuned.parameters() if p.requires_grad], 10 * seed + number)
            directory = folder / name / "adapters" / adapter
            tuned.save_pretrained(directory)
            # What was saved, not what is in memory.
            probabilities[adapter] = classify(PeftModel.from_pretrained(load(), directory).eval(), tokens)
        found.append({"name": name, "texts": TEXTS, "labels": labels, "probabilities": probabilities})
    print(json.dumps(found))


main()
