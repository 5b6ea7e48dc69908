"""How much each input channel of a linear module carries, over all languages: llama.cpp's importance matrix."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.calibration import CalibrationSet


@torch.no_grad()
def channel_importance(
    loaded: LoadedModel,
    modules: Collection[str],
    calibration: CalibrationSet,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Return the mean square of every input channel of linear modules of the 16-bit model, float32 `[cols]`.

    A language's channels are divided by their mean over channels before languages are added by their shares: one whose
    activations are larger would otherwise count for more, whatever its share.

    Args:
        loaded: the whole model; not changed.
        modules: full names.
        calibration: token rows, and how much each language counts.
        progress: called with (rows done, rows in all).

    Returns:
        Module → importance; the mean over channels is 1 where every language reaches the module.
    """
    total = {name: torch.zeros(()) for name in modules}
    count, done = sum(calibration.row_counts.values()), 0
    for language, rows in calibration.rows.items():
        sums: dict[str, Tensor] = {}
        with _watched(loaded.model, modules, sums):
            for row in rows:
                loaded.model.base_model(input_ids=torch.tensor([row], device=loaded.model.device), use_cache=False)
                done += 1
                if progress is not None:
                    progress(done, count)
        for name, squares in sums.items():
            mean = squares.mean()
            if mean > 0:
                total[name] = total[name] + calibration.shares[language] * squares / mean
    return {name: value.float().cpu() for name, value in total.items() if value.dim()}


@contextmanager
def _watched(model: nn.Module, modules: Collection[str], sums: dict[str, Tensor]) -> Iterator[None]:
    """Add the squares of what modules are given to `sums`, while the model runs."""

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_: nn.Module, positional: tuple[Any, ...]) -> None:
            squares = positional[0].detach().flatten(0, -2).double().square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return add

    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
