from pathlib import Path

import pytest
import yaml

from repro.configuration import build, plain
from repro.errors import UserError
from repro.link.spec import LinkChange, LinkSpec, mean_rate_bps, read_trace
from repro.verbs.link import spec_of

PRESETS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf/link").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_link_that_says_where_its_numbers_come_from(preset: str) -> None:
    spec = spec_of([preset])
    assert spec.name == preset
    assert spec.source
    assert build(LinkSpec, yaml.safe_load(yaml.safe_dump(plain(spec)))) == spec


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"rate_bps": 0.0}, "link.rate_bps"),
        ({"rate_bps": -1.0}, "link.rate_bps"),
        ({"rtt_s": -0.1}, "link.rtt_s"),
        ({"loss": 1.5}, "link.loss"),
        ({"loss": 0.6, "loss_burst_segments": 4.0, "loss_in_burst": 0.5}, "link.loss"),
        ({"loss_burst_segments": 0.5}, "link.loss_burst_segments"),
        ({"backend": "wifi"}, "link.backend"),
        ({"jitter_distribution": "odd"}, "link.jitter_distribution"),
        ({"congestion_control": "warp"}, "link.congestion_control"),
        ({"rto_min_s": 0.0}, "link.rto_min_s"),
        ({"mtu_bytes": 100}, "link.mtu_bytes"),
        ({"queue_s": 0.0}, "link.queue_s"),
        ({"capacity_trace": "/nowhere"}, "link.capacity_trace"),
        ({"schedule": (LinkChange(1.0, rate_bps=1.0),)}, "link.schedule"),
        ({"rate_bps": 1e6, "schedule": (LinkChange(2.0, rtt_s=1.0), LinkChange(1.0, rtt_s=2.0))}, "link.schedule"),
        ({"schedule": (LinkChange(1.0, rtt_s=1.0, for_s=2.0), LinkChange(2.0, rtt_s=2.0))}, "link.schedule"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key_and_what_is_accepted(wrong: dict[str, object], key: str) -> None:
    with pytest.raises(UserError, match=key) as refusal:
        LinkSpec(**wrong)  # type: ignore[arg-type]
    assert "accepted" in str(refusal.value) or "must" in str(refusal.value) or "lasts" in str(refusal.value)


def test_a_change_that_changes_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="nothing changes"):
        LinkChange(1.0)


def test_an_outage_ends_in_what_was_before_it() -> None:
    spec = LinkSpec(rate_bps=1e9, rtt_s=0.02, schedule=(LinkChange(5.0, for_s=2.0, rate_bps=0.0),))
    assert [(c.at_s, c.rate_bps) for c in spec.conditions("forward")] == [(0.0, 1e9), (5.0, 0.0), (7.0, 1e9)]


def test_changes_add_up_and_one_at_the_end_of_another_replaces_its_end() -> None:
    spec = LinkSpec(
        rate_bps=1e9,
        schedule=(
            LinkChange(0.0, loss=0.01),
            LinkChange(1.0, for_s=1.0, rate_bps=0.0),
            LinkChange(2.0, rtt_s=0.1),
        ),
    )
    found = [(c.at_s, c.rate_bps, c.delay_s, c.loss) for c in spec.conditions("forward")]
    assert found == [(0.0, 1e9, 0.0, 0.01), (1.0, 0.0, 0.0, 0.01), (2.0, 1e9, 0.05, 0.01)]


def test_a_change_of_rate_hits_both_ways_only_of_a_symmetric_link() -> None:
    change = LinkChange(1.0, rate_bps=1e6)
    assert LinkSpec(rate_bps=1e9, schedule=(change,)).conditions("reverse")[-1].rate_bps == 1e6
    asymmetric = LinkSpec(rate_bps=1e9, reverse_rate_bps=5e6, schedule=(change,))
    assert asymmetric.conditions("forward")[-1].rate_bps == 1e6
    assert asymmetric.conditions("reverse")[-1].rate_bps == 5e6


def test_scaling_keeps_every_ratio_of_the_link() -> None:
    spec = LinkSpec(
        rate_bps=100e9, rtt_s=0.04, jitter_s=0.002, queue_bytes=10**6, schedule=(LinkChange(60.0, rate_bps=1e9),)
    )
    scaled = spec.scaled(time_scale=10, byte_scale=1000)
    assert scaled.rate_bps == pytest.approx(1e9)
    assert scaled.rtt_s == pytest.approx(0.004)
    assert scaled.schedule[0].at_s == pytest.approx(6)
    assert scaled.rto_min_s == pytest.approx(0.02)  # of the kernel's 0.2 s
    assert scaled.bdp_bytes() / (scaled.queue_bytes or 0) == pytest.approx(spec.bdp_bytes() / 10**6)
    assert spec.scaled(1, 1) is spec


def test_a_mahimahi_trace_carries_1500_bytes_per_line(tmp_path: Path) -> None:
    trace = tmp_path / "cell.trace"
    trace.write_text("1\n1\n2\n\n10\n")
    pieces = read_trace(str(trace))
    assert sum(duration for duration, _ in pieces) == pytest.approx(0.010)
    assert sum(duration * rate for duration, rate in pieces) == pytest.approx(4 * 1500 * 8)
    assert mean_rate_bps(pieces) == pytest.approx(4 * 1500 * 8 / 0.010)


def test_a_csv_trace_is_read_by_its_header(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("at_s,rate_bps\n0,1e6\n2,3e6\n3,0\n")
    assert read_trace(str(trace)) == ((2.0, 1e6), (1.0, 3e6))
    assert LinkSpec(capacity_trace=str(trace)).base_rate_bps("forward") == pytest.approx(5e6 / 3)


@pytest.mark.parametrize("text", ["", "5\n3\n", "x\n", "at_s,rate_bps\n0,1\n", "at_s,rate_bps\n0,1\n0,2\n"])
def test_a_broken_trace_is_refused_with_its_file(tmp_path: Path, text: str) -> None:
    trace = tmp_path / "broken.trace"
    trace.write_text(text)
    with pytest.raises(UserError, match=r"broken\.trace"):
        read_trace(str(trace))


def test_the_ideal_goodput_counts_ip_and_tcp_headers() -> None:
    assert LinkSpec(rate_bps=1e9).ideal_goodput_bps() == pytest.approx(1e9 * 1448 / 1500)
