"""What a user can choose, its defaults, its help, and what is refused before loading.

The command line takes options, help and defaults from the fields of `FairConfig`; there is no second copy.
"""

from quant_fairness_plugin.config.fair_config import FairConfig, make_config
from quant_fairness_plugin.config.keywords import FairOptions

__all__ = ["FairConfig", "FairOptions", "make_config"]
