"""The time for a search: refused before the work where it does not hold the least of it."""

from __future__ import annotations

from quant_fairness_plugin.artifacts import TextSet, Undefined
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.forecast.search import forecast_search
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.sweep.sampling import LEAST_SENTENCES, SENTENCES, SearchTime


def check_time(loaded: LoadedModel, texts: TextSet, config: FairConfig, search: SearchTime, *, quantizes: bool) -> None:
    """Refuse a time that does not hold the least of a search, and note what scoring all sentences takes.

    Where the time of the least is not known beforehand, as on a GPU, nothing is refused.

    Args:
        loaded: the model.
        texts: the whole text set.
        config: how the search is made.
        search: the time that there is; it gets the forecast.
        quantizes: whether the model is quantized first, for the errors that are scored.

    Raises:
        ConfigError: says the time that is needed.
    """
    found = forecast_search(loaded, texts, config)
    wanted = config.sentences or SENTENCES
    whole = found.scored(wanted)
    search.whole_pass = None if isinstance(whole, Undefined) else whole.high
    needed = found.least(min(wanted, LEAST_SENTENCES), quantizes=quantizes)
    if isinstance(needed, Undefined):
        return
    # Between the two ends of the forecast it may fit, and what then does not is said with the plan.
    seconds = (needed.low + needed.high) / 2
    if seconds > search.left:
        first = "quantizing once and scoring" if quantizes else "scoring"
        raise ConfigError(
            f"time {search.text} is too short: {first} {min(wanted, LEAST_SENTENCES)} sentences a language takes about "
            f"{seconds:.0f} s here ({needed.low:.0f} to {needed.high:.0f}); give more time, or fewer languages"
        )
