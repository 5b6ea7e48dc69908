"""The import rules of the project: imports go only downwards, and never to a module of the same rank."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "quant_fairness_plugin"
RANKS = [
    {"quant_fairness_kernels", "documents", "errors"},
    {"artifacts"},
    {"model", "texts"},
    {"measure"},
    {"quantize"},
    {"config"},
    {"plans"},
    {"statistics"},
    {"checkpoint"},
    {"sweep"},
    {"recommend"},
    {"evidence"},
    {"export"},
    {"serve"},
    {"answers"},
    {"forecast", "planning", "preflight", "report"},
    {"steps"},
    {"opened"},
    {"fair_quantizer", "seeds"},
    {"analysis", "claims"},
    {"__init__"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}


def stage_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return "quant_fairness_kernels" if relative.parts[0] == "kernels" else relative.with_suffix("").parts[1]


def imported_stages(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update([node.module] if node.module != PACKAGE else [f"{PACKAGE}.{a.name}" for a in node.names])
    ours = {n for n in names if n.split(".")[0] in (PACKAGE, "quant_fairness_kernels")}
    return {
        n.split(".")[0] if n.startswith("quant_fairness_kernels") else (n + ".__init__").split(".")[1] for n in ours
    }


def violations(path: Path, source: str) -> list[str]:
    stage = stage_of(path)
    return [
        f"{path.relative_to(ROOT)} (rank {RANK[stage]}) imports {other} (rank {RANK[other]})"
        for other in sorted(imported_stages(source))
        if other != stage and RANK[other] >= RANK[stage]
    ]


def sources() -> list[Path]:
    return sorted([*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def test_imports_go_only_downwards() -> None:
    assert [v for path in sources() for v in violations(path, path.read_text(encoding="utf-8"))] == []


def test_an_upward_import_would_be_seen() -> None:
    planted = f"from {PACKAGE}.sweep import sweep_layers\n"
    assert violations(ROOT / PACKAGE / "measure" / "scoring.py", planted) != []
    assert violations(ROOT / PACKAGE / "model" / "load.py", f"import {PACKAGE}.texts.load\n") != []


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(source: str, modules: set[str]) -> set[str]:
    """The modules among `modules` that a source imports anywhere: at the top, in a function, for types only."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names.update({name if name in modules else node.module for name in whole})
    return names & modules


def circles(sources: Mapping[str, str]) -> list[str]:
    """Module name → source; every circle of imports, as `a → b → a`, once."""
    imports = {name: imported_modules(source, set(sources)) - {name} for name, source in sources.items()}
    done: set[str] = set()
    found: list[str] = []

    def visit(name: str, route: tuple[str, ...]) -> None:
        if name in route:
            found.append(" → ".join([*route[route.index(name) :], name]))
        elif name not in done:
            for other in sorted(imports[name]):
                visit(other, (*route, name))
            done.add(name)

    for name in sorted(sources):
        visit(name, ())
    return found


def test_no_module_imports_itself_through_others() -> None:
    assert circles({module_name(path): path.read_text(encoding="utf-8") for path in sources()}) == []


def test_a_circle_would_be_seen() -> None:
    planted = {
        "p.a": "def f() -> None:\n    from p.b import g\n",
        "p.b": "import p.c\n",
        "p.c": "from p import a\n",
        "p": "",
    }
    assert circles(planted) == ["p.a → p.b → p.c → p.a"]


LINES, PARAMETERS, FILE_LINES = 60, 8, 400
SELVES = (["self"], ["cls"])


def oversized(source: str) -> list[str]:
    """Functions of a source that are too long or take too many arguments, `self` and `cls` not counted."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    found = []
    for node in functions:
        given = node.args
        names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        count = len(names) + sum(each is not None for each in (given.vararg, given.kwarg)) - (names[:1] in SELVES)
        lines = (node.end_lineno or 0) - node.lineno + 1
        if lines > LINES or count > PARAMETERS:
            found.append(f"{node.name}: {lines} lines, {count} parameters")
    return found


def test_functions_and_files_can_be_read_at_once() -> None:
    ours = {path: path.read_text(encoding="utf-8") for path in (ROOT / PACKAGE).rglob("*.py")}
    assert {str(path): found for path, source in ours.items() if (found := oversized(source))} == {}
    assert {str(path): lines for path, source in ours.items() if (lines := source.count("\n")) > FILE_LINES} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(a, b, c, d, e, g, h, *, i): ...", []),
        ("def f(a, b, c, d, e, g, h, *, i, **j): ...", ["f: 1 lines, 9 parameters"]),
        ("class C:\n    def f(self, a, b, c, d, e, g, h, i): ...", []),
        ("def f():\n" + "    x = 1\n" * 60, ["f: 61 lines, 0 parameters"]),
    ],
    ids=["eight", "nine", "method", "long"],
)
def test_an_oversized_function_would_be_seen(source: str, found: list[str]) -> None:
    assert oversized(source) == found


@pytest.mark.parametrize("name", ["utils", "helpers", "common", "misc"])
def test_no_module_without_a_subject(name: str) -> None:
    assert [p for p in sources() if p.stem == name or name in p.parts] == []


@pytest.mark.parametrize(
    ("statement", "loads_torch"),
    [
        (f"import {PACKAGE}", False),
        (f"from {PACKAGE} import artifacts, config, errors", False),
        (f"import {PACKAGE}.model.resolve, {PACKAGE}.model.layers, {PACKAGE}.texts.load", False),
        (f"import {PACKAGE}.cli.main", False),
        (f"import {PACKAGE}.recommend, {PACKAGE}.recommend.allocation, {PACKAGE}.recommend.frontier", False),
        ("import torch", True),  # which shows that it would be seen
    ],
)
def test_what_must_be_quick_does_not_import_torch(statement: str, loads_torch: bool) -> None:
    code = f"import sys; {statement}; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(loads_torch)


@pytest.mark.parametrize("package", ["plans", "statistics", "checkpoint.formats", "report", "report.sections"])
def test_packages_that_do_without_torch(package: str) -> None:
    folder = ROOT / PACKAGE / Path(*package.split("."))
    names = [f"{PACKAGE}.{package}.{path.stem}".removesuffix(".__init__") for path in sorted(folder.glob("*.py"))]
    code = f"import sys, {', '.join(names)}; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"
