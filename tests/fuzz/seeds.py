"""Write the well-formed files of the corpus anew: `python -m tests.fuzz.seeds`, after a change of a schema.

What once went wrong lies beside them and stays as it is.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from quant_fairness_plugin.artifacts import ExpertCoverage, ExportRecord, SweepReport, to_json
from quant_fairness_plugin.checkpoint.folder import RECORD, file_record, list_files
from quant_fairness_plugin.config import FairConfig
from tests.fuzz.targets import CORPUS
from tests.planted import planted_sets
from tests.report.samples import PLAN, answers, measured, record

SENTENCES = 5
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9, "tie_word_embeddings": True, "dtype": "float16",
}  # fmt: skip
ROWS = (
    {"id": "a", "part": "search", "register": "news", "en": "One.", "he": "אחת."},
    {"id": "b", "part": "confirm", "register": "news", "en": "Two words.", "he": "שתי מילים."},
)
YAML = "bits: 4\nprotect_layers: [0, 9]\nlanguages: [en, no]\nlimits: {he: 0.05}\nseed: 1 # a comment\n"
CARD = "---\nlicense: mit\nlanguage: [en, no]\nbase_model: a/b\ntags:\n  - x\n---\n# A model\n"


def small_sweep() -> SweepReport:
    """Three plans of two layers on a few sentences: small enough to be read thousands of times."""
    report = planted_sets(
        {("layers.0",): 1.0, ("layers.1",): 2.0}, others={"int8": {"layers.0": 0.25, "layers.1": 0.5}}
    )
    scores = {
        name: replace(
            state,
            languages={
                language: replace(
                    rows,
                    nll_nats=rows.nll_nats[:SENTENCES], tokens=rows.tokens[:SENTENCES], bytes_=rows.bytes_[:SENTENCES],
                    kl_nats=rows.kl_nats[:SENTENCES], flips=rows.flips[:SENTENCES],
                )
                for language, rows in state.languages.items()
            },
        )
        for name, state in report.scores.items()
    }  # fmt: skip
    return replace(report, scores=scores)


def small_record() -> ExportRecord:
    """A record with everything that one can hold."""
    coverage = ExpertCoverage(
        experts=2,
        calibrated={"layers.0": {"en": (70, 3)}},
        reached={"layers.0": {"en": (9, 1), "he": (0, 8)}},
        gates={"layers.0": {"en": (0.75, 0.25), "he": (0.0, 1.0)}},
        part="confirm",
    )
    measurement = replace(measured(en=0.01, he=0.2, hi=9.0), answers=answers())
    return replace(record(measurement), experts=coverage)


def safetensors(header: dict[str, object], data: int) -> bytes:
    """Return a file with a header and so many bytes behind it."""
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(data)


def write(name: str, content: str | bytes) -> None:
    path = CORPUS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def write_folder(path: Path) -> None:
    """Write the files around the record of a checkpoint, and the record of just these."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "README.md").write_text("a card\n", encoding="utf-8")
    files = {name: file_record(path / name) for name in list_files(path)}
    write("folder/good", to_json(replace(record(), files=files)))
    assert RECORD not in files


def main() -> None:
    one = {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}
    shard = safetensors({"__metadata__": {"format": "pt"}, "a": one}, 12)
    for target in (
        "header/good",
        "index/around/model-00001-of-00001.safetensors",
        "model-config/around/model.safetensors",
    ):
        write(target, shard)
    index = {"metadata": {"total_size": 12}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    write("index/good", json.dumps(index))
    write("index/around/config.json", json.dumps(CONFIG))
    write("model-config/good", json.dumps(CONFIG))
    write("plan/good", to_json(PLAN))
    write("sweep/good", to_json(small_sweep()))
    write("record/good", to_json(small_record()))
    write_folder(CORPUS / "folder" / "around")
    write("config-yaml/good", YAML)
    write("config-json/good", json.dumps(FairConfig(protect_units=("3.down",), languages=("en", "no")).to_dict()))
    write("texts-json/good", json.dumps({"en": ["One.", "Two."], "he": ["אחת.", "שתיים."]}, ensure_ascii=False))
    write("texts-jsonl/good", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    write("texts-tsv/good", "\n".join("\t".join(row) for row in (ROWS[0], *(r.values() for r in ROWS))) + "\n")
    write("card/good", CARD)


if __name__ == "__main__":
    main()
