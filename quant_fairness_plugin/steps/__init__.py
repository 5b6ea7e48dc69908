"""Each step as a configuration says: a model, texts and a `FairConfig` in, the step's result out.

Nothing is remembered here, and nothing is done in another order than it is called; that is `FairQuantizer`.
"""

from quant_fairness_plugin.steps.answers import ask
from quant_fairness_plugin.steps.checkpoints import (
    EXPORTED,
    check_folder,
    compare,
    exported_state,
    format_problems,
    measured_folder,
    name_measuring,
    try_export,
    unprotected_state,
    write,
)
from quant_fairness_plugin.steps.opening import (
    check_config,
    check_tokens,
    check_whole,
    fit_config,
    load_checked,
    open_in_memory,
    probe_sentences,
)
from quant_fairness_plugin.steps.plans import (
    check_exportable_before_sweep,
    check_exportable_plan,
    check_report,
    fitting_plan,
    plan_of_layers,
    plan_of_quantized,
    recommend,
)
from quant_fairness_plugin.steps.search import check_time
from quant_fairness_plugin.steps.work import evidence, importance, measure, quantize, sweep

__all__ = [
    "EXPORTED",
    "ask",
    "check_config",
    "check_exportable_before_sweep",
    "check_exportable_plan",
    "check_folder",
    "check_report",
    "check_time",
    "check_tokens",
    "check_whole",
    "compare",
    "evidence",
    "exported_state",
    "fit_config",
    "fitting_plan",
    "format_problems",
    "load_checked",
    "importance",
    "measure",
    "measured_folder",
    "name_measuring",
    "open_in_memory",
    "plan_of_layers",
    "plan_of_quantized",
    "probe_sentences",
    "quantize",
    "recommend",
    "sweep",
    "try_export",
    "unprotected_state",
    "write",
]
