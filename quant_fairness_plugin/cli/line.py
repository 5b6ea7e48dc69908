"""The line of `run` and `quantize`: checked without torch, then opened, with its progress shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from quant_fairness_plugin.artifacts import ProtectionPlan
from quant_fairness_plugin.cli.options import Place
from quant_fairness_plugin.cli.progress import progress
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.preflight import ModelSource, preflight

if TYPE_CHECKING:
    from quant_fairness_plugin.fair_quantizer import FairQuantizer
    from quant_fairness_plugin.forecast.commands import Command


@contextmanager
def opened_line(
    command: Command,
    source: ModelSource,
    config: FairConfig,
    out: Path,
    *,
    plan: ProtectionPlan | None,
    overwrite: bool,
    place: Place,
) -> Iterator[FairQuantizer]:
    """Check what can be checked without torch, then load the model and yield the quantizer that works on it.

    Args:
        command: which of the two, to forecast its memory.
        source: the model.
        config: what the user has chosen.
        out: the folder that is to be written.
        plan: followed in place of the configuration's; None: the configuration's.
        overwrite: whether `out` may exist.
        place: where work is kept, and the memory that there is for it.
    """
    budget = place.bytes_
    checked = preflight(source, config, out=out, overwrite=overwrite)

    # Loads torch.
    from quant_fairness_plugin.fair_quantizer import FairQuantizer
    from quant_fairness_plugin.forecast.room import say_where_short
    from quant_fairness_plugin.quantize.workplace import Workplace

    say_where_short(command, *checked, config, budget=budget, trust_remote_code=source.trust_remote_code)
    with progress(place.kept) as tell:
        quantizer = FairQuantizer.from_source(
            source, config, checked=checked, progress=tell, place=Workplace(place.work, budget),
            stream=config.goes_in_blocks,
        )  # fmt: skip
        yield quantizer if plan is None else quantizer.following(plan)
