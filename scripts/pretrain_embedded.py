"""Pretrain the tiny causal language model that ships inside prelort.

    python scripts/pretrain_embedded.py --text TEXT_FOLDER

TEXT_FOLDER holds public-domain English prose as ``*.txt`` and ``*.xml`` files, at any depth:
the ``inaugural``, ``state_union``, ``shakespeare`` and ``genesis`` corpora of NLTK's data
collection. The script trains a byte-level BPE tokenizer and a Llama-architecture model on it and
writes both, with a model card, into ``--out``.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DEFAULT_OUT = Path("src/prelort/embedded/base")
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
# NLTK's genesis corpus holds translations beside the two English ones.
NOT_ENGLISH = frozenset(
    f"{name}.txt" for name in ("finnish", "french", "german", "lolcat", "portuguese", "swedish")
)
# About two contexts long, so that the model sees beginnings and ends often enough to learn them.
PASSAGE_CHARACTERS = 1500
HELD_OUT_FRACTION = 0.05
MIB = 2**20


@dataclass(frozen=True)
class Score:
    """Mean negative log likelihood in nats per token, and bits per byte of UTF-8 text."""

    loss: float
    bits_per_byte: float


def read_text(path: Path) -> str:
    """Read a file as UTF-8, or else as Windows-1252, or else as Latin-1, which cannot fail."""
    data = path.read_bytes()
    for encoding in ("utf-8", "cp1252"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1")


def clean(text: str, is_xml: bool) -> str:
    """Return plain text without markup, trailing spaces or more than one blank line in a row."""
    if is_xml:
        text = re.sub(r"<!--.*?-->|<[^>]*>", "", text, flags=re.DOTALL)
        text = html.unescape(text)
    lines = [line.strip() if is_xml else line.rstrip() for line in text.splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def read_documents(folder: Path) -> dict[str, str]:
    """Return cleaned text by relative path, sorted; raise SystemExit if the folder has none."""
    documents: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".txt", ".xml"} and path.name not in NOT_ENGLISH:
            relative = path.relative_to(folder).as_posix()
            documents[relative] = clean(read_text(path), path.suffix == ".xml")
    if not documents:
        raise SystemExit(f"no .txt or .xml file under {folder}")
    return documents


def passages(text: str) -> list[str]:
    """Cut text at line ends into passages of about PASSAGE_CHARACTERS characters."""
    found: list[str] = []
    lines: list[str] = []
    size = 0
    for line in text.splitlines():
        lines.append(line)
        size += len(line) + 1
        if size >= PASSAGE_CHARACTERS:
            found.append("\n".join(lines).strip())
            lines, size = [], 0
    if lines:
        found.append("\n".join(lines).strip())
    return [passage for passage in found if passage]


def split_documents(documents: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return (training, held-out) passages: the end of every document is held out."""
    train: list[str] = []
    held_out: list[str] = []
    for text in documents.values():
        cut = text.rfind("\n", 0, int(len(text) * (1 - HELD_OUT_FRACTION)))
        cut = cut if cut > 0 else len(text)
        train += passages(text[:cut])
        held_out += passages(text[cut:])
    return train, held_out


def train_tokenizer(texts: list[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: all 256 bytes are in it, so any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def count_bytes(texts: list[str]) -> int:
    """Return the bytes of all texts in UTF-8."""
    return sum(len(text.encode()) for text in texts)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return one int64 stream of token ids, every text between a bos and an eos token."""
    ids: list[int] = []
    for text in texts:
        # Not tokenizer.encode, which warns about every text longer than the model's context.
        encoded = tokenizer.backend_tokenizer.encode(text)
        ids += [tokenizer.bos_token_id, *encoded.ids, tokenizer.eos_token_id]
    return torch.tensor(ids, dtype=torch.long)


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a randomly initialised Llama with tied embeddings, in float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        # 8/3 of the width, as in Llama, rounded up to a multiple of 16.
        intermediate_size=math.ceil(args.hidden * 8 / 3 / 16) * 16,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=args.context,
        initializer_range=0.02,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def autocast(device: torch.device, enabled: bool) -> AbstractContextManager[object]:
    """Return a bfloat16 autocast context, or one that does nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if enabled else nullcontext()


def token_losses(
    model: LlamaForCausalLM, windows: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    """Cross entropy of windows (batch, context + 1): every token from those before it."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction=reduction
    )


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, stream: torch.Tensor, bytes_in_stream: int, args: argparse.Namespace
) -> Score:
    """Score a token stream in consecutive windows of the model's context."""
    model.eval()
    device = model.device
    size = args.context
    usable = (len(stream) - 1) // size * size
    windows = stream[: usable + 1].unfold(0, size + 1, size)
    total = 0.0
    for batch in torch.split(windows, 64):
        with autocast(device, args.bf16):
            total += token_losses(model, batch.to(device), "sum").item()
    model.train()
    loss = total / usable
    return Score(loss, loss * len(stream) / bytes_in_stream / math.log(2))


def training_windows(stream: torch.Tensor, args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Yield (batch, context + 1) windows epoch by epoch: shuffled, with a new offset each epoch."""
    generator = torch.Generator().manual_seed(args.seed)
    size = args.context
    while True:
        offset = int(torch.randint(size, (1,), generator=generator))
        windows = stream[offset:].unfold(0, size + 1, size)
        order = torch.randperm(len(windows), generator=generator)
        for chosen in torch.split(order, args.batch):
            if len(chosen) == args.batch:
                yield windows[chosen]


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up over 2 % of the steps, then a cosine down to 2 % of the peak."""
    warm_up = max(1, args.steps // 50)
    if step < warm_up:
        return float(args.lr * (step + 1) / warm_up)
    progress = (step - warm_up) / max(1, args.steps - warm_up)
    return float(args.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))))


def make_optimizer(model: LlamaForCausalLM, args: argparse.Namespace) -> torch.optim.AdamW:
    """Return AdamW with weight decay on the matrices only, not on the norms' gains."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))


def train(
    model: LlamaForCausalLM,
    stream: torch.Tensor,
    held_out: torch.Tensor,
    held_out_bytes: int,
    args: argparse.Namespace,
) -> None:
    """Train in place; the model ends with the weights of its best held-out loss."""
    optimizer = make_optimizer(model, args)
    best_loss = math.inf
    best = {name: value.clone() for name, value in model.state_dict().items()}
    batches = training_windows(stream, args)
    started = time.monotonic()
    every = max(1, args.steps // 20)
    model.train()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        with autocast(model.device, args.bf16):
            loss = token_losses(model, next(batches).to(model.device))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == args.steps:
            score = evaluate(model, held_out, held_out_bytes, args)
            if score.loss < best_loss:
                best_loss = score.loss
                best = {name: value.clone() for name, value in model.state_dict().items()}
            print(
                f"step {step + 1}/{args.steps}  train {loss.item():.3f}  "
                f"held out {score.loss:.3f} ({score.bits_per_byte:.3f} bits/byte)  "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
    model.load_state_dict(best)


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write float16 weights under a config that says float32, so that loading gives float32.

    Half precision halves the package; computing in it would be slow on a CPU and too coarse for
    training.
    """
    model.half().save_pretrained(folder)
    model.float()
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text())
    config["dtype"] = "float32"
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def model_card(
    model: LlamaForCausalLM,
    scores: dict[str, Score],
    tokens: int,
    text_bytes: int,
    args: argparse.Namespace,
) -> str:
    """Return the README.md of the saved model, with the figures of this run."""
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    megabytes = f"{text_bytes / 1e6:.1f}"
    epochs = args.steps * args.batch * args.context / tokens
    shape = (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.intermediate_size,
    )
    shown = sys.argv[1:]
    for option, stand_in in (("--text", "TEXT_FOLDER"), ("--out", "OUT_FOLDER")):
        if option in shown:
            shown[shown.index(option) + 1] = stand_in
    return f"""---
language: en
license: cc0-1.0
library_name: transformers
pipeline_tag: text-generation
---

# prelort's embedded base model

A Llama-architecture causal language model of {parameters:,} parameters, pretrained on
{megabytes} MB of public-domain English prose. It ships inside the prelort package so that
a first federated fine-tuning run needs no download.

**Intended use.** A default for teaching and testing: it trains in seconds on a laptop, and
fine-tuning changes it measurably. It has never seen source code, so code is a new domain. It cannot
write, answer or classify usefully, and it reproduces the language and views of its sources, some of
them centuries old.

## Architecture

| | |
|---|---|
| class | `LlamaForCausalLM`, tied embeddings |
| width, layers, heads, feed-forward | {", ".join(map(str, shape))} |
| context | {config.max_position_embeddings} tokens |
| tokenizer | byte-level BPE, {config.vocab_size} entries with `{PAD}`, `{BOS}` and `{EOS}` |
| weights | stored in float16; the config asks for float32 when loading |

The tokenizer adds no special tokens. In pretraining, each passage of about
{PASSAGE_CHARACTERS} characters stood between `{BOS}` and `{EOS}`.

## Data

All texts are in the public domain, from NLTK's data packages:

- `inaugural`: inaugural addresses of the presidents of the United States (works of the federal
  government)
- `state_union`: their State of the Union addresses since 1945 (likewise)
- `shakespeare`: eight plays ("placed in the public domain by Moby Lexical Tools, 1992"), markup
  removed
- `genesis`: the King James version and the World English Bible, in English only

The last {HELD_OUT_FRACTION:.0%} of every document was held out, also from the tokenizer. The
weights are dedicated to the public domain too (CC0 1.0).

## Training

    python scripts/pretrain_embedded.py {shlex.join(shown)}

AdamW, peak learning rate {args.lr:g}, cosine decay, {args.steps:,} steps of
{args.batch} x {args.context} tokens: {epochs:.1f} epochs of {tokens:,} tokens.

| text | loss (nats per token) | perplexity | bits per byte |
|---|---|---|---|
""" + "".join(
        f"| {name} | {s.loss:.3f} | {math.exp(s.loss):.2f} | {s.bits_per_byte:.3f} |\n"
        for name, s in scores.items()
    )


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--text", type=Path, required=True, help="folder of public-domain prose")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="where the model goes")
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=96, help="width")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=256, help="tokens")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16, help="windows per step")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.bf16 is None:
        args.bf16 = args.device.startswith("cuda")
    return args


def main() -> None:
    """Train the tokenizer and the model, score them and save them."""
    args = parse_arguments()
    # cuBLAS reads this when it starts; without it its results vary from run to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)

    documents = read_documents(args.text)
    train_texts, held_out_texts = split_documents(documents)
    tokenizer = train_tokenizer(train_texts, args.vocabulary, args.context)
    stream, held_out = encode(tokenizer, train_texts), encode(tokenizer, held_out_texts)
    train_bytes, held_out_bytes = count_bytes(train_texts), count_bytes(held_out_texts)
    model = build_model(args, tokenizer).to(torch.device(args.device))
    print(
        f"{len(documents)} documents, {train_bytes:,} bytes, {len(stream):,} training tokens "
        f"({train_bytes / len(stream):.2f} bytes each), {len(held_out):,} held out; "
        f"{sum(p.numel() for p in model.parameters()):,} parameters on {args.device}",
        flush=True,
    )
    train(model, stream, held_out, held_out_bytes, args)

    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    save_model(model, args.out)
    args.bf16 = False  # the card's figures are those of the saved, float16-rounded weights
    # A part of every document, about as much as is held out, is enough to compare the two.
    sample = train_texts[:: round(len(stream) / len(held_out))]
    sample_bytes = count_bytes(sample)
    scores = {
        "held out": evaluate(model, held_out, held_out_bytes, args),
        "training (a sample)": evaluate(model, encode(tokenizer, sample), sample_bytes, args),
    }
    card = model_card(model, scores, len(stream), train_bytes, args)
    (args.out / "README.md").write_text(card, encoding="utf-8")
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {size / MIB:.2f} MiB", *scores.items(), sep="\n  ")


if __name__ == "__main__":
    main()
