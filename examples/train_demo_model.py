"""Train the two bundled models (`demo`, a Llama, and `demo-gpt2`) on a parallel Bible corpus.

The mixture holds each language at a chosen share of its chapters (English whole, German, French and Spanish in part,
the others at a few per cent), so that "low-resource" is a fact of the training data, not a guess about it.

    python examples/train_demo_model.py --arch llama --data CORPUS --out demo --epochs 5
    python examples/train_demo_model.py --arch llama --data CORPUS --out demo --epochs 5 --resume   # go on after a stop

CORPUS holds `bible/<language>.tsv.xz` (lines `verse_id<TAB>text`) and `splits.tsv` (`verse_id  split …`). Whole
chapters outside the split `train` are never trained on; `dev` steers, `test` is measured once, at the end.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from demo_card import model_card
from demo_corpus import (
    END_OF_TEXT,
    MIXTURE,
    POSITIONS,
    VOCABULARY,
    Chapters,
    epoch_windows,
    held_out_verses,
    sample_mixture,
    train_tokenizer,
)
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

log = logging.getLogger("train_demo_model")

WIDTH, LAYERS, HEADS, KV_HEADS, MLP_WIDTH = 256, 12, 4, 2, 512
Loss = Callable[[PreTrainedModel, Tensor], Tensor]
"""Model and token ids `[B, T]` → what a step lowers, in nats per token."""


@dataclass(frozen=True)
class TrainingArguments:
    arch: str
    seed: int
    epochs: float
    batch: int
    window: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    decay_share: float
    gradient_clip: float
    threads: int
    device: str


@dataclass
class Progress:
    """What a resumed run needs besides weights and optimizer: everything else is a function of seed and step."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


def build_model(arch: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A freshly initialised model of the bundled shape, head tied to the embedding."""
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if arch == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                intermediate_size=MLP_WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_key_value_heads=KV_HEADS,
                max_position_embeddings=POSITIONS,
                tie_word_embeddings=True,
                **special,
            )
        )
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_inner=MLP_WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=POSITIONS,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **special,
        )
    )


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the parameters and leave the buffers: rotary frequencies rounded to bfloat16 would be another model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


class MixedPrecisionAdamW:
    """AdamW on float32 master weights, forward and backward in bfloat16.

    bfloat16 holds 8 bits of mantissa: updates below 0.4 % of a weight would be lost without the float32 copy.
    """

    def __init__(self, model: PreTrainedModel, arguments: TrainingArguments) -> None:
        self.model = model
        self.shadow = [p for p in model.parameters() if p.requires_grad]
        self.master = [p.detach().float().clone().requires_grad_() for p in self.shadow]
        matrices = [p for p in self.master if p.dim() >= 2]
        vectors = [p for p in self.master if p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": arguments.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.95), fused=True)
        self.clip = arguments.gradient_clip

    def step(self, learning_rate: float) -> None:
        for master, shadow in zip(self.master, self.shadow, strict=True):
            assert shadow.grad is not None
            master.grad = shadow.grad.float()
            shadow.grad = None
        nn.utils.clip_grad_norm_(self.master, self.clip)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        for master, shadow in zip(self.master, self.shadow, strict=True):
            shadow.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        return {"master": [p.detach() for p in self.master], "adamw": self.adamw.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for mine, stored in zip(self.master, state["master"], strict=True):
            mine.copy_(stored)
        self.adamw.load_state_dict(state["adamw"])
        self.publish()


def learning_rate_at(step: int, total: int, arguments: TrainingArguments) -> float:
    """Warm-up, plateau, then 1 − √progress to zero (warmup-stable-decay, Hägele et al. 2024, section 4)."""
    if step < arguments.warmup_steps:
        return arguments.learning_rate * (step + 1) / arguments.warmup_steps
    decay_from = total * (1 - arguments.decay_share)
    if step < decay_from:
        return arguments.learning_rate
    return arguments.learning_rate * max(0.0, 1 - math.sqrt((step - decay_from) / (total - decay_from)))


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str], device: str) -> float:
    """BPB of isolated texts, each after <|endoftext|>, every token counted once."""
    nats, count = 0.0, 0
    for start in range(0, len(texts), 16):
        chunk = texts[start : start + 16]
        batch = tokenizer([END_OF_TEXT + t for t in chunk], truncation=True, max_length=POSITIONS)["input_ids"]
        width = max(map(len, batch))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch], device=device)
        keep = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=device)[:, 1:].bool()
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        nats += float(losses[keep].sum())
        count += sum(len(t.encode()) for t in chunk)
    return nats / math.log(2) / count


def bigram_bits_per_byte(train: list[str], test: list[str]) -> float:
    """BPB of a byte bigram with add-one-half smoothing, fitted on the same text that the model saw of the language."""
    pairs: Counter[tuple[int, int]] = Counter()
    firsts: Counter[int] = Counter()
    for text in train:
        data = [256, *text.encode()]
        pairs.update(zip(data, data[1:], strict=False))
        firsts.update(data[:-1])
    bits, count = 0.0, 0
    for text in test:
        data = [256, *text.encode()]
        bits -= sum(math.log2((pairs[a, b] + 0.5) / (firsts[a] + 128)) for a, b in zip(data, data[1:], strict=False))
        count += len(data) - 1
    return bits / count


def next_token_loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood of the tokens of windows `[B, T]`, in nats."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def write_checkpoint(path: Path, optimizer: MixedPrecisionAdamW, progress: Progress) -> None:
    """Written beside and renamed: a kill leaves the previous checkpoint whole."""
    beside = path.with_suffix(".tmp")
    torch.save({"optimizer": optimizer.state_dict(), "progress": asdict(progress)}, beside)
    os.replace(beside, path)


def resumed(path: Path, optimizer: MixedPrecisionAdamW, device: str) -> Progress:
    """Take up weights and optimizer where a checkpoint left them; returns how far that was."""
    state = torch.load(path, map_location=device, weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    log.info("resumed at step %d", state["progress"]["step"])
    return Progress(**state["progress"])


def train(arguments: TrainingArguments, data: Path, out: Path, resume: bool) -> None:
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    mixture = sample_mixture(data, arguments.seed)
    tokenizer = train_tokenizer(mixture)
    model = build_model(arguments.arch, tokenizer)
    optimizer = MixedPrecisionAdamW(model.to(arguments.device), arguments)
    cast_parameters(model, torch.bfloat16)
    optimizer.publish()
    state_file = out.with_name(out.name + ".state.pt")
    progress = resumed(state_file, optimizer, arguments.device) if resume and state_file.exists() else Progress()
    run_steps(arguments, data, mixture, tokenizer, optimizer, progress, state_file)
    finish(arguments, data, out, mixture, tokenizer, optimizer, progress)
    state_file.unlink(missing_ok=True)


def run_steps(
    arguments: TrainingArguments,
    data: Path,
    mixture: dict[str, Chapters],
    tokenizer: PreTrainedTokenizerFast,
    optimizer: MixedPrecisionAdamW,
    progress: Progress,
    state_file: Path,
    loss_of: Loss = next_token_loss,
) -> None:
    """Run the optimizer up to the planned step, with a curve row and a checkpoint every ten minutes."""
    dev = {tag: verses[:40] for tag, verses in held_out_verses(data, "dev").items()}
    windows, loaded_epoch = epoch_windows(mixture, tokenizer, arguments.window, arguments.seed, 0), 0
    steps_per_epoch = len(windows) // arguments.batch
    total = round(arguments.epochs * steps_per_epoch)
    log.info("%d windows, %d steps an epoch, %d in all", len(windows), steps_per_epoch, total)
    started, last_save, losses = time.monotonic() - progress.seconds, time.monotonic(), []
    while progress.step < total:
        epoch, index = divmod(progress.step, steps_per_epoch)
        if epoch != loaded_epoch:
            windows, loaded_epoch = epoch_windows(mixture, tokenizer, arguments.window, arguments.seed, epoch), epoch
        ids = windows[index * arguments.batch : (index + 1) * arguments.batch].to(arguments.device)
        if len(ids) == 0:  # a later epoch can be a few windows shorter than the first
            ids = windows[: arguments.batch].to(arguments.device)
        loss = loss_of(optimizer.model, ids)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(learning_rate_at(progress.step, total, arguments))
        losses.append(float(loss.detach()))
        progress.step += 1
        progress.tokens += ids.numel()
        if progress.step % 100 == 0:
            progress.seconds = time.monotonic() - started
            row = {"step": progress.step, "tokens": progress.tokens, "train_nats": sum(losses) / len(losses)}
            losses.clear()
            if progress.step % 1000 == 0:
                row |= {
                    f"dev_bpb_{t}": bits_per_byte(optimizer.model, tokenizer, v, arguments.device)
                    for t, v in dev.items()
                }
            progress.curve.append({k: round(v, 4) for k, v in row.items()})
            log.info("%s (%.0f s)", json.dumps(progress.curve[-1]), progress.seconds)
        if time.monotonic() - last_save > 600:
            write_checkpoint(state_file, optimizer, progress)
            last_save = time.monotonic()


def write_float16(optimizer: MixedPrecisionAdamW, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the master weights, rounded once, as a Hugging Face folder; the model then holds what was written."""
    model = optimizer.model
    cast_parameters(model, torch.float32)
    optimizer.publish()
    cast_parameters(model, torch.float16)
    model.config.dtype = torch.float16
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    cast_parameters(model, torch.float32)


def measure_held_out(
    model: PreTrainedModel, data: Path, mixture: dict[str, Chapters], tokenizer: PreTrainedTokenizerFast, device: str
) -> dict[str, dict[str, float]]:
    """Bits per byte on test chapters beside those of a byte bigram, language by language."""
    test = {tag: verses[:400] for tag, verses in held_out_verses(data, "test").items()}
    held_out: dict[str, dict[str, float]] = {}
    for tag, chapters in mixture.items():
        verses = [v for chapter in chapters.values() for v in chapter]
        held_out[tag] = {
            "train_verses": len(verses),
            "train_bytes": sum(len(v.encode()) for v in verses),
            "test_verses": len(test[tag]),
            "bits_per_byte": round(bits_per_byte(model, tokenizer, test[tag], device), 4),
            "byte_bigram_bits_per_byte": round(bigram_bits_per_byte(verses, test[tag]), 4),
        }
        log.info("%s %s", tag, held_out[tag])
    return held_out


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def finish(
    arguments: TrainingArguments,
    data: Path,
    out: Path,
    mixture: dict[str, Chapters],
    tokenizer: PreTrainedTokenizerFast,
    optimizer: MixedPrecisionAdamW,
    progress: Progress,
) -> None:
    """Write the Hugging Face folder in float16, and measure exactly those weights on the test chapters."""
    write_float16(optimizer, tokenizer, out)
    held_out = measure_held_out(optimizer.model, data, mixture, tokenizer, arguments.device)
    record = {
        "arguments": asdict(arguments),
        "command": "python examples/train_demo_model.py "
        f"--arch {arguments.arch} --data CORPUS --out {out.name} --epochs {arguments.epochs:g} --seed {arguments.seed}",
        "versions": versions(),
        "mixture": {tag: share for tag, share in MIXTURE.values()},
        "tokens": progress.tokens,
        "steps": progress.step,
        "seconds": round(progress.seconds),
        "held_out": held_out,
        "curve": progress.curve,
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (out / "README.md").write_text(model_card(record), encoding="utf-8")


def training_parser(description: str, *, learning_rate: float) -> argparse.ArgumentParser:
    """The arguments that every training on this corpus has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder with bible/ and splits.tsv")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=8, help="windows per step")
    parser.add_argument("--window", type=int, default=256, help="tokens per window")
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = training_parser((__doc__ or "").splitlines()[0], learning_rate=1.5e-3)
    parser.add_argument("--arch", choices=("llama", "gpt2"), required=True)
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    given = parse_arguments(argv)
    arguments = TrainingArguments(
        arch=given.arch,
        seed=given.seed,
        epochs=given.epochs,
        batch=given.batch,
        window=given.window,
        learning_rate=given.learning_rate,
        weight_decay=0.1,
        warmup_steps=200,
        decay_share=0.3,
        gradient_clip=1.0,
        threads=given.threads,
        device=given.device,
    )
    train(arguments, given.data, given.out, given.resume)


if __name__ == "__main__":
    main(sys.argv[1:])
