"""The instances of `tiers` are as slow as the profile that predicts them was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from repro.composition import compose
from repro.errors import UserError
from repro.experiments import tiers
from repro.experiments.base import Context
from repro.experiments.table3 import one_model
from repro.serving.torch_instance import TorchInstanceConfig


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
