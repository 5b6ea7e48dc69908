from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant_fairness_plugin.artifacts import Grid, TextSet
from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.model.storage import parameters_sha256
from quant_fairness_plugin.model.streamed import open_streamed
from quant_fairness_plugin.plans.units import map_units
from quant_fairness_plugin.sweep import backward
from quant_fairness_plugin.sweep.bank import RtnBank
from quant_fairness_plugin.sweep.fisher import Changes, check_linear, score_sentences, spread
from quant_fairness_plugin.sweep.walk import score_plans
from tests.planted_model import planted_texts
from tests.tiny import write_tiny_model

GRID = Grid(group_size=32)


@pytest.fixture(scope="module", params=["llama", "gpt2", "mixtral", "deepseek_v3"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_model(folder, request.param)
    return load_model(str(folder))


@pytest.fixture(scope="module")
def texts() -> TextSet:
    return planted_texts().part("search").take([0, 3]).choose(planted_texts().languages[:2])


def changes_of(loaded: LoadedModel) -> Changes:
    units = map_units(loaded)
    bank = RtnBank(loaded, units, GRID)
    return Changes.of(loaded, units, bank, ["int4", "int8"])


def test_a_score_is_half_the_mean_squared_product_of_gradient_and_error(loaded: LoadedModel, texts: TextSet) -> None:
    units = map_units(loaded)
    bank = RtnBank(loaded, units, GRID)
    found, bytes_ = score_sentences(loaded, texts, changes_of(loaded), draws=3, seed=5)
    generator = torch.Generator().manual_seed(5)
    for language, sentences in texts.sentences.items():
        for i, text in enumerate(sentences):
            ids = [0, *loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]
            assert bytes_[language][i] == len(text.encode())
            expected = dict.fromkeys(units.group_names(), 0.0)
            for gradients in naive_gradients(loaded, ids, 3, generator):
                for unit in expected:
                    slope = sum(
                        float((gradients[name] * (value - loaded.model.get_parameter(name).detach())).sum())
                        for name, value in bank.weights(unit, "int4").items()
                    )
                    expected[unit] += slope**2 / 6
            for unit, value in expected.items():
                # float32 sums in another order
                assert found[unit]["int4"][language][i] == pytest.approx(value, rel=1e-3, abs=1e-9)


def naive_gradients(
    loaded: LoadedModel, ids: list[int], draws: int, generator: torch.Generator
) -> list[dict[str, torch.Tensor]]:
    parameters = dict(loaded.model.named_parameters())
    with torch.no_grad():
        probabilities = loaded.model(torch.tensor([ids])).logits[0, :-1].softmax(-1)
    found = []
    for _ in range(draws):
        labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            loss = torch.nn.functional.cross_entropy(
                loaded.model(torch.tensor([ids])).logits[0, :-1], labels, reduction="sum"
            )
            # Of experts that no token went to, there is none.
            gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
            found.append(dict(zip(parameters, gradients, strict=True)))
        for parameter in parameters.values():
            parameter.requires_grad_(False)
    return found


def test_a_score_is_the_measured_divergence_where_the_error_is_small(loaded: LoadedModel, texts: TextSet) -> None:
    draws, units = 200, map_units(loaded)
    bank = RtnBank(loaded, units, GRID)
    unit = units.group_names()[-1]
    changes = Changes(loaded, bank, {unit: units.parameters[unit]}, ("int8",))
    (scores,) = score_sentences(loaded, texts, changes, draws=draws)[0].values()
    measured = score_plans(loaded, {"one": {unit: "int8"}}, texts, units=units, bank=bank)["one"]
    for language in texts.languages:
        # 400 squared normal variates: their mean is off by more than 25 % (3.5 standard errors) once in 2000 draws.
        exact = sum(measured.languages[language].kl_nats)
        assert sum(scores["int8"][language]) == pytest.approx(exact, rel=0.25)


def test_blocks_read_from_their_files_give_the_same_scores(loaded: LoadedModel, texts: TextSet) -> None:
    streamed = open_streamed(str(loaded.files.folder))
    units = map_units(streamed)
    changes = Changes.of(streamed, units, RtnBank(streamed, units, GRID, keep=False), ["int4", "int8"])
    # Parameters that are not in memory read as NaN, so that a block that is run without its own shows.
    assert score_sentences(streamed, texts, changes) == score_sentences(loaded, texts, changes_of(loaded))


def test_scores_do_not_depend_on_which_rows_run_together(
    loaded: LoadedModel, texts: TextSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, _ = score_sentences(loaded, texts, changes_of(loaded))
    monkeypatch.setattr(backward, "BATCH_TOKENS", 1)
    monkeypatch.setattr(backward, "HEAD_VALUES", 1)
    monkeypatch.setattr(backward, "HEAD_ROWS", 7)
    alone, _ = score_sentences(loaded, texts, changes_of(loaded))
    for unit, kinds in alone.items():
        for kind, languages in kinds.items():
            for language, expected in languages.items():
                # float32 sums in another order
                assert together[unit][kind][language] == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_eight_bits_hurt_far_less_than_four(loaded: LoadedModel, texts: TextSet) -> None:
    found, _ = score_sentences(loaded, texts, changes_of(loaded))
    four, eight = (sum(sum(map(sum, row[kind].values())) for row in found.values()) for kind in ("int4", "int8"))
    # A step of 1/17 of the other's width, squared: 1/289; a quarter of that for the noise of few labels.
    assert 0 < eight < four / 72


def test_the_model_is_left_as_it_was(loaded: LoadedModel, texts: TextSet) -> None:
    before = parameters_sha256(loaded.model)
    score_sentences(loaded, texts, changes_of(loaded))
    assert parameters_sha256(loaded.model) == before
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    modules = list(loaded.model.modules())
    assert not any(module._forward_hooks for module in modules)


def test_the_same_seed_draws_the_same_labels(loaded: LoadedModel, texts: TextSet) -> None:
    first, again, other = (score_sentences(loaded, texts, changes_of(loaded), seed=seed)[0] for seed in (1, 1, 2))
    assert first == again != other


def test_a_weight_of_no_linear_module_is_refused(loaded: LoadedModel, texts: TextSet) -> None:
    name = map_units(loaded).parameters["layers.0.norms"][0]
    bank = RtnBank(loaded, map_units(loaded), GRID)
    changes = Changes(loaded, bank, {"layers.0.norms": (name,)}, ("int4",))
    with pytest.raises(UnsupportedModelError, match="no weight of a linear module.*Use --exhaustive"):
        score_sentences(loaded, texts, changes)


def test_units_of_other_modules_are_refused_before_the_work(loaded: LoadedModel) -> None:
    units = map_units(loaded)
    check_linear(loaded, units)
    vector = next(name for name, value in loaded.model.named_parameters() if value.dim() == 1)
    unit = units.group_names()[0]
    other = replace(units, parameters={**units.parameters, unit: (vector,)})
    with pytest.raises(UnsupportedModelError, match="no weight of a linear module"):
        check_linear(loaded, other)


def test_sentences_are_evenly_spread(texts: TextSet) -> None:
    every = planted_texts()
    assert spread(every, 3).ids == tuple(every.ids[i * len(every) // 3] for i in range(3))
    assert spread(texts, 10).ids == texts.ids
