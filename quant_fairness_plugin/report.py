"""What a whole run says in words: the plan, the checkpoint's record, and the damage without and with protection."""

from __future__ import annotations

from dataclasses import dataclass

from quant_fairness_plugin.artifacts import ExportRecord, Measurement, Number, ProtectionPlan, Undefined


@dataclass(frozen=True, slots=True)
class RunResult:
    """What `run` made: the plan, the checkpoint's record, and the damage without and with protection."""

    plan: ProtectionPlan
    record: ExportRecord
    unprotected: Measurement
    protected: Measurement
    gain: Number
    """Worst language's KL without protection minus with it, in bits per byte: above 0, protection helped."""

    @property
    def verdict(self) -> str:
        """What protection bought on sentences that no layer was chosen on, in one sentence."""
        if not self.plan.protected_layers:
            return "nothing was protected"
        if isinstance(self.gain, Undefined):
            return f"what protection bought is undefined: {self.gain.undefined}"
        figures = f"{self.gain.estimate:.5f} [{self.gain.low:.5f}, {self.gain.high:.5f}] bits per byte"
        if self.gain.low > 0:
            return f"protection lowered the worst language's KL by {figures}"
        if self.gain.high < 0:
            return f"protection did not help: it changed the worst language's KL by {figures} for the worse"
        return f"protection did not measurably help: it lowered the worst language's KL by {figures}, which includes 0"
