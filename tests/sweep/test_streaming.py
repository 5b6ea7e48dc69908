"""Layers outside, batches inside: the same scores as with the whole model in memory, from one block at a time."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Bootstrap, Grid, Precision, StateScores
from quant_fairness_plugin.errors import ArtifactError, ConfigError, ResourceError
from quant_fairness_plugin.model import stacks as stacks_module
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.model.streamed import StreamedModel, open_streamed
from quant_fairness_plugin.plans.units import map_units
from quant_fairness_plugin.sweep.bank import RtnBank
from quant_fairness_plugin.sweep.config import SweepConfig
from quant_fairness_plugin.sweep.engine import sweep_units
from quant_fairness_plugin.sweep.execution import Execution
from quant_fairness_plugin.sweep.executors import LocalExecutor
from quant_fairness_plugin.sweep.streaming import score_plans_layerwise, sweep_needs
from quant_fairness_plugin.sweep.walk import plan_tree, score_plans
from tests.sweep.streamed_cases import (
    BATCH_TOKENS,
    EVERYTHING,
    GRID,
    LAYERS,
    PLANS,
    PLENTY,
    WIDTH,
    streamed_scores,
    texts,
)
from tests.tiny import FAMILIES

Build = Callable[..., Path]
Scores = Mapping[str, StateScores]
ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5
"""Nats per token: the difference that float32 additions in another order can make over three blocks."""


def whole_scores(folder: Path, plans: Mapping[str, Mapping[str, Precision]] = PLANS) -> dict[str, StateScores]:
    loaded = load_model(str(folder))
    units = map_units(loaded)
    bank = RtnBank(loaded, units, GRID)
    return score_plans(loaded, plans, texts(), units=units, bank=bank, batch_tokens=BATCH_TOKENS)


def assert_close(found: Scores, expected: Scores) -> None:
    assert found.keys() == expected.keys()
    for name, scores in expected.items():
        for language, own in scores.languages.items():
            ours = found[name].languages[language]
            assert (ours.tokens, ours.bytes_) == (own.tokens, own.bytes_)
            pairs = zip(ours.nll_nats + ours.kl_nats, own.nll_nats + own.kl_nats, own.tokens * 2, strict=True)
            for a, b, tokens in pairs:
                assert abs(a - b) <= TOLERANCE * tokens, (name, language)


@pytest.fixture(scope="module")
def folder(tiny_model: Build) -> Path:
    return tiny_model("llama", layers=LAYERS, width=WIDTH)


@pytest.fixture
def loaded(folder: Path) -> StreamedModel:
    return open_streamed(str(folder))


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, StateScores]:
    return streamed_scores(open_streamed(str(folder)))


def least(loaded: LoadedModel) -> int:
    """The smallest budget: nothing is left for hidden states."""
    units = map_units(loaded)
    return sweep_needs(loaded, plan_tree(PLANS, units), units, 1024).least


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that were read."""
    layers: list[int] = []
    plain = StreamedModel.fetch

    def watched(self: StreamedModel, layer: int) -> dict[str, Tensor]:
        layers.append(layer)
        return plain(self, layer)

    monkeypatch.setattr(StreamedModel, "fetch", watched)
    return layers


# The same numbers


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_scores_as_with_the_whole_model_in_memory(tiny_model: Build, family: str) -> None:
    folder = tiny_model(family, layers=LAYERS, width=WIDTH)
    loaded = open_streamed(str(folder))
    units = map_units(loaded)
    vectors = {f"layers.2.{kind}" for kind in ("biases", "norms")} & units.parameters.keys()
    around = {unit for unit in ("embeddings", "positions", "final_norm") if unit in units.parameters}
    plans: dict[str, Mapping[str, Precision]] = {
        **PLANS,
        "one unit": {f"layers.1.{units.groups[-1]}": "int3"},
        "vectors": dict.fromkeys(sorted(vectors), "int4"),
        "around": dict.fromkeys(sorted(around), "int4"),
        "head": {"head": "int3", "layers.0": "int3"},
    }
    found = streamed_scores(loaded, plans=plans)
    assert_close(found, whole_scores(folder, plans))
    assert {kl for scores in found["16 bit"].languages.values() for kl in scores.kl_nats} == {0.0}


def test_one_batch_with_one_long_sentence_is_enough(loaded: StreamedModel, folder: Path) -> None:
    one = texts().take([0]).choose(["en"])
    units = map_units(loaded)
    bank = RtnBank(loaded, units, GRID, keep=False)
    execution = Execution(memory_budget=PLENTY)
    found = score_plans_layerwise(loaded, PLANS, one, units=units, bank=bank, execution=execution)
    whole = load_model(str(folder))
    assert_close(found, score_plans(whole, PLANS, one, units=units, bank=RtnBank(whole, units, GRID)))


def test_a_model_in_memory_can_be_swept_the_same_way(folder: Path, expected: Scores) -> None:
    assert streamed_scores(load_model(str(folder))) == expected


def test_a_whole_sweep_is_the_same_report(planted_model: Path) -> None:
    config, options = SweepConfig(granularity="unit"), {"grid": Grid(bits=3, group_size=32)}
    bootstrap, streamed = Bootstrap(draws=200), open_streamed(str(planted_model))
    whole = sweep_units(load_model(str(planted_model)), texts(), config, bootstrap=bootstrap, **options)
    execution = Execution(memory_budget=PLENTY)
    ours = sweep_units(streamed, texts(), config, bootstrap=bootstrap, execution=execution, **options)
    assert_close(ours.scores, whole.scores)
    assert ours.layer_bytes == whole.layer_bytes
    assert ours.provenance == whole.provenance


# One block at a time


class CountingBank(RtnBank):
    """Notes what it is asked for."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded, map_units(loaded), GRID, keep=False)
        self.asked = Counter[tuple[str, Precision]]()
        self.layers_held: list[set[str]] = []
        self._given: list[tuple[str, weakref.ref[Tensor]]] = []

    def weights(self, unit: str, precision: Precision) -> dict[str, Tensor]:
        self.asked[unit, precision] += 1
        made = super().weights(unit, precision)
        self._given += [(unit.split(".")[1], weakref.ref(value)) for value in made.values()]
        self.layers_held.append({layer for layer, value in self._given if value() is not None})
        return made


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_block_is_read_once_and_rounded_once_in_each_precision(
    loaded: StreamedModel, fetched: list[int], expected: Scores, prefetch: bool
) -> None:
    fetched.clear()
    bank = CountingBank(loaded)
    assert streamed_scores(loaded, bank=bank, prefetch=prefetch) == expected
    assert fetched == [0, 1, 2]
    assert set(bank.asked.values()) == {1}
    assert {precision for unit, precision in bank.asked if unit.startswith("layers.0")} == {"int3", "int8"}
    assert {len(layers) for layers in bank.layers_held} == {1}


def test_never_is_more_than_one_block_in_memory(loaded: StreamedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[int] = []
    plain = StreamedModel.resident

    @contextmanager
    def watched(self: StreamedModel, layer: int, given: dict[str, Tensor] | None = None) -> Iterator[None]:
        with plain(self, layer, given):
            full = [
                i for i in range(LAYERS) if all(any(p.stride()) and not p.is_meta for p in self.block(i).parameters())
            ]
            inside.extend(full)
            yield

    monkeypatch.setattr(StreamedModel, "resident", watched)
    streamed_scores(loaded)
    assert inside == [0, 1, 2]


@pytest.mark.parametrize("prefetch", [True, False])
def test_the_next_block_is_read_while_one_is_run(
    loaded: StreamedModel, monkeypatch: pytest.MonkeyPatch, prefetch: bool
) -> None:
    plain, begun = StreamedModel.fetch, threading.Event()

    def watched(self: StreamedModel, layer: int) -> dict[str, Tensor]:
        if layer == 1:
            begun.set()
        return plain(self, layer)

    monkeypatch.setattr(StreamedModel, "fetch", watched)
    seen: list[bool] = []
    streamed_scores(loaded, prefetch=prefetch, progress=lambda *_: seen.append(begun.wait(20 if prefetch else 0)))
    assert seen[0] == prefetch  # after the first batch in layer 0
    assert seen[-1]


def test_an_error_of_the_reading_thread_is_the_sweeps(loaded: StreamedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = StreamedModel.fetch

    def broken(self: StreamedModel, layer: int) -> dict[str, Tensor]:
        if layer == 2:
            raise ArtifactError("the disk is gone")
        return plain(self, layer)

    monkeypatch.setattr(StreamedModel, "fetch", broken)
    with pytest.raises(ArtifactError, match="the disk is gone"):
        streamed_scores(loaded)
    assert all(p.is_meta or not any(p.stride()) for i in range(LAYERS) for p in loaded.block(i).parameters())


def test_progress_ends_where_it_should(loaded: StreamedModel) -> None:
    seen: list[tuple[int, int]] = []
    streamed_scores(loaded, progress=lambda *step: seen.append(step))
    assert seen[-1][0] == seen[-1][1] == max(done for done, _ in seen)
    assert seen == sorted(seen)
    assert seen[-1][1] % plan_tree(PLANS, map_units(loaded)).block_passes == 0


# Memory


def test_states_that_do_not_fit_are_spilled_and_change_nothing(
    loaded: StreamedModel, expected: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    most: list[int] = []

    def note(*_: int) -> None:
        most.append(sum(path.stat().st_size for path in tmp_path.rglob("*.stack")))

    assert streamed_scores(loaded, budget=PLENTY, progress=note) == expected
    assert max(most) == 0
    assert streamed_scores(loaded, budget=least(loaded), progress=note) == expected
    everything = max(most)
    assert everything > 0
    most.clear()
    assert streamed_scores(loaded, budget=least(loaded) + everything // 2, progress=note) == expected
    assert 0 < max(most) < everything
    assert list(tmp_path.iterdir()) == []


def test_spilled_states_that_lost_their_end_are_not_filled_up(
    loaded: StreamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def cut(*_: int) -> None:
        for path in tmp_path.rglob("*.stack"):
            path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(ResourceError, match="shorter than it was written"):
        streamed_scores(loaded, budget=least(loaded), progress=cut)


def test_a_budget_that_is_too_small_is_refused_before_a_block_is_read(
    loaded: StreamedModel, fetched: list[int]
) -> None:
    with pytest.raises(ResourceError, match=r"memory budget .* need .*; raise the budget to that or more"):
        streamed_scores(loaded, budget=least(loaded) - 1)
    assert fetched == []


def test_quantized_tables_need_more(loaded: StreamedModel) -> None:
    units = map_units(loaded)
    plain, tables = (
        sweep_needs(loaded, plan_tree(plans, units), units, 10**6).least
        for plans in (PLANS, PLANS | {"head": {"head": "int4", "embeddings": "int4"}})
    )
    assert tables == plain  # tiny: running a block takes more
    widened = sweep_needs(loaded, plan_tree({"head": {"head": "int4"}}, units), units, 1)
    assert widened.work >= 20 * 264 * WIDTH


def test_a_streamed_model_is_not_swept_without_a_budget_nor_by_an_executor(loaded: StreamedModel) -> None:
    with pytest.raises(ConfigError, match=r"block by block and no memory budget is given"):
        sweep_units(loaded, texts(), grid=GRID)
    with pytest.raises(ConfigError, match="a memory budget and an executor do not go together"):
        Execution(memory_budget=PLENTY, executor=LocalExecutor())


# Interruption


class StopError(Exception):
    """Ends a sweep in the middle."""


def stopped_after(loaded: StreamedModel, work: Path, passes: int) -> None:
    def stop(done: int, total: int) -> None:
        if done >= passes:
            raise StopError

    with pytest.raises(StopError):
        streamed_scores(loaded, work=work, progress=stop)


@pytest.mark.parametrize("budget", ["plenty", "least"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 1.0])
def test_an_interrupted_sweep_goes_on_and_ends_with_the_same_bits(
    loaded: StreamedModel, expected: Scores, fetched: list[int], tmp_path: Path, share: float, budget: str
) -> None:
    steps: list[tuple[int, int]] = []
    streamed_scores(loaded, progress=lambda *step: steps.append(step))
    total = steps[-1][1]
    stopped_after(loaded, tmp_path, max(1, round(share * total)))
    fetched.clear()
    again: list[int] = []
    size = PLENTY if budget == "plenty" else least(loaded)
    found = streamed_scores(loaded, work=tmp_path, budget=size, progress=lambda done, _: again.append(done))
    assert found == expected
    assert again[0] >= round(share * total)
    assert again[-1] == total
    assert (0 in fetched) == (share < 0.3)


def test_a_finished_sweep_reads_no_block_and_keeps_no_states(
    loaded: StreamedModel, expected: Scores, fetched: list[int], tmp_path: Path
) -> None:
    assert streamed_scores(loaded, work=tmp_path) == expected
    assert list(tmp_path.glob("*.stack")) == []
    fetched.clear()
    assert streamed_scores(loaded, work=tmp_path) == expected
    assert fetched == []


def test_states_of_a_sweep_that_was_stopped_after_its_last_scores_are_removed(
    loaded: StreamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(stacks: stacks_module.Stacks, batch: int) -> None:
        raise StopError

    with monkeypatch.context() as patched:
        patched.setattr(stacks_module.Stacks, "drop", stop)
        with pytest.raises(StopError):
            streamed_scores(loaded, work=tmp_path)
    assert list(tmp_path.glob("*.stack"))
    streamed_scores(loaded, work=tmp_path)
    assert not [*tmp_path.glob("*.stack"), *tmp_path.glob("*.index.json")]


def test_a_killed_process_leaves_nothing_that_changes_a_bit(
    loaded: StreamedModel, folder: Path, expected: Scores, tmp_path: Path
) -> None:
    # A process of its own: one that is forked from this one would wait for threads of torch that it has not got.
    command: list[str | Path] = [sys.executable, "-m", "tests.sweep.streamed_cases", folder, tmp_path]
    died = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert len(list(tmp_path.glob("*-2.stack"))) == 1
    assert streamed_scores(loaded, work=tmp_path) == expected


@pytest.mark.parametrize("damage", ["cut", "altered", "gone", "no index", "other index"])
def test_a_torn_file_is_computed_again(
    loaded: StreamedModel, expected: Scores, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    stopped_after(loaded, tmp_path, 20)
    path = sorted(tmp_path.glob("*.stack"))[0]
    index = next(path.parent.glob(f"{path.stem.rpartition('-')[0]}.index.json"))
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:-1])
        case "altered":
            content = bytearray(path.read_bytes())
            content[100] ^= 1
            path.write_bytes(content)
        case "gone":
            path.unlink()
        case "no index":
            index.unlink()
        case "other index":
            index.write_text('{"stage": "x"}')
    assert streamed_scores(loaded, work=tmp_path) == expected
    assert ("run again from the beginning" in caplog.text) == (damage in {"cut", "altered", "other index"})


def test_other_plans_and_texts_do_not_take_each_others_states(
    loaded: StreamedModel, folder: Path, expected: Scores, tmp_path: Path
) -> None:
    stopped_after(loaded, tmp_path, 20)
    other = {"none": PLANS["mixed"]}
    assert_close(streamed_scores(loaded, plans=other, work=tmp_path), whole_scores(folder, other))
    assert streamed_scores(loaded, work=tmp_path, batch_tokens=BATCH_TOKENS - 100).keys() == expected.keys()
    assert streamed_scores(loaded, work=tmp_path) == expected


def test_a_work_folder_that_cannot_be_used_is_refused(loaded: StreamedModel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file: not a folder"):
        streamed_scores(loaded, work=tmp_path / "file")
    with pytest.raises(ResourceError, match="below: cannot be used"):
        streamed_scores(loaded, work=tmp_path / "file" / "below")


def test_a_full_disk_is_named(
    loaded: StreamedModel, expected: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, node: int, values: Tensor) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(stacks_module._Writer, "put", full)
        with pytest.raises(ResourceError, match=r"hidden states cannot be written \(No space left on device\)"):
            streamed_scores(loaded, work=tmp_path)
    assert streamed_scores(loaded, work=tmp_path) == expected


def test_a_plan_that_predicts_nan_is_named(loaded: StreamedModel) -> None:
    class Broken(RtnBank):
        def weights(self, unit: str, precision: Precision) -> dict[str, Tensor]:
            return {name: value * torch.inf for name, value in super().weights(unit, precision).items()}

    bank = Broken(loaded, map_units(loaded), GRID, keep=False)
    with pytest.raises(ArtifactError, match="state 'none' predicts NaN or infinity"):
        streamed_scores(loaded, bank=bank, plans={"none": EVERYTHING})
