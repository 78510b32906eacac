"""The fit of TCP's law, without a link."""

from __future__ import annotations

import math
from dataclasses import asdict

import pandas as pd
import pytest

from repro.errors import UserError
from repro.experiments.link_law import Condition, Options, fitted
from repro.link import LinkSpec
from repro.link.tcp_model import TcpPath, chain_bps


def test_the_fit_finds_the_constants_that_made_the_measurements() -> None:
    link = LinkSpec(rate_bps=1e9)
    conditions = (Condition(0.01, 1e-2, "cubic", 16), Condition(0.04, 1e-2, "cubic", 16))
    rows = [
        {
            **asdict(one),
            "measured_bps": chain_bps(
                TcpPath(**asdict(one), window_bytes=math.inf, link_bps=link.ideal_goodput_bps()), 2, 0.0005
            ),
        }
        for one in conditions
    ]
    rounds, host_s = fitted(link, pd.DataFrame(rows))
    assert rounds == 2
    assert host_s == pytest.approx(0.0005, abs=1e-4)


def test_no_condition_is_both_fitted_and_held_out() -> None:
    options = Options()
    assert not set(options.fitted) & set(options.held_out)
    with pytest.raises(UserError, match=r"options\.held_out"):
        Options(held_out=options.fitted)
