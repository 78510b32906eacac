"""A link that is brought to one condition after another while it stays open."""

from __future__ import annotations

import pytest

from repro.link import LinkSpec, open_link
from repro.link.conditions import go_to, measured, scheduled


def test_a_link_goes_to_any_of_its_conditions_and_back() -> None:
    asked = ((1e8, 0.03), (2e7, 0.01))
    specs = [LinkSpec(rate_bps=rate, rtt_s=rtt, queue_s=0.02, backend="relay") for rate, rtt in asked]
    with open_link(scheduled(specs), run="conditions") as link:
        for number in (1, 0):
            go_to(link, number)
            found = measured(link, specs[number])
            assert found.rate_share == pytest.approx(1.0, abs=0.15)
            assert found.rtt_s == pytest.approx(specs[number].rtt_s, abs=0.005)
