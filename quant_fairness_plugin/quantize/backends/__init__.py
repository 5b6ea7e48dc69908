"""Quantize with another tool: gptqmodel, llm-compressor, or one that a third party registers.

A backend gets our plan and exactly our calibration rows and writes the tool's own folder; `export/foreign.py` reads
that back into a `QuantizedModel`, so that record, card, formats, verification and measurement are the same as ours.

- `known_backends`, `find_backend`: by name, through the entry points `quant_fairness.backends`
- `check_backend`: everything that can be refused before anything is loaded (no torch)
- `rules`: a plan in the tools' skip rules, and their configurations
- `gptqmodel`, `llmcompressor`: the two that come with this package, one file per outside tool
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from quant_fairness_plugin.artifacts import Clip, Grid, Weighting
from quant_fairness_plugin.errors import ConfigError, MissingExtraError, UnsupportedModelError

if TYPE_CHECKING:
    from quant_fairness_plugin.quantize.calibration import CalibrationSet

NATIVE = "native"
"""Our own core, which is no backend: `quantize.stream.quantize_model`."""
ENTRY_POINTS = "quant_fairness.backends"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a backend is to do: a 16-bit model in a folder, a plan module by module, and token rows."""

    source: Path
    """Folder of the 16-bit model: safetensors weights, `config.json`, tokenizer."""
    dtype: str
    """`float16` or `bfloat16`: what the 16-bit model is stored in, and what everything unquantized must stay in."""
    method: str
    grid: Grid
    blocks: str
    """Full name of the list of decoder blocks."""
    grids: Mapping[str, Grid]
    """Full name of every module to quantize → its grid: `grid`, or the same with other bits or another group size."""
    shapes: Mapping[str, tuple[int, int]]
    """Module to quantize → output and input channels."""
    kept: tuple[str, ...]
    """Full name of every other linear module, the head included."""
    calibration: CalibrationSet
    device: str = "cpu"
    """Where the tool is to compute: a device type of torch."""

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """The calibration rows of all languages, one language after the other."""
        return tuple(row for rows in self.calibration.rows.values() for row in rows)


class Backend(Protocol):
    """Another tool that quantizes. Third parties register a class without arguments as `quant_fairness.backends`.

    Importing its module must import neither the tool nor torch: `check` and `refuse` are called before anything is
    loaded.
    """

    @property
    def name(self) -> str:
        """The name of `--backend`."""

    @property
    def methods(self) -> tuple[str, ...]:
        """What the tool can do for us."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Distributions whose versions are recorded; the first one is the tool."""

    def check(self) -> None:
        """Check that the tool is installed.

        Raises:
            MissingExtraError: it is not; holds the line that installs it.
        """

    def refuse(self, family: str, method: str, grid: Grid) -> str | None:
        """Why the tool cannot quantize this family in this way, and the way out; None where it can.

        Args:
            family: name of the family, or a `model_type` whose family is not known yet.
            method: one of `methods`.
            grid: the grid of the plan.
        """

    def quantize(self, job: Job, out: Path) -> Path:
        """Quantize and write the tool's own checkpoint. Leaves nothing outside `out`.

        Args:
            job: what to do.
            out: an existing empty folder for everything that the tool writes.

        Returns:
            The folder of the checkpoint, `out` or one in it: `config.json` with a `quantization_config` of the kind
            `gptq` (version 1), `awq` (gemm) or `compressed-tensors` (pack-quantized), and safetensors weights.
        """


def known_backends() -> tuple[str, ...]:
    """Every name that `--backend` takes: `native`, and the entry points."""
    return (NATIVE, *sorted({point.name for point in entry_points(group=ENTRY_POINTS)}))


def find_backend(name: str) -> Backend:
    """The backend of that name. Its tool is not imported.

    Raises:
        ConfigError: no such backend; lists those that there are.
        MissingExtraError: the package that registers it cannot be imported.
    """
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            try:
                backend: Backend = point.load()()
            except ImportError as err:
                raise MissingExtraError(
                    f"backend {name!r} ({point.value}) cannot be imported ({err}); accepted are backends whose "
                    "packages are installed. Install what is missing, or use --backend native."
                ) from err
            return backend
    raise ConfigError(f"backend {name!r} is unknown; known are {', '.join(known_backends())}. Correct --backend.")


def check_backend(
    name: str, *, method: str, grid: Grid, clip: Clip = "absmax", weighting: Weighting = "uniform", family: str = ""
) -> None:
    """Refuse what a backend cannot do, before anything is loaded. `native` can do everything.

    Args:
        name: `native` or a backend.
        method: the method.
        grid: the grid.
        clip: the clipping rule; the tools have their own.
        weighting: how languages count; the tools know rows only.
        family: the family, or the `model_type` of `config.json`; empty where neither is known yet.

    Raises:
        ConfigError: an unknown backend, or an option that it would silently ignore.
        MissingExtraError: the tool is not installed.
        UnsupportedModelError: the tool fails on such models; says how, and the way out.
    """
    if name == NATIVE:
        return
    backend = find_backend(name)
    if method not in backend.methods:
        raise ConfigError(
            f"backend {name!r} does not do {method!r}; it does {', '.join(backend.methods)}. "
            "Use one, or --backend native."
        )
    ignored = {
        f"bits {grid.bits}": grid.bits != 4,
        f"clip {clip!r}": clip != "absmax",
        f"calibration {weighting!r}": weighting != "uniform",
    }
    for option in (option for option, wrong in ignored.items() if wrong):
        raise ConfigError(
            f"{option} cannot be handed to backend {name!r}; accepted are bits 4, clip 'absmax' and calibration "
            "'uniform' (the same number of tokens in every language). Use those, or --backend native."
        )
    backend.check()
    reason = backend.refuse(family, method, grid) if family else None
    if reason is not None:
        raise UnsupportedModelError(reason)


def require(packages: Sequence[str], *, backend: str, install: str) -> None:
    """Check that packages can be imported, without importing them.

    Raises:
        MissingExtraError: names those that cannot, and the line that installs them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"backend {backend!r} needs {' and '.join(missing)}, not installed here; install with: {install}. "
            "Or use --backend native, which needs nothing more."
        )


def backend_versions(backend: Backend) -> dict[str, str]:
    """Version of each of a backend's packages."""
    return {name: version(name) for name in backend.packages}
