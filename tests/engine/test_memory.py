"""Freed memory stays in the process, so that a computation that is done again needs no new pages."""

from __future__ import annotations

import subprocess
import sys

ROUNDS = """
import resource, sys
import numpy as np
from repro.engine.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    temporaries = [np.ones(20 << 20, np.uint8) for _ in range(3)]
    del temporaries
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "kept":
    assert keep_freed_memory()
faults(), faults()
print(faults())
"""


def faults_of_a_round(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", ROUNDS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_computation_that_is_done_again_needs_no_new_pages() -> None:
    kept = faults_of_a_round("kept")
    assert kept < 20
    assert faults_of_a_round("as it is") > kept
