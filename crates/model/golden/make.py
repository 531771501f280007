#!/usr/bin/env python3
"""Makes tiny random checkpoints and their teacher-forced log-probabilities with HF transformers.

Needs a venv with torch, transformers, safetensors and gguf. Run by `cargo xtask golden`; its output is committed,
so that tests need no Python. Weights are drawn from a seed, so the same versions give the same files.

    make.py [--out DIR] [--case NAME ...] [--check]

`--check` writes nothing and fails if the committed log-probabilities differ from freshly computed ones.
"""

import argparse
import json
import math
import pathlib
import sys
import zlib

import gguf
import torch
import transformers
from safetensors.torch import save_file

# A gate on numbers proves nothing where all tokens are nearly equally likely: the logits of every case must
# spread at least this much.
MIN_SPREAD = 1.2
TARGET_SPREAD = 1.6
PROMPT_LENGTHS = (41, 23, 6)

LLAMA = dict(hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, vocab_size=61, max_position_embeddings=96)


def rope(**scaling):
    return dict({"rope_theta": 10000.0}, **scaling)


# Each case: architecture, configuration, type of the stored weights, and how they are stored.
CASES = {
    "llama-mha-tied": ("Llama", dict(LLAMA, num_key_value_heads=4, tie_word_embeddings=True), "float32", {}),
    "llama-gqa-bias": ("Llama", dict(LLAMA, hidden_size=36, num_attention_heads=6, head_dim=10, attention_bias=True,
                                     mlp_bias=True, vocab_size=97), "float32", {}),
    "llama-mqa-bf16": ("Llama", dict(LLAMA, num_attention_heads=8, num_key_value_heads=1, head_dim=16,
                                     rms_norm_eps=1e-5), "bfloat16", {}),
    "llama-llama3": ("Llama", dict(LLAMA, hidden_size=64, head_dim=16, rope_parameters=rope(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16)), "bfloat16", {"gguf": True}),
    "llama-linear": ("Llama", dict(LLAMA, rope_parameters=rope(rope_type="linear", factor=4.0)), "bfloat16",
                     {"old_spelling": True}),
    "llama-yarn": ("Llama", dict(LLAMA, head_dim=16, rope_parameters=rope(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=24)), "bfloat16", {"gguf": True}),
    "llama-sharded": ("Llama", dict(LLAMA, num_hidden_layers=3), "bfloat16", {"shards": 3}),
    "llama-only-head": ("Llama", dict(LLAMA, tie_word_embeddings=True), "float16", {"only_head": True}),
    "mistral-window": ("Mistral", dict(LLAMA, sliding_window=7, head_dim=12), "bfloat16", {}),
    "qwen2": ("Qwen2", dict(LLAMA, tie_word_embeddings=True), "float32", {"gguf": True}),
    "qwen2-mixed-window": ("Qwen2", dict(LLAMA, num_hidden_layers=3, use_sliding_window=True, sliding_window=5,
                                         max_window_layers=1), "bfloat16", {}),
    "qwen3": ("Qwen3", dict(LLAMA, head_dim=16, rope_parameters=rope(rope_theta=1e6, rope_type="default")),
              "bfloat16", {"gguf": True}),
}


def build(name, family, fields, dtype):
    """The model with random weights, rounded to the stored type, in double precision."""
    torch.manual_seed(zlib.crc32(name.encode()))
    config = getattr(transformers, f"{family}Config")(
        bos_token_id=1, eos_token_id=2, pad_token_id=None, attn_implementation="eager", **fields)
    model = getattr(transformers, f"{family}ForCausalLM")(config).double().eval()
    stored = getattr(torch, dtype)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("norm.weight"):
                p.uniform_(0.5, 1.5)
            elif key.endswith("bias"):
                p.normal_(0, 0.4)
            else:
                # Queries and keys larger than usual, so that attention is sharp and positions matter.
                gain = 2.5 if "q_proj" in key or "k_proj" in key else 1.3
                p.normal_(0, gain / math.sqrt(p.shape[-1]))
            p.copy_(p.to(stored).double())
        scale_logits(model, prompts(name, config.vocab_size)[0], stored)
    return model


def scale_logits(model, prompt, stored):
    """Scales the last norm until the logits spread as a trained model's do."""
    spread = logits(model, prompt).std(dim=-1).mean().item()
    weight = model.model.norm.weight
    weight.copy_((weight * (TARGET_SPREAD / spread)).to(stored).double())


def prompts(name, vocab):
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ 1)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double()


def golden(name, model):
    """Inputs, and the log-probability of each next token given those before it."""
    entries = []
    spread = []
    for ids in prompts(name, model.config.vocab_size):
        values = logits(model, ids)
        spread.append(values.std(dim=-1).mean().item())
        logprobs = values.log_softmax(dim=-1)
        taken = [round(logprobs[i, ids[i + 1]].item(), 6) for i in range(len(ids) - 1)]
        best = values.argmax(dim=-1).tolist()
        entries.append({"ids": ids, "logprobs": taken, "argmax": best})
    if min(spread) < MIN_SPREAD:
        sys.exit(f"{name}: logits spread {min(spread):.2f}, at least {MIN_SPREAD} is needed")
    return {"logits_deviation": [round(s, 3) for s in spread], "prompts": entries}


def config_json(model, dtype, old_spelling):
    config = json.loads(model.config.to_json_string(use_diff=False))
    drop = ("transformers_version", "_name_or_path", "id2label", "label2id")
    config = {k: v for k, v in config.items() if k not in drop}
    config["architectures"] = [type(model).__name__]
    config["dtype"] = dtype
    if old_spelling:
        config["torch_dtype"] = config.pop("dtype")
        parameters = config.pop("rope_parameters")
        config["rope_theta"] = parameters.pop("rope_theta")
        parameters["type"] = parameters.pop("rope_type")
        config["rope_scaling"] = parameters
    return json.dumps(config, indent=1, sort_keys=True) + "\n"


def save_weights(directory, model, dtype, shards=1, only_head=False):
    stored = getattr(torch, dtype)
    tensors = {k: v.detach().to(stored).clone().contiguous() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        drop = "model.embed_tokens.weight" if only_head else "lm_head.weight"
        tensors.pop(drop, None)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i::shards]
        save_file({n: tensors[n] for n in part}, directory / file, metadata={"format": "pt"})
        weight_map.update({n: file for n in part})
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


GGUF_PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    if name == "lm_head.weight":
        return "output.weight"
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{GGUF_PARTS[part]}.{kind}"


def pairwise(tensor, heads):
    """The order of rows that converters give to q and k of Llama."""
    rows = tensor.shape[0]
    return tensor.reshape(heads, 2, rows // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def save_gguf(path, model, arch):
    """The same weights as GGUF, in f32 (f16 cannot hold every bf16 value)."""
    c = model.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    out = gguf.GGUFWriter(str(path), arch)
    out.add_context_length(c.max_position_embeddings)
    out.add_embedding_length(c.hidden_size)
    out.add_block_count(c.num_hidden_layers)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_head_count(c.num_attention_heads)
    out.add_head_count_kv(c.num_key_value_heads)
    out.add_key_length(head_dim)
    out.add_value_length(head_dim)
    out.add_layer_norm_rms_eps(c.rms_norm_eps)
    out.add_rope_freq_base(c.rope_parameters["rope_theta"])
    out.add_vocab_size(c.vocab_size)
    out.add_tokenizer_model("llama")
    out.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    out.add_token_scores([0.0] * c.vocab_size)
    out.add_token_types([1] * c.vocab_size)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    kind = c.rope_parameters["rope_type"]
    if kind == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](c, "cpu")
        plain = 1.0 / c.rope_parameters["rope_theta"] ** (torch.arange(0, head_dim, 2) / head_dim)
        out.add_tensor("rope_freqs.weight", (plain / scaled).float().numpy())
    elif kind == "yarn":
        out.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        out.add_rope_scaling_factor(c.rope_parameters["factor"])
        out.add_rope_scaling_orig_ctx_len(c.rope_parameters["original_max_position_embeddings"])
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        tensor = tensor.detach().float()
        if arch == "llama" and "q_proj" in name:
            tensor = pairwise(tensor, c.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            tensor = pairwise(tensor, c.num_key_value_heads)
        out.add_tensor(gguf_name(name), tensor.contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def check(directory, fresh):
    """Whether the committed log-probabilities are those of the installed transformers."""
    committed = json.loads((directory / "golden.json").read_text())
    worst = 0.0
    for old, new in zip(committed["prompts"], fresh["prompts"], strict=True):
        if old["ids"] != new["ids"]:
            sys.exit(f"{directory.name}: the inputs differ")
        worst = max([worst] + [abs(a - b) for a, b in zip(old["logprobs"], new["logprobs"], strict=True)])
    if worst > 1e-4:
        sys.exit(f"{directory.name}: log-probabilities differ by {worst:.2e}")
    print(f"{directory.name}: ok, largest difference {worst:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden"
    parser.add_argument("--out", type=pathlib.Path, default=default)
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.case or CASES:
        family, fields, dtype, storage = CASES[name]
        model = build(name, family, fields, dtype)
        result = golden(name, model)
        directory = args.out / name
        if args.check:
            check(directory, result)
            continue
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(config_json(model, dtype, storage.get("old_spelling", False)))
        save_weights(directory, model, dtype, storage.get("shards", 1), storage.get("only_head", False))
        if storage.get("gguf"):
            save_gguf(directory / "model.gguf", model, family.lower())
        (directory / "golden.json").write_text(json.dumps(result, separators=(",", ":")) + "\n")
        print(f"{name}: logits deviation {result['logits_deviation']}")


if __name__ == "__main__":
    main()
