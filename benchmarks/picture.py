"""The picture of README and start page: each language's loss on the public model, from the rows of real_model.jsonl.

python benchmarks/picture.py                          # writes docs/real-model.svg; needs the extra report
"""

from __future__ import annotations

from typing import Any

import altair as alt
import vl_convert
from real_model import FAST, ROOT, read_rows

from quant_fairness_plugin.artifacts import write_atomically
from quant_fairness_plugin.texts.languages import language_name

PICTURE = ROOT / "docs" / "real-model.svg"
COLOURS = ("#b0413e", "#d99a3d", "#2f6f8f")
TITLE = "What 4 bits cost each language"


def points(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one point for each variant and language: KL in thousandths of a bit per byte, with its interval."""
    return [
        {
            "variant": row["variant"],
            "language": language_name(cell["language"]),
            "kl": 1000 * cell["kl_bits_per_byte"]["estimate"],
            "low": 1000 * cell["kl_bits_per_byte"]["low"],
            "high": 1000 * cell["kl_bits_per_byte"]["high"],
        }
        for row in rows
        for cell in row["languages"]
    ]


def draw(stored: list[dict[str, Any]]) -> str:
    """Return the picture as SVG, readable on a dark and on a light page; without the fast variant."""
    rows = [row for row in stored if row["variant"] != FAST]
    variants = [row["variant"] for row in rows]
    languages = [language_name(cell["language"]) for cell in rows[0]["languages"]]
    base = alt.Chart(alt.Data(values=points(rows))).encode(
        y=alt.Y("language:N", sort=languages, title=None),
        yOffset=alt.YOffset("variant:N", sort=variants),
        color=alt.Color(
            "variant:N", sort=variants, scale=alt.Scale(domain=variants, range=list(COLOURS)),
            legend=alt.Legend(orient="top", title=None, labelLimit=260),
        ),
    )  # fmt: skip
    bars = base.mark_bar().encode(x=alt.X("kl:Q", title="KL to the 16-bit model, thousandths of a bit per byte"))
    whiskers = base.mark_rule(color="#222222").encode(x="low:Q", x2="high:Q", color=alt.value("#222222"))
    subtitle = f"{rows[0]['model']}; 95 % intervals; weights {', '.join(size(row) for row in rows)}"
    chart = (bars + whiskers).properties(
        width=560, height=alt.Step(13), background="white", title=alt.Title(TITLE, subtitle=subtitle, anchor="start")
    )
    svg: str = vl_convert.vegalite_to_svg(chart.to_json())
    return svg + "\n"


def size(row: dict[str, Any]) -> str:
    """Return the bytes of a row's weights, as `113 MB`."""
    return f"{row['weight_bytes'] / 1e6:.0f} MB"


if __name__ == "__main__":
    write_atomically(PICTURE, draw(read_rows()).encode())
