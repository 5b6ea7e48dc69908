"""`quant-fairness doctor`: what works here, what each extra adds, and the command that installs it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from quant_fairness_plugin.artifacts import package_versions
from quant_fairness_plugin.checkpoint.readers import READERS
from quant_fairness_plugin.checkpoint.readers.transformers import TRANSFORMERS
from quant_fairness_plugin.cli.options import Json
from quant_fairness_plugin.errors import QuantFairnessError
from quant_fairness_plugin.model.devices import present_devices
from quant_fairness_plugin.model.resolve import BUNDLED, resolve_model
from quant_fairness_plugin.model.sizes import shown

EXTRAS = {
    "report": (("altair", "vl-convert-python"), "report.html beside every result"),
    "datasets": (("datasets",), "texts from Hugging Face (--texts datasets:NAME)"),
    "gguf": (("gguf", "accelerate"), "GGUF files as 16-bit models"),
    "ray": (("ray",), "sweeps on many machines (--executor ray)"),
    "triton": (("triton",), "INT4 kernels on NVIDIA GPUs"),
    "gptqmodel": (("gptqmodel",), "--backend gptqmodel; gptq and awq in Transformers"),
    "llmcompressor": (("llmcompressor", "auto-round"), "--backend llmcompressor"),
    "optimum": (("optimum", "gptqmodel"), "gptq checkpoints in Transformers"),
    "auto-gptq": (("gptqmodel",), "the same as gptqmodel, which succeeded it"),
    "autoawq": (("llmcompressor",), "the same as llmcompressor, which adopted it"),
}
"""Extra → the packages that make it, and what it adds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that works here, or does not."""

    name: str
    works: bool
    detail: str
    """What it is or adds."""
    command: str = ""
    """What to type for it; empty where it works, or no command helps."""


def doctor(as_json: Json = False) -> None:
    """Say what works here, what each extra adds, and the command for it."""
    sections = {"works here": list(_here()), "readers": list(_readers()), "extras": list(_extras())}
    if as_json:
        facts = {name: [asdict(finding) for finding in rows] for name, rows in sections.items()}
        typer.echo(json.dumps({"versions": package_versions(), "machine": _machine()} | facts, indent=1))
        return
    versions = package_versions()
    typer.echo(" · ".join(f"{name} {versions[name]}" for name in ("quant-fairness", "python", "torch", "transformers")))
    for name, rows in sections.items():
        typer.echo(f"\n{name.capitalize()}")
        for finding in rows:
            typer.echo(f"  {'✓' if finding.works else '–'} {finding.name:<14} {finding.detail}")
            if finding.command:
                typer.echo(f"{'':<19}{finding.command}")
        if name == "readers":
            typer.echo(f"{'':<19}Each reader is installed into an environment of its own.")


def _machine() -> dict[str, int | str | None]:
    return {
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
    }


def _here() -> Iterator[Finding]:
    facts = _machine()
    memory, disk = (shown(int(facts[key] or 0)) for key in ("memory_bytes", "free_disk_bytes"))
    sizes = f"{memory} of memory, {disk} of disk free"
    yield Finding(name="cpu", works=True, detail=f"{facts['cpus']} × {facts['processor']}, {sizes}")
    others = [device for device in present_devices() if device != "cpu"]
    yield Finding(name="accelerator", works=bool(others), detail=", ".join(others) or "torch finds none")
    for name in BUNDLED:
        try:
            yield Finding(name=name, works=True, detail=f"a bundled model of {resolve_model(name).layers} layers")
        except QuantFairnessError as err:
            yield Finding(name=name, works=False, detail=str(err))


def _readers() -> Iterator[Finding]:
    """Yield who can be run by `verify`; the rules of all readers are checked in any case."""
    for name, reader in READERS.items():
        if not reader.script:
            yield Finding(name=name, works=False, detail="is never run; its documented rules are checked")
            continue
        # Transformers itself is there; what it needs for single formats is said apart.
        here = reader is TRANSFORMERS or all(importlib.util.find_spec(module) for module in reader.modules)
        elsewhere = os.environ.get(reader.variable) if reader.variable else None
        missing = sorted(kind for kind, needs in reader.needs.items() if any(_version(each) is None for each in needs))
        detail = "runs in this Python" if here else f"runs in {elsewhere}" if elsewhere else "its rules are checked"
        detail += f", but not on {' and '.join(missing)} checkpoints" if here and missing else ""
        lacks = not (here or elsewhere) or bool(missing)
        command = reader.install if lacks else ""
        yield Finding(name=name, works=bool(here or elsewhere), detail=detail, command=command)


def _extras() -> Iterator[Finding]:
    torch = importlib.metadata.version("torch").partition("+")[0]
    for name, (packages, adds) in EXTRAS.items():
        works = all(_version(package) is not None for package in packages)
        # torch named again, or pip might replace it by another build
        command = "" if works else f'pip install torch=={torch} "quant-fairness[{name}]"'
        yield Finding(name=name, works=works, detail=adds, command=command)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
