"""A W&B Report built by code: what was found, a section per claim with the paper's value beside ours, panels of the runs.

Without a service its specification is saved as JSON, and report.html has the same content. Panels need runs that the service knows, so a
specification that is only saved holds none. W&B names blocks at random; here they are numbered, so the same records give the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from repro.record.directory import Record
from repro.record.metrics import each
from repro.report.comparison import compare, percent, readable
from repro.report.words import label


def build(records: Sequence[Record], title: str, entity: str, project: str, *, panels: bool) -> Any:
    """The Report, not yet saved."""
    from wandb_workspaces.reports import v2  # half a second that only this needs

    wr: Any = v2

    claims = compare(records)
    blocks: list[Any] = [wr.TableOfContents()]
    for record in records:
        if sentence := record.provenance.get("finding"):
            blocks.append(wr.P(sentence))
    blocks.append(wr.H1("Paper and measured"))
    lines = ["| claim | paper | ours | deviation | verdict |", "|---|---|---|---|---|"]
    for row in each(claims):
        lines.append(
            f"| {row.statement} | {readable(row.paper, row.unit)} | {readable(row.ours, row.unit)} | {percent(row.deviation_pct)} | "
            f"{row.verdict} |"
        )
    blocks.append(wr.MarkdownBlock("\n".join(lines)))
    for where, own in claims.groupby("where", sort=False):
        blocks.append(wr.H2(str(where)))
        blocks += [
            wr.MarkdownBlock(f"**{row.verdict}**: {row.statement} {row.experiment}, {row.tier}.") for row in each(own)
        ]
    for record in records:
        command = " ".join(record.provenance.get("command", [])[1:])
        blocks.append(wr.H2(f"{record.configuration['name']}, tier {record.configuration['tier']}"))
        blocks.append(wr.MarkdownBlock(f"```sh\npython -m repro {command}\n```"))
        if panels:
            blocks.append(_panels(wr, record, entity, project))
    return wr.Report(project=project, entity=entity, title=title, description=f"{len(claims)} claims", blocks=blocks)


def _panels(wr: Any, record: Record, entity: str, project: str) -> Any:
    """The run's own group: a bar for each of its first metrics, and its series."""
    table = record.metrics.dropna(subset=["value"]).head(8)
    keys = [f"{row.tier}/{row.case}/{row.metric}" for row in each(table)]
    runs = wr.Runset(entity=entity, project=project, name=record.path.parent.name, query=record.path.parent.name)
    bars = [wr.BarPlot(title=label(key.rpartition("/")[2]), metrics=[wr.SummaryMetric(key)]) for key in keys]
    return wr.PanelGrid(runsets=[runs], panels=bars)


def specification(report: Any) -> str:
    """The Report as JSON, with its blocks' random names numbered."""
    text = report._to_model().model_dump_json(by_alias=True)
    names: dict[str, str] = {}

    def numbered(found: re.Match[str]) -> str:
        return f'"id":"{names.setdefault(found.group(1), f"block{len(names)}")}"'

    value = json.loads(re.sub(r'"id":"([^"]+)"', numbered, text))
    return json.dumps(_undated(value), indent=1, sort_keys=True) + "\n"


def _undated(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _undated(item) for key, item in value.items() if key not in ("createdAt", "updatedAt")}
    return [_undated(item) for item in value] if isinstance(value, list) else value
