"""The deployments on which simulator and live system are compared: drawn from a seed, within bounds, and able to serve."""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from repro import runner
from repro.composition import compose
from repro.errors import UserError
from repro.experiments.validate import Draw, Options, draws, finding
from repro.record.directory import REFERENCE, Record
from repro.settings import Settings


@pytest.fixture(scope="module")
def settings() -> Settings:
    return runner.prepare(compose(["experiment=validate", "tracking=disabled"])).settings


def first(settings: Settings, count: int = 40, **options: object) -> list[Draw]:
    return list(itertools.islice(draws(settings, replace(Options(), **options)), count))  # type: ignore[arg-type]


def test_the_same_seed_draws_the_same_deployments_and_another_seed_draws_others(settings: Settings) -> None:
    assert first(settings) == first(settings)
    assert first(settings) != first(replace(settings, seed=1))


def test_what_is_drawn_lies_within_its_bounds_and_can_serve(settings: Settings) -> None:
    options = Options()
    found = first(settings)
    for draw in found:
        row = draw.drawn()
        assert options.prfaas_instances[0] <= row["n_prfaas"] <= options.prfaas_instances[1]
        assert options.pd_instances[0] <= row["n_p"] + row["n_d"] <= options.pd_instances[1]
        for key, bounds in (("link_bps", options.rates_bps), ("rtt_s", options.rtts_s), ("load", options.loads)):
            assert bounds[0] <= row[key] <= bounds[1]
        assert row["rate_per_s"] == pytest.approx(row["load"] * draw.point.lambda_max)
        share = 1 - draw.point.offload_fraction
        assert options.threshold_shares[0] - 0.05 < share < options.threshold_shares[1] + 0.05
    varied = {key: {row.drawn()[key] for row in found} for key in ("n_prfaas", "n_p", "n_d", "link_bps", "mu")}
    assert all(len(values) > 2 for values in varied.values())


def test_bounds_that_cannot_be_drawn_between_are_refused_by_name() -> None:
    with pytest.raises(
        UserError, match=r"^options\.loads: \[0\.9, 0\.5\]; accepted: two rising numbers between 0\.01 and 0\.95"
    ):
        Options(loads=(0.9, 0.5))
    with pytest.raises(UserError, match=r"^options\.pd_instances: \[1, 4\]"):
        Options(pd_instances=(1, 4))


@pytest.mark.parametrize(("late_s", "named"), [(0.01, False), (8.1, True)], ids=["held", "not held"])
def test_a_deployment_whose_clock_was_not_held_is_named_with_how_late_it_was(
    late_s: float, named: bool, tmp_path: Path
) -> None:
    shutil.copytree(REFERENCE / "validate" / "emulate", tmp_path / "run")
    metrics = pd.read_csv(tmp_path / "run" / "metrics.csv")
    late = metrics["metric"] == "arrivals_late_p99_s"
    metrics.loc[late, "value"] = np.where(metrics.loc[late, "case"] == "deployment_2", late_s, 0.01)
    metrics.to_csv(tmp_path / "run" / "metrics.csv", index=False)
    words = finding(Record(tmp_path / "run"))
    said = "This machine did not hold the clock in deployment_2 (arrivals up to 8.1 s late)."
    assert words.endswith(said) == named
    assert ("hold the clock" in words) == named
