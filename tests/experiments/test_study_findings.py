"""What a comparison found is computed from its record, and a tuned baseline is the best of its candidates."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pandas as pd
import pytest

from repro.composition import compose
from repro.experiments import agentic, base, study_findings
from repro.experiments.simulated import Setting
from repro.record.directory import REFERENCE, Record
from repro.report.figures import records
from repro.workload.stream import Independent

KEPT = [record for record in records(REFERENCE) if record.provenance.get("finding")]


@pytest.mark.parametrize("record", KEPT, ids=lambda record: f"{record.path.parent.name}/{record.path.name}")
def test_a_kept_finding_follows_from_its_record(record: Record) -> None:
    finding = base.load(record.configuration["name"]).finding
    assert finding is not None
    assert finding(record) == record.provenance["finding"]


def found(**differences: tuple[float, float, float]) -> str:
    rows = [
        {"case": case, "metric": "goodput_minus_static", "value": value, "ci_low": low, "ci_high": high}
        for case, (value, low, high) in differences.items()
    ]
    return study_findings.goodput(cast(Any, SimpleNamespace(metrics=pd.DataFrame(rows))))


def test_the_largest_gain_and_loss_are_named_with_their_intervals() -> None:
    said = found(short_term=(0.2, 0.1, 0.3), two_timescale=(0.4, 0.2, 0.6), naive=(-1.0, -1.5, -0.5))
    assert "most is gained by both timescales (+0.40 req/s; +0.20 to +0.60)" in said
    assert "most is lost by naive heterogeneous (-1.00 req/s; -1.50 to -0.50)" in said
    assert "no measurable" not in said


def test_a_difference_whose_interval_holds_zero_is_none() -> None:
    said = found(short_term=(0.4, -0.1, 0.9), naive=(-1.0, -1.5, 0.5))
    assert said == "Goodput against static t: no measurable difference by short-term only, naive heterogeneous."


def test_the_static_threshold_is_the_best_of_its_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of two that serve as much, the one that answers sooner.
    outcomes = {500.0: (2.0, 9.0), 2000.0: (3.0, 5.0), 8000.0: (3.0, 4.0)}
    settings, options = _agentic(tuple(outcomes))

    def measured(_context: object, _measuring: object, points: dict[str, Any]) -> list[Any]:
        goodput = [outcomes[point.spec.scheduler.threshold_tokens] for point in points.values()]
        return [SimpleNamespace(values={"goodput": served, "ttft_mean_s": ttft}) for served, ttft in goodput]

    monkeypatch.setattr(agentic, "run_points", measured)
    context = cast(Any, SimpleNamespace(settings=settings, options=options))
    spec = Setting.of(context).policies()["static"]

    def never(_seed: int) -> list[Independent]:
        return []

    (best,) = agentic._best_static(context, {"": (spec, never)})
    assert best.scheduler.threshold_tokens == 8000.0


def _agentic(thresholds: tuple[float, ...]) -> tuple[Any, agentic.Options]:
    settings = compose(["experiment=agentic", "policy.threshold_step_tokens=4000"]).settings
    return settings, agentic.Options(static_thresholds=thresholds)
