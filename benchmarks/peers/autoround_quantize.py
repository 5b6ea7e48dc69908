"""Quantizes a model folder with AutoRound on given token rows. Runs in AutoRound's own environment, never in ours.

    .venv-peers-autoround/bin/python benchmarks/peers/autoround_quantize.py MODEL REQUEST.json OUT

REQUEST holds `rows` (lists of token ids, all of one length), `bits`, `group_size`, `symmetric` and `iters`; everything
else is AutoRound's default. With `max_bytes` its AutoScheme chooses 4 or 8 bits for every layer, from the same rows,
within the bits a weight that a file of that size has room for; `merged` lists names of layers that get the same.
OUT becomes its `auto_gptq` folder, with `peer.json` beside the weights.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound, AutoScheme
from auto_round.calib_dataset import get_dataloader, register_dataset
from auto_round.schemes import QuantizationScheme
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = "rows-of-the-request"
WIDTHS = (4, 8)
HEADER = 100
"""Bytes of a tensor in the header of its file, beside its name: some more than any takes."""


def quantize(folder: str, request: dict[str, Any], out: Path) -> None:
    rows = torch.tensor(request["rows"])
    # float16 holds its scales exactly as they are written; of bfloat16 it would keep 8 bits.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = {"iters": request["iters"], "nsamples": len(rows), "seqlen": rows.shape[1], "batch_size": 8}
    mixed = "max_bytes" in request
    if mixed:
        average = average_bits(model, request["max_bytes"], request["group_size"])
        given = {"scheme": scheme(request, average, len(rows), rows.shape[1]), "dataset": named(rows, tokenizer)}
    else:
        # Of bare ids AutoRound hides those that are the padding token, which here is EOS and stands in the rows.
        dataset = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows.split(1)]
        grid = {"bits": request["bits"], "group_size": request["group_size"], "sym": request["symmetric"]}
        given = grid | {"dataset": dataset}
    tool = AutoRound(model, tokenizer, device_map="cpu", seed=0, **given, **settings)
    tool.quantize_and_save(str(out), format="auto_gptq", inplace=True)
    flatten(out)
    halve(out)
    if mixed:
        settings |= {"avg_bits": average, "eight_bits": check_size(out, request["max_bytes"])}
    names = ("auto-round", "torch", "transformers", "numpy")
    peer = {"versions": {name: metadata.version(name) for name in names}, "settings": settings}
    (out / "peer.json").write_text(json.dumps(peer, indent=1) + "\n", encoding="utf-8")


def scheme(request: dict[str, Any], average: float, samples: int, length: int) -> AutoScheme:
    """Return AutoScheme with both widths on the grid that all tools get, and its defaults."""
    grid = {"group_size": request["group_size"], "sym": request["symmetric"], "data_type": "int", "act_bits": 16}
    options = [QuantizationScheme.from_dict({"bits": bits} | grid) for bits in WIDTHS]
    return AutoScheme(
        avg_bits=average, options=options, nsamples=samples, seqlen=length, shared_layers=request.get("merged")
    )


def average_bits(model: torch.nn.Module, max_bytes: int, group_size: int) -> float:
    """Return what a weight may cost for a file of so many bytes, in bits, scales and zero points counted.

    AutoScheme counts them as the file does: 16 bits for a scale and as many as a weight for a zero point, a group.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings()
    }
    weights = sum(layer.weight.numel() for layer in layers.values())
    kept = {name: value for name, value in model.named_parameters() if name.rpartition(".")[0] not in layers}
    names = [*kept, *(f"{name}.{part}" for name in layers for part in ("qweight", "qzeros", "scales", "g_idx"))]
    rest = sum(2 * value.numel() for value in kept.values()) + sum(4 * layer.in_features for layer in layers.values())
    rest += sum(len(name) + HEADER for name in names)
    average = 8 * (max_bytes - rest) / weights
    least = WIDTHS[0] + (16 + WIDTHS[0]) / group_size
    if average < least:
        raise SystemExit(f"{max_bytes} bytes are {average:.3f} bits a weight; the fewest that can be are {least:.3f}")
    return average


def named(rows: torch.Tensor, tokenizer: Any) -> str:
    """Return the name under which AutoRound finds the rows: AutoScheme takes no other data set.

    Raises:
        SystemExit: AutoRound leaves some out.
    """

    @register_dataset(NAME)
    def load(*_: Any, **__: Any) -> Dataset:
        return Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})

    batches = get_dataloader(tokenizer, rows.shape[1], NAME, bs=1, nsamples=len(rows))
    found = [batch["input_ids"][0].tolist() for batch in batches if batch is not None]
    if found != rows.tolist():
        raise SystemExit(f"AutoRound reads {len(found)} of {len(rows)} rows, or others")
    return NAME


def check_size(out: Path, max_bytes: int) -> int:
    """Return how many layers have 8 bits.

    Raises:
        SystemExit: the file is larger than was asked for.
    """
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    if size > max_bytes:
        raise SystemExit(f"the checkpoint has {size} bytes, more than {max_bytes}")
    rules = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"].get("dynamic", {})
    return sum(change.get("bits") == WIDTHS[1] for change in rules.values())


def halve(out: Path) -> None:
    """Store in float16 what AutoRound kept in float32 where the CPU has no bfloat16: the float16 that it was given.

    Raises:
        SystemExit: float16 does not hold a value.
    """
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        halves = {name: value.half() if value.dtype == torch.float32 else value for name, value in tensors.items()}
        if any(not torch.equal(halves[name].to(value.dtype), value) for name, value in tensors.items()):
            raise SystemExit(f"{file.name} holds float32 values that float16 does not")
        save_file(halves, file, metadata={"format": "pt"})


def flatten(out: Path) -> None:
    """Move a checkpoint out of a folder of its own below, named after the model and the scheme."""
    saved = next(out.rglob("config.json")).parent
    if saved != out:
        for file in saved.iterdir():
            file.rename(out / file.name)
        saved.rmdir()


def main() -> None:
    folder, request, out = sys.argv[1:]
    torch.set_num_threads(1)
    # What torch.compile and AutoScheme left of an earlier run would make this one look cheaper.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["AR_AUTO_SCHEME_CACHE"] = cache
        quantize(folder, json.loads(Path(request).read_text(encoding="utf-8")), Path(out))


if __name__ == "__main__":
    main()
