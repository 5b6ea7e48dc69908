"""Greedy decoding over a cache of fixed size, one token at a time; on a GPU as replays of one CUDA graph.

A step reads the last token from one tensor and writes the next one into it, and the cache counts its own tokens, so a
step depends on nothing outside the GPU: it can be recorded once and replayed. The first steps run without a graph, for
Triton to compile the kernels; recording computes nothing, so no step is lost or done twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from quant_fairness_plugin.model.architectures import find_architecture

EAGER_STEPS = 2
"""Before recording. The first one compiles kernels; the second shows that nothing is left to compile."""
Step = Callable[[], None]
_logger = logging.getLogger(__name__)


def greedy_tokens(
    model: PreTrainedModel,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    stops: frozenset[int],
    record: Callable[[Step], Step] | None = None,
) -> Iterator[int]:
    """The likeliest tokens after a prompt, each as soon as it is known.

    The same as `model.generate(do_sample=False)` with a generation config that changes no logits.

    Args:
        model: in evaluation mode; a decoder-only one that takes `input_ids`, `past_key_values` and `use_cache`.
        prompt: `[1, tokens]` on the model's device.
        max_new_tokens: at least 1.
        stops: tokens that end the text; the one that does is yielded too.
        record: turns a step into one that is replayed; None is a CUDA graph on a GPU, and no recording elsewhere.

    Yields:
        Token ids.
    """
    cache = _cache(model, int(prompt.shape[1]) + max_new_tokens)
    run: Any = model
    last = torch.empty(1, 1, dtype=torch.long, device=prompt.device)

    def advance(tokens: Tensor) -> None:
        with torch.no_grad():
            logits = run(input_ids=tokens, past_key_values=cache, use_cache=True).logits
            last.copy_(logits[:, -1].argmax(-1, keepdim=True))

    if record is None and prompt.device.type == "cuda" and isinstance(cache, StaticCache):
        record = cuda_graph
    advance(prompt)
    step: Step = lambda: advance(last)  # noqa: E731
    for made in range(1, max_new_tokens + 1):
        token = int(last)
        yield token
        if token in stops or made == max_new_tokens:
            return
        if record is not None and made == EAGER_STEPS + 1:
            step = record(step)
        step()


def cuda_graph(step: Step) -> Step:
    """A CUDA graph of a step, whose replay launches all its kernels at once; the step itself where that fails."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as err:
        reason = " ".join(str(err).split())[:200]
        _logger.warning("decoding without CUDA graphs, which this model's step cannot be recorded in (%s)", reason)
        return step
    return graph.replay


def _cache(model: PreTrainedModel, tokens: int) -> Cache:
    architecture = find_architecture(str(model.config.model_type))
    if architecture is not None and not architecture.static_cache:
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=tokens)
