"""The command line: `python -m repro [overrides]` runs experiments, `python -m repro <verb> …` are the tools around them.

Hydra composes and sweeps; this module keeps its manners: every mistake ends in one line that names the key, and the last line of stdout
is the run directory.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from repro.errors import UserError, writing
from repro.presets import CONF, GLOBAL_GROUPS, choices, groups

_TERMINATED = "terminated"
_DRY_RUN = "--dry-run"


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
    except BrokenPipeError:  # who read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
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
        "       python -m repro --dry-run …                                                     what would run, and what is done",
        "       python -m repro --cfg job [overrides]                                           print the composed configuration",
        "       python -m repro <verb> …                                                        a tool",
    ]
    width = max(len(name) for group in (*GLOBAL_GROUPS, "model") for name in choices(group)) + 2
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
    from omegaconf.errors import OmegaConfBaseException

    from repro import composition, runner
    from repro.sweeps import definition, run

    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here as exceptions, to be said in one line
    dry = _DRY_RUN in arguments
    flags, words = _parted([argument for argument in arguments if argument != _DRY_RUN])
    multirun = {"-m", "--multirun"} & set(flags)
    if multirun or any(word.startswith("sweep=") and word != "sweep=null" for word in words):
        if other := set(flags) - multirun:
            raise UserError(f"{other.pop()}: does not go with a sweep; accepted: {_DRY_RUN}, or one run")
        sweep = definition.read(words)
        with writing(sweep.folder):
            return run.dry_run(sweep) if dry else run.run(sweep, ["repro", *arguments])
    if dry:
        prepared = runner.prepare(composition.compose(words))
        print("done" if prepared.finished() else "to run", file=sys.stderr)
        print(prepared.directory.path)
        return 0
    mistakes: list[UserError] = []

    def job(composed: Any) -> None:
        try:
            record = runner.run(composition.of(composed, HydraConfig.get().overrides.task), ["repro", *arguments])
        except UserError as error:  # Hydra would put a line of its own before it
            mistakes.append(error)
            return
        print(runner.summary(record))
        print(record.path, flush=True)

    composition.register()
    application = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)
    before, sys.argv = sys.argv, ["repro", *flags, *map(composition.forced, words)]
    try:
        application()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(composition.explain(error)) from error
    finally:
        sys.argv = before
    if mistakes:
        raise mistakes[0]
    return 0


def _parted(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Options, and overrides.

    Raises:
        UserError: for what is neither an option nor an override; Hydra would answer with a page of usage.
    """
    from hydra._internal.utils import get_args_parser

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
    return [word for word in arguments if word not in overrides], overrides
