"""The table of arms as Markdown and as LaTeX (booktabs): one row an arm, differences to the first below its means."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vgr.report.arms import COST
from vgr.report.page import figure, interval

TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}", **{c: f"\\{c}" for c in "&%$#_{}"},
       "−": "$-$", "…": r"\ldots{}", "°": r"$^\circ$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "×": r"$\times$",
       "–": "--"}  # fmt: skip


def markdown(found: Mapping[str, Any]) -> str:
    """The table of compare.json's content with what a reader must know below it, as Markdown."""
    head, rows = _rows(found)
    bold = {"better": "**better**", "worse": "**worse**", "differs": "**differs**"}

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def text(cell: Sequence[str]) -> str:
        value, difference, verdict = cell
        return "<br>".join(filter(None, (value, " ".join(filter(None, (difference, bold.get(verdict)))))))

    lines = [line([x.replace("|", r"\|") for x in head]), line(["---", *["---:"] * (len(head) - 1)])]
    lines += [line([text(c).replace("|", r"\|") for c in row]) for row in rows]
    return "\n\n".join(["\n".join(lines), *(textwrap.fill(x, 120) for x in _below(found))]) + "\n"


def latex(found: Mapping[str, Any]) -> str:
    """The same as a LaTeX table for the booktabs package."""
    head, rows = _rows(found)
    tex = _escaper()
    lines = [f"% {line}" for told in _below(found) for line in textwrap.wrap(told, 118)]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule"]
    lines += [" & ".join(tex(x) for x in head) + r" \\", r"\midrule"]
    for row in rows:
        lines.append(" & ".join(tex(value) for value, _, _ in row) + r" \\")
        if any(difference for _, difference, _ in row):
            small = [" ".join(filter(None, (tex(d), rf"\textbf{{{v}}}" if v else ""))) for _, d, v in row]
            lines.append(" & ".join(rf"\footnotesize {x}" if x else "" for x in small) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def published(study: Any, reference: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What compare.json tells of a study's published row: columns, values by arm, source and conditions.

    study: of vgr.studies; reference: the file of benchmarks/references it names.
    """
    values = {arm.name: dict(arm.published) for arm in study.arms if arm.published}
    if reference is None or not values:
        return None
    columns = {k: c for k, c in reference["columns"].items() if any(k in x for x in values.values())}
    return {"columns": columns, "values": values, **{k: reference[k] for k in ("source", "conditions", "doubt")}}


def costs(found: Mapping[str, Any]) -> dict[str, str]:
    """Heads of the columns of cost that some arm has."""
    return {k: head for k, head in COST.items() if any(k in a["cost"] for a in found["arms"])}


def seeds(arm: Mapping[str, Any]) -> str:
    """How many seeds an arm has, and which of them diverged, at which steps."""
    steps, told = sorted(arm["diverged"].values()), str(len(arm["seeds"]))
    if not steps:
        return told
    ends = " to ".join(f"{step:g}" for step in dict.fromkeys((steps[0], steps[-1])))
    return f"{told}, {len(steps)} diverged at step {ends}"


def _rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[tuple[str, str, str]]]]:
    """Heads, and by arm and column (value, difference, verdict)."""
    arrows, theirs = {"higher": " ↑", "lower": " ↓"}, found.get("published") or {"columns": {}, "values": {}}

    def head(told: Mapping[str, str]) -> str:
        return ", ".join(filter(None, (told["label"], told["unit"]))) + arrows.get(told["better"], "")

    heads = ["Arm", "Seeds", *map(head, found["metrics"].values()), *costs(found).values()]
    heads += [f"Published: {head(c)}" for c in theirs["columns"].values()]
    apart = {(c["arm"], c["metric"]): c for c in found["differences"]}
    rows = []
    for a in found["arms"]:
        row = [(a["label"], "", ""), (seeds(a), "", "")]
        for key in found["metrics"]:
            c = apart.get((a["arm"], key))
            row.append((_cell(a["metrics"].get(key)), _cell(c, True) if c else "", c["verdict"] if c else ""))
        row += [(f"{a['cost'][k]:.3g}" if k in a["cost"] else "–", "", "") for k in costs(found)]
        values = theirs["values"].get(a["arm"], {})
        rows.append(row + [(f"{values[k]:g}" if k in values else "–", "", "") for k in theirs["columns"]])
    return heads, rows


def _cell(cell: Mapping[str, Any] | None, signed: bool = False) -> str:
    text, ends = figure(cell), interval(cell)
    plus = "+" if signed and cell and (cell["value"] or 0) > 0 else ""
    return f"{plus}{text} ({ends})" if ends else plus + text


def _below(found: Mapping[str, Any]) -> list[str]:
    """Paragraphs below the table."""
    first = found["arms"][0]["label"]
    told = ["Mean over seeds and clips with its 95 % interval, both being a sample."]
    if tests := len(found["differences"]):
        told[0] += (f" Below it the paired difference to {first}, seed by seed and clip by clip; better and worse are "
                    f"what stands among all {tests} tests (Benjamini and Hochberg, 5 % false).")  # fmt: skip
    if theirs := found.get("published"):
        unlike = "; ".join(f"{c['label']}: {c['unlike']}" for c in theirs["columns"].values() if c.get("unlike"))
        told += [" ".join(filter(None, (f"Published: {theirs['source']}. {theirs['conditions']} {theirs['doubt']}",
                                        unlike and f"Not the same numbers: {unlike}.")))]  # fmt: skip
    return told + list(found["notes"])


def _escaper() -> Callable[[str], str]:
    table = str.maketrans(TEX)
    return lambda text: text.translate(table)
