"""The tables of docs/peers.md and the first one of the README, from the rows of `peers_table`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def tables(stored: list[dict[str, Any]], variants: Collection[str] = ()) -> dict[str, str]:
    """Return the Markdown tables of every model's rows by name; what of `variants` has no row is named below."""
    found: dict[str, str] = {}
    for model in dict.fromkeys(row["model"] for row in stored):
        rows = [row for row in stored if row["model"] == model and "failed" not in row]
        if rows:
            found |= {
                f"{model}": table(rows) + missing(rows, variants),
                f"{model}-languages": by_language(rows),
                f"{model}-cost": costs(rows),
            }
            found[f"{model}-beginnings"] = by_beginning(rows)
    return found


def missing(rows: list[dict[str, Any]], variants: Collection[str]) -> str:
    """Return which variants were not measured, as a paragraph; empty where all were."""
    left = [name for name in variants if name not in {row["variant"] for row in rows}]
    return f"\nNot measured yet, or failed: {'; '.join(left)}.\n" if left else ""


def front(stored: list[dict[str, Any]]) -> dict[str, str]:
    """Return the table of the README from one model's rows: bytes, loss, and what making each took.

    Without our rows that differ from another of ours in the weights of languages alone.
    """
    rows = {row["variant"]: row for row in stored if "failed" not in row}
    shown_rows = [
        row for row in rows.values() if row["calibration"] != "English" and "weights" not in row.get("request", {})
    ]
    head = ["checkpoint", "MB", "worst language", "mean", "CPU s", "most memory"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    if english := [row for row in rows.values() if row["calibration"] == "English"]:
        lines = ["| " + " | ".join([*head, "worst, calibrated in English"]) + " |", "|---|" + "---:|" * len(head)]
    for row in shown_rows:
        cells = [row["variant"], f"{row['weight_bytes'] / 1e6:.1f}", figure(row["worst_kl"]), figure(row["mean_kl"])]
        cells += [f"{row['cpu_seconds']:.0f}", f"{row['peak_rss_bytes'] / 1e9:.1f} GB"]
        if english:
            other = rows.get(f"{row['variant']}, English")
            cells.append("" if other is None else figure(other["worst_kl"]))
        lines.append("| " + " | ".join(cells) + " |")
    return {"peers": "\n".join([*lines, ""])} if rows else {}


def table(rows: list[dict[str, Any]]) -> str:
    """Return bytes, worst and mean KL of every variant, and the paired differences to ours."""
    lines = [
        "| checkpoint | calibration | MB | worst KL | mean KL | worst beyond ours | mean beyond ours |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    digits = places(rows)
    for row in rows:
        own = row is rows[0]
        beyond = ["", ""] if own else [difference(row, key, digits) for key in ("worst", "mean")]
        calibration = row["calibration"] + (
            f", {row['request']['tokens']} tokens" if "tokens" in row["request"] else ""
        )
        cells = [shown(row), calibration]
        cells += [f"{row['weight_bytes'] / 1e6:.1f}", *(figure(row[key], digits) for key in ("worst_kl", "mean_kl"))]
        cells += beyond
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"On {rows[0]['sentences']} sentences of each language.", ""])


def by_language(rows: list[dict[str, Any]]) -> str:
    """Return the KL of every language, a line a variant."""
    languages = list(rows[0]["kl"])
    lines = ["| checkpoint | calibration | " + " | ".join(languages) + " |", "|---|---|" + "---:|" * len(languages)]
    for row in rows:
        cells = [f"{1000 * row['kl'][language]['estimate']:.{places(rows)}f}" for language in languages]
        lines.append("| " + " | ".join([shown(row), row["calibration"], *cells]) + " |")
    return "\n".join([*lines, ""])


def by_beginning(rows: list[dict[str, Any]]) -> str:
    """Return the worst KL behind each beginning and, but for ours, the paired difference to ours behind the same."""
    starts = list(rows[0]["beginnings"])
    lines = ["| checkpoint | calibration | as usual | " + " | ".join(starts) + " |"]
    lines.append("|---|---|" + "---:|" * (1 + len(starts)))
    for row in rows:
        cells = [shown(row), row["calibration"]]
        for found in (row, *(row["beginnings"][start] for start in starts)):
            beyond = "" if row is rows[0] else f"; {difference(found, 'worst', places(rows))}"
            cells.append(figure(found["worst_kl"], places(rows)) + beyond)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def shown(row: dict[str, Any]) -> str:
    """Return a variant's name without its calibration, which has a column of its own."""
    return str(row["variant"]).removesuffix(", English").removesuffix(", no calibration")


def costs(rows: list[dict[str, Any]]) -> str:
    """Return what making each took, and by which versions."""
    lines = ["| checkpoint | CPU s | wall s | most memory | versions | our revision |", "|---|---:|---:|---:|---|---|"]
    for row in rows:
        own = package_names(row["tool"])
        versions = ", ".join(f"{name} {row['tool_versions'][name]}" for name in own if name in row["tool_versions"])
        cells = [row["variant"], f"{row['cpu_seconds']:.0f}", f"{row['wall_seconds']:.0f}"]
        cells += [f"{row['peak_rss_bytes'] / 1e9:.2f} GB", versions, f"{row['made_at']}, measured {row['revision']}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def package_names(tool: str) -> tuple[str, ...]:
    """Return the packages whose versions the page names."""
    named = {
        "ours": "quant-fairness",
        "autoround": "auto-round",
        "llmcompressor": "llmcompressor",
        "llamacpp": "llama-cpp-python",
    }
    return named.get(tool, tool), "transformers", "torch"


def places(rows: list[dict[str, Any]]) -> int:
    """Return the decimals of a table's thousandths: one where no checkpoint loses as much as 20 of them."""
    return int(all(row["worst_kl"].get("estimate", 0) < 0.02 for row in rows))


def figure(value: dict[str, Any], digits: int = 0) -> str:
    """Return `419 [388, 455]`, thousandths."""
    if "undefined" in value:
        return "undefined"
    estimate, low, high = (f"{1000 * value[key]:.{digits}f}" for key in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"


def difference(row: dict[str, Any], key: str, digits: int = 0) -> str:
    """Return what a checkpoint loses beyond ours; a dash where ours is made anew and its sentences are not kept."""
    return signed(row["beyond_ours"][key], digits) if "beyond_ours" in row else "–"


def signed(value: dict[str, Any], digits: int = 0) -> str:
    """Return `+41 [+8, +75]`, thousandths."""
    if "undefined" in value:
        return "undefined"
    estimate, low, high = (f"{1000 * value[key]:+.{digits}f}" for key in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"
