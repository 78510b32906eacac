"""What a placement on Ray refuses, in one line each, with or without Ray installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from repro.errors import UserError
from repro.serving.ray_launcher import RayLauncher
from repro.verbs import serve


def test_where_there_is_no_ray_or_no_cluster_it_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ray is not installed|no Ray cluster at 127.0.0.1:9") as refused:
        RayLauncher("127.0.0.1:9", tmp_path)
    assert "\n" not in str(refused.value)


def test_an_emulated_link_between_nodes_of_ray_is_refused_before_anything_starts() -> None:
    with pytest.raises(UserError, match=r"--ray: link\.backend=auto .* accepted: link\.backend=none"):
        serve.main(["--ray", "127.0.0.1:9"])
