#!/usr/bin/env python3
"""Makes tiny random checkpoints and what HF transformers computes from them.

Needs a venv with torch, transformers, safetensors and gguf. Run by `cargo xtask golden`; its output is committed,
so that tests need no Python. Weights are drawn from a seed, so the same versions give the same files.

    make.py [--out DIR] [--case NAME ...] [--check]

`--check` writes nothing and fails if the committed numbers differ from freshly computed ones.
"""

import argparse
import contextlib
import json
import math
import pathlib
import re
import sys
import zlib

import torch
import transformers

from cases import CASES
from store import TYPES, config_json, save_gguf, save_pooling, save_weights

# A gate on numbers proves nothing where all tokens are nearly equally likely: the logits of every case must
# spread at least this much.
MIN_SPREAD = 1.2
TARGET_SPREAD = 1.6


@contextlib.contextmanager
def double_throughout():
    """transformers computes norms, rotary tables, softmax and more in single precision whatever the model's type is.
    The goldens are to be better than what is held against them: in here, single precision means double."""
    real = torch.float32, torch.Tensor.float
    torch.float = torch.float32 = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float = torch.float32 = real[0]
        torch.Tensor.float = real[1]


def build(name, case):
    """The model with random weights, rounded to the stored type, in double precision."""
    torch.manual_seed(zlib.crc32(name.encode()))
    model_class = getattr(transformers, case.model)
    special = dict(bos_token_id=1, eos_token_id=2, pad_token_id=None, attn_implementation="eager",
                   experts_implementation="eager")
    config = model_class.config_class(**dict(special, **case.fields))
    pooled = dict(add_pooling_layer=False) if case.model == "XLMRobertaModel" else {}
    model = model_class(config, **pooled).double().eval()
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            # Its tables once more: `double` came too late for them.
            module.__init__(module.config)
    stored = TYPES[case.dtype]
    with torch.no_grad():
        for key, p in [*model.named_parameters(), *persistent_buffers(model)]:
            draw(key, p, transposed=case.model.startswith("GptOss"))
            p.copy_(p.to(stored).double())
        if case.task == "generate":
            scale_logits(model, prompts(name, case)[0], stored)
    return model


def persistent_buffers(model):
    """Numbers that are stored and are no parameters: layer scalars, corrections of the choice of experts."""
    kept = model.state_dict()
    return [(key, b) for key, b in model.named_buffers() if key in kept and b.is_floating_point()]


def draw(key, p, transposed):
    """Random values, none of them neutral."""
    last = key.rsplit(".", 1)[-1]
    if re.search(r"norm(_\d)?\.weight$", key.lower()):
        # Some norms add 1 to the weight, and start at 0.
        low = -0.5 if not p.any() else 0.5
        p.uniform_(low, low + 1.0)
    elif last == "A_log":
        p.uniform_(0.05, 1.5).log_()
    elif last == "e_score_correction_bias":
        p.uniform_(-0.3, 0.3)
    elif last in ("layer_scalar", "per_expert_scale", "scale"):
        p.uniform_(0.5, 1.4)
    elif last == "sinks":
        p.normal_(1.0, 1.0)
    elif last in ("alpha_p", "alpha_n"):
        p.normal_(0, 0.8)
    elif last in ("beta", "eps"):
        pass
    elif key.endswith("bias"):
        p.normal_(0, 0.4)
    else:
        p.normal_(0, gain(key) / math.sqrt(fan_in(p, transposed)))


def gain(key):
    """Queries and keys larger than usual, so that attention is sharp and positions matter; routers too."""
    if re.search(r"q_proj|k_proj|q_b_proj|qkv_proj|query|key\.|mlp\.gate\.|router|block_sparse_moe\.gate", key):
        return 2.5
    return 1.3


def fan_in(p, transposed):
    """Inputs of each output: last, but in the experts of gpt-oss, which are stored the other way round."""
    return p.shape[1] if p.dim() == 3 and transposed else p.shape[-1]


def scale_logits(model, prompt, stored):
    """Scales the last norm until the logits spread as a trained model's do."""
    norm = model.model.norm
    offset = 1.0 if "1.0 + self.weight" in open(sys.modules[type(norm).__module__].__file__).read() else 0.0
    # Where logits are capped, the spread is not proportional to the norm.
    for _ in range(1 if getattr(model.config, "final_logit_softcapping", None) is None else 4):
        spread = logits(model, prompt).std(dim=-1).mean().item()
        scaled = (norm.weight + offset) * (TARGET_SPREAD / spread) - offset
        norm.weight.copy_(scaled.to(stored).double())


def prompts(name, case):
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ 1)
    vocab = case.fields["vocab_size"]
    ids = [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in case.lengths]
    # An encoder's text has a token at either end, and no padding within.
    if "XLMRoberta" not in case.model:
        return ids
    bos, eos = case.fields["bos_token_id"], case.fields["eos_token_id"]
    # A cross-encoder's is a query and a document, with two tokens between.
    pair = lambda i: [*i[: len(i) // 3], eos, eos, *i[len(i) // 3 :]] if case.task == "rerank" else i
    return [[bos, *pair(i), eos] for i in ids]


def logits(model, ids):
    # Named one by one: a number would let Gemma 4 skip rows.
    every = torch.arange(len(ids))
    with torch.no_grad():
        return model(torch.tensor([ids]), logits_to_keep=every).logits[0].double()


def vector(model, case, ids):
    """The numbers that a pooling model gives for a text, an embedding before it is normalised."""
    with torch.no_grad():
        if case.task == "rerank" and not case.tokens:
            return model(torch.tensor([ids])).logits[0].double()
        if case.task == "rerank":
            return logits(model, ids)[-1][list(case.tokens)]
        inner = getattr(model, "model", model)
        rows = inner(torch.tensor([ids])).last_hidden_state[0].double()
    return {"cls": rows[0], "mean": rows.mean(dim=0), "lasttoken": rows[-1]}[case.pooling[0]]


def golden(name, case, model):
    """Inputs, and the log-probability of each next token given those before it, or the pooled vector."""
    if case.task != "generate":
        entries = [{"ids": ids, "vector": [float(f"{v:.7g}") for v in vector(model, case, ids).tolist()]}
                   for ids in prompts(name, case)]
        head = {"task": case.task}
        if case.tokens:
            head["tokens"] = list(case.tokens)
        return dict(head, prompts=entries)
    entries = []
    spread = []
    for ids in prompts(name, case):
        values = logits(model, ids)
        spread.append(values.std(dim=-1).mean().item())
        logprobs = values.log_softmax(dim=-1)
        taken = [round(logprobs[i, ids[i + 1]].item(), 6) for i in range(len(ids) - 1)]
        best = values.argmax(dim=-1).tolist()
        entries.append({"ids": ids, "logprobs": taken, "argmax": best})
    if min(spread) < MIN_SPREAD:
        sys.exit(f"{name}: logits spread {min(spread):.2f}, at least {MIN_SPREAD} is needed")
    return {"logits_deviation": [round(s, 3) for s in spread], "prompts": entries}


def check(directory, fresh):
    """Whether the committed numbers are those of the installed transformers."""
    committed = json.loads((directory / "golden.json").read_text())
    worst = 0.0
    for old, new in zip(committed["prompts"], fresh["prompts"], strict=True):
        if old["ids"] != new["ids"]:
            sys.exit(f"{directory.name}: the inputs differ")
        key = "vector" if "vector" in new else "logprobs"
        worst = max([worst] + [abs(a - b) for a, b in zip(old[key], new[key], strict=True)])
    if worst > 1e-5:
        sys.exit(f"{directory.name}: the numbers differ by {worst:.2e}")
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
        case = CASES[name]
        with double_throughout():
            model = build(name, case)
            result = golden(name, case, model)
        directory = args.out / name
        if args.check:
            check(directory, result)
            continue
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(config_json(model, case))
        save_weights(directory, model, case)
        if case.gguf:
            save_gguf(directory / "model.gguf", model, case.model.removesuffix("ForCausalLM").lower())
        if case.pooling:
            save_pooling(directory, model.config.hidden_size, case.pooling)
        (directory / "golden.json").write_text(json.dumps(result, separators=(",", ":")) + "\n")
        bytes_ = sum(f.stat().st_size for f in directory.rglob("*") if f.is_file())
        print(f"{name}: {bytes_} bytes, logits deviation {result.get('logits_deviation')}", flush=True)


if __name__ == "__main__":
    main()
