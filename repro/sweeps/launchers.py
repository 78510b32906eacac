"""Where a sweep's points run: this machine's processes (basic, joblib), jobs of SLURM through submitit, or tasks of Ray.

`hydra/launcher` chooses, as anywhere with Hydra. A job gets a share of the points and works on it as any process does that was given the
sweep's words; jobs need the results folder in common and nothing else. Points that take times never come here: they run one after the
other where the sweep was started.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from repro.errors import UserError
from repro.sweeps import points
from repro.sweeps.definition import Sweep
from repro.sweeps.points import Ended, Point

Share = Sequence[Point]
#: A share that has come to its end, and what gives its results or raises what ended its job.
Done = tuple[Share, Callable[[], list[Ended]]]
Launch = Callable[[Mapping[str, Any], str, Sequence[Share]], Iterator[Done]]

#: What submitit's executors call alike; its other parameters are SLURM's own.
_COMMON = (
    "name", "timeout_min", "mem_gb", "nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "stderr_to_stdout",
)  # fmt: skip
_HERE = ("BasicLauncher", "JoblibLauncher", "")


def processes(sweep: Sweep) -> int | None:
    """How many processes the launcher asks for; None for one per core."""
    asked = [word.partition("=")[2] for word in sweep.how if word.startswith("processes=")]
    if asked and asked[-1] != "null":
        return int(asked[-1])
    jobs = sweep.launcher.get("n_jobs")
    return int(jobs) if isinstance(jobs, int) and jobs > 0 else None


def _name(sweep: Sweep) -> str:
    return str(sweep.launcher.get("_target_", "")).rpartition(".")[2]


def elsewhere(sweep: Sweep) -> bool:
    """Whether points go to jobs outside this process's own pool.

    Raises:
        UserError: for a launcher that this kit does not know, or whose package is not installed.
    """
    name = _name(sweep)
    if name in _HERE:
        return False
    if name not in LAUNCHES:
        raise UserError(f"hydra/launcher: {name} is not supported; accepted: basic, joblib, {', '.join(LAUNCHES)}")
    package = name.partition("_")[0]
    if importlib.util.find_spec(package) is None:
        extra = "ray" if package == "ray" else "cluster"
        raise UserError(
            f"hydra/launcher: {name} needs {package}, which is not installed (pip install '.[{extra}]'); accepted: basic, joblib"
        )
    return True


def each(sweep: Sweep, todo: Sequence[Point]) -> Iterator[Ended]:
    """Results of all points from the launcher's jobs, as the jobs end; of a job that was lost, what it left finished."""
    own = {key: value for key, value in sweep.launcher.items() if key not in ("_target_", "jobs") and value is not None}
    jobs = max(int(sweep.launcher.get("jobs") or len(os.sched_getaffinity(0))), 1)
    shares = [list(todo[index::jobs]) for index in range(min(jobs, len(todo)))]
    for share, result in LAUNCHES[_name(sweep)](own, str(sweep.folder.parent.resolve() / ".jobs"), shares):
        try:
            yield from result()
        except Exception as error:  # whatever the launcher calls a job that was killed or ran out of time
            lost = f"its job was lost: {' '.join(str(error).split())[:300]}"
            yield from (points.seen(point, lost) for point in share)


def share_of(share: Share, folder: str) -> list[Ended]:
    """All points of one job's share, in turn; `folder` is where the sweep was started, which its paths are relative to."""
    os.chdir(folder)
    return [points.attempt(point) for point in share]


def _by_submitit(cluster: str, own: Mapping[str, Any], folder: str, shares: Sequence[Share]) -> Iterator[Done]:
    import submitit

    executor: Any = submitit.AutoExecutor(folder=folder, cluster=cluster)
    executor.update_parameters(**{key if key in _COMMON else f"{cluster}_{key}": value for key, value in own.items()})
    with executor.batch():  # one array of jobs
        jobs = [executor.submit(share_of, share, str(Path.cwd())) for share in shares]
    of_job = {id(job): share for job, share in zip(jobs, shares, strict=True)}
    for job in submitit.helpers.as_completed(jobs):
        yield of_job[id(job)], job.result


def _by_ray(own: Mapping[str, Any], _: str, shares: Sequence[Share]) -> Iterator[Done]:
    import ray

    before = signal.getsignal(signal.SIGTERM)
    ray.init(address=own.get("address"), include_dashboard=False, log_to_driver=False, logging_level="error")
    signal.signal(signal.SIGTERM, before)  # Ray puts one of its own in its place
    try:
        task: Any = ray.remote(num_cpus=own.get("cpus_per_job", 1), max_retries=0)(share_of)
        waiting = {task.remote(share, str(Path.cwd())): share for share in shares}
        while waiting:
            (done,), _left = ray.wait(list(waiting), num_returns=1)
            yield waiting.pop(done), partial(ray.get, done)
    finally:
        ray.shutdown()


#: Launchers beside Hydra's own.
LAUNCHES: Mapping[str, Launch] = {
    "submitit_local": partial(_by_submitit, "local"),
    "submitit_slurm": partial(_by_submitit, "slurm"),
    "ray": _by_ray,
}
