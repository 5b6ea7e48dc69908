"""Models whose text decoder is a part of them, all the way: quantized, read back by Transformers, all else copied."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from quant_fairness_plugin.artifacts import CheckpointFormat, ExportRecord
from quant_fairness_plugin.checkpoint.dequantize import load_dense_model, read_dense_state
from quant_fairness_plugin.config import make_config
from quant_fairness_plugin.errors import ArtifactError, ConfigError, UnsupportedModelError
from quant_fairness_plugin.export.trial import try_architecture
from quant_fairness_plugin.export.verify import verify
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.model.load import from_loaded, quiet_transformers
from quant_fairness_plugin.model.resolve import resolve_model
from quant_fairness_plugin.preflight import check_model
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from tests.export.build import GRID, TEXTS, quantize_tiny
from tests.tiny import byte_tokenizer
from tests.wrappers import WRAPPERS, make_wrapper, write_wrapper

DISK = {"gemma3": "language_model.model.layers", "qwen3_vl": "model.language_model.layers"}
OTHERS = {"gemma3": ("vision_tower.", "multi_modal_projector."), "qwen3_vl": ("model.visual.",)}
Done = tuple[Path, Path, QuantizedModel, ExportRecord]


@pytest.fixture(scope="module", params=WRAPPERS)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Done]:
    """A wrapper of twelve layers, of which layer 1 is protected and layers 10 and 11 are not."""
    root = tmp_path_factory.mktemp(request.param)
    write_wrapper(root / "source", request.param, layers=12)
    quantized = quantize_tiny(root / "source", protected=(1,))
    record = export(quantized, root / "out", texts=TEXTS)
    return request.param, (root / "source", root / "out", quantized, record)


def test_everything_that_is_not_text_has_the_bytes_and_names_of_the_source(done: tuple[str, Done]) -> None:
    kind, (source, out, _, record) = done
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    others = {name for name in before if name.startswith(OTHERS[kind])}
    assert others
    assert set(record.copied_tensors) == others
    for name in others:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name])


def test_the_text_decoder_is_quantized_under_its_names_on_disk(done: tuple[str, Done]) -> None:
    kind, (_, out, quantized, _) = done
    tensors = load_file(out / "model.safetensors")
    packed = {name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")}
    modules = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert packed == {f"{DISK[kind]}.{layer}.{name}" for layer in range(12) if layer != 1 for name in modules}
    dense = read_dense_state(out)
    for name, tensor in quantized.tensors.items():
        stored = name.replace("model.language_model.layers", DISK[kind])
        assert torch.equal(dense[f"{stored}.weight"], tensor.dequantize())


@torch.no_grad()
def test_transformers_own_class_computes_what_the_files_say(done: tuple[str, Done]) -> None:
    _, (source, out, _, _) = done
    with quiet_transformers():
        read = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
        original = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    for parameter in read.parameters():  # what it renames while it loads a quantized checkpoint, it leaves in 16 bit
        parameter.data = parameter.data.float() if parameter.is_floating_point() else parameter.data
    ids = torch.tensor([[0, 5, 17, 250, 33, 8, 91]])
    found, expected, before = (
        model(input_ids=ids, use_cache=False).logits for model in (read, load_dense_model(out), original)
    )
    # Equal weights in float32: only the order of additions may differ.
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert float((expected - before).abs().max()) > 1e-2 * float(before.abs().max())  # INT4 leaves its trace


def test_the_config_is_the_wrappers_own(done: tuple[str, Done]) -> None:
    _, (source, out, _, _) = done
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    quantization = after.pop("quantization_config")
    assert after == before
    patterns = [entry for entry in quantization["ignore"] if entry.startswith("re:")]
    assert len(patterns) == len(OTHERS[done[0]]) + 1
    # vLLM has the head in its text model, and looks the whole name up.
    assert any(re.match(entry.removeprefix("re:"), "language_model.lm_head") for entry in patterns)
    assert "lm_head" in quantization["ignore"]


def test_verify_sees_a_copy_with_other_bytes(done: tuple[str, Done], tmp_path: Path) -> None:
    from quant_fairness_plugin.checkpoint.copied import check_copies

    kind, (_, out, _, record) = done
    if kind == "gemma3":  # once is enough, as it loads the model three times
        assert "copies" in {check.name for check in verify(out).checks}
    tensors = load_file(out / "model.safetensors")
    name = next(name for name in tensors if name.startswith(OTHERS[kind]))
    tensors[name].view(-1).view(torch.uint8)[0] ^= 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=f"{name} holds other bytes"):
        check_copies(tmp_path, record)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        check_copies(tmp_path, record)


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_formats_that_no_reader_was_run_on_are_refused(
    done: tuple[str, Done], tmp_path: Path, layout: CheckpointFormat
) -> None:
    with pytest.raises(UnsupportedModelError, match="also sees or hears"):
        export(done[1][2], tmp_path / "out", texts=TEXTS, format=layout)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"format": "gptq"}, UnsupportedModelError, "also sees or hears"),
        ({"backend": "llmcompressor", "method": "gptq"}, ConfigError, "takes a whole model"),
    ],
)
def test_what_a_wrapper_cannot_have_is_refused_before_it_is_loaded(
    done: tuple[str, Done], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    _, (source, _, _, _) = done
    with pytest.raises(error, match=words):
        check_model(make_config(**options), resolve_model(str(source)))


def test_a_wrapper_in_memory_survives_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def noting(quantized: QuantizedModel, out: Path, **options: object) -> ExportRecord:
        tried.append(quantized.loaded.layers)
        return export(quantized, out, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("quant_fairness_plugin.export.trial.export", noting)
    model = make_wrapper("gemma3", layers=5)
    try_architecture(
        model, byte_tokenizer(), texts=TEXTS, format="compressed-tensors", reader="transformers", grid=GRID
    )
    assert tried == [2]
    assert from_loaded(model, byte_tokenizer()).layers == 5
