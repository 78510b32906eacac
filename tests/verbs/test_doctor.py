"""The doctor says of everything that is missing what that costs."""

import itertools
import os
from collections.abc import Callable

import pytest

from repro import app
from repro.verbs import doctor


def test_every_line_says_what_was_found_and_of_what_is_missing_what_it_costs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert app.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("  yes", "  NO")) for line in lines) == len(doctor.NEEDED) + len(doctor.USEFUL)
    for line, following in itertools.pairwise(lines):
        if line.startswith("  NO"):
            assert following.startswith("      without it: ")
            assert len(following) > 24


@pytest.mark.parametrize("check", doctor.USEFUL, ids=lambda check: check.__name__)
def test_a_check_never_fails_where_nothing_is_installed(
    check: Callable[[], doctor.Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for name in list(os.environ):
        if name.startswith("WANDB"):
            monkeypatch.delenv(name)
    found = check()
    assert found.name
    assert found.there or found.costs
