"""Train a student of `demo` with half its layers, to set distillation beside quantization and pruning.

The student begins as every second layer of its teacher, with a copy of its embedding, which is its head too. What it
lowers is the KL of its next-token distributions to the teacher's, over the whole vocabulary. Texts, mixture, tokenizer,
optimizer and schedule are those of `train_demo_model.py`. Its weights are not bundled: `trifecta_table.py` of the
benchmarks measures them.

    python examples/train_demo_student.py --data CORPUS --out demo-student --epochs 1
    python examples/train_demo_student.py --data CORPUS --out demo-student --epochs 1 --resume   # go on after a stop
"""

from __future__ import annotations

import copy
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from demo_corpus import MIXTURE, sample_mixture
from torch import Tensor, nn
from train_demo_model import (
    Loss,
    MixedPrecisionAdamW,
    Progress,
    TrainingArguments,
    cast_parameters,
    measure_held_out,
    resumed,
    run_steps,
    training_parser,
    versions,
    write_float16,
)
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from quant_fairness_plugin.model.resolve import bundled_folder


def half_of(teacher: LlamaForCausalLM) -> LlamaForCausalLM:
    """A model of every second layer of another, beginning with the first; no weight is shared with it."""
    config = copy.deepcopy(teacher.config)
    kept = teacher.model.layers[::2]
    config.num_hidden_layers = len(kept)
    student = LlamaForCausalLM(config)
    for mine, theirs in zip(student.model.layers, kept, strict=True):
        mine.load_state_dict(theirs.state_dict())
    student.model.norm.load_state_dict(teacher.model.norm.state_dict())
    student.model.embed_tokens.load_state_dict(teacher.model.embed_tokens.state_dict())
    student.lm_head.load_state_dict(teacher.lm_head.state_dict())
    return student


def divergence_from(teacher: PreTrainedModel) -> Loss:
    """The loss of a student: mean KL(teacher || student) of the next token, in nats, at every position."""

    def loss_of(student: PreTrainedModel, ids: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher(input_ids=ids, use_cache=False).logits.float().flatten(0, 1).log_softmax(-1)
        found = student(input_ids=ids, use_cache=False).logits.float().flatten(0, 1).log_softmax(-1)
        return nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean")

    return loss_of


def train(arguments: TrainingArguments, teacher_folder: Path, data: Path, out: Path, resume: bool) -> None:
    """Distil, write the folder in float16, and record what was done in `training.json`."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    mixture = sample_mixture(data, arguments.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(teacher_folder)
    teacher = LlamaForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32).to(arguments.device).eval()
    optimizer = MixedPrecisionAdamW(half_of(teacher).to(arguments.device), arguments)
    for model in (teacher, optimizer.model):
        cast_parameters(model, torch.bfloat16)
    state_file = out.with_name(out.name + ".state.pt")
    progress = resumed(state_file, optimizer, arguments.device) if resume and state_file.exists() else Progress()
    run_steps(arguments, data, mixture, tokenizer, optimizer, progress, state_file, divergence_from(teacher))
    write_float16(optimizer, tokenizer, out)
    record = {
        "arguments": asdict(arguments),
        "command": f"python examples/train_demo_student.py --data CORPUS --out {out.name} "
        f"--epochs {arguments.epochs:g} --seed {arguments.seed}",
        "loss": "KL of the student's next-token distributions to its teacher's, whole vocabulary",
        "teacher": {"name": teacher_folder.name, "layers": teacher.config.num_hidden_layers},
        "layers": optimizer.model.config.num_hidden_layers,
        "versions": versions(),
        "mixture": dict(MIXTURE.values()),
        "tokens": progress.tokens,
        "steps": progress.step,
        "seconds": round(progress.seconds),
        "held_out": measure_held_out(optimizer.model, data, mixture, tokenizer, arguments.device),
        "curve": progress.curve,
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    state_file.unlink(missing_ok=True)


def main(argv: list[str]) -> None:
    """Read the arguments and train."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = training_parser((__doc__ or "").splitlines()[0], learning_rate=1e-3)
    parser.add_argument("--teacher", type=Path, default=bundled_folder("demo"), help="folder of a Llama; default: demo")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args(argv)
    arguments = TrainingArguments(
        arch="llama",
        seed=given.seed,
        epochs=given.epochs,
        batch=given.batch,
        window=given.window,
        learning_rate=given.learning_rate,
        weight_decay=0.1,
        warmup_steps=100,
        decay_share=0.5,
        gradient_clip=1.0,
        threads=given.threads,
        device="cpu",
    )
    train(arguments, given.teacher, given.data, given.out, given.resume)


if __name__ == "__main__":
    main(sys.argv[1:])
