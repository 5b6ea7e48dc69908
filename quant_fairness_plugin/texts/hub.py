"""Reader of Hugging Face datasets (extra `datasets`), into `RawTexts`."""

from __future__ import annotations

import importlib
from typing import Any

from quant_fairness_plugin.errors import ConfigError, ExternalServiceError, MissingExtraError
from quant_fairness_plugin.texts.sentences import RawTexts
from quant_fairness_plugin.texts.sources import from_rows

PREFIX = "datasets:"
# Far more than an interval needs; a whole training corpus would be loaded into memory and scored for days.
MAX_ROWS = 20_000


def read_dataset(source: str) -> RawTexts:
    """Read `datasets:<name>[:split]`: one column per language, or a `translation` column of `{lang: text}`.

    The split may be a slice (`datasets:me/news:test[:200]`). The library keeps a cached copy and uses it offline.

    Raises:
        MissingExtraError: the extra is not installed.
        ConfigError: no name, no such split, several splits and none named, or more than `MAX_ROWS` rows.
        ExternalServiceError: the dataset could not be fetched.
        ArtifactError: a text is empty or damaged, or the columns are not parallel.
        UnknownLanguageError: a column is not named by a language.
    """
    name, _, split = source.removeprefix(PREFIX).partition(":")
    if not name:
        raise ConfigError(
            f"{source!r} names no dataset; write datasets:<name>[:split], for example datasets:me/news:test"
        )
    rows = _one_split(_fetch(name, split, source), source)
    if len(rows) > MAX_ROWS:
        raise ConfigError(
            f"{source}: {len(rows):,} rows; accepted are {MAX_ROWS:,}. "
            f"Take a slice: {PREFIX}{name}:{split or 'test'}[:2000]"
        )
    return from_rows([(f"{source} row {i}", _flat(row)) for i, row in enumerate(rows)], source)


def _fetch(name: str, split: str, source: str) -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as err:
        raise MissingExtraError(
            f'{source}: reading datasets needs an extra; install it: pip install "quant-fairness[datasets]"'
        ) from err
    try:
        return datasets.load_dataset(name, split=split or None)
    except ValueError as err:
        raise ConfigError(
            f"{source}: {_first_line(err)}. Write datasets:<name>[:split] with a split that it has."
        ) from err
    # Whatever its network stack raises, which changes with its version: httpx, httpx2, requests, OSError.
    except Exception as err:
        raise ExternalServiceError(
            f"{source}: the dataset could not be fetched ({_first_line(err)}). "
            "Check name, access and network, then try again."
        ) from err


def _one_split(loaded: Any, source: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if len(loaded) != 1:
        raise ConfigError(
            f"{source}: the dataset has the splits {', '.join(loaded)}; choose one: {source.rstrip(':')}:<split>"
        )
    return next(iter(loaded.values()))


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    translation = row.get("translation")
    if not isinstance(translation, dict):
        return row
    return {name: cell for name, cell in row.items() if name != "translation"} | translation


def _first_line(err: BaseException) -> str:
    return (str(err).strip() or type(err).__name__).splitlines()[0].rstrip(".")
