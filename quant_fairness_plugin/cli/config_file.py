"""`--config FILE`: fields of the configuration from a YAML or JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from quant_fairness_plugin.config import FairConfig
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
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"--config {path} cannot be read: {getattr(err, 'strerror', None) or err}") from err
    try:
        if path.suffix.lower() == ".json":
            return json.loads(text, object_pairs_hook=_once)
        # PyYAML's loaders are the documented way to safe_load with other rules.
        return yaml.load(text, Loader=_Loader)
    except ConfigError as err:
        raise ConfigError(f"{path}: {err}") from err
    except (ValueError, yaml.YAMLError, RecursionError) as err:
        raise ConfigError(f"{path} is not valid {path.suffix[1:].upper()}: {' '.join(str(err).split())}") from err


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return the pairs as a table. Both formats would silently take the last of two."""
    table: dict[Any, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ConfigError(f"{key!r} is there twice; leave one of the two out")
        table[key] = value
    return table


def _kind(document: Any) -> str:
    return "nothing" if document is None else f"a {type(document).__name__}"


class _Loader(yaml.SafeLoader):  # type: ignore[misc] # PyYAML has no types
    """Plain data only, with the truth values of YAML 1.2: `no` is Norwegian, and not false."""


def _table(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    return _once(
        [(loader.construct_object(key), loader.construct_object(value, deep=True)) for key, value in node.value]
    )


_BOOLEAN = "tag:yaml.org,2002:bool"
_Loader.add_constructor("tag:yaml.org,2002:map", _table)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN or first in "tTfF"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
