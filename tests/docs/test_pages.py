"""The README and the pages: their links lead somewhere, and every block of a job page runs as a reader would run it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer import TyperException
from typer.core import TyperGroup
from typer.main import get_command

from quant_fairness_plugin.cli import awq_quantize, gptq_quantize, main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("quantize", "judge", "serving", "large", "formats")),
]
"""Pages whose blocks are run, each page in a folder of its own, one block after the other."""
COMMANDS = {"quant-fairness": main.app, "gptq-quantize": gptq_quantize.app, "awq-quantize": awq_quantize.app}
BLOCK = re.compile(r"(?:<!-- (before|not run): (.*?) -->\n)?^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A block of code on a page."""

    language: str
    code: str
    before: str = ""
    """What a reader has done already, where the page does not say it."""
    not_run: str = ""
    """Why it cannot be run here."""


def blocks(path: Path) -> list[Block]:
    """The shell and Python blocks of a page, in order."""
    found = BLOCK.findall(path.read_text(encoding="utf-8"))
    return [
        Block(language, code, before=note if kind == "before" else "", not_run=note if kind == "not run" else "")
        for kind, note, language, code in found
    ]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in LINK.findall(text):
        if not target.startswith(("http", "#")):
            assert (path.parent / target.split("#")[0]).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.name)
def test_every_block_is_found(path: Path) -> None:
    fences = re.findall(r"^```(?:bash|python)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(blocks(path)) == len(fences) > 0


def test_a_block_is_read_with_what_comes_before_it(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- before: true -->\n```bash\nfalse\n```\n\n<!-- not run: no vLLM -->\n```python\nx\n```\n")
    assert blocks(page) == [Block("bash", "false\n", before="true"), Block("python", "x\n", not_run="no vLLM")]


def commands(path: Path) -> list[list[str]]:
    """The command lines of ours in the shell blocks of a page."""
    code = "".join(block.code for block in blocks(path) if block.language == "bash").replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in code.splitlines()]
    return [line[: line.index(">")] if ">" in line else line for line in lines if line and line[0] in COMMANDS]


def parse(name: str, arguments: list[str]) -> None:
    """Parse a command line as far as its command is not called."""
    command = get_command(COMMANDS[name])
    context = command.make_context(name, list(arguments))
    if isinstance(command, TyperGroup):
        said, chosen, rest = command.resolve_command(context, list(arguments))
        assert chosen is not None
        chosen.make_context(said, rest, parent=context)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_parser_takes_the_command_lines_of_a_page(path: Path) -> None:
    for name, *arguments in commands(path):
        parse(name, arguments)


def test_an_option_that_there_is_not_would_be_seen() -> None:
    assert ["quant-fairness", "report", "demo-fair", "-o", "report.html"] in commands(ROOT / "README.md")
    with pytest.raises(TyperException, match="No such option"):
        parse("quant-fairness", ["verify", "demo-fair", "--strictest"])


def run(line: list[str], folder: Path) -> None:
    """Run a command in a folder; what it printed is shown where it fails."""
    paths = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", ""))))
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.pages
@pytest.mark.parametrize("path", RUN, ids=lambda path: path.name)
def test_the_blocks_of_a_page_run_in_their_order(path: Path, tmp_path: Path) -> None:
    for block in blocks(path):
        if block.before:
            run(["bash", "-euo", "pipefail", "-c", block.before], tmp_path)
        if not block.not_run:
            shell = block.language == "bash"
            run(
                ["bash", "-euo", "pipefail", "-c", block.code] if shell else [sys.executable, "-c", block.code],
                tmp_path,
            )


def test_the_picture_is_that_of_the_stored_rows() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import picture
    finally:
        sys.path.pop(0)
    assert picture.draw(picture.read_rows()) == picture.PICTURE.read_text(encoding="utf-8"), (
        "python benchmarks/picture.py"
    )
