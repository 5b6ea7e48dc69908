"""The library with which the installed huggingface_hub speaks HTTP: httpx, or from its version 2 on httpx2."""

from __future__ import annotations

import importlib
from typing import Any

from quant_fairness_plugin.model.hub import transport_error

HTTP: Any = importlib.import_module(transport_error().__module__.partition(".")[0])
