"""Memory of whole commands: what it follows from, that it counts what the code holds, and what is said of a limit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quant_fairness_plugin.checkpoint.in_blocks import HEAD_ROWS
from quant_fairness_plugin.checkpoint.readers.compare import ROW_TOKENS as READER_ROW
from quant_fairness_plugin.config import make_config
from quant_fairness_plugin.forecast import commands
from quant_fairness_plugin.forecast.commands import CommandMemory, key_values
from quant_fairness_plugin.forecast.job import memory_job, tokenize_parts
from quant_fairness_plugin.forecast.room import say_where_short
from quant_fairness_plugin.measure import layers
from quant_fairness_plugin.model.activations import ROW_TOKENS as SERVED_ROW
from quant_fairness_plugin.model.outline import outline_model
from quant_fairness_plugin.model.resolve import resolve_model
from quant_fairness_plugin.quantize.stream import BATCH_TOKENS
from quant_fairness_plugin.quantize.workplace import ROWS_IN_MEMORY
from quant_fairness_plugin.steps import answers
from quant_fairness_plugin.sweep import backward
from tests.planted_model import planted_texts

Build = Callable[..., Path]
WARNED = "it may end for lack of memory"


def remembered(folder: Path, command: commands.Command, *, budget: int | None = None, **options: Any) -> CommandMemory:
    files = resolve_model(str(folder))
    config = make_config(**{"group_size": 32, "protect_layers": "none"} | options)
    outline, texts = outline_model(files), planted_texts()
    tokenized = tokenize_parts(files, outline, texts, trust_remote_code=False)
    return memory_job(files, outline, config, texts, tokenized, budget=budget).memory(command)


def test_what_is_counted_is_what_the_code_holds() -> None:
    assert commands.ROWS_IN_MEMORY == ROWS_IN_MEMORY
    assert (commands.MEASURED_IN_MEMORY, commands.BUDGET_SHARE) == (layers.STATES_IN_MEMORY, layers.BUDGET_SHARE)
    assert commands.CALIBRATION_TOKENS == BATCH_TOKENS
    assert (commands.SERVED_TOKENS, commands.SERVED_ROWS) == (SERVED_ROW, HEAD_ROWS)
    assert commands.READER_TOKENS == READER_ROW
    assert commands.ANSWERS_SHARE == answers.BUDGET_SHARE
    assert (commands.GRAPH_TOKENS, commands.LABEL_VALUES) == (backward.BATCH_TOKENS, backward.HEAD_VALUES)


def test_the_peak_is_that_of_the_largest_stage(tiny_model: Build) -> None:
    found = remembered(tiny_model("llama"), "run", protect_layers="auto")
    assert found.peak == found.libraries + max(stage.bytes_ for stage in found.stages)
    names = [stage.name for stage in found.stages]
    assert names == ["solve", "score", "try plans", "verify", "reader", "page", "measure", "prompts"]
    assert [stage.name for stage in remembered(tiny_model("llama"), "measure").stages] == ["measure", "prompts"]


def test_blocks_in_files_cost_nothing_and_in_memory_their_weights(tiny_model: Build) -> None:
    two, four = (tiny_model("llama", layers=count) for count in (2, 4))
    solving = [stage(remembered(folder, "quantize"), "solve") for folder in (two, four)]
    assert solving[0] == solving[1]
    swept: dict[str, Any] = {"protect_layers": "auto", "exhaustive": True}
    whole, parameters = remembered(two, "quantize", **swept), outline_model(resolve_model(str(two))).parameters
    assert whole.whole
    assert stage(whole, "solve") == solving[0] + 4 * parameters
    assert not remembered(two, "quantize", budget=1 << 30, **swept).whole


def test_a_budget_leaves_out_what_would_hold_more(tiny_model: Build) -> None:
    folder = tiny_model("llama")
    assert stage(remembered(folder, "quantize"), "reader") > 0
    tight = remembered(folder, "quantize", budget=1000)
    assert (stage(tight, "reader"), stage(tight, "prompts")) == (0, 0)


def test_shared_heads_remember_less(tiny_model: Build) -> None:
    outline = outline_model(resolve_model(str(tiny_model("llama"))))
    assert key_values(outline, {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 24}) == 48
    assert key_values(outline, {"num_attention_heads": 4, "num_key_value_heads": 2}) == outline.width
    assert key_values(outline, {}) == 2 * outline.width


def test_a_limit_below_the_forecast_is_named_and_refuses_nothing(
    tiny_model: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files, config = resolve_model(str(tiny_model("llama"))), make_config(group_size=32, protect_layers="none")

    def said(left: int) -> str:
        group = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.current": "0\n"}
        for name, content in (group | {"sys/fs/cgroup/memory.max": f"{left}\n"}).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = say_where_short("measure", files, planted_texts(), config, budget=None, root=tmp_path)
        assert (found is None) == (left > commands.LIBRARIES * 10)
        return caplog.text

    assert WARNED in said(1 << 20)
    assert "measure is forecast to take" in said(1 << 20)
    assert WARNED not in said(2 * commands.LIBRARIES)
    assert WARNED not in said(100 * commands.LIBRARIES)  # ample: nothing is forecast


def stage(found: CommandMemory, name: str) -> int:
    return next(one.bytes_ for one in found.stages if one.name == name)
