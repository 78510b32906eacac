import itertools
import time
from dataclasses import replace

import pytest

from repro.errors import UserError
from repro.link import DirectionSignals, LinkSignals
from repro.link.watch import Series, watching


class Counting:
    """A link that carries 1000 bytes per question and dies at the question of that number."""

    def __init__(self, dies_at: int) -> None:
        self.asked = 0
        self.dies_at = dies_at

    def signals(self) -> LinkSignals:
        self.asked += 1
        if self.asked >= self.dies_at:
            raise UserError("gone")
        return LinkSignals(time.monotonic(), DirectionSignals(forwarded_bytes=1000.0 * self.asked))


def test_a_series_is_in_order_and_its_rates_come_from_differences() -> None:
    series = Series()
    assert series.latest is None
    first = LinkSignals(10.0, DirectionSignals(queue_bytes=5, forwarded_bytes=1000))
    series.add(first)
    series.add(replace(first, at_s=10.5, forward=DirectionSignals(forwarded_bytes=3000, dropped_segments=2)))
    rows = series.rows(origin_s=10.0)
    assert [row["at_s"] for row in rows] == [0.0, 0.5]
    assert [row["forwarded_bps"] for row in rows] == [0.0, 32_000.0]
    assert rows[1]["dropped_segments"] == 2
    assert series.latest is not None
    assert series.latest.at_s == 10.5
    assert series.rows("reverse")[1]["forwarded_bps"] == 0


def test_a_link_is_sampled_until_the_block_ends_and_a_dead_one_only_ends_the_series() -> None:
    link = Counting(dies_at=4)
    with watching(link, interval_s=0.005) as series:
        deadline = time.monotonic() + 10
        while link.asked < 4 and time.monotonic() < deadline:
            time.sleep(0.005)
    assert link.asked == 4
    moments = [row["at_s"] for row in series.rows()]
    assert len(moments) == 3
    assert all(later > earlier for earlier, later in itertools.pairwise(moments))


def test_an_interval_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="accepted: above 0"), watching(Counting(2), interval_s=0):
        pass
