"""A model folder whose every file that could be code leaves a mark when it is run."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

CODE = "from pathlib import Path\nPath({mark!r}).write_text('ran')\n"
TEMPLATE = "{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}"


class _Runs:
    """What runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return exec, (CODE.format(mark=str(self.mark)),)


def make_hostile(model: Path, folder: Path, mark: Path) -> Path:
    """Copy a model and put a trap into the copy for every way that a reader may take."""
    shutil.copytree(model, folder)
    code, template = CODE.format(mark=str(mark)), TEMPLATE.format(mark=mark)
    for name in ("modeling_trap", "configuration_trap", "tokenization_trap", "setup", "conftest", "__init__"):
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code, encoding="utf-8")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(_Runs(mark)))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _add(
        folder / "config.json",
        auto_map={"AutoConfig": "configuration_trap.Trap", "AutoModelForCausalLM": "modeling_trap.Trap"},
        model_file="modeling_trap.py",
    )
    _add(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_trap.Trap", None]},
        chat_template=template,
    )
    front = f"---\nlicense: !!python/object/apply:os.system ['touch {mark}']\n---\n"
    (folder / "README.md").write_text(front, encoding="utf-8")
    return folder


def _add(path: Path, **fields: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | fields), encoding="utf-8")
