"""Where a sweep's points run, by Hydra's launchers: this machine's processes (basic, joblib), or jobs of SLURM through submitit.

A job gets a share of the points and works on it as any process does that was given the sweep's words; jobs need the results folder in
common and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from repro.errors import UserError
from repro.sweeps import points
from repro.sweeps.definition import Sweep
from repro.sweeps.points import Ended, Point

#: Of submitit's parameters, those of Hydra's launcher that its executors take by another name, or not at all.
_OWN = ("_target_", "submitit_folder", "max_num_timeout")


def _target(sweep: Sweep) -> str:
    return str(sweep.launcher.get("_target_", "")).rpartition(".")[2]


def processes(sweep: Sweep) -> int | None:
    """How many processes the launcher asks for; None for one per core."""
    asked = [word.partition("=")[2] for word in sweep.how if word.startswith("processes=")]
    if asked and asked[-1] != "null":
        return int(asked[-1])
    jobs = sweep.launcher.get("n_jobs")
    return int(jobs) if isinstance(jobs, int) and jobs > 0 else None


def elsewhere(sweep: Sweep) -> bool:
    """Whether points go to jobs outside this process's own pool."""
    target = _target(sweep)
    if target in ("BasicLauncher", "JoblibLauncher", ""):
        return False
    if target in ("LocalLauncher", "SlurmLauncher"):
        return True
    raise UserError(
        f"hydra/launcher: {target} is not supported; accepted: basic, joblib, submitit_local, submitit_slurm"
    )


def each(sweep: Sweep, todo: Sequence[Point]) -> Iterator[Ended]:
    """Results of all points from submitit's jobs, as the jobs end."""
    import submitit

    local = _target(sweep) == "LocalLauncher"
    parameters = {key: value for key, value in sweep.launcher.items() if key not in _OWN and value is not None}
    own = submitit.LocalExecutor if local else submitit.SlurmExecutor
    executor: Any = submitit.AutoExecutor(
        folder=str(sweep.folder.parent / ".jobs"), cluster="local" if local else "slurm"
    )
    prefix = "slurm_"
    accepted = set(own._valid_parameters()) | set(submitit.AutoExecutor._typed_parameters())
    executor.update_parameters(**{
        (f"{prefix}{key}" if not local and key in own._valid_parameters() else key): value
        for key, value in parameters.items()
        if key in accepted
    })  # fmt: skip
    jobs = int(sweep.launcher.get("array_parallelism", 1)) if not local else (processes(sweep) or 2)
    shares = [list(todo[index::jobs]) for index in range(min(jobs, len(todo)))]
    for job in submitit.helpers.as_completed([executor.submit(share_of, share) for share in shares]):
        yield from job.result()


def share_of(share: Sequence[Point]) -> list[Ended]:
    """All points of one job's share, in turn."""
    return [points.attempt(point) for point in share]
