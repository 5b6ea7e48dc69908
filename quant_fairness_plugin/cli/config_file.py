"""`--config FILE`: fields of the configuration from a YAML or JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.documents import parse_json, parse_yaml, read_text
from quant_fairness_plugin.errors import ConfigError


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the fields that a file gives, as `FairConfig` holds them; what it leaves out is not in the result.

    Raises:
        ConfigError: no such file, not a table, a key twice, an unknown key, or a value of the wrong type; names the
            file and the key.
    """
    document = _decode(path)
    if not isinstance(document, dict):
        raise ConfigError(f"{path} holds {_kind(document)}, not a table; write one `key: value` per line, like bits: 4")
    try:
        config = FairConfig.from_dict(document)
    except ConfigError as err:
        raise ConfigError(f"{path}: {err}") from err
    return {name: getattr(config, name) for name in document}


def _decode(path: Path) -> Any:
    if path.suffix.lower() not in (".json", ".yaml", ".yml"):
        raise ConfigError(f"--config {path} is neither YAML nor JSON by its name; use a file NAME.yaml or NAME.json")
    try:
        text = read_text(path)
    except (OSError, ValueError) as err:
        raise ConfigError(f"--config {path} cannot be read: {getattr(err, 'strerror', None) or err}") from err
    try:
        return parse_json(text) if path.suffix.lower() == ".json" else parse_yaml(text)
    except ValueError as err:
        raise ConfigError(f"{path} is not valid {path.suffix[1:].upper()}: {err}") from err


def _kind(document: Any) -> str:
    return "nothing" if document is None else f"a {type(document).__name__}"
