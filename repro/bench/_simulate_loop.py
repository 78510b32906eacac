"""Times one method of somebody else's program inside its own process: `python _simulate_loop.py OUT MODULE:CLASS.METHOD RUN [ARGS]`.

What is compared between simulators is the event loop, from the first event to the last: imports, reading requests and writing results
are left out for each. No command line tells these apart, so this file runs under the other simulator's interpreter and needs nothing
but the standard library. RUN is a script, or `-m` and a module; OUT receives wall and processor seconds once the method has returned.
"""

from __future__ import annotations

import functools
import importlib
import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any


def _put_clock(target: str, out: Path) -> None:
    """Wrap MODULE:CLASS.METHOD where it is defined, so that a subclass's call of it is timed too."""
    module, _, path = target.partition(":")
    owner, _, method = path.partition(".")
    holder: Any = getattr(importlib.import_module(module), owner)
    inner = getattr(holder, method)

    @functools.wraps(inner)
    def timed(*arguments: Any, **named: Any) -> Any:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        result = inner(*arguments, **named)
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        out.write_text(json.dumps({"wall_s": wall_s, "cpu_s": cpu_s}))
        return result

    setattr(holder, method, timed)


def main(argv: list[str]) -> None:
    """Run the program as if it had been called by itself."""
    out, target, run, *arguments = argv
    sys.path[0] = str(Path.cwd())
    _put_clock(target, Path(out))
    if run == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [run, *arguments]
        runpy.run_path(run, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
