"""Fuzz one target for a while, guided by coverage. Needs atheris.

    python -m tests.fuzz.guided TARGET SECONDS SEED LONGEST KEPT FAULTS PLACE

What reached new code is added to KEPT, which is read first; what went wrong lies in FAULTS as `crash-…`; the target
works in PLACE. libFuzzer ends the process with its statistics on stderr, the number of executions among them, so that
nothing is removed here.
"""

from __future__ import annotations

import gc
import logging
import sys
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["quant_fairness_plugin"]):
    from tests.fuzz.targets import CORPUS, Target

from tests.fuzz.mutations import mutated

_SHARE_OF_DOCUMENTS = 3
"""Of four mutations, so many are of the document's values; the others are libFuzzer's, of bytes."""


def mutate(content: bytes, most: int, seed: int) -> bytes:
    """Return a changed copy of a file, as libFuzzer asks for it."""
    if seed % 4 < _SHARE_OF_DOCUMENTS:
        return mutated(content, Random(seed))[:most]
    changed: bytes = atheris.Mutate(content, most)
    return changed


def main() -> None:
    name, seconds, seed, longest, kept, faults, place = sys.argv[1:]
    logging.disable(logging.CRITICAL)
    with atheris.instrument_imports(include=["quant_fairness_plugin"]):  # some of it is loaded at first use
        target = Target(name, Path(place))

    def read(content: bytes) -> None:
        target(content)

    options = [
        f"-max_total_time={seconds}",
        f"-seed={seed}",
        f"-max_len={longest}",
        f"-artifact_prefix={faults}/",
        "-verbosity=0",
        "-print_final_stats=1",
    ]
    options += ["-rss_limit_mb=0", "-timeout=60"]  # the target measures both itself
    atheris.Setup([sys.argv[0], *options, kept, str(CORPUS / name)], read, custom_mutator=mutate)
    gc.freeze()  # what the libraries hold stays: looking through it again and again took a share of the time
    atheris.Fuzz()


if __name__ == "__main__":
    main()
