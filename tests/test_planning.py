"""Plans of `auto` on a mixture of experts, whose units have menus of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from quant_fairness_plugin import planning
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.fair_quantizer import FairQuantizer
from quant_fairness_plugin.model.load import from_loaded
from quant_fairness_plugin.preflight import ModelSource
from quant_fairness_plugin.quantize.workplace import Workplace
from tests.planted_model import PLANTED_LAYER, write_planted_mixture
from tests.tiny import byte_tokenizer
from tests.traced import traced_model


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture") / "planted"
    write_planted_mixture(folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # the model's own code warns
def test_layers_that_share_more_than_a_hidden_state_are_refused_before_the_work() -> None:
    loaded = from_loaded(traced_model("gemma4_text"), byte_tokenizer())
    with pytest.raises(UnsupportedModelError, match="keys and values from earlier ones.*Name the layers to protect"):
        planning.check_scorable(loaded)


def test_experts_are_scored_and_get_what_readers_take(mixture: Path, planted_file: str, tmp_path: Path) -> None:
    """Experts in 8 bits would be the cheapest remedy, which no reader takes: the planted ones keep 16 bit."""
    config = FairConfig(texts=planted_file, group_size=32, max_overhead=0.35, prompts="none")
    plans = []
    for place in (None, Workplace(memory_budget=1 << 26)):
        quantizer = FairQuantizer.from_source(ModelSource(str(mixture)), config, place=place)
        plans.append(quantizer.recommend())
    assert plans[0].overrides == plans[1].overrides
    assert plans[0].overrides[f"layers.{PLANTED_LAYER}.experts"] == "fp16"
    experts = {kind for unit, kind in plans[0].overrides.items() if unit.endswith(".experts")}
    assert experts == {"fp16"}
    record = quantizer.save_pretrained(tmp_path / "out")
    assert record.measurement is not None
    assert record.reader_run is not None
