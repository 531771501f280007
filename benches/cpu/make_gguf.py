"""Writes GGUF files of the SmolLM2-135M shape with random weights, for speed comparisons only.

Usage: python make_gguf.py DIR     (a venv with numpy and gguf)

DIR gets smollm2-135m-shape-bf16.gguf and smollm2-135m-shape-q8_0.gguf: hidden 576, 30 layers, 9 query and 3 kv heads,
feed-forward 1,536, vocabulary 49,152, tied head. The vocabulary is made up; the text a model of random weights writes
means nothing.
"""

import pathlib
import sys

import gguf
import numpy as np

HIDDEN, LAYERS, HEADS, KV_HEADS, FFN, VOCAB, CONTEXT = 576, 30, 9, 3, 1536, 49152, 8192
HEAD_DIM = HIDDEN // HEADS


def shapes():
    """Names and shapes of the weights, outermost dimension first."""
    yield "token_embd.weight", (VOCAB, HIDDEN)
    yield "output_norm.weight", (HIDDEN,)
    for i in range(LAYERS):
        yield f"blk.{i}.attn_norm.weight", (HIDDEN,)
        yield f"blk.{i}.attn_q.weight", (HEADS * HEAD_DIM, HIDDEN)
        yield f"blk.{i}.attn_k.weight", (KV_HEADS * HEAD_DIM, HIDDEN)
        yield f"blk.{i}.attn_v.weight", (KV_HEADS * HEAD_DIM, HIDDEN)
        yield f"blk.{i}.attn_output.weight", (HIDDEN, HEADS * HEAD_DIM)
        yield f"blk.{i}.ffn_norm.weight", (HIDDEN,)
        yield f"blk.{i}.ffn_gate.weight", (FFN, HIDDEN)
        yield f"blk.{i}.ffn_up.weight", (FFN, HIDDEN)
        yield f"blk.{i}.ffn_down.weight", (HIDDEN, FFN)


def write(path, kind, file_type):
    """One file; norms stay f32, everything else becomes `kind`."""
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("SmolLM2-135M shape, random weights")
    writer.add_file_type(file_type)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("llama")
    tokens = [b"<unk>", b"<s>", b"</s>"] + [f"<0x{b:02X}>".encode() for b in range(256)]
    types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL] + [gguf.TokenType.BYTE] * 256
    missing = VOCAB - len(tokens)
    tokens += [f"w{i}".encode() for i in range(missing)]
    types += [gguf.TokenType.NORMAL] * missing
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(VOCAB)])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, shape in shapes():
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, dtype=np.float32))
            continue
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(shape[1] ** -0.5)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    directory = pathlib.Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    types, files = gguf.GGMLQuantizationType, gguf.LlamaFileType
    write(directory / "smollm2-135m-shape-bf16.gguf", types.BF16, files.MOSTLY_BF16)
    write(directory / "smollm2-135m-shape-q8_0.gguf", types.Q8_0, files.MOSTLY_Q8_0)


if __name__ == "__main__":
    main()
