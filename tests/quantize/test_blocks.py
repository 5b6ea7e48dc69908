from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.blocks import first_inputs, input_moment
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from tests.tiny import FAMILIES

Load = Callable[..., LoadedModel]


def own_inputs(loaded: LoadedModel, name: str, row: tuple[int, ...]) -> Tensor:
    """What the model itself gives a module on one row, `[tokens, cols]`."""
    found: list[Tensor] = []
    module = loaded.model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].flatten(0, -2)))
    with torch.no_grad():
        loaded.model(torch.tensor([row]))
    handle.remove()
    return found[0]


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_compute_what_they_compute_inside_the_model(load: Load, rows: CalibrationSet, family: str) -> None:
    loaded = load(family)
    batches = first_inputs(loaded, rows, batch_tokens=100)
    assert sum(batch.hidden.shape[0] * batch.hidden.shape[1] for batch in batches) == sum(rows.coverage.values())
    with torch.no_grad():
        for layer in range(loaded.layers):
            for batch in batches:
                batch.hidden = batch.run(loaded.block(layer), layer)
    outputs: list[Tensor] = []

    def note(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = loaded.block(loaded.layers - 1).register_forward_hook(note)
    with torch.no_grad():
        for row in rows.rows["he"]:
            loaded.model(torch.tensor([row]))
    handle.remove()
    ours = [hidden for batch in batches if batch.language == "he" for hidden in batch.hidden]
    assert len(ours) == len(outputs)
    for mine, expected in zip(ours, outputs, strict=True):
        torch.testing.assert_close(mine, expected[0], rtol=1e-4, atol=1e-5)  # float32, other batch sizes


@pytest.mark.parametrize("family", FAMILIES)
def test_the_moment_is_the_mean_over_languages_and_serves_the_whole_fusion_group(
    load: Load, rows: CalibrationSet, family: str
) -> None:
    loaded = load(family)
    batches = first_inputs(loaded, rows, batch_tokens=100)
    for unit in loaded.family.units:
        expected = torch.zeros(())
        names = [f"{loaded.family.blocks}.0.{module}" for module in unit.modules]
        for language_rows in rows.rows.values():
            inputs = torch.cat([own_inputs(loaded, names[-1], row) for row in language_rows]).double()
            expected = expected + inputs.T @ inputs / len(inputs) / len(rows.rows)
        moment = input_moment(loaded.block(0), loaded.linears(0)[names[0]], 0, batches, rows)
        torch.testing.assert_close(moment, expected, rtol=1e-4, atol=1e-6)
    assert count_hooks(loaded.model) == 0


def test_a_language_with_more_tokens_does_not_count_more(load: Load, rows: CalibrationSet) -> None:
    loaded = load()
    module = loaded.linears(0)["model.layers.0.self_attn.q_proj"]

    def moment(parts: dict[str, int]) -> Tensor:
        chosen = {language: rows.rows[language][:1] * times for language, times in parts.items()}
        calibration = CalibrationSet(chosen, "x", "0", 24, 0, 0)
        batches = first_inputs(loaded, calibration, batch_tokens=100)
        return input_moment(loaded.block(0), module, 0, batches, calibration)

    torch.testing.assert_close(moment({"en": 5, "he": 1}), moment({"en": 1, "he": 1}))
    assert not torch.allclose(moment({"en": 1, "he": 1}), moment({"en": 1}))


@pytest.mark.parametrize("batch_tokens", [1, 50, 10_000])
def test_batches_hold_whole_rows_of_one_language_and_length(
    load: Load, rows: CalibrationSet, batch_tokens: int
) -> None:
    batches = first_inputs(load(), rows, batch_tokens=batch_tokens)
    assert all(b.hidden.shape[0] == 1 or b.hidden.shape[0] * b.hidden.shape[1] <= batch_tokens for b in batches)
    for language, tokens in rows.coverage.items():
        assert sum(b.hidden.shape[0] * b.hidden.shape[1] for b in batches if b.language == language) == tokens


def test_a_row_longer_than_the_context_is_an_error(load: Load) -> None:
    calibration = CalibrationSet({"en": ((0,) * 257,)}, "x", "0", 257, 0, 0)
    with pytest.raises(ConfigError, match="row has 257 tokens, the model's context 256"):
        first_inputs(load(), calibration, batch_tokens=512)


def test_hooks_are_gone_after_an_error(load: Load, rows: CalibrationSet) -> None:
    loaded = load()
    wrong = CalibrationSet({"en": ((99_999,),)}, "x", "0", 1, 0, 0)
    with pytest.raises(IndexError, match="out of range"):
        first_inputs(loaded, wrong, batch_tokens=100)
    batches = first_inputs(loaded, rows, batch_tokens=100)
    batches[0].hidden = torch.zeros(1, 1, 3)
    with pytest.raises(RuntimeError, match="size"):
        input_moment(loaded.block(0), loaded.linears(0)["model.layers.0.mlp.down_proj"], 0, batches, rows)
    assert count_hooks(loaded.model) == 0


def test_a_module_that_is_not_given_every_token_is_an_error(load: Load, rows: CalibrationSet) -> None:
    loaded = load()
    batches = first_inputs(loaded, rows, batch_tokens=100)
    q_proj = loaded.linears(0)["model.layers.0.self_attn.q_proj"]
    with pytest.raises(UnsupportedModelError, match=r"gave the module \d+ of \d+ calibration tokens"):
        input_moment(loaded.block(0), q_proj, 0, batches[:-1], rows)
    with pytest.raises(UnsupportedModelError, match=r"gave the module 0 of \d+ calibration tokens.*'rtn'"):
        input_moment(loaded.block(0), nn.Linear(32, 32), 0, batches, rows)
