"""Makes checkpoints of a few layers at the true widths of published models, and what HF transformers computes from them.

Needs torch and transformers; uses a GPU where torch has one. Weights are random, stored as bf16, and the last norm is scaled
until the logits spread as a trained model's do: where all tokens are equally likely, no fault shows. transformers computes
in single precision from the stored weights, and once more in bf16: what that is off by says how much a bf16 computation may
be off. Each folder has config.json, model.safetensors and golden.json, the latter as `crates/model/golden/make.py` writes it.

    make_checkpoints.py --out DIR [--case NAME]... [--tiny]
"""

import argparse
import json
import math
import pathlib
import sys
import time
import zlib

import torch
import transformers

TARGET_SPREAD = 1.6
MIN_SPREAD = 1.2
LENGTHS = (61, 33, 7)
LAYERS = 4
PATTERN = ["sliding_attention", "full_attention"] * (LAYERS // 2)
# A part of the vocabulary: the head is the same at any width, and files and time are not. No power of two.
VOCAB = 16_160

CASES = {
    "llama-3.1-8b": ("LlamaForCausalLM", dict(
        hidden_size=4096, intermediate_size=14_336, num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5,
        rope_parameters=dict(rope_type="llama3", rope_theta=500_000.0, factor=8.0, low_freq_factor=1.0,
                             high_freq_factor=4.0, original_max_position_embeddings=8192))),
    "qwen3-30b-a3b": ("Qwen3MoeForCausalLM", dict(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True)),
    "gpt-oss-20b": ("GptOssForCausalLM", dict(
        hidden_size=2880, intermediate_size=2880, num_attention_heads=64, num_key_value_heads=8, head_dim=64,
        num_local_experts=32, num_experts_per_tok=4, sliding_window=24, layer_types=PATTERN)),
    "gemma-2-9b": ("Gemma2ForCausalLM", dict(
        hidden_size=3584, intermediate_size=14_336, num_attention_heads=16, num_key_value_heads=8, head_dim=256,
        query_pre_attn_scalar=256, sliding_window=24, layer_types=PATTERN)),
    "gemma-3-12b": ("Gemma3ForCausalLM", dict(
        hidden_size=3840, intermediate_size=15_360, num_attention_heads=16, num_key_value_heads=8, head_dim=256,
        query_pre_attn_scalar=256, sliding_window=24, layer_types=PATTERN)),
}
# The same models in small, to see that this script works.
TINY = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            moe_intermediate_size=32, num_experts=8, num_local_experts=4, num_experts_per_tok=2, vocab_size=160)
NOISE = ("transformers_version", "_name_or_path", "id2label", "label2id")


def config_of(model_class, fields, tiny):
    fields = dict(fields, num_hidden_layers=LAYERS, vocab_size=VOCAB, max_position_embeddings=4096, bos_token_id=1,
                  eos_token_id=2, pad_token_id=None)
    if tiny:
        fields.update({key: value for key, value in TINY.items() if key in fields})
    return model_class.config_class(**fields, attn_implementation="eager", experts_implementation="eager")


def draw(key, p, transposed):
    """Random values, none of them neutral; queries, keys and routers larger, so that attention is sharp."""
    last = key.rsplit(".", 1)[-1]
    if key.lower().endswith("norm.weight"):
        # Some norms add 1 to the weight, and start at 0.
        low = -0.5 if not p.any() else 0.5
        p.uniform_(low, low + 1.0)
    elif last == "sinks":
        p.normal_(1.0, 1.0)
    elif "bias" in last:
        p.normal_(0, 0.2)
    else:
        fan_in = p.shape[1] if p.dim() == 3 and transposed else p.shape[-1]
        p.normal_(0, gain(key) / math.sqrt(fan_in))


def gain(key):
    sharp = any(word in key for word in ("q_proj", "k_proj", "mlp.gate.", "router"))
    return 1.8 if sharp else 1.3


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids], device=model.device)).logits[0].float()


def build(name, model_class, config, prompt, device):
    """Random weights, rounded to bf16, in single precision."""
    torch.manual_seed(zlib.crc32(name.encode()))
    with torch.device(device):
        model = model_class(config).float().eval()
    norm = model.model.norm
    adds_one = not norm.weight.any().item()
    with torch.no_grad():
        for key, p in model.named_parameters():
            draw(key, p, transposed=model_class.__name__.startswith("GptOss"))
            p.copy_(p.bfloat16().float())
        offset = 1.0 if adds_one else 0.0
        # Where logits are capped, the spread is not proportional to the norm.
        for _ in range(4):
            spread = logits(model, prompt).std(dim=-1).mean().item()
            scaled = (norm.weight + offset) * (TARGET_SPREAD / spread) - offset
            norm.weight.copy_(scaled.bfloat16().float())
    return model


def golden(model, prompts):
    entries, spreads = [], []
    for ids in prompts:
        values = logits(model, ids)
        spreads.append(values.std(dim=-1).mean().item())
        logprobs = values.double().log_softmax(dim=-1)
        taken = [round(logprobs[i, ids[i + 1]].item(), 6) for i in range(len(ids) - 1)]
        entries.append({"ids": ids, "logprobs": taken, "argmax": values.argmax(dim=-1).tolist()})
    if not min(spreads) >= MIN_SPREAD:
        raise ValueError(f"logits spread {min(spreads):.2f}, at least {MIN_SPREAD} is needed")
    return {"logits_deviation": [round(s, 3) for s in spreads], "prompts": entries}


def noise(model, result):
    """How far transformers itself is off in bf16: a router that is nearly undecided then chooses other experts."""
    differences = []
    for prompt in result["prompts"]:
        logprobs = logits(model, prompt["ids"]).double().log_softmax(dim=-1)
        got = [logprobs[i, token].item() for i, token in enumerate(prompt["ids"][1:])]
        differences += [abs(a - b) for a, b in zip(got, prompt["logprobs"], strict=True)]
    differences.sort()
    return {"mean": sum(differences) / len(differences), "p99": differences[int(0.99 * (len(differences) - 1))]}


def make(name, out, tiny, device):
    class_name, fields = CASES[name]
    model_class = getattr(transformers, class_name)
    config = config_of(model_class, fields, tiny)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ 1)
    prompts = [torch.randint(3, config.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    model = build(name, model_class, config, prompts[0], device)
    result = golden(model, prompts)
    model.bfloat16()
    result["bf16"] = noise(model, result)
    folder = out / name
    # transformers writes its own names of tensors, as published checkpoints have them.
    model.save_pretrained(folder)
    written = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k not in NOISE}
    written["architectures"], written["dtype"] = [class_name], "bfloat16"
    (folder / "config.json").write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")
    (folder / "golden.json").write_text(json.dumps(result, separators=(",", ":")) + "\n")
    return f"logits deviation {result['logits_deviation']}, bf16 is off by {result['bf16']}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # tf32 would round what the goldens are to be better than.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    failed = 0
    for name in arguments.case or CASES:
        start = time.monotonic()
        try:
            made = make(name, arguments.out, arguments.tiny, device)
            print(f"{name}: {time.monotonic() - start:.0f} s, {made}", flush=True)
        except Exception as error:  # The other models are still of use.
            failed += 1
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
