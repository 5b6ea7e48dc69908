"""The seeds' figures by one-line rules: `Q3: 0 11 | series | D3` is INT4 but for two layers, on their two sentences.

Figures: a disparity by its name (`seeds.disparity`), `degradation.he` (percent change of perplexity), or `layers`, the
three that the seeds' sweep recommends. Rules are those of `seeds.rules`, texts those of `seeds.texts`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from quant_fairness_plugin.artifacts import Undefined
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.metrics import percent_change
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.seeds.disparity import disparity, perplexities
from quant_fairness_plugin.seeds.rules import read_rule
from quant_fairness_plugin.seeds.simulation import simulate, undo_simulation
from quant_fairness_plugin.seeds.sweeps import quick_sweep
from quant_fairness_plugin.seeds.texts import LEDGER_TEXTS

SWEEP = "sweep"
Figure = float | list[int] | Undefined


@dataclass(slots=True)
class LegacyFigures:
    """Makes figures of one model, each simulation once. The model is bit-identical after every one."""

    loaded: LoadedModel
    _before: dict[str, dict[str, float]] = field(default_factory=dict)
    _changes: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)

    def figure(self, spec: str) -> Figure:
        """Return the figure that `RULE | TEXTS | FIGURE` names; undefined where the seeds' formula is.

        Raises:
            ConfigError: a spec, rule, text or figure that does not exist.
        """
        rule, texts, wanted = read_spec(spec)
        loaded = self.loaded
        if rule == SWEEP:
            return quick_sweep(loaded.model, loaded.tokenizer, LEDGER_TEXTS[texts], method="legacy")
        changes = self._degradations(loaded, rule, texts)
        infinite = [language for language, change in changes.items() if not math.isfinite(change)]
        if infinite:
            return Undefined(f"the perplexity of {', '.join(infinite)} is infinite in float32")
        name, dot, language = wanted.partition(".")
        return changes[language] if dot else disparity(name, changes)

    def _degradations(self, loaded: LoadedModel, rule: str, texts: str) -> Mapping[str, float]:
        sentences = LEDGER_TEXTS[texts]
        if texts not in self._before:
            self._before[texts] = perplexities(loaded.model, loaded.tokenizer, sentences)
        if (rule, texts) not in self._changes:
            before, recipe = self._before[texts], read_rule(rule, loaded.model)
            simulate(loaded.model, recipe.rule, keep_largest=recipe.keep_largest)
            try:
                after = perplexities(loaded.model, loaded.tokenizer, sentences)
            finally:
                undo_simulation(loaded.model)
            self._changes[rule, texts] = {name: _change(before[name], after[name]) for name in sentences}
        return self._changes[rule, texts]


def read_spec(spec: str) -> tuple[str, str, str]:
    """Return rule, texts and figure.

    Raises:
        ConfigError: not three parts, or texts that do not exist.
    """
    parts = [part.strip() for part in spec.split("|")]
    if len(parts) != 3 or parts[1] not in LEDGER_TEXTS:
        raise ConfigError(f"{spec!r} is no legacy figure; write RULE | {' or '.join(LEDGER_TEXTS)} | FIGURE")
    return parts[0], parts[1], parts[2]


def _change(before: float, after: float) -> float:
    return percent_change(before, after) if math.isfinite(before) and math.isfinite(after) else math.inf
