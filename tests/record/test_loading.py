"""Records read back: many as one frame, two compared, one checked against the schema, and none with a secret in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from repro.errors import UserError
from repro.record import load, pairing
from repro.record.checking import check
from repro.record.directory import Record, RunDirectory
from repro.record.metrics import Metric
from repro.record.pairing import Side

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"


def made(folder: Path, values: dict[str, Any], metrics: list[Metric], samples: pd.DataFrame | None = None) -> Record:
    directory = RunDirectory(folder)
    directory.begin({"name": "simulation", "tier": "simulate", **values}, ["repro"], {"seed": 0})
    directory.write_metrics(metrics)
    if samples is not None:
        directory.write_table("samples", samples)
    return directory.complete()


def goodput(value: float, source: str = "simulated", half: float = 0.1) -> Metric:
    low, high = (value - half, value + half) if source == "simulated" else (float("nan"), float("nan"))
    return Metric("simulation", "simulate", "deployment", "goodput", value, "req/s", source, low, high, 4)


def by_seed(values: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"case": "deployment", "seed": range(len(values)), "metric": "goodput", "value": values})


def test_the_frame_has_a_column_for_each_key_that_differs(tmp_path: Path) -> None:
    for rate in (1e9, 2e9):
        made(tmp_path / "simulation" / f"r{rate:g}", {"link": {"rate_bps": rate, "rtt_s": 0.1}}, [goodput(rate / 1e9)])
    frame = load(f"{tmp_path}/**")
    assert list(frame["link.rate_bps"]) == [1e9, 2e9]
    assert list(frame["value"]) == [1.0, 2.0]
    assert "link.rtt_s" not in frame
    assert len(load(tmp_path / "simulation", tmp_path)) == 2, "each run once"
    with pytest.raises(UserError, match="no finished run"):
        load(tmp_path / "nothing")


def test_reading_needs_neither_torch_nor_hydra() -> None:
    code = "import sys; from repro.record import load; load(sys.argv[1]); print({'torch', 'hydra'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(REFERENCE / "table6")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_every_committed_record_fits_the_schema() -> None:
    for done in sorted(REFERENCE.rglob("DONE")):
        assert check(done.parent) == []


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda run: (run / "DONE").unlink(), "neither DONE nor FAILED.json"),
        (lambda run: (run / "FAILED.json").write_text("{}"), "both DONE and FAILED.json"),
        (lambda run: (run / "config.yaml").write_text("[1"), "config.yaml: cannot be read"),
        (lambda run: (run / "provenance.json").write_text('{"schema": 99}'), "schema 99 is unknown"),
        (lambda run: (run / "metrics.csv").write_text("a,b\n1,2\n"), "column experiment is missing"),
        (lambda run: rewrite(run, "simulated", "guessed"), "source 'guessed'"),
        (lambda run: rewrite(run, ",1.9,", ",2.9,"), "has an interval from 2.9 down to 2.1"),
        (lambda run: rewrite(run, "\n", "\n", twice=True), "goodput of case deployment stands twice"),
        (lambda run: (run / "config.yaml").write_text(f"name: hf_{'a' * 34}"), "looks like a secret"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_what_is_wrong_with_a_record_is_said_in_one_line(tmp_path: Path, harm: Any, said: str) -> None:
    run = made(tmp_path / "run", {}, [goodput(2.0)]).path
    assert check(run) == []
    harm(run)
    assert any(said in line for line in check(run)), check(run)


def rewrite(run: Path, old: str, new: str, *, twice: bool = False) -> None:
    text = (run / "metrics.csv").read_text()
    text = text + text.splitlines()[1] + "\n" if twice else text.replace(old, new)
    (run / "metrics.csv").write_text(text)


def test_no_secret_enters_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "-".join(
        ("correct", "horse", "battery")
    )  # in pieces, for a record holds uncommitted changes such as this line
    monkeypatch.setenv("SERVICE_API_KEY", secret)
    directory = RunDirectory(tmp_path / "run")
    directory.begin({"name": "x", "note": secret}, ["repro", f"a=hf_{'b' * 34}"], {})
    directory.complete()
    text = "".join(path.read_text() for path in (tmp_path / "run").iterdir())
    assert secret not in text
    assert "b" * 30 not in text
    assert text.count("<redacted>") >= 2
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["schema"] == 2


def test_a_difference_within_seeds_is_seen_where_seeds_differ_more(tmp_path: Path) -> None:
    seeds = [1.0, 2.0, 3.0, 4.0]
    a = made(tmp_path / "a", {"policy": 1}, [goodput(2.5, half=2.0)], by_seed(seeds))
    b = made(
        tmp_path / "b",
        {"policy": 2},
        [goodput(2.6, half=2.0)],
        by_seed([v + d for v, d in zip(seeds, (0.09, 0.1, 0.11, 0.1), strict=True)]),
    )
    (row,) = pairing.compare(Side.of("a", [a]), Side.of("b", [b])).to_dict("records")
    assert (row["how"], row["n"], row["verdict"]) == ("paired", 4, "higher")
    assert row["low"] < 0.1 < row["high"]
    assert row["repeats_for_2_pct"] >= 2


def test_without_common_seeds_wide_intervals_make_it_noise(tmp_path: Path) -> None:
    a = made(tmp_path / "a", {}, [goodput(2.5, half=2.0)])
    b = made(tmp_path / "b", {}, [goodput(2.6, half=2.0)])
    (row,) = pairing.compare(Side.of("a", [a]), Side.of("b", [b])).to_dict("records")
    assert (row["how"], row["verdict"]) == ("independent", "noise")
    assert row["high"] - row["difference"] == pytest.approx(np.hypot(2, 2))


def test_runs_that_differ_in_seed_alone_are_one_side(tmp_path: Path) -> None:
    def side(name: str, shift: float) -> Side:
        found = [
            made(tmp_path / name / str(seed), {"seed": seed, "x": shift}, [goodput(seed + shift)]) for seed in range(5)
        ]
        return Side.of(name, found)

    (row,) = pairing.compare(side("a", 0.0), side("b", 0.5)).to_dict("records")
    assert (row["how"], row["n"], row["verdict"]) == ("paired", 5, "higher")
    assert row["difference"] == pytest.approx(0.5)
    mixed = [made(tmp_path / "m" / str(x), {"x": x}, [goodput(1.0)]) for x in (1, 2)]
    with pytest.raises(UserError, match="its 2 runs differ in x"):
        Side.of("m", mixed)


def test_computed_values_have_no_noise(tmp_path: Path) -> None:
    a, b = (made(tmp_path / str(v), {}, [goodput(v, "computed")]) for v in (2.0, 2.001))
    (row,) = pairing.compare(Side.of("a", [a]), Side.of("b", [b])).to_dict("records")
    assert (row["how"], row["verdict"]) == ("exact", "higher")
    (row,) = pairing.compare(Side.of("a", [a]), Side.of("a", [a])).to_dict("records")
    assert row["verdict"] == "equal"
