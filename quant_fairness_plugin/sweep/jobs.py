"""What the trials of a sweep have in common, here and in worker processes.

A trial is one batch of rows in every state: a pure function of the rows and of the job. A worker makes its own copy of
the job from a `Recipe` (the model is loaded from its files), and refuses to start if its numbers would be others.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from quant_fairness_plugin.artifacts import TextSet, digest, package_versions
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.rows import Row, pad_rows
from quant_fairness_plugin.model.devices import describe_device
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.model.provenance import model_identity
from quant_fairness_plugin.plans.tree import StateTree
from quant_fairness_plugin.plans.units import UnitMap, map_units
from quant_fairness_plugin.sweep.bank import Bank
from quant_fairness_plugin.sweep.runner import BatchScores, TreeRunner
from quant_fairness_plugin.sweep.walk import score_batch

RESULT_VERSION = 3
"""Goes up whenever the same trial would give another number, or its file another form."""

CIRCUMSTANCES = ("versions", "machine", "device", "matmul_precision", "threads", "attention")
"""What of a job's identity is no part of what was asked for, and yet decides the last bits."""

BankRecipe = Callable[[LoadedModel, UnitMap], Bank]
"""Makes a bank for a model. Pickled, so a class or function of a module, or a `functools.partial` of one."""


@runtime_checkable
class Portable(Protocol):
    """A bank that can be made again in another process."""

    def recipe(self) -> BankRecipe:
        """What makes it."""


@dataclass(frozen=True, slots=True)
class Job:
    """What all trials of a sweep share."""

    loaded: LoadedModel
    tree: StateTree
    bank: Bank
    texts: TextSet
    """For the names of sentences in errors."""
    threads: int
    """Threads of every trial, wherever it runs: float32 sums depend on how they are split."""

    @property
    def runner(self) -> TreeRunner:
        """The model and its states, to run batches through."""
        return TreeRunner.of(self.loaded, self.tree, self.bank)

    def run(self, rows: Sequence[Row]) -> BatchScores:
        """Return the scores of one trial. The process has as many threads as before when it returns."""
        with fixed_threads(self.threads):
            return score_batch(self.runner, pad_rows(rows), self.texts)


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that a worker needs to make its own copy of a job. Holds no weights; can be pickled."""

    folder: Path
    dtype: torch.dtype
    device: str
    storage: torch.dtype
    """What the weights were rounded to."""
    trust_remote_code: bool
    allow_pickle: bool
    bank: BankRecipe
    tree: StateTree
    texts: TextSet
    threads: int
    identity: dict[str, Any]
    """That of the original, which the copy must have too."""


def identity(job: Job) -> dict[str, Any]:
    """Return all that the numbers of a trial depend on, beside its rows. Plain JSON data."""
    model = job.loaded.model
    versions = package_versions()
    return {
        "result_version": RESULT_VERSION,
        "versions": {name: versions[name] for name in ("quant-fairness", "torch", "transformers")},
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": describe_device(model.device),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "threads": job.threads,
        "model": model_identity(job.loaded),
        "attention": str(model.config._attn_implementation),
        "storage_dtype": str(job.loaded.storage_dtype),
        "compute_dtype": str(model.dtype),
        "bank": job.bank.description,
        "plans": digest(asdict(job.tree)),
    }


def pack(job: Job) -> Recipe:
    """Return the recipe of a job.

    Raises:
        ConfigError: the model is in memory only, or the bank cannot be made again elsewhere.
    """
    files = job.loaded.files
    if not files.weights:
        raise ConfigError(
            f"the model {files.name} is in memory only, and a worker loads it from files; save it and load that "
            "folder, or use the local executor"
        )
    if not isinstance(job.bank, Portable):
        raise ConfigError(
            f"bank {job.bank.description!r} has no recipe() to make it again in a worker; use the local executor"
        )
    return Recipe(
        folder=files.folder.resolve(),
        dtype=job.loaded.model.dtype,
        device=str(job.loaded.model.device),
        storage=job.loaded.storage_dtype,
        trust_remote_code=files.runs_code,
        allow_pickle=files.weights[0].suffix != ".safetensors",
        bank=job.bank.recipe(),
        tree=job.tree,
        texts=job.texts,
        threads=job.threads,
        identity=identity(job),
    )


def unpack(recipe: Recipe) -> Job:
    """Return a copy of the job that the recipe is of, with a model of its own.

    Raises:
        QuantFairnessError: the model does not load.
        ConfigError: the copy would give other numbers; names what differs.
    """
    with fixed_threads(recipe.threads):
        loaded = load_model(
            str(recipe.folder),
            dtype=recipe.dtype,
            device=recipe.device,
            storage=recipe.storage,
            trust_remote_code=recipe.trust_remote_code,
            allow_pickle=recipe.allow_pickle,
        )
        bank = recipe.bank(loaded, map_units(loaded))
    job = Job(loaded, recipe.tree, bank, recipe.texts, recipe.threads)
    _check_same(recipe.identity, identity(job))
    return job


@contextmanager
def fixed_threads(count: int) -> Iterator[None]:
    """Give torch so many threads inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_same(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> None:
    for field, value in expected.items():
        if actual[field] != value:
            raise ConfigError(
                f"a worker would give other numbers: its {field} is {actual[field]}, here it is {value}; every worker "
                "needs the same model files and versions. Make them equal, or use the local executor."
            )
