"""The Hugging Face Hub: a repository id in, the folder of its cached snapshot out."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path

from quant_fairness_plugin.errors import ConfigError, ExternalServiceError

_logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")


def go_offline() -> None:
    """Keep every library of Hugging Face from the network, for the rest of the process."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:  # it has read the environment already
        vars(constants)["HF_HUB_OFFLINE"] = True


def is_repository_id(name: str) -> bool:
    """Return whether the name could be a Hub repository (`gpt2`, `organisation/model`)."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # exported, but lazily

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_commit(revision: str | None) -> bool:
    """Return whether the revision is a full commit hash, the only kind that cannot change."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def transport_error() -> type[Exception]:
    """Return the base of what the Hub's HTTP library raises: that is httpx, and from huggingface_hub 2 on httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def download(name: str, *, revision: str | None, allow_pickle: bool, trust_remote_code: bool, hint: str) -> Path:
    """Return the folder that holds a snapshot of a Hub repository; its name is the commit.

    Only config, tokenizer and weight files at the top of the repository are fetched, pickles and code only where
    allowed. Where the Hub does not answer, a cached snapshot is used, and logged.

    Args:
        name: the repository id.
        revision: branch, tag or commit; None is the default branch.
        allow_pickle: fetch `pytorch_model*.bin` as well.
        trust_remote_code: fetch `*.py` as well.
        hint: what else the name could have been, appended to the message.

    Raises:
        ConfigError: the Hub knows no such repository or revision.
        ExternalServiceError: the Hub refuses access, cannot be reached or failed, and the cache has no snapshot.
    """
    from huggingface_hub import errors, snapshot_download

    patterns = [
        "*.json",
        "*.txt",
        "*.model",
        "*.jinja",
        "*.safetensors",
        "*LICENSE*",
        "*LICENCE*",
        "NOTICE*",
        "README.md",
    ]
    patterns += ["COPYING*", "USE_POLICY*", "*.tiktoken"]
    patterns += ["pytorch_model*.bin"] * allow_pickle + ["*.py"] * trust_remote_code
    ignored = ["*/*", "consolidated*"]  # other formats in subfolders; Mistral's second copy of the weights
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))
    except errors.GatedRepoError as err:
        raise ExternalServiceError(
            f"{name}: the Hub gives access only to accounts that accepted its terms. Accept them on the model's page "
            "and log in (hf auth login)."
        ) from err
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as err:
        unknown_revision = isinstance(err, errors.RevisionNotFoundError)
        what = f"revision {revision!r} of the repository" if unknown_revision else "repository"
        raise ConfigError(f"{name}: the Hub has no such {what} (or it is private: hf auth login). {hint}") from err
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, transport_error(), OSError) as err:
        cached = _cached_snapshot(name, revision)
        if cached is None:
            raise ExternalServiceError(
                f"{name}: not in the local Hub cache, and the Hub did not answer "
                f"({' '.join(str(err).split())[:200]}). {hint}"
            ) from err
        _logger.warning("%s: the Hub did not answer, using the cached revision %s", name, cached.name)
        return cached


def _cached_snapshot(name: str, revision: str | None) -> Path | None:
    """Return a snapshot in the cache that has at least a config; whether it is complete is checked file by file later.

    `snapshot_download` itself does not look there when a commit is given, nor where a README is all that is missing.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["config.json"], local_files_only=True))
    except LocalEntryNotFoundError:
        return None
