"""Quantizes a model with a real backend and writes what it did as JSON. Runs in `.venv-gptqmodel`, never in ours.

    .venv-gptqmodel/bin/python tests/readers/backend_runner.py REQUEST.json RESULT.json

REQUEST holds `model` (a folder), `out`, `backend`, `method`, and `units` (the plan's, without its 4-bit layers).
RESULT: `different` (modules whose weights an independent reading of the tool's own files gives otherwise), `quantized`
(module → bits), `folded`, `printed` (what reached our streams), `left` (files left in the temporary folder), `recipe`
(module → bits after the tool was given what `recommend --as` prints).
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors import safe_open
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid, ProtectionPlan
from quant_fairness_plugin.checkpoint.dense_modules import dense_weight, tensor_layout
from quant_fairness_plugin.config import make_config
from quant_fairness_plugin.export import foreign
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.quantize.backends.running import running
from quant_fairness_plugin.quantize.calibration import build_calibration
from quant_fairness_plugin.quantize.grid import QuantizedTensor
from quant_fairness_plugin.recommend.tools import plan_for_tool
from quant_fairness_plugin.texts.load import load_texts

GROUP = 32


def tool_files(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def different(folder: Path, tensors: dict[str, QuantizedTensor]) -> list[str]:
    """The modules that were read back with other weights than the plainest reading of the tool's files gives."""
    files = tool_files(folder)
    layout = tensor_layout(json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"])
    wrong = []
    for name, tensor in tensors.items():
        parts = {key.removeprefix(f"{name}."): value for key, value in files.items() if key.startswith(f"{name}.")}
        parts.pop("bias", None)
        if not torch.equal(dense_weight(name, parts, layout), tensor.dequantize()):
            wrong.append(name)
    return wrong


def plan_of(request: dict[str, Any], layers: int, grid: Grid) -> ProtectionPlan:
    units = {f"layers.{i}": "int4" for i in range(layers)} | request["units"]
    return ProtectionPlan(
        model=request["model"],
        units=units,
        grid=grid,
        source="explicit",
        reasons=(),
        stable=True,
        predicted=False,
        extra_bytes=0,
        overhead=0.0,
    )


def bits_of(folder: Path) -> dict[str, int]:
    """Module → bits, from the shapes of the tool's files: eight 4-bit integers to a word, or four 8-bit ones."""
    files = tool_files(folder)
    found = {}
    for name, tensor in files.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            found[module] = 32 * tensor.shape[0] // (GROUP * files[f"{module}.scales"].shape[0])
        elif suffix == "weight_packed":
            found[module] = 32 * tensor.shape[1] // int(files[f"{module}.weight_shape"][1])
    return found


def with_printed_plan(tool: str, text: str, model: str, rows: list[tuple[int, ...]], work: Path) -> dict[str, int]:
    """Give the tool what `recommend --as` prints, as its documentation says, and look at what it quantized."""
    source, out = work / "printed", work / "printed-out"
    source.write_text(text, encoding="utf-8")
    with running(tool):
        if tool == "gptqmodel":
            from gptqmodel import GPTQModel, QuantizeConfig

            config = QuantizeConfig(**json.loads(source.read_text(encoding="utf-8")), offload_to_disk=False)
            quantizing = GPTQModel.load(model, config, device="cpu", dtype=torch.float16)
            inputs = [{"input_ids": list(row), "attention_mask": [1] * len(row)} for row in rows]
            quantizing.quantize(inputs, batch_size=1, calibration_data_min_length=0)
            quantizing.save(str(out))
        else:
            from llmcompressor import oneshot
            from torch.utils.data import DataLoader
            from transformers import AutoModelForCausalLM

            loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16)
            tokens = [{"input_ids": torch.tensor(row)} for row in rows]
            recipe = source.rename(source.with_suffix(".yaml"))
            oneshot(model=loaded, dataset=DataLoader(tokens, batch_size=1), recipe=str(recipe), tokenizer=model)
            loaded.save_pretrained(out, save_compressed=True)
    return bits_of(out)


def main() -> None:
    torch.set_num_threads(1)
    # Set before the import of gptqmodel, which the backend does by itself; here another test may come first.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    config = make_config(backend=request["backend"], method=request["method"], group_size=GROUP)
    loaded, texts = load_model(request["model"]), load_texts("bundled", languages=("en", "he"))
    calibration = build_calibration(loaded.tokenizer, texts, tokens_per_language=300)
    plan = plan_of(request, loaded.layers, config.grid)
    wrong: list[str] = []
    read = foreign.read_foreign

    def checked(folder: Path, *args: Any, **kwargs: Any) -> Any:
        found = read(folder, *args, **kwargs)
        wrong.extend(different(folder, found[0]))
        return found

    foreign.read_foreign = checked
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as other:
        tempfile.tempdir = scratch
        printed = io.StringIO()
        with redirect_stdout(printed):
            quantized = foreign.quantize_with(
                config.backend, loaded, plan, method=config.method, calibration=calibration
            )
        left = sorted(path.name for path in Path(scratch).iterdir() if not path.name.startswith("torchinductor"))
        tempfile.tempdir = None
        record = export(quantized, request["out"], texts=texts)
        recipe = {}
        if config.method == "gptq":
            text = plan_for_tool(config.backend, plan, loaded.files)
            rows = [row for rows in calibration.rows.values() for row in rows]
            recipe = with_printed_plan(config.backend, text, request["model"], rows, Path(other))
    answer = {
        "different": wrong,
        "quantized": record.quantized_modules,
        "folded": sorted(quantized.folded),
        "printed": printed.getvalue(),
        "left": left,
        "recipe": recipe,
        "versions": record.provenance.versions,
    }
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
