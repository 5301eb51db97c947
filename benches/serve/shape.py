"""A Llama of another shape, with random weights and the tokenizer of a GGUF file: speed does not depend on the numbers.

    pip install --requirement benches/serve/requirements.txt
    python3 benches/serve/shape.py --like SmolLM2-135M-Instruct.Q4_1.gguf --out llama-1b.gguf
    cargo bench --bench decode -- int8 model=llama-1b.gguf 1 8 32 prompt=512

The defaults are those of Llama 3.2 1B but for the vocabulary, which is the other file's.
"""

import argparse

import numpy
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import quantize


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", required=True, help="a GGUF file of a Llama")
    parser.add_argument("--out", required=True)
    parser.add_argument("--type", default="Q8_0", help="of the matrices: Q8_0, Q4_0, Q4_1, BF16 or F32")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--ffn", type=int, default=8192)
    return parser.parse_args()


def main():
    args = arguments()
    like = GGUFReader(args.like)
    kind = GGMLQuantizationType[args.type]
    writer = GGUFWriter(args.out, "llama")
    for name, field in like.fields.items():
        if name.startswith("tokenizer."):
            part = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], part)
    vocabulary = len(like.fields["tokenizer.ggml.tokens"].data)
    head = args.hidden // args.heads
    writer.add_file_type(LlamaFileType[f"MOSTLY_{args.type}" if args.type != "F32" else "ALL_F32"])
    writer.add_block_count(args.layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(args.hidden)
    writer.add_feed_forward_length(args.ffn)
    writer.add_head_count(args.heads)
    writer.add_head_count_kv(args.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(500_000.0)
    writer.add_vocab_size(vocabulary)
    random = numpy.random.default_rng(0)

    def matrix(name, outputs, inputs):
        numbers = random.standard_normal((outputs, inputs), numpy.float32) * numpy.float32(inputs**-0.5)
        writer.add_tensor(name, quantize(numbers, kind), raw_dtype=kind)

    norm = lambda name: writer.add_tensor(name, numpy.ones(args.hidden, numpy.float32))
    matrix("token_embd.weight", vocabulary, args.hidden)
    norm("output_norm.weight")
    for layer in range(args.layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm.weight")
        norm(f"{block}.ffn_norm.weight")
        matrix(f"{block}.attn_q.weight", args.heads * head, args.hidden)
        matrix(f"{block}.attn_k.weight", args.kv_heads * head, args.hidden)
        matrix(f"{block}.attn_v.weight", args.kv_heads * head, args.hidden)
        matrix(f"{block}.attn_output.weight", args.hidden, args.heads * head)
        matrix(f"{block}.ffn_gate.weight", args.ffn, args.hidden)
        matrix(f"{block}.ffn_up.weight", args.ffn, args.hidden)
        matrix(f"{block}.ffn_down.weight", args.hidden, args.ffn)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


main()
