"""Greedy decoding over a static cache gives the tokens of Transformers' `generate`, with and without recorded steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

from quant_fairness_plugin.serve import decode
from quant_fairness_plugin.serve.decode import EAGER_STEPS, Step, greedy_tokens
from quant_fairness_plugin.serve.generate import generate_text, load_tokenizer
from quant_fairness_plugin.serve.load import load_quantized
from tests.serve.conftest import Served
from tests.tiny import FAMILIES

PROMPT = torch.tensor([[5, 9, 2, 77, 30]])
NEVER: frozenset[int] = frozenset()


def expected(model: Any, new: int) -> list[int]:
    out = model.generate(PROMPT, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    return [int(token) for token in out[0, PROMPT.shape[1] :]]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers(served: Served, family: str) -> None:
    model = load_quantized(served(family), kernel="reference")
    # Transformers forbids the end of the text until `min_new_tokens`; elsewhere these models do not choose it.
    wanted = expected(model, 12)
    found = list(greedy_tokens(model, PROMPT, max_new_tokens=12, stops=NEVER))
    assert found == wanted


def test_tokens_of_the_cpu_path_with_shared_launches(served: Served) -> None:
    model = load_quantized(served("llama"), kernel="cpu", fuse=True)
    assert list(greedy_tokens(model, PROMPT, max_new_tokens=9, stops=NEVER)) == expected(model, 9)


class Recorder:
    """What a CUDA graph does: recording runs nothing, every replay runs the step."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, step: Step) -> Step:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            step()

        return replay


def test_a_step_is_recorded_once_and_replayed_for_all_further_tokens(served: Served) -> None:
    model, recorder = load_quantized(served("llama"), kernel="reference"), Recorder()
    found = list(greedy_tokens(model, PROMPT, max_new_tokens=12, stops=NEVER, record=recorder))
    assert found == expected(model, 12)
    assert (recorder.recorded, recorder.replayed) == (1, 12 - 1 - EAGER_STEPS)


def test_a_step_reads_and_writes_the_same_memory(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph replays with the addresses that it was recorded with: keys, values, length and token."""
    seen: list[tuple[int, ...]] = []
    caches: list[StaticCache] = []
    monkeypatch.setattr(decode, "StaticCache", lambda **named: caches.append(StaticCache(**named)) or caches[-1])  # type: ignore[func-returns-value]
    model: Any = load_quantized(served("llama"), kernel="reference")
    model.register_forward_pre_hook(
        lambda module, args, named: seen.append((named["input_ids"].data_ptr(), *addresses(caches[-1]))),
        with_kwargs=True,
    )
    list(greedy_tokens(model, PROMPT, max_new_tokens=6, stops=NEVER))
    assert len(seen) == 6
    assert len(set(seen[1:])) == 1


def addresses(cache: StaticCache) -> tuple[int, ...]:
    layers: list[Any] = [layer for layer in cache.layers if layer.is_initialized]
    return tuple(t.data_ptr() for layer in layers for t in (layer.keys, layer.values, layer.cumulative_length))


def test_a_stop_ends_the_text_and_is_yielded(served: Served) -> None:
    model = load_quantized(served("gpt2"), kernel="reference")
    wanted = expected(model, 8)
    stop = wanted[4]
    found = list(greedy_tokens(model, PROMPT, max_new_tokens=8, stops=frozenset({stop})))
    assert found == wanted[: wanted.index(stop) + 1]


def test_a_step_that_cannot_be_recorded_goes_on_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(graph: object) -> Any:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr("torch.cuda.CUDAGraph", object)
    monkeypatch.setattr("torch.cuda.graph", refuse)
    step: Callable[[], None] = lambda: None  # noqa: E731
    assert decode.cuda_graph(step) is step
    assert (
        "without CUDA graphs, which this model's step cannot be recorded in (operation not permitted when"
        in caplog.text
    )


def test_a_penalty_that_is_not_applied_is_said(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    folder: Path = served("llama")
    model: Any = load_quantized(folder, kernel="reference")
    model.generation_config.repetition_penalty = 1.5
    with caplog.at_level(logging.WARNING):
        generate_text(model, load_tokenizer(folder), "one", max_new_tokens=2)
    assert "repetition_penalty 1.5 is not applied" in caplog.text
