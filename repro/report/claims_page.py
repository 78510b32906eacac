"""CLAIMS.md: for each claim of the paper the command that tests it, how long that took on which machine, what to expect and how near.

It is what an artifact committee asks for, made from the reference records; nothing in it is written by hand.
"""

from __future__ import annotations

from collections.abc import Sequence

from repro.paper.claims import CLAIMS
from repro.record.directory import Record
from repro.record.metrics import each
from repro.report.comparison import compare, readable


def page(records: Sequence[Record]) -> str:
    """The page as Markdown."""
    claims = compare(records, only_run=False)
    counts = ", ".join(f"{count} {name}" for name, count in claims["verdict"].value_counts().items())
    lines = [
        "# Claims", "",
        f"Made from the records of `results/reference` by `python -m repro figures`: {len(CLAIMS)} claims, {counts}. *Input*: "
        "the paper's value was used to calibrate an input, or is repeated from it, so agreement confirms nothing.", "",
    ]  # fmt: skip
    for key, own in claims.groupby(["experiment", "tier"], sort=False):
        experiment, tier = str(key[0]), str(key[1])
        lines += [f"## {experiment}, tier {tier}", "", *_made(records, experiment, tier), ""]
        lines += ["| claim | where | expected | tolerance | here | verdict |", "|---|---|---|---|---|---|"]
        for row in each(own):
            lines.append(
                f"| {row.statement} | {row.where} | {readable(row.paper, row.unit)} | {row.tolerance} | {readable(row.ours, row.unit)} | "
                f"{row.verdict} |"
            )
        lines.append("")
    return "\n".join(lines)


def _made(records: Sequence[Record], experiment: str, tier: str) -> list[str]:
    """Command, time and hardware of the record behind a group of claims."""
    command = f"python -m repro experiment={experiment} tier={tier}"
    for record in records:
        if (record.configuration["name"], record.configuration["tier"]) == (experiment, tier):
            known = record.provenance
            machine, elapsed = known["machine"], known.get("elapsed_s")
            took = f"{elapsed:.0f} s" if isinstance(elapsed, (int, float)) and elapsed >= 1 else "under a second"
            gpus = ", ".join(machine["gpus"]) or "no GPU"
            return [
                f"- command: `{command}`",
                f"- time: {took}, without starting Python",
                f"- hardware: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {gpus}",
                f"- commit: {known['git']['commit']}{', with uncommitted changes' if known['git']['dirty'] else ''}",
            ]
    return [f"- command: `{command}`", "- no reference record"]
