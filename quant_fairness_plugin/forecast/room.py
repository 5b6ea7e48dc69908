"""A word before the work where a limit of memory leaves less than the forecast. It refuses nothing.

What certainly is needed is refused by `model.limits`; a forecast can be off in both directions, and a run that would
fit must not be refused because of one.
"""

from __future__ import annotations

import logging
from pathlib import Path

from quant_fairness_plugin.artifacts import TextSet
from quant_fairness_plugin.checkpoint.readers import takes_one_group_size
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import QuantFairnessError
from quant_fairness_plugin.forecast.commands import Command, CommandMemory
from quant_fairness_plugin.forecast.job import memory_job, tokenize_parts
from quant_fairness_plugin.model.devices import find_device
from quant_fairness_plugin.model.limits import Room, resident, rooms
from quant_fairness_plugin.model.outline import outline_model
from quant_fairness_plugin.model.resolve import ModelFiles
from quant_fairness_plugin.model.sizes import shown

_logger = logging.getLogger(__name__)
AMPLE, AMPLE_BYTES = 8, 4_000_000_000
"""A limit that leaves so many times the weight files, and so much more, is not looked at: no command takes that."""


def say_where_short(
    command: Command,
    files: ModelFiles,
    texts: TextSet,
    config: FairConfig,
    *,
    budget: int | None,
    trust_remote_code: bool = False,
    root: Path = Path("/"),
) -> CommandMemory | None:
    """Warn where a limit leaves less than a command on a CPU is forecast to take; returns the forecast that was made.

    Args:
        command: what is about to begin.
        files: the model's files.
        texts: the whole text set.
        config: of the command.
        budget: the memory budget in bytes.
        trust_remote_code: as in `forecast`.
        root: where `proc` and `sys` are.
    """
    if not files.weights or files.weights[0].suffix != ".safetensors":
        return None
    stored = sum(path.stat().st_size for path in files.weights)
    least = min((room for room in rooms(root) if room.counts != "addresses"), key=lambda room: room.bytes_)
    if least.bytes_ > AMPLE * stored + AMPLE_BYTES:
        return None
    try:
        if not str(find_device(config.device)).startswith("cpu"):
            return None
        outline = outline_model(files, trust_remote_code=trust_remote_code)
        fitted = config.fitted(outline, uniform=takes_one_group_size(config.format, config.reader))
        tokenized = tokenize_parts(files, outline, texts, trust_remote_code=trust_remote_code)
        found = memory_job(files, outline, fitted, texts, tokenized, budget=budget).memory(command)
    except QuantFairnessError:
        return None  # the command itself says what is wrong
    _say(found, least, held=resident(root))
    return found


def _say(found: CommandMemory, room: Room, *, held: int) -> None:
    if found.peak - held > room.bytes_:
        _logger.warning(
            "%s is forecast to take %s of memory at its stage %r, libraries included, and %s leaves %s beside what "
            "this process holds: it may end for lack of memory%s",
            found.command, shown(found.peak), found.largest.name, room.limit, shown(max(0, room.bytes_)),
            "; read the model block by block with --memory-budget" if found.whole else "",
        )  # fmt: skip
