"""Upload an exported folder to the Hugging Face Hub: the files of its record, in one commit, after verifying them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypedDict

from quant_fairness_plugin.artifacts import ReaderRun
from quant_fairness_plugin.checkpoint.folder import RECORD, load_record
from quant_fairness_plugin.errors import ConfigError, ExternalServiceError
from quant_fairness_plugin.export.verify import verify
from quant_fairness_plugin.model.hub import transport_error


class PushOptions(TypedDict, total=False):
    """The keyword arguments of `push_folder`, each optional."""

    private: bool
    token: str | None
    revision: str | None
    commit_message: str | None


_LONGEST = 200
"""Characters of what the Hub said that are repeated in a message."""
_logger = logging.getLogger(__name__)


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Verify an exported folder and upload the files of its record to a model repository, nothing else.

    The repository and the branch are made where they do not exist. All files come in one commit, so that nobody loads
    a part of them. Other files of the repository stay there.

    Args:
        folder: an export of this program.
        repo_id: `name` or `organisation/name`.
        private: who can see a repository that is made now; one that exists stays as it is.
        token: an access token with write permission; None is the one of `hf auth login`. It is sent to the Hub, and
            neither logged nor written.
        revision: branch to upload to; None is the default branch.
        commit_message: None is the method, grid and format of the checkpoint.

    Returns:
        The URL of the commit.

    Raises:
        ArtifactError: no export, or its files are not those of its record, or do not verify; nothing is uploaded.
        UnsupportedModelError: no reader reads the checkpoint right; nothing is uploaded.
        ConfigError: a name that no repository can have.
        ExternalServiceError: the Hub refused, failed or could not be reached.
    """
    # Imported here: it takes half a second, and only those who upload need it.
    from huggingface_hub import CommitOperationAdd, HfApi

    _check_name(repo_id, token)
    record = load_record(folder)
    run = verify(folder).reader_run
    read = f"read by {run.reader} {run.version} in {run.dtype}" if isinstance(run, ReaderRun) else "no reader was run"
    additions = [CommitOperationAdd(name, folder / name) for name in sorted([*record.files, RECORD])]
    message = (
        commit_message or f"{record.method} {record.grids}, {record.format}, files verified by quant-fairness; {read}"
    )
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(repo_id, additions, commit_message=message, revision=revision)
    except (transport_error(), OSError, RuntimeError, ValueError) as err:  # ValueError: an answer that is malformed
        raise ExternalServiceError(
            f"{folder} was not uploaded to {repo_id}: {_one_line(err, token)}. Check the network and that the token "
            "may write to this repository (hf auth login), then push again."
        ) from err
    _logger.info("%s: %d files uploaded to %s", folder, len(additions), repo_id)
    return str(commit.commit_url)


def _check_name(repo_id: str, token: str | None) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # exported, but lazily

    try:
        validate_repo_id(repo_id)
    except HFValidationError as err:
        raise ConfigError(
            f"{repo_id!r} cannot be the name of a repository ({_one_line(err, token)}); NAME and ORGANISATION/NAME are "
            "accepted. Correct it"
        ) from err


def _one_line(err: BaseException, token: str | None) -> str:
    """Return what an error says, with its cause, without the token."""
    said = [str(part) or type(part).__name__ for part in (err, err.__cause__) if part is not None]
    text = " ".join(": ".join(said).split())
    text = (text.replace(token, "…") if token else text).rstrip(".")
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
