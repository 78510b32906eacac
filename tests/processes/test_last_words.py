"""What a child said last, for each place that its stderr can go to."""

from __future__ import annotations

import sys
import threading

import pytest

from repro.processes import Child, Ended

SAYS = [sys.executable, "-c", "import sys; print('out of memory', file=sys.stderr); sys.exit(3)"]


@pytest.mark.parametrize(("stderr", "words"), [("kept", "out of memory"), ("dropped", "")])
def test_an_end_is_told_with_the_last_words_that_were_kept(stderr: str, words: str) -> None:
    told, over = list[Ended](), threading.Event()
    with Child("probe", SAYS, channel=False, stderr=stderr) as child:  # type: ignore[arg-type]
        child.on_end(lambda ended: (told.append(ended), over.set()))
        assert over.wait(10)
    assert [ended.role for ended in told] == ["probe"]
    assert told[0].last_words == words
