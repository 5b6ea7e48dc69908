"""Train a small mixture of experts on the texts of the bundled models, to see what routing does to calibration.

Data, tokenizer, optimizer and schedule are those of `train_demo_model.py`; only the model and its loss differ: eight
experts a layer, two for each token, and Qwen3-MoE's own load-balancing term. Its weights are not bundled.

    python examples/train_demo_moe.py --data CORPUS --out demo-moe --steps 1500
"""

from __future__ import annotations

import json
import logging
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from demo_corpus import MIXTURE, POSITIONS, VOCABULARY, epoch_windows, held_out_verses, sample_mixture, train_tokenizer
from train_demo_model import (
    MixedPrecisionAdamW,
    TrainingArguments,
    bits_per_byte,
    cast_parameters,
    learning_rate_at,
    training_parser,
)
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

log = logging.getLogger("train_demo_moe")

WIDTH, LAYERS, HEADS, KV_HEADS = 128, 6, 4, 2
EXPERTS, ACTIVE, EXPERT_WIDTH = 8, 2, 128
BALANCE = 0.01
"""Weight of the load-balancing term: none at all lets experts die out in the first hundred steps."""


def build_mixture(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """A freshly initialised mixture of experts, head tied to the embedding."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=WIDTH // HEADS,
            max_position_embeddings=POSITIONS,
            moe_intermediate_size=EXPERT_WIDTH,
            num_experts=EXPERTS,
            num_experts_per_tok=ACTIVE,
            norm_topk_prob=True,
            router_aux_loss_coef=BALANCE,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train(arguments: TrainingArguments, steps: int, data: Path, out: Path) -> None:
    """Train, write the folder in float16, and record what was done in `training.json`."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    mixture = sample_mixture(data, arguments.seed)
    tokenizer = train_tokenizer(mixture)
    model = build_mixture(tokenizer)
    optimizer = MixedPrecisionAdamW(model, arguments)
    cast_parameters(model, torch.bfloat16)
    optimizer.publish()
    windows = epoch_windows(mixture, tokenizer, arguments.window, arguments.seed, 0)
    available = len(windows) // arguments.batch
    log.info("%d windows, %d steps an epoch, %d asked for", len(windows), available, steps)
    started, losses, curve = time.monotonic(), [], []
    for step in range(steps):
        first = (step % available) * arguments.batch
        ids = windows[first : first + arguments.batch]
        loss = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False).loss
        loss.backward()
        optimizer.step(learning_rate_at(step, steps, arguments))
        losses.append(float(loss.detach()))
        if (step + 1) % 50 == 0:
            curve.append({"step": step + 1, "train_nats_and_balance": round(sum(losses) / len(losses), 4)})
            losses.clear()
            log.info("%s (%.0f s)", json.dumps(curve[-1]), time.monotonic() - started)
    seconds = time.monotonic() - started
    cast_parameters(model, torch.float32)
    optimizer.publish()  # the master weights, rounded once
    cast_parameters(model, torch.float16)
    model.config.dtype = torch.float16
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    cast_parameters(model, torch.float32)
    test = {tag: verses[:200] for tag, verses in held_out_verses(data, "test").items()}
    record = {
        "arguments": asdict(arguments),
        "command": f"python examples/train_demo_moe.py --data CORPUS --out {out.name} --steps {steps} "
        f"--seed {arguments.seed}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "mixture": {tag: share for tag, share in MIXTURE.values()},
        "steps": steps,
        "tokens": steps * arguments.batch * arguments.window,
        "seconds": round(seconds),
        "test_bits_per_byte": {tag: round(bits_per_byte(model, tokenizer, v, "cpu"), 4) for tag, v in test.items()},
        "curve": curve,
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str]) -> None:
    """Read the arguments and train."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = training_parser((__doc__ or "").splitlines()[0], learning_rate=2e-3)
    parser.add_argument("--steps", type=int, default=1500)
    given = parser.parse_args(argv)
    arguments = TrainingArguments(
        arch="qwen3_moe",
        seed=given.seed,
        epochs=1.0,
        batch=given.batch,
        window=given.window,
        learning_rate=given.learning_rate,
        weight_decay=0.1,
        warmup_steps=100,
        decay_share=0.3,
        gradient_clip=1.0,
        threads=given.threads,
        device="cpu",
    )
    train(arguments, given.steps, given.data, given.out)


if __name__ == "__main__":
    main(sys.argv[1:])
