"""`quant-fairness`: the group of commands, and the one place where an error becomes a line and an exit status."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

import typer

from quant_fairness_plugin.cli.declare import PanelCommand
from quant_fairness_plugin.cli.stopping import Stopped, describe_stop, stoppable
from quant_fairness_plugin.errors import QuantFairnessError, ResourceError, is_disk_error

COMMANDS = {
    "run": "quant-fairness run --model demo -o demo-int4-fair",
    "plan": "quant-fairness plan --model demo --langs en,he,ar,zh",
    "sweep": "quant-fairness sweep --model demo --langs en,he,ar,zh --json > sweep.json",
    "recommend": "quant-fairness recommend sweep.json --max-overhead 0.2",
    "measure": "quant-fairness measure demo-int4-fair",
    "quantize": "quant-fairness quantize demo --protect-layers 0,9,11 -o demo-int4",
    "compare": "quant-fairness compare --model demo --calibrations english,uniform",
    "analyze": "quant-fairness analyze weights demo-gpt2 --json > weights.json",
    "reproduce": "quant-fairness reproduce S4-20 S4-33 S2-6",
    "cite": "quant-fairness cite frantar2022",
    "verify": "quant-fairness verify demo-int4-fair",
    "report": "quant-fairness report demo-int4-fair sweep.json -o report.html",
    "repair": "quant-fairness repair DIR --dry-run",
    "gguf": "quant-fairness gguf demo-int4-fair --like demo.gguf",
    "generate": "quant-fairness generate demo-int4-fair --prompt 'In the beginning'",
    "doctor": "quant-fairness doctor",
}
"""Every command, with the example at the end of its help."""

MOST_CHARACTERS = 2000
"""Of an error: a value from a file can be as long as the file."""
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "failed to map segment",
    "can't start new thread",
    "std::bad_alloc",
)
"""Words of what torch, the loader of libraries, and Python say where an address or a page is refused."""

app = typer.Typer(
    name="quant-fairness",
    help="Quantize a language model to INT4 without hurting some languages more than others.",
    pretty_exceptions_enable=False,
)
for _name, _example in COMMANDS.items():
    _module = importlib.import_module(f"quant_fairness_plugin.cli.{_name}")
    app.command(_name, cls=PanelCommand, epilog=f"Example: {_example}")(getattr(_module, _name))


def run_guarded(command: Callable[..., object], argv: Sequence[str], name: str) -> int:
    """Run a command and turn what it raises, or a signal to stop, into one line on stderr and an exit status.

    `QUANT_FAIRNESS_VERBOSE=1` adds the traceback.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Harmless("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        with stoppable():
            status = command(args=list(argv), prog_name=name, standalone_mode=False)
        return status if isinstance(status, int) else 0
    except QuantFairnessError as err:
        return _report(str(err), err.exit_code)
    except typer.TyperException as err:  # the parser's own errors
        return _report(f"{err.format_message()} See {name} --help.", err.exit_code)
    except Stopped as err:
        return _report(*describe_stop(err))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as err:  # noqa: BLE001 - the last line of defence: an unexpected error is one line, too
        return _report(*_describe(err))


def _describe(err: Exception) -> tuple[str, int]:
    """Return the line and the exit status of an error that nobody turned into one of ours."""
    if isinstance(err, OSError) and is_disk_error(err):
        return (
            f"{err.filename or 'a file'}: {err.strerror}; results need write access and space on a working disk. Free "
            "space, or choose another place",
            ResourceError.exit_code,
        )
    if isinstance(err, MemoryError) or any(words in str(err) for words in _OUT_OF_MEMORY):
        return (
            f"out of memory ({' '.join(str(err).split())[:120] or type(err).__name__}); with --memory-budget SIZE a "
            "model is read block by block, and fewer --langs take less. Or use a machine, or a limit, with more memory",
            ResourceError.exit_code,
        )
    return f"unexpected {type(err).__name__}: {err}. Set QUANT_FAIRNESS_VERBOSE=1 for the traceback.", 1


def _report(message: str, status: int) -> int:
    if os.environ.get("QUANT_FAIRNESS_VERBOSE"):
        traceback.print_exc()
    sys.stderr.write(f"error: {_shortened(harmless(' '.join(message.split())))}\n")
    return status


def harmless(text: str) -> str:
    """Return a text that a terminal shows and does not obey: names in files can hold escape sequences."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _shortened(message: str) -> str:
    if len(message) <= MOST_CHARACTERS:
        return message
    half = MOST_CHARACTERS // 2
    return f"{message[:half]} … {message[-half:]}"


class _Harmless(logging.Formatter):
    """Log lines that a terminal does not obey."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return harmless(super().format(record))


def main() -> None:
    """Entry point of `quant-fairness`."""
    sys.exit(run_guarded(typer.main.get_command(app), sys.argv[1:], "quant-fairness"))
