"""Fragments for a paper in LaTeX: the claims as a table, each figure as a float, and a small document that holds them all.

`claims.tex` and `figures.tex` are for \\input into a paper of one's own; `paper.tex` compiles by itself. Every fragment says in a comment
which run it comes from, by commit and command.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from repro.presets import choice_of, choices
from repro.record.directory import Record
from repro.report import latex, style
from repro.report.comparison import compare
from repro.report.figures import Figures, redraw
from repro.report.words import label

_DOCUMENT = r"""\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage{booktabs}
\usepackage{graphicx}
\begin{document}
%s
\end{document}
"""


def write(folder: Path, records: Sequence[Record], figures: Sequence[Figures], column: style.Column) -> Path:
    """Write the fragments of these records, each with the figures that it draws; returns the path of paper.tex."""
    folder.mkdir(parents=True, exist_ok=True)
    inputs = []
    claims = compare(records)
    if len(claims):
        (folder / "claims.tex").write_text(_made_by(records) + latex.claims(claims))
        inputs.append("claims")
    floats = [_float(folder, record, drawn, column) for record, drawn in zip(records, figures, strict=True)]
    if any(floats):
        (folder / "figures.tex").write_text("% needs \\usepackage{graphicx}\n" + "".join(floats))
        inputs.append("figures")
    paper = folder / "paper.tex"
    paper.write_text(_DOCUMENT % "\n".join(f"\\input{{{name}}}" for name in inputs))
    return paper


def _float(folder: Path, record: Record, drawn: Figures, column: style.Column) -> str:
    """Every figure of a record as a float, its PDF beside the fragments."""
    experiment, tier = record.configuration["name"], record.configuration["tier"]
    group, choice = choice_of(experiment)
    question = choices(group).get(choice, "")
    text = ""
    for png in redraw(record, folder / "figures" / f"{experiment}-{tier}", drawn, for_print=True, column=column):
        png.unlink()
        pdf = png.with_suffix(".pdf")
        star = "" if column == "single" else "*"
        caption = latex.escape(
            f"{label(png.stem)}: {question} (tier {tier})" if question else f"{label(png.stem)}, {tier}"
        )
        text += "\n".join([
            _made_by([record]).rstrip("\n"),
            f"\\begin{{figure{star}}}", "\\centering", f"\\includegraphics[width=\\linewidth]{{{pdf.relative_to(folder)}}}",
            f"\\caption{{{caption}}}", f"\\label{{fig:{experiment}-{tier}-{png.stem.replace('_', '-')}}}", f"\\end{{figure{star}}}", "",
        ])  # fmt: skip
    return text


def _made_by(records: Sequence[Record]) -> str:
    """A comment for each record: its run, commit and command."""
    lines = []
    for record in records:
        git, command = record.provenance.get("git", {}), record.provenance.get("command", [])
        changed = ", with uncommitted changes" if git.get("dirty") else ""
        lines.append(
            f"% run {record.path.name}, commit {git.get('commit')}{changed}: {' '.join(['repro', *command[1:]])}"
        )
    return "".join(" ".join(line.split()) + "\n" for line in lines)
