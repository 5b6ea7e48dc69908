"""One hook pass against a naive one, sentence by sentence; planted outliers; identical models that do not differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import PreTrainedModel

from quant_fairness_plugin.analysis.collect import collect, spread
from quant_fairness_plugin.analysis.kinds import find_analysis
from quant_fairness_plugin.analysis.quantized import rounded_state
from quant_fairness_plugin.analysis.representations import Representations, input_moments, summarise
from quant_fairness_plugin.artifacts import Bootstrap, Grid, Interval
from quant_fairness_plugin.measure.scoring import ModelState, fixed_state
from quant_fairness_plugin.model.exchange import exchanged
from quant_fairness_plugin.model.load import LoadedModel
from tests.analysis.samples import SENTENCES, few_texts, request_of

Load = Callable[..., LoadedModel]
LAYERS = 3


def hidden(model: PreTrainedModel, loaded: LoadedModel, text: str) -> list[np.ndarray]:
    """The embedding and the outputs of all blocks but the last, without BOS."""
    ids = loaded.tokenizer(text)["input_ids"]
    if ids[0] != loaded.tokenizer.bos_token_id:
        ids = [loaded.tokenizer.bos_token_id, *ids]
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return [state[0, 1:].double().numpy() for state in states[:-1]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_sums_are_those_of_single_sentences(load: Load, family: str) -> None:
    loaded = load(family, layers=LAYERS)
    state = rounded_state(loaded, Grid(bits=3, group_size=32))
    found = collect(loaded, state, few_texts(), sample=10**6)
    for language, sentences in SENTENCES.items():
        values = []
        for number, text in enumerate(sentences):
            one = hidden(loaded.model, loaded, text)
            with state.applied() as model:
                two = hidden(model, loaded, text)
            for layer in range(LAYERS - 1):  # the last state of Transformers is behind the final norm
                a, b = one[layer + 1], two[layer + 1]
                cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
                mine = found[language]
                assert mine.cosine_distance[layer, number] == pytest.approx((1 - cosine).sum(), rel=1e-4)
                assert mine.squared_error[layer, number] == pytest.approx(((a - b) ** 2).sum(), rel=1e-4)
                assert mine.squared_norm[layer, number] == pytest.approx((a**2).sum(), rel=1e-5)
                assert mine.added[layer, number] == pytest.approx(np.abs(a - one[layer]).mean(1).sum(), rel=1e-5)
                assert mine.tokens[number] == len(a)
            values.append(one[1].ravel())
        flat = np.concatenate(values)
        assert input_moments(found[language], 1) == pytest.approx(
            (flat.mean(), flat.var(), stats.skew(flat), stats.kurtosis(flat)), rel=1e-4, abs=1e-6
        )
        assert sorted(found[language].sample(1)) == pytest.approx(sorted(flat), abs=1e-5)


def test_identical_models_do_not_differ_at_all(load: Load) -> None:
    loaded = load("llama", layers=LAYERS)
    found = collect(loaded, fixed_state("same", loaded.model), few_texts())
    for rows in found.values():
        assert not rows.cosine_distance.any()
        assert not rows.squared_error.any()


def test_a_change_is_seen_from_its_layer_on(load: Load) -> None:
    loaded = load("llama", layers=LAYERS)
    name = f"{loaded.family.full_names(1)[-1]}.weight"
    values = {name: loaded.model.get_parameter(name).detach() * 1.5}

    @contextmanager
    def applied() -> Iterator[PreTrainedModel]:
        with exchanged(loaded.model, values):
            yield loaded.model

    rows = collect(loaded, ModelState("changed", applied), few_texts())["he"]
    assert not rows.squared_error[0].any()
    assert rows.squared_error[1:].all()


def test_an_injected_outlier_layer_and_channel_are_found(load: Load) -> None:
    loaded = load("llama", layers=5)
    with torch.no_grad():
        loaded.model.get_parameter(f"{loaded.family.full_names(3)[-1]}.weight").mul_(40)
        loaded.model.get_input_embeddings().get_parameter("weight")[:, 7] = 60
    result = find_analysis("representations").run(request_of(loaded))
    assert isinstance(result, Representations)
    assert result.outlier_layers == (3,)
    assert result.outlier_channels[0] == 1
    assert result.languages[1].outlier_layers > 0.5
    first = result.layers[0]
    assert (first.language, first.layer) == ("en", 0)
    assert first.outlier_channels > 0.9
    assert 0 < result.languages[0].cosine_distance.estimate < 1
    assert isinstance(result.languages[1].to_reference, Interval)
    assert result.languages[0].to_reference == Interval(1.0, 1.0, 1.0)


def test_the_figures_of_a_language_are_means_of_its_sums(load: Load) -> None:
    loaded = load("llama", layers=LAYERS)
    found = collect(loaded, rounded_state(loaded, Grid(bits=3, group_size=32)), few_texts())
    kurtosis = np.array([3.0, 0.0, 6.0])
    row = summarise("rtn", found, kurtosis, Bootstrap(draws=200)).languages[0]
    sums = found["en"]
    expected = np.mean([sums.cosine_distance[layer].sum() / sums.tokens.sum() for layer in range(LAYERS)])
    assert row.cosine_distance.estimate == pytest.approx(expected, rel=1e-6)
    error = (sums.squared_error[-1].sum() / sums.squared_norm[-1].sum()) ** 0.5
    assert row.last_relative_error.estimate == pytest.approx(error, rel=1e-6)
    added = sums.added.sum(1)
    assert row.effective_kurtosis == pytest.approx((3 * added[0] + 6 * added[2]) / added.sum(), rel=1e-6)
    assert row.by_sentence.tokens == tuple(sums.tokens.astype(int))


def test_values_are_taken_from_every_column() -> None:
    grid = np.tile(np.arange(32.0), 64)
    assert set(spread(grid, 128, 32)) == set(range(32))
    assert len(spread(grid, 128, 32)) <= 128
