"""The command line: `python -m repro [overrides]` runs experiments, `python -m repro <verb> …` are the tools around them.

Hydra composes and sweeps; this module keeps its manners: every mistake ends in one line that names the key, and the last line of stdout
is the run directory.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import traceback
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from repro.errors import UserError, writing
from repro.presets import CONF, GLOBAL_GROUPS, choices, groups

_TERMINATED = "terminated"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, _terminated)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    try:
        if arguments and arguments[0] in verbs():
            return int(importlib.import_module(f"repro.verbs.{arguments[0]}").main(arguments[1:]))
        if "--help" in arguments or "-h" in arguments:
            print(_help())
            return 0
        return _hydra(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        reason = str(stop) or "interrupted"
        print("; ".join([f"error: {reason}", *getattr(stop, "__notes__", [])]), file=sys.stderr)
        return 128 + (signal.SIGTERM if reason == _TERMINATED else signal.SIGINT)


def _terminated(*_: object) -> None:
    """A terminated run unwinds like an interrupted one, so that its workers and namespaces are gone when it ends."""
    raise KeyboardInterrupt(_TERMINATED)


def verbs() -> dict[str, str]:
    """The tools' names and first docstring lines, read without importing them."""
    found = {}
    for path in sorted((Path(__file__).parent / "verbs").glob("*.py")):
        if path.stem != "__init__":
            found[path.stem] = path.read_text().split('"""')[1].splitlines()[0]
    return found


def _help() -> str:
    lines = [
        "usage: python -m repro [experiment=<name>] [<group>=<choice> …] [<key>=<value> …]     one experiment (default: the case study)",
        "       python -m repro -m experiment=<a>,<b> [<key>=<value>,<value> …]                 a sweep",
        "       python -m repro bench=<name> [overrides]                                        a benchmark",
        "       python -m repro sweep=<name> [overrides]                                        a sweep from conf/sweep",
        "       python -m repro --cfg job [overrides]                                           print the composed configuration",
        "       python -m repro <verb> …                                                        a tool",
    ]
    width = max(map(len, choices("experiment"))) + 2
    for title, group in (("experiments", "experiment"), ("benchmarks", "bench"), ("sweeps", "sweep")):
        lines += ["", f"{title}:", *(f"  {name:<{width}}{line}" for name, line in choices(group).items())]
    lines += ["", "groups:"]
    for group in groups():
        if group not in GLOBAL_GROUPS or group == "tier":
            lines.append(f"  {group:<{width}}{', '.join(choices(group))}")
    lines += ["", "verbs:"]
    lines += [f"  {name:<{width}}{line}" for name, line in verbs().items()]
    return "\n".join(lines)


def _hydra(arguments: list[str]) -> int:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    from repro.composition import explain, register

    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here as exceptions, to be said in one line
    arguments = _in_order(arguments)
    register()
    folder = _sweep_folder(arguments)
    mistakes: list[UserError] = []

    def job(composed: Any) -> None:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            _sweep_job(composed)
            return
        try:
            _job(composed)
        except UserError as error:  # Hydra would put a line of its own before it
            mistakes.append(error)

    application = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)
    before, sys.argv = sys.argv, ["repro", *arguments, f"hydra.sweep.dir='{folder}'"]
    try:
        with writing(folder):
            application()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error
    finally:
        sys.argv = before
    if mistakes:
        raise mistakes[0]
    return _sweep_summary(folder) if folder.exists() else 0


def _in_order(arguments: list[str]) -> list[str]:
    """Options before overrides, the one order that Hydra's parser takes.

    An experiment's own options may be set whether its file names them or leaves them at their defaults: the schema knows
    them all, Hydra only the file. So they are forced.

    Raises:
        UserError: for what is neither an option nor an override; Hydra would answer with a page of usage.
    """
    from hydra._internal.utils import get_args_parser

    from repro.composition import forced

    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    parser.error = refuse  # type: ignore[method-assign]
    overrides: list[str] = parser.parse_intermixed_args(arguments).overrides
    for word in overrides:
        group, _, choice = word.partition("=")
        if choice == "null" and group in groups() and group not in ("sweep", "bench"):
            raise UserError(f"{group}: null chooses nothing; accepted: {', '.join(choices(group))}")
        if "=" not in word and not word.startswith("~"):
            raise UserError(
                f"{word!r}: neither a verb nor key=value; verbs: {', '.join(verbs()) or 'none'}; see --help"
            )
    return [*(word for word in arguments if word not in overrides), *map(forced, overrides)]


def _sweep_folder(arguments: list[str]) -> Path:
    """A folder for this sweep alone, even when two start in the same second."""
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if "hydra.sweep.dir" in given:
        return Path(given["hydra.sweep.dir"].strip("'\""))
    return Path(given.get("results", "results").strip("'\""), "sweeps", f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}")


def _job(composed: Any) -> None:
    from hydra.core.hydra_config import HydraConfig

    from repro import composition, runner

    record = runner.run(composition.of(composed, HydraConfig.get().overrides.task), _command())
    print(runner.summary(record))
    print(record.path, flush=True)


def _command() -> list[str]:
    """What was typed, for the record: without the sweep's folder, which `_hydra` adds."""
    return [argument for argument in sys.argv if not argument.startswith("hydra.sweep.dir=")]


def _sweep_job(composed: Any) -> None:
    """One job of a sweep: its failure is written down and must not keep the others from running."""
    from hydra.core.hydra_config import HydraConfig

    configuration = HydraConfig.get()
    outcome: dict[str, Any] = {"overrides": list(configuration.overrides.task)}
    try:
        from repro import composition, runner

        # The job's own overrides are the command that repeats it, whichever process it runs in.
        outcome["path"] = str(
            runner.run(composition.of(composed, outcome["overrides"]), ["repro", *outcome["overrides"]]).path
        )
    except UserError as error:
        outcome["error"] = str(error)
        print(f"error: {' '.join(outcome['overrides'])}: {error}", file=sys.stderr)
    except Exception as error:
        outcome["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    folder = Path(configuration.sweep.dir) / str(configuration.job.num)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "outcome.json").write_text(json.dumps(outcome, indent=1) + "\n")
    print(outcome.get("path", f"failed: {outcome.get('error')}"), flush=True)


def _sweep_summary(folder: Path) -> int:
    outcomes = [
        json.loads(path.read_text()) for path in sorted(folder.glob("*/outcome.json"), key=lambda p: int(p.parent.name))
    ]
    failed = [outcome for outcome in outcomes if "error" in outcome]
    print(f"sweep: {len(outcomes) - len(failed)} of {len(outcomes)} runs finished", file=sys.stderr)
    for outcome in failed:
        print(f"  failed: {' '.join(outcome['overrides'])}: {outcome['error']}", file=sys.stderr)
    print(folder)
    return 1 if failed or not outcomes else 0
