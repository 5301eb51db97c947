"""transformers and PEFT on a GPU, 32 sequences with an adapter each: what loramux is measured against there (benches/gpu.sh).

    python3 gpu_peft.py [tiny]      # tiny tells whether this program works, on a CPU

A model of random weights with the sizes of Llama 3.2 1B, adapters of rank 16 on all its linear layers, bf16. Prints the median
of the rates of a decode step, in tokens a second. Needs torch, transformers and peft, and no network; ends with 1 without a GPU.
"""

import statistics
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

SEQUENCES = 32
TOKENS = 30
START = 128
DEVICE = "cpu" if "tiny" in sys.argv else "cuda"
SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128_256}
if DEVICE == "cpu":
    SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
elif not torch.cuda.is_available():
    sys.exit("torch has no GPU here")


def network():
    config = LlamaConfig(
        **SIZES,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=16, lora_alpha=16, target_modules=layers, init_lora_weights=False)
    model = get_peft_model(model, lora, adapter_name="0", autocast_adapter_dtype=False)
    for i in range(1, SEQUENCES):
        model.add_adapter(str(i), lora, autocast_adapter_dtype=False)
    return model.eval()


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def main():
    model = network()
    names = [str(i) for i in range(SEQUENCES)]
    ids = torch.randint(0, SIZES["vocab_size"], (SEQUENCES, START), device=DEVICE)
    cache = DynamicCache()
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, adapter_names=names)
    rates = []
    for _ in range(TOKENS):
        wait()
        start = time.perf_counter()
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=cache, use_cache=True, adapter_names=names)
        wait()
        rates.append(SEQUENCES / (time.perf_counter() - start))
    print(f"{statistics.median(rates[TOKENS // 3 :]):.1f}")


main()
