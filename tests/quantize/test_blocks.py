from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from quant_fairness_plugin.errors import ArtifactError, ConfigError, UnsupportedModelError
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize import blocks
from quant_fairness_plugin.quantize.blocks import first_inputs
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from quant_fairness_plugin.quantize.moments import LanguageMoment, fair_moments, language_moments, output_energy
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
def test_the_statistics_are_means_over_a_language_and_serve_the_whole_fusion_group(
    load: Load, rows: CalibrationSet, family: str
) -> None:
    loaded = load(family)
    batches = first_inputs(loaded, rows, batch_tokens=100)
    for unit in loaded.family.units:
        names = [f"{loaded.family.blocks}.0.{module}" for module in unit.modules]
        found = list(language_moments(loaded.block(0), loaded.linears(0)[names[0]], 0, batches, rows))
        assert [own.language for own in found] == list(rows.rows)
        for own in found:
            inputs = torch.cat([own_inputs(loaded, names[-1], row) for row in rows.rows[own.language]]).double()
            # float32 sums in batches of other sizes
            torch.testing.assert_close(own.moment, inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(own.magnitude, inputs.abs().mean(0), rtol=1e-4, atol=1e-6)
    assert count_hooks(loaded.model) == 0


def planted_moments(columns: int = 17) -> list[LanguageMoment]:
    """Three languages; the inputs of the second are ten times as large."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for language, size in (("en", 1.0), ("he", 10.0), ("zh", 1.0)):
        inputs = size * torch.randn(63, columns, generator=draw, dtype=torch.float64)
        found.append(LanguageMoment(language, inputs.T @ inputs / 63, inputs.abs().mean(0)))
    return found


def test_the_fair_hessian_weighs_each_language_by_its_share_of_its_own_output_energy() -> None:
    draw = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(rows, 17, generator=draw) for name, rows in (("q", 9), ("k", 3))}
    shares = {"en": 0.5, "he": 0.2, "zh": 0.3}
    hessians = fair_moments(planted_moments(), weights, shares).hessians
    assert list(hessians) == ["q", "k"]
    error = torch.randn(9, 17, generator=draw, dtype=torch.float64)
    for name, weight in weights.items():
        wide = weight.double()
        expected = torch.zeros(17, 17, dtype=torch.float64)
        for own in planted_moments():
            expected += shares[own.language] * own.moment / torch.trace(wide @ own.moment @ wide.T)
        torch.testing.assert_close(hessians[name], expected)
        # the weight itself has a relative output energy of 1 in every language
        assert output_energy(weight, hessians[name]) == pytest.approx(1)
    relative = sum(
        shares[own.language] * output_energy(error, own.moment) / output_energy(weights["q"], own.moment)
        for own in planted_moments()
    )
    assert output_energy(error, hessians["q"]) == pytest.approx(relative)


def test_larger_activations_do_not_weigh_more() -> None:
    weights = {"q": torch.randn(5, 17, generator=torch.Generator().manual_seed(2))}
    shares = {"en": 0.5, "he": 0.3, "zh": 0.2}
    louder = [LanguageMoment(m.language, 100 * m.moment, m.magnitude) for m in planted_moments()]
    torch.testing.assert_close(
        fair_moments(louder, weights, shares).hessians["q"],
        fair_moments(planted_moments(), weights, shares).hessians["q"],
    )


def test_a_language_without_output_adds_nothing_and_one_without_weight_neither() -> None:
    weights = {"q": torch.ones(2, 17)}
    en, he, zh = planted_moments()
    silent = LanguageMoment("he", torch.zeros_like(he.moment), torch.zeros_like(he.magnitude))
    alone = fair_moments([en], weights, {"en": 0.5}).hessians["q"]
    found = fair_moments([en, silent, zh], weights, {"en": 0.5, "he": 0.5, "zh": 0.0}).hessians["q"]
    torch.testing.assert_close(found, alone)
    assert torch.isfinite(found).all()


def test_a_language_with_more_tokens_does_not_count_more(load: Load, rows: CalibrationSet) -> None:
    loaded = load()
    module = loaded.linears(0)["model.layers.0.self_attn.q_proj"]

    def hessian(parts: dict[str, int]) -> Tensor:
        chosen = {language: rows.rows[language][:1] * times for language, times in parts.items()}
        calibration = CalibrationSet(chosen, "x", "0", 24, 0, 0)
        batches = first_inputs(loaded, calibration, batch_tokens=100)
        moments = language_moments(loaded.block(0), module, 0, batches, calibration)
        return fair_moments(moments, {"q": torch.eye(32)}, calibration.shares).hessians["q"]

    torch.testing.assert_close(hessian({"en": 5, "he": 1}), hessian({"en": 1, "he": 1}))
    assert not torch.allclose(hessian({"en": 1, "he": 1}), hessian({"en": 1}))


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


def test_hooks_are_gone_after_an_error(load: Load, rows: CalibrationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load()
    wrong = CalibrationSet({"en": ((99_999,),)}, "x", "0", 1, 0, 0)
    with pytest.raises(ArtifactError, match=r"x: the tokenizer gives None the id 99999, .* has 264 rows, ids 0\.\.263"):
        first_inputs(loaded, wrong, batch_tokens=100)
    monkeypatch.setattr(blocks, "check_ids", lambda *_, **__: None)  # so that the error comes while the model runs
    with pytest.raises(IndexError, match="out of range"):
        first_inputs(loaded, wrong, batch_tokens=100)
    batches = first_inputs(loaded, rows, batch_tokens=100)
    batches[0].hidden = torch.zeros(1, 1, 3)
    with pytest.raises(RuntimeError, match="size"):
        list(language_moments(loaded.block(0), loaded.linears(0)["model.layers.0.mlp.down_proj"], 0, batches, rows))
    assert count_hooks(loaded.model) == 0


def test_a_module_that_is_not_given_every_token_is_an_error(load: Load, rows: CalibrationSet) -> None:
    loaded = load()
    batches = first_inputs(loaded, rows, batch_tokens=100)
    q_proj = loaded.linears(0)["model.layers.0.self_attn.q_proj"]
    with pytest.raises(UnsupportedModelError, match=r"gave the module \d+ of \d+ calibration tokens"):
        list(language_moments(loaded.block(0), q_proj, 0, batches[:-1], rows))
    with pytest.raises(UnsupportedModelError, match=r"gave the module 0 of \d+ calibration tokens.*'rtn'"):
        list(language_moments(loaded.block(0), nn.Linear(32, 32), 0, batches, rows))
