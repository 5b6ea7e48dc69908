"""`load_quantized` runs any of our exports, and gives exactly the quantized model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant_fairness_plugin.artifacts import CheckpointFormat
from quant_fairness_plugin.errors import ArtifactError, ConfigError
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.quantize.bank import swapped
from quant_fairness_plugin.serve.load import load_quantized
from tests.export.build import TEXTS, plan_of, quantize_tiny

ROW = torch.arange(1, 34).unsqueeze(0)


@pytest.fixture(scope="module", params=[("llama", "compressed-tensors"), ("gpt2", "gptq"), ("gpt_neox", "gptq")])
def case(
    request: pytest.FixtureRequest, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    family: str = request.param[0]
    format_name: CheckpointFormat = request.param[1]
    quantized = quantize_tiny(tiny_model(family, layers=2), protected=(1,))
    out = tmp_path_factory.mktemp("serve") / family
    export(quantized, out, plan=plan_of(quantized), texts=TEXTS, format=format_name, reader="vllm")
    return out, quantized


@torch.no_grad()
def test_logits_equal_those_of_the_quantized_model_in_memory(case: tuple[Path, Any]) -> None:
    out, quantized = case
    with swapped(quantized.loaded, quantized.dense_weights()) as model:
        expected = model(input_ids=ROW).logits
    original = quantized.loaded.model(input_ids=ROW).logits
    found = load_quantized(out)(input_ids=ROW).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(found, original, rtol=1e-3)


def test_the_model_is_in_float32_and_evaluation_mode_and_generates(case: tuple[Path, Any]) -> None:
    model = load_quantized(case[0], kernel="reference")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == case[1].loaded.family.tied_head
    tokens = model.generate(ROW[:, :3], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 7)


def test_nothing_outside_the_folder_is_needed(case: tuple[Path, Any], tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in case[0].iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert torch.equal(load_quantized(moved)(input_ids=ROW).logits, load_quantized(case[0])(input_ids=ROW).logits)


def test_an_unknown_kernel_is_refused(case: tuple[Path, Any]) -> None:
    with pytest.raises(ConfigError, match="unknown kernel 'triton'; allowed is 'reference'"):
        load_quantized(case[0], kernel="triton")  # type: ignore[arg-type] # the refusal is the test


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="no weights|cannot be read|describes no model"):
        load_quantized(tmp_path)
