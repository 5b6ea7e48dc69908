"""The blocks of a model one after the other: each in memory while it runs, the next one read meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor

from quant_fairness_plugin.model.freed import return_free_pages, returned_when_freed
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.streamed import StreamedModel


@contextmanager
def block_feed(
    loaded: LoadedModel, layers: Sequence[int], *, prefetch: bool
) -> Iterator[Callable[[int], AbstractContextManager[None]]]:
    """Yield what makes one of these layers after the other resident; another thread reads the next one meanwhile.

    Args:
        loaded: the model.
        layers: in the order in which they will be run.
        prefetch: whether to read ahead.
    """
    if not isinstance(loaded, StreamedModel):
        yield lambda layer: nullcontext()
        return
    model, following = loaded, dict(zip(layers, layers[1:], strict=False))
    coming: dict[int, Future[dict[str, Tensor]]] = {}

    @contextmanager
    def resident(layer: int) -> Iterator[None]:
        fetched = coming.pop(layer).result() if layer in coming else None
        with model.resident(layer, fetched):
            if prefetch and layer in following:
                coming[following[layer]] = reader.submit(model.fetch, following[layer])
            yield
        return_free_pages()

    # With a budget there may be a limit of data, which counts what is free in the heap, given back or not.
    at_once = nullcontext() if model.memory_budget is None else returned_when_freed()
    with at_once, ThreadPoolExecutor(max_workers=1) as reader:
        yield resident


def block_in_memory(loaded: LoadedModel, layer: int) -> AbstractContextManager[None]:
    """Return a context in which a block has its parameters."""
    return loaded.resident(layer) if isinstance(loaded, StreamedModel) else nullcontext()
