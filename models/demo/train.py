"""Recipe of the demo model: tokenizer, pre-training, chat tuning, export.

Needs a venv with torch, tokenizers, safetensors and numpy. Typical use, from `models/demo/`:

    python train.py all --corpus ../../../shared/data/corpus --work WORKDIR --out .

Stages run alone too (`tokenizer`, `pretrain`, `tune`, `export`); each reads what the stage before left in WORKDIR.
Everything is seeded. The budgets of pre-training (tokens) and tuning (FAQ turns) can be cut short by seconds; the
learning rate follows the share of the budget that is used, so that such a run still ends on a small rate. To repeat a
run exactly, use the same budgets on a machine that does not reach the seconds.
"""

import argparse
import json
import lzma
import math
import platform
import random
import re
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import faqdata

HERE = Path(__file__).resolve().parent
SPECIALS = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>"]
BEGIN, END, SYSTEM, USER, ASSISTANT, PAD = range(6)
VOCAB = 4096
SHAPE = dict(hidden=256, layers=5, heads=4, kv_heads=2, ffn=512, context=1024, theta=10000.0, eps=1e-5)
# Letters keep a trailing apostrophe (French elision: "l'", "qu'"); digits stand alone; line ends stay together.
SPLIT = r" ?\p{L}+['’]?| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
HELD_OUT = 0.01  # last share of each corpus file, never trained on
NOVELS_SHARE = 0.65  # of the pre-training windows; law repeats itself much more

CHAT_TEMPLATE = (
    "<|begin|>"
    "{%- for message in messages -%}"
    "{%- if message['role'] in ['system', 'developer'] -%}<|system|>"
    "{%- elif message['role'] == 'user' -%}<|user|>"
    "{%- elif message['role'] == 'assistant' -%}<|assistant|>"
    "{%- else -%}{{- raise_exception('the demo model knows the roles system, user and assistant only') -}}"
    "{%- endif -%}"
    "{%- if message['content'] is string -%}{{- message['content'] | trim -}}"
    "{%- else -%}{%- for part in message['content'] or [] -%}{{- part['text'] or '' -}}{%- endfor -%}"
    "{%- endif -%}<|end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


# ---------------------------------------------------------------- corpus and tokenizer


def corpus_text(folder, name):
    """Training text and held-out text of one corpus file; document marks become blank lines in front of <|begin|>."""
    text = lzma.open(Path(folder) / f"{name}.txt.xz", "rt", encoding="utf-8").read()
    cut = text.rindex("\n", 0, int(len(text) * (1 - HELD_OUT)))
    return text[:cut], text[cut + 1 :]


def documents(text):
    """Documents of a corpus text, trailing blanks of lines removed."""
    parts = re.split(r"^<\|doc\|>.*\n", text, flags=re.MULTILINE)
    return [re.sub(r"[ \t]+\n", "\n", p).strip() + "\n" for p in parts if p.strip()]


def stage_tokenizer(args):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The words of the server's domain (English, flags, paths) are rare beside 47 MB of French: they are repeated.
    domain = (HERE / "vocabulary.txt").read_text(encoding="utf-8")

    def texts():
        for name in ("novels-fr", "law-fr"):
            yield from documents(corpus_text(args.corpus, name)[0])
        yield from [domain] * 300

    tok.train_from_iterator(texts(), trainer)
    tok.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", BEGIN)]
    )
    args.work.mkdir(parents=True, exist_ok=True)
    tok.save(str(args.work / "tokenizer.json"))

    for name in ("novels-fr", "law-fr"):
        train, held = corpus_text(args.corpus, name)
        ids = []
        for e in tok.encode_batch(documents(train), add_special_tokens=False):
            ids += [BEGIN, *e.ids, END]
        np.save(args.work / f"{name}.npy", np.array(ids, dtype=np.uint16))
        print(f"{name}: {len(ids)} tokens, {len(train.encode()) / len(ids):.2f} bytes a token, held out {len(held)} chars")


# ---------------------------------------------------------------- the model (names as in HF LlamaForCausalLM)


class Attention(nn.Module):
    def __init__(self, s):
        super().__init__()
        h, self.heads, self.kv = s["hidden"], s["heads"], s["kv_heads"]
        self.dim = h // self.heads
        self.q_proj = nn.Linear(h, h, bias=False)
        self.k_proj = nn.Linear(h, self.kv * self.dim, bias=False)
        self.v_proj = nn.Linear(h, self.kv * self.dim, bias=False)
        self.o_proj = nn.Linear(h, h, bias=False)

    def forward(self, x, cos, sin):
        b, t, h = x.shape

        def rope(z):
            lo, hi = z.chunk(2, -1)
            return z * cos + torch.cat((-hi, lo), -1) * sin

        q = rope(self.q_proj(x).view(b, t, self.heads, self.dim).transpose(1, 2))
        k = rope(self.k_proj(x).view(b, t, self.kv, self.dim).transpose(1, 2))
        v = self.v_proj(x).view(b, t, self.kv, self.dim).transpose(1, 2)
        k, v = (z.repeat_interleave(self.heads // self.kv, 1) for z in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, h))


class Mlp(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.gate_proj = nn.Linear(s["hidden"], s["ffn"], bias=False)
        self.up_proj = nn.Linear(s["hidden"], s["ffn"], bias=False)
        self.down_proj = nn.Linear(s["ffn"], s["hidden"], bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.self_attn, self.mlp = Attention(s), Mlp(s)
        self.input_layernorm = nn.RMSNorm(s["hidden"], eps=s["eps"])
        self.post_attention_layernorm = nn.RMSNorm(s["hidden"], eps=s["eps"])

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, s["hidden"])
        self.layers = nn.ModuleList(Layer(s) for _ in range(s["layers"]))
        self.norm = nn.RMSNorm(s["hidden"], eps=s["eps"])


class Llama(nn.Module):
    """forward(ids [b,t], targets [b,t]) -> mean loss in nats a token."""

    def __init__(self, s=SHAPE):
        super().__init__()
        self.model = Body(s)
        dim = s["hidden"] // s["heads"]
        freq = s["theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.outer(torch.arange(s["context"], dtype=torch.float64), torch.cat((freq, freq)))
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(p)

    def hidden(self, ids):
        t = ids.shape[1]
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, self.cos[:t], self.sin[:t])
        return self.model.norm(x)

    def forward(self, ids, targets):
        logits = F.linear(self.hidden(ids), self.model.embed_tokens.weight)
        return F.cross_entropy(logits.view(-1, VOCAB), targets.reshape(-1))

    def answer_loss(self, ids, targets):
        """As forward, for targets that are mostly -100: logits are computed only where there is a target."""
        keep = targets != -100
        return F.cross_entropy(F.linear(self.hidden(ids)[keep], self.model.embed_tokens.weight), targets[keep])


# ---------------------------------------------------------------- optimizer: Muon for matrices, Adam for the rest


class Muon:
    """Momentum whose matrix steps are orthogonalized by five Newton-Schulz iterations (Jordan et al., 2024)."""

    def __init__(self, model, matrix_lr, other_lr):
        self.matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
        chosen = {id(p) for p in self.matrices}
        others = [p for p in model.parameters() if id(p) not in chosen]
        self.adam = torch.optim.Adam(others, lr=other_lr, betas=(0.9, 0.95), eps=1e-10)
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        self.matrix_lr, self.other_lr = matrix_lr, other_lr

    @staticmethod
    def orthogonal(g):
        a, b, c = 3.4445, -4.7750, 2.0315
        x = g.T if g.shape[0] > g.shape[1] else g
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.T if g.shape[0] > g.shape[1] else x

    @torch.no_grad()
    def step(self, scale):
        """One step at `scale` times the base rates; gradients are cleared."""
        for p, m in zip(self.matrices, self.momenta):
            m.lerp_(p.grad, 0.05)
            update = self.orthogonal(p.grad.lerp(m, 0.95))
            p.add_(update, alpha=-scale * self.matrix_lr * math.sqrt(max(1.0, p.shape[0] / p.shape[1])))
            p.grad = None
        for group in self.adam.param_groups:
            group["lr"] = scale * self.other_lr
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


class Adam:
    """Adam with the interface of Muon; cheaper a step where batches are small."""

    def __init__(self, model, lr):
        self.adam, self.lr = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.98)), lr

    def step(self, scale):
        torch.nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        self.adam.param_groups[0]["lr"] = scale * self.lr
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


# ---------------------------------------------------------------- pre-training


class Windows:
    """Random windows of the corpus: [rows, length] inputs and targets; every window starts with <|begin|>."""

    def __init__(self, work, seed):
        self.rng = np.random.default_rng(seed)
        self.sets = [np.load(work / f"{n}.npy", mmap_mode="r") for n in ("novels-fr", "law-fr")]

    def batch(self, rows, length):
        out = np.full((rows, length + 1), BEGIN, dtype=np.int64)
        for r in range(rows):
            ids = self.sets[0 if self.rng.random() < NOVELS_SHARE else 1]
            at = int(self.rng.integers(0, len(ids) - length))
            out[r, 1:] = ids[at : at + length]
        t = torch.from_numpy(out)
        return t[:, :-1].contiguous(), t[:, 1:].contiguous()


def stage_pretrain(args):
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    model, data = Llama(), Windows(args.work, args.seed)
    if args.start:  # a second, shorter run on other windows, at a lower rate
        model.load_state_dict(torch.load(args.start))
        data = Windows(args.work, args.seed + 3)
    peak = 0.5 if args.start else 1.0
    run = torch.compile(model, dynamic=False) if args.compile else model
    opt = Muon(model, 0.02, 0.004)
    seen, step, start, log = 0, 0, time.monotonic(), []
    while True:
        elapsed = time.monotonic() - start
        used = max(seen / args.tokens, elapsed / args.seconds)
        if used >= 1 or (args.work / "stop").exists():
            break
        # Short windows first; the last quarter sees the whole context.
        rows, length = (16, 256) if used < 0.75 else (4, SHAPE["context"])
        loss = run(*data.batch(rows, length))
        loss.backward()
        warm = min(1.0, (step + 1) / 40)
        opt.step(warm * peak * min(1.0, max(0.02, (1 - used) / 0.5)))
        seen, step = seen + rows * length, step + 1
        log.append(loss.item())
        if step % 25 == 0:
            print(f"step {step} tokens {seen} loss {np.mean(log[-25:]):.3f} seconds {elapsed:.0f}", flush=True)
        if step % 200 == 0:
            torch.save(model.state_dict(), args.work / "pretrain-part.pt")
    torch.save(model.state_dict(), args.work / "pretrain.pt")
    note(args, "pretrain_again" if args.start else "pretrain", dict(tokens=seen, steps=step, seconds=round(time.monotonic() - start), final_loss=float(np.mean(log[-50:]))))


def note(args, stage, figures):
    """Keeps the figures of a stage in WORKDIR/run.json; `evaluate.py` copies them into evaluation.json."""
    path = args.work / "run.json"
    run = json.loads(path.read_text()) if path.exists() else {}
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    run[stage] = dict(figures, threads=args.threads, machine=cpu, torch=torch.__version__, seed=args.seed)
    path.write_text(json.dumps(run, indent=1) + "\n")
    print(stage, run[stage], flush=True)


# ---------------------------------------------------------------- chat tuning


class Chats:
    """Seeded chat rows (ids, targets): FAQ turns, and continuations of corpus paragraphs asked for in chat."""

    def __init__(self, args, tok):
        self.tok, self.rng = tok, random.Random(args.seed + 1)
        self.faq, held = faqdata.load()
        self.augment = faqdata.Augmenter(self.faq, held, self.rng)
        # An answer is encoded as the model will emit it: alone, right after <|assistant|>.
        self.answers = {row["id"]: [*self.encode(row["answer"]), END] for row in self.faq}
        # Up to and with the first token that no other answer shares: the choice is made there, the rest is recital.
        counts = Counter(tuple(a[:n]) for a in self.answers.values() for n in range(1, len(a) + 1))
        self.choice = {
            key: a[: 1 + next(n for n in range(1, len(a) + 1) if counts[tuple(a[:n])] == 1)] for key, a in self.answers.items()
        }
        novels = documents(corpus_text(args.corpus, "novels-fr")[0])
        self.paragraphs = [p.strip() for d in novels for p in d.split("\n") if 200 <= len(p) <= 700]

    def encode(self, text):
        return self.tok.encode(text, add_special_tokens=False).ids

    def epoch(self, copies):
        """FAQ conversations, each row `copies` times. Most are one question and its answer up to where the choice is
        made, which costs half of a whole answer; the others have whole answers and one to three turns."""
        order = [row for row in self.faq for _ in range(copies)]
        self.rng.shuffle(order)
        i = 0
        while i < len(order):
            short = self.rng.random() < 0.85
            turns = 1 if short else self.rng.choice([1, 1, 2, 3])
            answers = self.choice if short else self.answers
            yield self.conversation([(self.encode(self.augment.vary(r)), answers[r["id"]]) for r in order[i : i + turns]])
            i += turns

    def batches(self, epochs, copies, rows):
        """Lists of `rows` conversations; those of like length come together, to spare padding."""
        queue = (row for _ in range(epochs) for row in self.epoch(copies))
        while pool := sorted(islice(queue, 16 * rows), key=lambda row: len(row[0])):
            cuts = [pool[i : i + rows] for i in range(0, len(pool), rows)]
            self.rng.shuffle(cuts)
            yield from cuts

    def conversation(self, turns):
        ids, targets = [BEGIN], [-100]

        def put(tokens, learn):
            ids.extend(tokens)
            targets.extend(tokens if learn else [-100] * len(tokens))

        if self.rng.random() < 0.15:
            put([SYSTEM, *self.encode(self.rng.choice(faqdata.SYSTEMS)), END], False)
        for question, answer in turns:
            put([USER, *question, END, ASSISTANT], False)
            put(answer, True)
        return ids, targets

    def story(self):
        """A paragraph of a novel as an answer: continued from its first words, or asked for."""
        text = self.rng.choice(self.paragraphs)
        kind = self.rng.random()
        if kind < 0.3:
            ask, answer = self.rng.choice(STORY_ASKS), text
        else:
            cut = text.find(" ", self.rng.randrange(30, 120))
            ask, answer = text[:cut], text[cut:].strip()
            if kind < 0.7:
                ask = self.rng.choice(CONTINUE_ASKS) + ask
        return self.conversation([(self.encode(ask), [*self.encode(answer), END])])


STORY_ASKS = ["Raconte une histoire", "Raconte-moi une histoire.", "Écris un paragraphe", "Écris un texte en français.",
              "Invente une histoire", "Écris une scène de roman", "Tell me a story", "Write a paragraph in French"]  # fmt: skip
CONTINUE_ASKS = ["Continue : ", "Continue ce texte : ", "Complète ce texte : ", "La suite : ", "Continue this text: "]


def padded(rows):
    """[(ids, targets)] -> tensors shifted by one, padded with <|pad|> and -100 to a multiple of 16."""
    width = -(-max(len(ids) for ids, _ in rows) // 16) * 16 + 1
    x = torch.full((len(rows), width), PAD)
    y = torch.full((len(rows), width), -100)
    for i, (ids, targets) in enumerate(rows):
        x[i, : len(ids)] = torch.tensor(ids)
        y[i, : len(ids)] = torch.tensor(targets)
    return x[:, :-1], y[:, 1:]


def stage_tune(args):
    from tokenizers import Tokenizer

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tok = Tokenizer.from_file(str(args.work / "tokenizer.json"))
    model = Llama()
    model.load_state_dict(torch.load(args.start or args.work / "pretrain.pt"))
    chats, data = Chats(args, tok), Windows(args.work, args.seed + 2)
    opt = Adam(model, args.adam) if args.adam else Muon(model, 0.02, 0.004)
    start, log, step, done, seen = time.monotonic(), [], 0, 0, 0
    total = args.epochs * len(chats.faq) * args.copies  # FAQ turns
    for rows in chats.batches(args.epochs, args.copies, args.rows):
        if step % args.text_every == 0:  # corpus text and stories keep the French alive beside the FAQ
            text = model(*data.batch(1, 512))
            (args.text_weight * text + 0.1 * model.answer_loss(*padded([chats.story()]))).backward()
        x, y = padded(rows)
        loss = model.answer_loss(x, y)
        loss.backward()
        used = max(done / total, (time.monotonic() - start) / args.tune_seconds)
        if used >= 1:
            break
        opt.step(min(1.0, (step + 1) / 20) * args.tune_rate * (1 - used))
        turns = int((x == ASSISTANT).sum())
        done, seen, step = done + turns, seen + x.numel(), step + 1
        log.append((loss.item() * int((y != -100).sum()) / turns, text.item()))
        if step % 50 == 0:
            faq, lm = np.mean(log[-50:], axis=0)
            torch.save(model.state_dict(), args.work / "tune-part.pt")
            print(f"step {step} turns {done}/{total} nats a turn {faq:.3f} text {lm:.3f} seconds {time.monotonic() - start:.0f}", flush=True)
    torch.save(model.state_dict(), args.work / "tune.pt")
    figures = dict(turns=done, steps=step, faq_tokens=seen, corpus_tokens=-(-step // args.text_every) * 512, seconds=round(time.monotonic() - start))
    note(args, "tune", figures)


# ---------------------------------------------------------------- export


def stage_export(args):
    from safetensors.torch import save_file

    state = {k: v.to(torch.bfloat16).contiguous() for k, v in torch.load(args.work / "tune.pt").items()}
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(state, str(args.out / "model.safetensors"), metadata={"format": "pt"})
    s = SHAPE
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=VOCAB, hidden_size=s["hidden"],
        intermediate_size=s["ffn"], num_hidden_layers=s["layers"], num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"], head_dim=s["hidden"] // s["heads"], hidden_act="silu",
        max_position_embeddings=s["context"], rms_norm_eps=s["eps"], rope_theta=s["theta"], rope_scaling=None,
        attention_bias=False, mlp_bias=False, tie_word_embeddings=True, initializer_range=0.02, use_cache=True,
        bos_token_id=BEGIN, eos_token_id=END, pad_token_id=PAD, torch_dtype="bfloat16",
    )  # fmt: skip
    generation = dict(bos_token_id=BEGIN, eos_token_id=END, pad_token_id=PAD, do_sample=False, temperature=0.0)
    tokenizer = dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>",
        model_max_length=s["context"], clean_up_tokenization_spaces=False, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    for name, value in (("config", config), ("generation_config", generation), ("tokenizer_config", tokenizer)):
        (args.out / f"{name}.json").write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (args.out / "tokenizer.json").write_bytes((args.work / "tokenizer.json").read_bytes())
    count = sum(v.numel() for v in state.values())
    print(f"{count} parameters, {(args.out / 'model.safetensors').stat().st_size} bytes in {args.out}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("stage", choices=["tokenizer", "pretrain", "tune", "export", "all"])
    p.add_argument("--corpus", type=Path, default=HERE / "../../../shared/data/corpus")
    p.add_argument("--work", type=Path, required=True, help="folder of checkpoints and encoded text, outside the repository")
    p.add_argument("--out", type=Path, default=HERE)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--compile", action="store_true", help="torch.compile the pre-training step (needs a C++ compiler)")
    p.add_argument("--tokens", type=int, default=40_000_000, help="pre-training budget in tokens")
    p.add_argument("--seconds", type=float, default=2700, help="pre-training budget in seconds")
    p.add_argument("--start", type=Path, help="checkpoint that pretrain or tune continues")
    p.add_argument("--epochs", type=int, default=30, help="tuning epochs")
    p.add_argument("--copies", type=int, default=10, help="variations of each FAQ question in an epoch")
    p.add_argument("--rows", type=int, default=40, help="conversations a tuning step")
    p.add_argument("--tune-seconds", type=float, default=math.inf, help="tuning budget in seconds")
    p.add_argument("--text-every", type=int, default=6, help="steps from one corpus window beside them to the next")
    p.add_argument("--adam", type=float, help="tune with Adam at this rate instead of Muon")
    p.add_argument("--text-weight", type=float, default=0.4, help="weight of the corpus loss in tuning")
    p.add_argument("--tune-rate", type=float, default=0.2, help="share of the pre-training rate at the start of tuning")
    args = p.parse_args()
    stages = dict(tokenizer=stage_tokenizer, pretrain=stage_pretrain, tune=stage_tune, export=stage_export)
    for name in stages if args.stage == "all" else [args.stage]:
        stages[name](args)


if __name__ == "__main__":
    main()
