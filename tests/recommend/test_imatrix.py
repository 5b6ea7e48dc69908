"""The importance matrix is that of a loop over tokens, in the file that llama.cpp's own tool writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from gguf import GGUFReader

from quant_fairness_plugin.cli.main import app, run_guarded
from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.model.resolve import resolve_model
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from quant_fairness_plugin.quantize.importance import channel_importance
from quant_fairness_plugin.recommend.imatrix import tensor_name, write_imatrix

DOWN, QUERY = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"
ROWS = {"en": ((3, 5, 7), (9, 11)), "he": ((13, 15),)}


@pytest.fixture
def calibration() -> CalibrationSet:
    return CalibrationSet(
        rows=ROWS, source="some texts", text_sha256="0", row_tokens=3, seed=0,
        weights={"en": 0.25, "he": 0.75},
    )  # fmt: skip


@torch.no_grad()
def naive(loaded: object, module: str, shares: dict[str, float]) -> torch.Tensor:
    """One token after the other, from the inputs that a hook saw."""
    model, total = loaded.model, torch.zeros(())  # type: ignore[attr-defined]
    for language, rows in ROWS.items():
        seen: list[torch.Tensor] = []
        handle = model.get_submodule(module).register_forward_pre_hook(lambda _, given, to=seen: to.extend(given[0][0]))
        for row in rows:
            model(torch.tensor([row]))
        handle.remove()
        squares = sum(token.double() ** 2 for token in seen)
        total = total + shares[language] * squares / squares.mean()
    return total.float()


def test_every_language_counts_by_its_share_alone(tiny_model: Callable[..., Path], calibration: CalibrationSet) -> None:
    loaded = load_model(resolve_model(str(tiny_model("llama", layers=2))))
    found = channel_importance(loaded, [DOWN, QUERY], calibration)
    for module in (DOWN, QUERY):
        torch.testing.assert_close(found[module], naive(loaded, module, {"en": 0.25, "he": 0.75}))
        assert found[module].mean() == pytest.approx(1, rel=1e-5)
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())


def test_the_file_holds_sums_and_counts_under_llamacpps_names(
    tiny_model: Callable[..., Path], calibration: CalibrationSet, tmp_path: Path
) -> None:
    family = load_model(resolve_model(str(tiny_model("llama", layers=2)))).family
    values = torch.rand(8)
    write_imatrix({DOWN: values}, calibration, family, tmp_path / "imatrix.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["imatrix.gguf"]
    reader = GGUFReader(tmp_path / "imatrix.gguf")
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert tensors.keys() == {"blk.1.ffn_down.weight.in_sum2", "blk.1.ffn_down.weight.counts"}
    sums, counts = tensors["blk.1.ffn_down.weight.in_sum2"], tensors["blk.1.ffn_down.weight.counts"]
    torch.testing.assert_close((sums / counts).flatten(), values)
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == ["some texts: en, he"]
    assert reader.get_field("imatrix.chunk_count").contents() == 3
    with pytest.raises(UnsupportedModelError, match="llama.cpp's name of model.layers.0.mlp.experts .* is not known"):
        tensor_name("model.layers.0.mlp.experts", family)


def test_imatrix_without_llamacpp_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    group = typer.main.get_command(app)
    assert run_guarded(group, ["recommend", "--imatrix", "x.gguf", "--as", "mlx"], "quant-fairness") == 2
    assert "--imatrix x.gguf is read by llama.cpp alone" in " ".join(capsys.readouterr().err.split())
