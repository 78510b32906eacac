"""Which scale an emulation gets: the fastest that this machine's timers hold, and a link that it can carry."""

from __future__ import annotations

import pytest

from repro.errors import UserError
from repro.serving.scale import Calibration, Scale, Scaling


def late(mean_s: float) -> Calibration:
    return Calibration(mean_s, 10 * mean_s, 100)


def test_the_later_timers_come_the_slower_time_runs() -> None:
    scales = [Scaling().scale(late(mean_s), 100e9).time for mean_s in (1e-5, 3e-4, 1e-3, 5e-3)]
    assert scales == [25.0, 25.0, 7.5, 1.0]


def test_a_machine_too_late_for_real_time_is_refused_unless_it_is_told_a_scale() -> None:
    with pytest.raises(UserError, match=r"options\.time_scale: timers of this machine come 20\.00 ms late"):
        Scaling().scale(late(0.02), 100e9)
    assert Scaling(time_scale=4.0).scale(late(0.02), 100e9).time == 4.0


def test_bytes_are_scaled_so_that_the_link_is_the_asked_one_here_and_never_grow() -> None:
    scale = Scaling(time_scale=20.0).scale(late(0.0), 100e9)
    assert 100e9 * scale.time / scale.bytes == pytest.approx(1e9)
    assert Scaling(time_scale=2.0).scale(late(0.0), 1e6).bytes == 1.0
    assert Scaling(time_scale=2.0, byte_scale=7.0).scale(late(0.0), 1e12).bytes == 7.0
    assert Scaling(time_scale=20.0).scale(late(0.0), None) == scale


def test_a_moment_is_scaled_there_and_back() -> None:
    scale = Scale(20.0, 1.0, origin_s=100.0)
    assert scale.virtual_s(101.5) == pytest.approx(30.0)
    assert scale.wall_s(scale.virtual_s(101.5)) == pytest.approx(101.5)
