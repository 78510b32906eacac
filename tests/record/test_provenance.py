"""Where a result came from: enough to run it again, and nothing that leads elsewhere."""

import json

from repro.record import provenance


def test_it_holds_code_machine_packages_and_seeds() -> None:
    found = provenance.collect(["repro", "seed=3"], {"seed": 3})
    assert found["command"] == ["repro", "seed=3"]
    assert found["seeds"] == {"seed": 3}
    assert found["packages"]["numpy"]
    assert found["packages"]["hydra-core"]
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["memory_gib"] > 0
    assert set(found["git"]) == {"commit", "dirty", "diff"}
    assert len(found["source_digest"]) == 64
    json.dumps(found)


def test_outside_a_repository_the_commit_is_unknown_and_nothing_fails(monkeypatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(provenance, "PROJECT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.collect([], {})["git"] == {"commit": None, "dirty": False, "diff": ""}


def test_versions_beside_the_tested_ones_are_named_and_the_tested_ones_are_the_locks(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    locked = dict(
        line.split("==") for line in (provenance.PROJECT / "requirements.txt").read_text().split() if "==" in line
    )
    for name, series in provenance.TESTED.items():
        assert locked[name].startswith(f"{series}.")
    monkeypatch.setattr(provenance, "_packages", lambda: {"torch": "2.11.0+cu130", "transformers": "5.23.0"})
    assert provenance.other_versions() == ["torch 2.11.0+cu130 (tested with 2.13)"]
    monkeypatch.setattr(provenance, "_packages", lambda: {"torch": "2.13.1+cu130"})
    assert provenance.other_versions() == []
