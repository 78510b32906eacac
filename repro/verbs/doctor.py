"""What this machine can do, what each missing thing costs, and the command that gets it: doctor."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from repro import native
from repro.arguments import Parser
from repro.processes import cores


@dataclass(frozen=True)
class Finding:
    """One line of the table: what was looked at, whether it is there, what was found, what its absence costs, and how to get it."""

    name: str
    there: bool
    found: str
    costs: str = ""
    get: str = ""


def main(argv: list[str]) -> int:
    """Print the table; the exit code is 1 where something is missing that the kit cannot do without."""
    Parser(prog="doctor", description=(__doc__ or "").partition("\n")[0]).parse_args(argv)
    needed, useful = [check() for check in NEEDED], [check() for check in USEFUL]
    for title, findings in (("needed", needed), ("useful", useful)):
        print(f"{title}:")
        for finding in findings:
            print(f"  {'yes' if finding.there else 'NO ':<4}{finding.name:<22}{finding.found}")
            if not finding.there:
                print(f"      without it: {finding.costs}")
                if finding.get:
                    print(f"      to get it:  {finding.get}")
    return 0 if all(finding.there for finding in needed) else 1


def _python() -> Finding:
    fits = sys.version_info >= (3, 11)
    return Finding("Python", fits, platform.python_version(), "nothing runs", "PYTHON=<3.11 or later> scripts/setup")


def _linux() -> Finding:
    fits = sys.platform == "linux"
    return Finding("Linux", fits, platform.release(), "no emulated link, no live tiers; model and simulate run", "")


def _packages() -> Finding:
    missing = [
        name for name in ("torch", "transformers", "hydra", "pandas", "pyarrow") if not importlib.util.find_spec(name)
    ]
    found = (
        f"torch {metadata.version('torch')}, transformers {metadata.version('transformers')}"
        if not missing
        else f"no {missing[0]}"
    )
    return Finding("packages", not missing, found, "experiments that need them end in an import error", "scripts/setup")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return Finding(
        "disk", free > 1, f"{free:.0f} GiB free here", "records cannot be written", "results=<a folder with space>"
    )


def _memory() -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Finding(
        "memory", memory >= 7, f"{memory:.0f} GiB", "experiment=split and models at full size may be killed", ""
    )


def _cores() -> Finding:
    usable = len(cores.usable())
    return Finding(
        "cores",
        usable >= 2,
        f"{usable} physical",
        "live tiers compute and send on the same core: times are distorted",
        "",
    )


def _files() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return Finding("open files", limit >= 1024, str(limit), "many connections at once fail", "ulimit -n 4096")


def _namespaces() -> Finding:
    works = _runs("unshare", "--user", "--net", "--map-root-user", "true")
    return Finding(
        "network namespaces", works, "for an ordinary user" if works else "refused",
        "links are emulated by a relay alone: no TCP dynamics, no loss", "sysctl kernel.unprivileged_userns_clone=1, or run as root",
    )  # fmt: skip


def _netem() -> Finding:
    found = bool(shutil.which("tc")) and _runs(
        "unshare",
        "--user",
        "--net",
        "--map-root-user",
        "tc",
        "qdisc",
        "add",
        "dev",
        "lo",
        "root",
        "netem",
        "delay",
        "1ms",
    )
    return Finding(
        "netem", found, "in this kernel" if found else "not in this kernel, or no tc",
        "packets are forwarded in user space instead: 11 to 17 Gbps at most", "modprobe sch_netem; apt install iproute2",
    )  # fmt: skip


def _program(name: str, costs: str, get: str) -> Callable[[], Finding]:
    def check() -> Finding:
        path = shutil.which(name)
        return Finding(name, path is not None, path or "not found", costs, get)

    return check


def _package(name: str, module: str, costs: str, get: str) -> Callable[[], Finding]:
    def check() -> Finding:
        title = name.partition("-")[0]
        there = importlib.util.find_spec(module) is not None
        found = ""
        if there:
            try:
                found = metadata.version(name)
            except metadata.PackageNotFoundError:
                found = "installed"
        return Finding(title, there, found or "not installed", costs, get)

    return check


def _gpu() -> Finding:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=True
        )  # fmt: skip
        found = done.stdout.strip().replace("\n", "; ")
    except (OSError, subprocess.SubprocessError):
        found = ""
    return Finding("GPU", bool(found), found or "none", "executed numbers are of this CPU and of small models", "")


def _compiler() -> Finding:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    return Finding(
        "C compiler",
        compiler is not None,
        compiler or "none",
        "the simulator runs as Python, 1.6 times slower",
        "apt install gcc",
    )


def _compiled() -> Finding:
    active = native.active()
    return Finding(
        "compiled simulator",
        active,
        "in use" if active else "not built",
        "the simulator runs as Python, 1.6 times slower",
        "python -m repro compile",
    )


def _wandb() -> Finding:
    key = bool(os.environ.get("WANDB_API_KEY"))
    found = "WANDB_API_KEY is set" if key else "WANDB_API_KEY is not set"
    costs = "runs are mirrored offline, for sync later"
    return Finding("W&B account", key, found, costs, "wandb login, or set WANDB_API_KEY")


def _runs(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


NEEDED: tuple[Callable[[], Finding], ...] = (_python, _linux, _packages, _disk)
USEFUL: tuple[Callable[[], Finding], ...] = (
    _memory, _cores, _files, _namespaces, _netem, _gpu, _compiler, _compiled,
    _program("iperf3", "the link and transport are compared with nothing", "apt install iperf3"),
    _package("cryptography", "cryptography", "no TLS between the clusters", "scripts/setup"),
    _package("nixl", "nixl", "transport=nixl is refused", "pip install nixl (see repro/transport/remote_memory.py)"),
    _package("mooncake-transfer-engine-non-cuda", "mooncake", "transport=mooncake is refused", "pip install '.[transport]'"),
    _package("ray", "ray", "no hydra/launcher=ray", "pip install '.[ray]'"),
    _package("submitit", "submitit", "no hydra/launcher=submitit_slurm", "pip install '.[cluster]'"),
    _program("sbatch", "sweeps stay on this machine", "run on a SLURM login node"),
    _wandb,
    _program("pdflatex", "exported tables are not compiled by the test", "apt install texlive-latex-recommended"),
    _program("chromium", "reports are not looked at by the test", "apt install chromium"),
)  # fmt: skip
