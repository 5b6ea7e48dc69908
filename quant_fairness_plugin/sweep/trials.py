"""A sweep that can be interrupted: every trial's result is a file, named by all that it depends on.

A trial is one batch of rows in every state. A sweep that was killed finds the files of its finished trials and runs the
rest; sums are made in the order of the batches, so the scores are the same bits as without the interruption.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quant_fairness_plugin.artifacts import (
    Precision,
    StateScores,
    TextSet,
    digest,
    note_circumstances,
    write_atomically,
)
from quant_fairness_plugin.errors import ArtifactError, ConfigError, ResourceError
from quant_fairness_plugin.measure.rows import Batch, Row
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.plans.units import UnitMap
from quant_fairness_plugin.sweep.bank import Bank
from quant_fairness_plugin.sweep.execution import Execution
from quant_fairness_plugin.sweep.executors import Executor, LocalExecutor
from quant_fairness_plugin.sweep.jobs import CIRCUMSTANCES, RESULT_VERSION, Job, identity
from quant_fairness_plugin.sweep.memory import BATCH_TOKENS
from quant_fairness_plugin.sweep.runner import BatchScores
from quant_fairness_plugin.sweep.walk import Progress, add_up, plan_tree, tokenize_texts

_logger = logging.getLogger(__name__)


def score_plans_resumably(
    loaded: LoadedModel,
    plans: Mapping[str, Mapping[str, Precision]],
    texts: TextSet,
    *,
    units: UnitMap,
    bank: Bank,
    execution: Execution,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> dict[str, StateScores]:
    """Return the same as `score_plans`, trial by trial: finished ones stay in a folder, and trials can run elsewhere.

    The result is the same bits whether or not the sweep was interrupted, and whichever executor ran it: a trial has
    the same number of threads everywhere, also in this process, which gets its own number back afterwards.

    Args:
        loaded: the model; bit-identical afterwards.
        plans: name → unit → precision; what is not listed is in 16 bit.
        texts: the sentences.
        units: the model's units.
        bank: their weights.
        execution: its `work`, `executor` and `threads`.
        batch_tokens: tokens of a batch.
        progress: called with (block passes done, in all).

    Returns:
        `16 bit` and every plan → its scores.

    Raises:
        ConfigError: a unit that does not exist, a `work` that is no folder, or an executor that cannot run this.
        ArtifactError: a plan predicts NaN or infinity.
        ResourceError: `work` cannot be written, or workers are lost again and again.
    """
    job = Job(loaded, plan_tree(plans, units), bank, texts, execution.threads)
    tokenized = tokenize_texts(loaded, texts)
    batches = tokenized.batches(batch_tokens)
    store = None if execution.work is None else open_store(execution.work, job, batch_tokens=batch_tokens)
    results = _run_all(job, batches, store, execution.executor or LocalExecutor(), progress)
    return add_up(tokenized, job.tree, batches, [results[number] for number in range(len(batches))])


def _run_all(
    job: Job, batches: Sequence[Batch], store: Store | None, executor: Executor, progress: Progress | None
) -> dict[int, BatchScores]:
    stored = {} if store is None else {number: store.read(batch.rows) for number, batch in enumerate(batches)}
    results = {number: scores for number, scores in stored.items() if scores is not None}
    missing = {number: batch.rows for number, batch in enumerate(batches) if number not in results}

    def report() -> None:
        if progress is not None:
            progress(len(results) * job.tree.block_passes, len(batches) * job.tree.block_passes)

    if results:
        _logger.info("%d of %d trials were finished before", len(results), len(batches))
        report()
    if not missing:
        return results
    with closing(executor.run(job, missing)) as running:  # an executor that is left in the middle ends its workers
        for number, scores in running:
            if store is not None:
                store.write(missing[number], scores)
            results[number] = scores
            report()
    return results


@dataclass(frozen=True, slots=True)
class Store:
    """Results of one job on disk. Only whole files are ever seen, and any of them is checked when it is read."""

    folder: Path
    states: tuple[str, ...]
    job: Mapping[str, Any]
    """All that results depend on, beside their rows."""

    def path(self, rows: Sequence[Row]) -> Path:
        """Return where the result of a trial is."""
        return self.folder / f"{self._key(rows)}.json"

    def read(self, rows: Sequence[Row]) -> BatchScores | None:
        """Return the result of a trial, or None where it must be computed (again, if its file is torn or altered)."""
        path = self.path(rows)
        try:
            return _decode(path.read_bytes(), self._key(rows), self.states, len(rows))
        except FileNotFoundError:
            return None
        except (OSError, ArtifactError) as err:
            _logger.warning("%s: not a whole result (%s); its trial is computed again", path, err)
            return None

    def write(self, rows: Sequence[Row], scores: BatchScores) -> None:
        """Write the result of a trial. Whoever else writes it writes the same bytes.

        Raises:
            ResourceError: the disk is full or read-only.
        """
        try:
            write_atomically(self.path(rows), _encode(self._key(rows), scores))
        except OSError as err:
            raise ResourceError(
                f"{self.folder}: a result cannot be written ({err.strerror}); finished trials stay there. Make "
                "room, or use another folder."
            ) from err

    def _key(self, rows: Sequence[Row]) -> str:
        return trial_key(self.job, rows)


def trial_key(job: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Return the name of a trial's result: sha256 of all that it depends on.

    Which sentences the rows belong to is no part of it: the numbers depend on token ids alone.
    """
    return digest({"job": dict(job), "rows": [[list(row.ids), row.first] for row in rows]})


def open_store(work: Path, job: Job, **further: int) -> Store:
    """Return the results of a job in `work`, which is made if it is missing.

    Args:
        work: the folder.
        job: what its trials share.
        **further: what else results depend on, by name.

    Raises:
        ConfigError: `work` is no folder.
        ResourceError: it cannot be used.
    """
    depends = identity(job) | further
    if work.exists() and not work.is_dir():
        raise ConfigError(f"{work}: not a folder; use a folder, or a name that is free")
    try:
        work.mkdir(parents=True, exist_ok=True)
        circumstances = {name: depends[name] for name in CIRCUMSTANCES}
        note_circumstances(work, {name: depends[name] for name in depends.keys() - circumstances}, circumstances)
    except OSError as err:
        raise ResourceError(f"{work}: cannot be used ({err.strerror}); use a folder that can be written.") from err
    return Store(work, tuple(job.tree.leaves), depends)


def _encode(key: str, scores: BatchScores) -> bytes:
    # Floats are written with as many digits as it takes to read the same bits.
    rows = {state: values.tolist() for state, values in scores.items()}
    document = {"schema_version": RESULT_VERSION, "key": key, "sha256": digest(rows), "scores": rows}
    return (json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _decode(content: bytes, key: str, states: Collection[str], rows: int) -> BatchScores:
    """Return the scores of a result file.

    Raises:
        ArtifactError: not exactly what was written for this key.
    """
    try:
        document = json.loads(content)
        scores = document["scores"]
        written = document["schema_version"], document["key"], document["sha256"]
        if written != (RESULT_VERSION, key, digest(scores)):
            raise ArtifactError("its key or checksum is another")
        result = {state: np.array(scores[state], dtype=np.float64) for state in states}
    except (ValueError, TypeError, KeyError) as err:
        raise ArtifactError(f"{type(err).__name__}: {err}") from err
    if len(scores) != len(states) or any(values.shape != (rows, 3) for values in result.values()):
        raise ArtifactError("it holds other states or rows")
    return result
