"""The instances of `tiers` are as slow as the profile that predicts them was measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest

from repro.composition import compose
from repro.errors import UserError
from repro.experiments import tiers
from repro.experiments.base import Context
from repro.experiments.computed import prefill_over_profile
from repro.experiments.table3 import one_model
from repro.profiles.presets import load_profile
from repro.record.directory import Record
from repro.serving.torch_instance import TorchInstanceConfig

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"


class StoppedError(Exception):
    """Before anything is measured."""


@pytest.mark.parametrize("slowdown", [1.0, 4.0])
def test_an_instance_rests_as_long_as_it_did_while_its_profile_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slowdown: float
) -> None:
    settings, options = (
        compose(["experiment=tiers", "workload.slo.tokens_per_s=7"]).settings,
        tiers.Options(slowdown=slowdown),
    )
    measured = list[float]()

    def measuring(_context: Any, _model: Any, _law: Any, _repeats: int, *speeds: float) -> Any:
        measured.extend(speeds)
        raise StoppedError

    monkeypatch.setattr(tiers, "measured_profile", measuring)
    with pytest.raises(StoppedError):
        tiers.run(Context(settings, options, tmp_path, lambda _: None))
    assert measured == [slowdown, 7.0]
    computing = options.computing(one_model(settings))
    for name in ("prfaas0.0", "pd0.0", "pd0.1"):
        config = computing.config(name, settings.transport, None, 1, settings.seed)
        assert isinstance(config, TorchInstanceConfig)
        assert config.engine.slowdown == slowdown


def test_faster_than_this_machine_is_refused() -> None:
    with pytest.raises(UserError, match=r"^options.slowdown: 0.5; accepted: 1 \(as fast as this machine\) or more$"):
        tiers.Options(slowdown=0.5)


def test_its_finding_says_what_crossed_and_where_nothing_did_says_that() -> None:
    record = Record(REFERENCE / "tiers" / "execute")
    assert "(computed) of the simulated." in tiers.finding(record)
    table = record.metrics
    alone = SimpleNamespace(metrics=table[table["metric"] != "egress_bps_over_simulated"])
    assert tiers.finding(cast("Record", alone)).endswith("times what their profile says. Nothing crosses the link.")


def test_prefills_are_held_against_the_profile_at_their_own_lengths(tmp_path: Path) -> None:
    profile, tokens = load_profile("paper_1t_h200", tmp_path), np.array([1000.0, 8000.0, 32000.0])
    served = pd.DataFrame(
        {"input_tokens": tokens, "prefill_s": np.asarray(profile.prefill_s(tokens)) * [0.5, 1.25, 3.0]}
    )
    assert prefill_over_profile(served, profile) == pytest.approx(1.25)
