"""Reference records: a finished run and its parts, small, and still whole where they are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from repro.composition import compose
from repro.errors import UserError
from repro.record.directory import Record, RunDirectory
from repro.report.figures import records
from repro.runner import parts_of, run
from repro.verbs.keep import keep


@pytest.fixture
def finished(tmp_path: Path) -> Record:
    overrides = ["options.parts=[figure2]", f"results={tmp_path / 'results'}", "tracking=disabled"]
    return run(compose(overrides), ["repro", *overrides], lambda line: None)


def test_a_kept_case_study_brings_its_parts_and_finds_them(finished: Record, tmp_path: Path) -> None:
    kept = keep(finished.path, tmp_path / "reference")
    (part,) = parts_of(Record(kept))
    assert part.path == tmp_path / "reference" / "figure2" / "model"
    assert part.metrics.equals(parts_of(finished)[0].metrics)
    assert not list((tmp_path / "reference").rglob("*.png"))


def test_a_run_that_is_not_finished_is_not_kept(finished: Record, tmp_path: Path) -> None:
    (finished.path / "DONE").unlink()
    with pytest.raises(UserError, match="no finished run"):
        keep(finished.path, tmp_path / "reference")
    assert not (tmp_path / "reference").exists()


def test_a_benchmarks_record_is_kept_by_its_folders_name_and_draws_no_figure(tmp_path: Path) -> None:
    run_directory = RunDirectory(tmp_path / "results" / "bench_search" / "all-0123")
    run_directory.begin({"repeats": 3}, ["bench", "search"], {})
    run_directory.write_metrics([])
    record = run_directory.complete()
    kept = keep(record.path, tmp_path / "reference")
    assert kept == tmp_path / "reference" / "bench_search" / "all-0123"
    assert Record(kept).configuration == {"repeats": 3}
    assert records(tmp_path / "reference") == []


def bench_record(folder: Path, *, dirty: bool, **configuration: object) -> Path:
    run_directory = RunDirectory(folder / "bench_search" / "all")
    run_directory.begin({"results": str(folder), **configuration}, ["bench", "search"], {})
    run_directory.write_metrics([])
    git = {"commit": "0" * 40, "dirty": dirty, "diff": ""}
    run_directory.add_provenance({"git": git})
    return run_directory.complete().path


def test_a_reference_record_is_replaced_by_a_run_of_its_own_configuration(tmp_path: Path) -> None:
    kept = keep(bench_record(tmp_path / "one", dirty=True, repeats=3), tmp_path / "reference")
    again = bench_record(tmp_path / "two", dirty=False, repeats=3)
    assert keep(again, tmp_path / "reference") == kept
    assert Record(kept).configuration["results"] == str(tmp_path / "two")


def test_a_reference_record_is_not_replaced_by_another_configuration_unless_told(tmp_path: Path) -> None:
    kept = keep(bench_record(tmp_path / "one", dirty=False, repeats=3), tmp_path / "reference")
    other = bench_record(tmp_path / "two", dirty=False, repeats=4, inner={"load": 0.5})
    with pytest.raises(UserError, match=r"differs from .* in inner\.load, repeats; .*--replace"):
        keep(other, tmp_path / "reference")
    assert Record(kept).configuration["repeats"] == 3
    keep(other, tmp_path / "reference", replace=True)
    assert Record(kept).configuration["repeats"] == 4


def test_a_reference_record_is_not_replaced_by_uncommitted_code_unless_told(tmp_path: Path) -> None:
    kept = keep(bench_record(tmp_path / "one", dirty=False, repeats=3), tmp_path / "reference")
    dirty = bench_record(tmp_path / "two", dirty=True, repeats=3)
    with pytest.raises(UserError, match=r"ran with uncommitted changes"):
        keep(dirty, tmp_path / "reference")
    assert Record(kept).configuration["results"] == str(tmp_path / "one")
    keep(dirty, tmp_path / "reference", replace=True)
    assert Record(kept).configuration["results"] == str(tmp_path / "two")


def test_a_case_study_whose_part_may_not_be_replaced_replaces_nothing(finished: Record, tmp_path: Path) -> None:
    kept = keep(finished.path, tmp_path / "reference")
    part = tmp_path / "reference" / "figure2" / "model"
    held = (part / "config.yaml").read_text().replace("seed: ", "seed: 1")
    (part / "config.yaml").write_text(held)
    (kept / "metrics.csv").write_text("as it was")
    with pytest.raises(UserError, match=r"differs from .*figure2.* in "):
        keep(finished.path, tmp_path / "reference")
    assert (kept / "metrics.csv").read_text() == "as it was"
