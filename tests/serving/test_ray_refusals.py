"""What a placement on Ray refuses, in one line each, with or without Ray installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from repro import app
from repro.errors import UserError
from repro.serving.ray_launcher import RayLauncher
from repro.verbs import serve


def test_where_there_is_no_ray_or_no_cluster_it_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ray is not installed|no Ray cluster at 127.0.0.1:9") as refused:
        RayLauncher("127.0.0.1:9", tmp_path)
    assert "\n" not in str(refused.value)


def test_an_emulated_link_between_nodes_of_ray_is_refused_before_anything_starts() -> None:
    with pytest.raises(UserError, match=r"ray: link\.backend=auto .* accepted: link\.backend=none"):
        serve.main(["--ray", "127.0.0.1:9"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["experiment=tiers"], "error: ray: link.backend=auto stands on one machine; accepted: link.backend=none"),
        (
            ["experiment=live_stress", "link.backend=none"],
            "error: link.schedule: nothing changes the network between the",
        ),
        (["experiment=live_faults"], "error: ray: not read by experiment=live_faults on tier=emulate; read by: "),
        (["experiment=table6"], "error: ray: not read by experiment=table6 on tier=model; read by: "),
    ],
    ids=lambda part: part[0] if isinstance(part, list) else "",
)
def test_a_cluster_that_an_experiment_cannot_use_is_refused_before_anything_is_written(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main([*words, "ray=127.0.0.1:9", "tracking=disabled", f"results={tmp_path / 'results'}"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(said)
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "results").exists()
