"""An exported checkpoint behind HTTP, by the servers themselves: the completion is our dequantizer's, word for word."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from quant_fairness_plugin.serve.load import load_quantized
from tests.readers.checkpoints import export
from tests.readers.matrix import Checkpoint
from tests.readers.session import ENVIRONMENT, python_of, skip_without_int4_kernel

pytestmark = pytest.mark.readers

PROMPT = "And Jesus answered and said"
NEW_TOKENS = 8
CLEAR_LEAD = 0.1
"""Nats by which our likeliest token must lead at every step: far more than float16 changes, so that no tie decides."""
START_SECONDS = 600
ANSWER_SECONDS = 300
END_SECONDS = 30
Command = Callable[[Path, int], list[str | Path]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("http")
    export(Checkpoint("demo", "compressed-tensors"), "vllm", root / "demo", root)
    return root / "demo"


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> str:
    """The greedy completion of our dequantizer, which must be a clear one."""
    model, tokenizer = load_quantized(checkpoint, kernel="reference"), AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(PROMPT)["input_ids"]
    start = len(ids)
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            best = model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1).topk(2)
        assert best.values[0] - best.values[1] > CLEAR_LEAD
        ids = [*ids, int(best.indices[0])]
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


def vllm(folder: Path, port: int) -> list[str | Path]:
    skip_without_int4_kernel()
    program = Path(__file__).with_name("vllm_cli.py")
    sizes = ["--dtype", "float16", "--max-model-len", "128", "--max-num-seqs", "2", "--enforce-eager"]
    return [python_of(".venv-vllm"), program, "serve", folder, "--host", "127.0.0.1", "--port", str(port), *sizes]


def transformers(folder: Path, port: int) -> list[str | Path]:
    program = python_of(".venv-gptqmodel").with_name("transformers")
    return [program, "serve", folder, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]


@pytest.mark.parametrize("command", [vllm, transformers])
def test_serves_the_completion_of_our_dequantizer(
    command: Command, checkpoint: Path, expected: str, tmp_path: Path
) -> None:
    with server(command, checkpoint, tmp_path / "server.log") as address:
        request = {"model": str(checkpoint), "prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0.0}
        answer = json.loads(post(f"{address}/v1/completions", request))
    assert answer["choices"][0]["text"] == expected


@contextmanager
def server(command: Command, folder: Path, log: Path) -> Iterator[str]:
    """A server on a free port, until it is healthy; ended with all that it started, whatever happens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    environment = ENVIRONMENT | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command(folder, port), stdout=output, stderr=output, cwd=log.parent, env=os.environ | environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            end(process)


def wait_until_healthy(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended:\n{log.read_text(encoding='utf-8')[-4000:]}"
        try:
            with urllib.request.urlopen(address, timeout=10):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise AssertionError(f"not healthy after {START_SECONDS} s:\n{log.read_text(encoding='utf-8')[-4000:]}")


def post(address: str, content: dict[str, object]) -> bytes:
    request = urllib.request.Request(
        address, data=json.dumps(content).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
        body: bytes = response.read()
    return body


def end(process: subprocess.Popen[bytes]) -> None:
    """The server and its workers: they are a process group of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(END_SECONDS)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait(END_SECONDS)
