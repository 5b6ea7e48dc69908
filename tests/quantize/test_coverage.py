from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from quant_fairness_plugin.artifacts import TextSet
from quant_fairness_plugin.artifacts.experts import ExpertCoverage
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.calibration import CalibrationSet, build_calibration
from quant_fairness_plugin.quantize.coverage import count_rows, expert_coverage, reach_experts
from tests.tiny import byte_tokenizer

Load = Callable[..., LoadedModel]


def naive_counts(loaded: LoadedModel, row: tuple[int, ...], layer: int) -> tuple[Counter[int], Counter[int]]:
    """Tokens and gate weights of one row, from the router's own output."""
    found: list[tuple[torch.Tensor, ...]] = []
    router = loaded.model.get_submodule(f"model.layers.{layer}.mlp.gate")
    handle = router.register_forward_hook(lambda _, __, output: found.append(output))
    with torch.no_grad():
        loaded.model(torch.tensor([row]))
    handle.remove()
    [(_, weights, chosen)] = found
    tokens, gates = Counter[int](), Counter[int]()
    for experts, shares in zip(chosen.tolist(), weights.tolist(), strict=True):
        for expert, share in zip(experts, shares, strict=True):
            tokens[expert] += 1
            gates[expert] += share
    return tokens, gates


def test_tokens_are_counted_where_the_router_sends_them(load: Load, rows: CalibrationSet) -> None:
    loaded = load("qwen3_moe", layers=3)
    some = (*rows.rows["en"], *rows.rows["he"])
    counts = count_rows(loaded, some)
    for number, row in enumerate(some):
        for layer in range(3):
            tokens, gates = naive_counts(loaded, row, layer)
            assert counts.tokens[number, layer].tolist() == [tokens[expert] for expert in range(4)]
            assert counts.gates[number, layer].tolist() == pytest.approx([gates[expert] for expert in range(4)])


def test_a_model_without_experts_has_no_coverage(load: Load, rows: CalibrationSet, texts: TextSet) -> None:
    assert expert_coverage(load("llama"), rows, texts) is None


def test_a_coverage_counts_calibration_and_the_part(load: Load, rows: CalibrationSet, texts: TextSet) -> None:
    loaded = load("mixtral")
    english = replace(rows, rows={"en": rows.rows["en"]})
    coverage = expert_coverage(loaded, english, texts, part="search")
    assert coverage is not None
    assert list(coverage.calibrated) == list(coverage.reached) == ["layers.0", "layers.1"]
    assert sum(coverage.calibrated["layers.1"]["en"]) == 2 * english.coverage["en"]
    assert set(coverage.calibrated["layers.0"]) == {"en"}
    assert set(coverage.reached["layers.0"]) == {"en", "he", "zh"}
    length = len("חיפוש בלבד.".encode()) + 1  # a token a byte, and BOS
    assert sum(coverage.reached["layers.0"]["he"]) == 2 * length
    assert sum(coverage.gates["layers.1"]["zh"]) == pytest.approx(1, abs=1e-4)
    assert coverage.use("he", "layers.0").few_own == coverage.use("he", "layers.0").used


def coverage() -> ExpertCoverage:
    """Two layers of four experts; Hebrew uses two experts of layer 3 that calibration hardly reaches."""
    return ExpertCoverage(
        experts=4,
        calibrated={
            "layers.2": {"en": (90, 90, 90, 90), "he": (64, 64, 63, 0)},
            "layers.3": {"en": (200, 40, 0, 100), "he": (0, 23, 10, 100)},
        },
        reached={
            "layers.2": {"en": (9, 9, 9, 9), "he": (2, 2, 2, 0)},
            "layers.3": {"en": (9, 0, 0, 9), "he": (0, 5, 5, 2)},
        },
        gates={
            "layers.2": {"en": (0.25, 0.25, 0.25, 0.25), "he": (0.5, 0.25, 0.25, 0.0)},
            "layers.3": {"en": (0.5, 0.0, 0.0, 0.5), "he": (0.0, 0.5, 0.25, 0.25)},
        },
        part="confirm",
    )


def test_the_worst_layer_of_a_language_is_said_in_words() -> None:
    found = coverage()
    use = found.worst("he")
    assert (use.layer, use.used, use.few, use.few_own) == ("layers.3", 3, 2, 2)
    assert use.gates_few == pytest.approx(0.75)
    assert use.entropy == pytest.approx(1.5)
    assert found.use("he", "layers.2").few_own == 1
    english, hebrew = found.lines()
    assert english == "en: calibration reached every expert that it uses with 64 of its own tokens or more"
    assert hebrew == (
        "he uses 3 of 4 experts of layer 3; calibration reached 2 of them with fewer than 64 tokens (75% of its gate "
        "weights), 2 with fewer than 64 of its own (75%)"
    )


def greedy(counts: torch.Tensor, missing: torch.Tensor) -> list[int]:
    """Numbers of the rows that are added, one after another, by loops."""
    taken: list[int] = []

    def gain(number: int) -> int:
        pairs = zip(counts[number].flatten().tolist(), missing.flatten().tolist(), strict=True)
        return 0 if number in taken else sum(min(pair) for pair in pairs)

    while True:
        gains = [gain(number) for number in range(len(counts))]
        if max(gains) == 0:
            return taken
        taken.append(gains.index(max(gains)))
        missing = (missing - counts[taken[-1]]).clamp(min=0)


def test_rows_are_added_until_every_expert_has_enough(load: Load, texts: TextSet) -> None:
    loaded, enough = load("qwen3_moe"), 40
    build = partial(build_calibration, byte_tokenizer(), texts, row_tokens=12)
    calibration, whole = build(tokens_per_language=24), build(weighting="proportional")

    def totals(some: CalibrationSet) -> torch.Tensor:
        return count_rows(loaded, [row for rows in some.rows.values() for row in rows]).tokens.sum(0)

    found = reach_experts(loaded, calibration, whole, enough=enough)
    spare = [(name, row) for name in calibration.rows for row in whole.rows[name][2:]]
    missing = (enough - totals(calibration)).clamp(min=0)
    assert missing.sum() > 0
    taken = greedy(count_rows(loaded, [row for _, row in spare]).tokens, missing)
    added = [spare[number] for number in taken]
    for name, rows in calibration.rows.items():
        assert list(found.rows[name]) == [*rows, *(row for language, row in added if language == name)]
    assert found.shares == calibration.shares
    assert bool(((totals(found) >= enough) | (totals(found) == totals(whole))).all())
    assert len(taken) < len(spare)
    some, all_of_it = replace(calibration, sentences="c29tZXM="), replace(whole, sentences="d2hvbGVz")
    assert reach_experts(loaded, some, all_of_it, enough=enough).sentences == all_of_it.sentences
    as_it_was = reach_experts(loaded, some, all_of_it, enough=1)
    assert (as_it_was.rows, as_it_was.sentences) == (calibration.rows, some.sentences)


def test_a_dense_model_has_no_experts_to_reach(load: Load, rows: CalibrationSet) -> None:
    with pytest.raises(ConfigError, match="tokens_per_expert 9: the model has 0 layers with experts"):
        reach_experts(load("llama"), rows, rows, enough=9)
