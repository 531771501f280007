"""Figures of the demo model, measured on the exported files with HF transformers.

    python evaluate.py --corpus ../../../shared/data/corpus [--run WORKDIR/run.json]

Greedy answers to every FAQ question and every held-out paraphrase (right = the text equals the reference after strip),
bits per byte on the held-out last part of each corpus file, and a few samples. Writes evaluation.json.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import faqdata
from train import ASSISTANT, BEGIN, END, HERE, PAD, SHAPE, USER, corpus_text, documents

SAMPLES = ["Il était une fois", "La nuit tombait sur la ville et", "Article L. 1. Le contrat"]


@torch.no_grad()
def greedy(model, tok, prompts, limit):
    """Greedy texts for token-id prompts; prompts of one length run together, so that no padding enters."""
    by_length = defaultdict(list)
    for i, ids in enumerate(prompts):
        by_length[len(ids)].append(i)
    texts = [""] * len(prompts)
    for length, members in by_length.items():
        x = torch.tensor([prompts[i] for i in members])
        # The model's own defaults are greedy; they are said again here so that the figures do not hang on them.
        out = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=limit, do_sample=False, pad_token_id=PAD)
        for i, row in zip(members, out):
            texts[i] = tok.decode(row[length:], skip_special_tokens=True)
    return texts


def chat_ids(tok, question):
    """The prompt by the chat template, which must be what training has seen."""
    ids = list(tok.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False))
    assert ids == [BEGIN, USER, *tok(question, add_special_tokens=False)["input_ids"], END, ASSISTANT]
    return ids


def answers(model, tok, questions, reference):
    """Share of right answers, per language and together, and the wrong ones. questions: [(faq id, text)]."""
    texts = greedy(model, tok, [chat_ids(tok, q) for _, q in questions], 96)
    right, total, wrong = defaultdict(int), defaultdict(int), []
    for (key, question), text in zip(questions, texts):
        good = text.strip() == reference[key].strip()
        for group in ("all", key.rsplit("-", 1)[1]):
            total[group] += 1
            right[group] += good
        if not good:
            wrong.append(dict(id=key, question=question, answer=text))
    figures = {g: dict(right=right[g], total=total[g], share=round(right[g] / total[g], 4)) for g in sorted(total)}
    return figures, wrong


@torch.no_grad()
def bits_per_byte(model, tok, text):
    """Bits per UTF-8 byte of held-out text, in windows of the whole context that each start with <|begin|>."""
    joined = "\n".join(documents(text))
    ids = tok(joined, add_special_tokens=False)["input_ids"]
    nats, step = 0.0, SHAPE["context"] - 1
    for at in range(0, len(ids), step):
        x = torch.tensor([[tok.bos_token_id, *ids[at : at + step]]])
        logits = model(x).logits[0, :-1].float()
        nats += torch.nn.functional.cross_entropy(logits, x[0, 1:], reduction="sum").item()
    return dict(bits_per_byte=round(nats / math.log(2) / len(joined.encode()), 4), bytes=len(joined.encode()), tokens=len(ids))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--corpus", type=Path, default=HERE / "../../../shared/data/corpus")
    p.add_argument("--model", type=Path, default=HERE)
    p.add_argument("--run", type=Path, help="run.json of the training, copied into the figures")
    p.add_argument("--out", type=Path, default=HERE / "evaluation.json")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--quick", action="store_true", help="answers only, f32 only, nothing written")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    start = time.monotonic()

    faq, held = faqdata.load()
    reference = {row["id"]: row["answer"] for row in faq}
    sets = {
        "faq_questions": [(r["id"], r["question"]) for r in faq],
        "training_paraphrases": [(r["id"], q) for r in faq for q in r["paraphrases"]],
        "held_out_paraphrases": [(r["id"], r["question"]) for r in held],
    }
    tok = PreTrainedTokenizerFast.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    result = dict(parameters=sum(v.numel() for v in model.parameters()), faq_rows=len(faq))
    for name, questions in sets.items():
        if args.quick and name == "training_paraphrases":
            continue
        result[name], wrong = answers(model, tok, questions, reference)
        print(name, result[name], flush=True)
        if name != "training_paraphrases":
            result[name]["wrong"] = wrong
        if args.quick:
            for row in wrong:
                print("   ", row["id"], "|", row["question"], "|", row["answer"])
    result["samples"] = dict(zip(SAMPLES, greedy(model, tok, [tok(s)["input_ids"] for s in SAMPLES], 80)))
    print(json.dumps(result["samples"], ensure_ascii=False, indent=1))
    if args.quick:
        return
    for name in ("novels-fr", "law-fr"):
        result[f"held_out_{name}"] = bits_per_byte(model, tok, corpus_text(args.corpus, name)[1])
        print(name, result[f"held_out_{name}"], flush=True)
    # The same answers with every activation rounded to bf16, as a bf16 engine may compute them.
    rough = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    for name in ("faq_questions", "held_out_paraphrases"):
        result[f"{name}_bf16_compute"] = answers(rough, tok, sets[name], reference)[0]
        print(name, "bf16", result[f"{name}_bf16_compute"], flush=True)
    if args.run:
        result["training"] = json.loads(args.run.read_text())
    result["evaluation_seconds"] = round(time.monotonic() - start)
    args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
