"""The verdict on a checkpoint: the first line of a result, and the exit status of a gate."""

from __future__ import annotations

from quant_fairness_plugin.artifacts import Measurement
from quant_fairness_plugin.artifacts.gates import Gate
from quant_fairness_plugin.cli.say import say
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import QualityGateError
from quant_fairness_plugin.statistics.verdict import Verdict, judge


def verdict_of(measurement: Measurement, config: FairConfig) -> Verdict:
    """Return the verdict under the gate of a configuration, if it has one."""
    return judge(measurement, None if config.gate is None else Gate.parse(config.gate))


def show_verdict(measurement: Measurement, config: FairConfig) -> None:
    """Print the verdict to stdout."""
    say(verdict_of(measurement, config))


def check_gate(measurement: Measurement | None, config: FairConfig) -> None:
    """Refuse a checkpoint that the stated gate does not let through; what was written stays.

    The gate is a bound on the loss. Faulty answers alone do not fail it, unless they forbid to ship.

    Raises:
        QualityGateError: the gate is exceeded, or the sentences cannot tell.
    """
    if config.gate is None:
        return
    if measurement is None:
        raise QualityGateError(f"gate {config.gate} cannot be judged: nothing was measured. Measure the checkpoint")
    verdict = verdict_of(measurement, config)
    if verdict.decision not in ("SHIP", "SHIP WITH CARE"):  # the latter, under a gate, by answers alone
        raise QualityGateError(f"gate {config.gate} is not passed. {verdict}")
