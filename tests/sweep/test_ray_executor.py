"""The same trials on a local Ray of two workers, one of which is killed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.load import from_loaded, load_model
from quant_fairness_plugin.plans.units import map_units
from quant_fairness_plugin.sweep.executors import LocalExecutor
from quant_fairness_plugin.sweep.make_executor import make_executor
from tests.sweep.trial_cases import FatalOnceBank, UnmakeableBank, sweep

ray = pytest.importorskip("ray", reason='Ray is not installed; pip install "quant-fairness[ray]" runs these tests')
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # Ray's own warnings are not ours to mend

Build = Callable[..., Path]
ROOT = Path(__file__).parents[2]


def test_what_a_worker_refuses_is_raised_here_and_a_cluster_of_our_own_ends(
    tiny_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the bank of the tests
    loaded = load_model(str(tiny_model("llama")))
    with pytest.raises(ConfigError, match="is in memory only"):
        sweep(from_loaded(loaded.model, loaded.tokenizer), None, make_executor("ray"))
    bank = UnmakeableBank(ConfigError("no such checkpoint on this machine"))
    with pytest.raises(ConfigError, match="no such checkpoint on this machine"):
        sweep(loaded, None, make_executor("ray", workers=1), bank)
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def _two_places() -> Iterator[None]:
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},  # for the bank of the tests
    )
    yield
    ray.shutdown()


@pytest.mark.usefixtures("_two_places")
def test_two_workers_of_which_one_is_killed_give_the_bits_of_the_local_sweep(
    tiny_model: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_model(str(tiny_model("llama")))
    expected = sweep(loaded, tmp_path / "local", LocalExecutor())
    marker = tmp_path / "killed"
    bank = FatalOnceBank(loaded, map_units(loaded), marker=marker)
    with caplog.at_level(logging.WARNING, logger="quant_fairness_plugin"):
        assert sweep(loaded, tmp_path / "ray", make_executor("ray"), bank) == expected
    assert marker.exists()
    assert "a worker was lost" in caplog.text
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.json")} for name in ("local", "ray")
    ]
    assert contents[0] == contents[1]
    assert ray.is_initialized(), "a cluster that was there before stays"
