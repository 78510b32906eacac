"""Every command of README and docs/ is one that runs: each is composed or parsed here, and the quick ones of the README are run in order.

Before a release all of those that need no device are run, which takes hours: `EVERY_COMMAND=1 pytest tests/docs/test_commands.py`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import PAGES, commands

from repro import app
from repro.arguments import Parser
from repro.record.directory import REFERENCE
from repro.record.provenance import PROJECT

#: What a reader puts in the place of a name in angle brackets.
FILLED = {"<run>": str(PROJECT / REFERENCE / "table6" / "model"), "<command>": "true", "<run directory>": "results/x"}
COMMANDS = [command for page in PAGES for command in commands(page)]
#: Those of the README that take seconds; each is run as it stands there.
QUICK = (
    "python -m repro --help",
    "python -m repro experiment=table6",
    "python -m repro experiment=table6 link.rate_bps=6e9",
    "python -m repro -m experiment=table6 link.rate_bps=5e9,10e9,20e9,100e9",
    "python -m repro compare <run> <run>",
    "python -m repro export <run> --to table.tex --metric lambda_max ttft_mean_s",
    "python -m repro export <run> --paper paper",
)


class ParsedError(Exception):
    """A tool has understood its command."""


def typed(command: str) -> list[str] | None:
    """The words of a command with its names filled in; None where a reader has to think of one."""
    for name, value in FILLED.items():
        command = command.replace(name, value)
    if "<" in command or "…" in command:
        return None
    words = shlex.split(command)
    return words[3:] if words[0] == "python" else [f"bench={words[1]}", *words[2:]]


def stopping(parse: Callable[..., object]) -> Callable[..., object]:
    """The parser's own method, and then the end."""

    def parsed(self: Parser, *arguments: object) -> None:
        parse(self, *arguments)
        raise ParsedError

    return parsed


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands write where they are started, and find what scripts/engines makes there as far as a run looks before it starts."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "bin/python",
        *(f"lib/python3.11/site-packages/{package}/__init__.py" for package in ("vllm", "nixl")),
    ):
        made = tmp_path / ".engines" / name
        made.parent.mkdir(parents=True)
        made.touch(mode=0o755)


def test_the_pages_have_commands_of_every_kind() -> None:
    assert len(COMMANDS) > 40
    assert sum(typed(command) is None for command in COMMANDS) < 12


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS), ids=str)
def test_a_command_is_one_that_runs(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = typed(command)
    if words is None:
        return  # a name that only its reader knows
    if words[0] in app.verbs() and len(words) == 1:
        return  # a tool that is asked for nothing more
    if words[0] not in app.verbs():
        assert app.main([word for word in words if word != "--dry-run"] + ["--dry-run"]) == 0
        return
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(Parser, name, stopping(getattr(Parser, name)))
    with pytest.raises(ParsedError):
        app.main(words)


def test_the_readmes_quick_commands_run_in_their_order_and_the_table_is_one_for_a_paper(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = commands(PROJECT / "README.md")
    assert [command for command in listed if command in QUICK] == list(QUICK), "in the README, in this order"
    runs: list[str] = []
    for command in QUICK:
        # Each `<run>` is one of the last runs, as a reader would copy them.
        latest = iter(runs[len(runs) - command.count("<run>") :])
        filled = re.sub("<run>", lambda _, latest=latest: next(latest), command)
        assert app.main(shlex.split(filled)[3:]) == 0, filled
        said = capsys.readouterr().out.splitlines()
        if command.startswith("python -m repro experiment="):
            runs.append(said[-1])
    assert len(set(runs)) == 2
    table = (tmp_path / "table.tex").read_text()
    assert "\\toprule" in table
    assert "mean TTFT" in table
    compiles(tmp_path / "paper" / "paper.tex")


def compiles(paper: Path) -> None:
    """What is written for LaTeX is balanced, and compiles where there is LaTeX."""
    text = "".join(path.read_text() for path in sorted(paper.parent.glob("*.tex")))
    begun, ended = (sorted(re.findall(rf"\\{word}{{([^}}]+)}}", text)) for word in ("begin", "end"))
    assert begun == ended
    assert {"document", "table", "tabular", "figure"} <= set(begun)
    for name in re.findall(r"\\includegraphics\[[^]]*\]{([^}]+)}", text):
        assert (paper.parent / name).is_file()
    if shutil.which("pdflatex") is None:
        return  # `test_the_fragments_compile` says so
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", paper.name],
        cwd=paper.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_fragments_compile(tmp_path: Path) -> None:
    runs = [str(PROJECT / REFERENCE / name) for name in ("table6/model", "table5/model", "burst/simulate")]
    assert app.main(["export", *runs, "--paper", str(tmp_path / "paper")]) == 0
    compiles(tmp_path / "paper" / "paper.tex")
    text = (tmp_path / "paper" / "figures.tex").read_text()
    assert text.count("\\includegraphics") == 4
    assert re.search(r"^% run model, commit [0-9a-f]{40}", text, re.MULTILINE)
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex here: the fragments are balanced, and every figure that they name is there")


def test_every_command_runs_before_a_release() -> None:
    if not os.environ.get("EVERY_COMMAND"):
        pytest.skip("takes hours; EVERY_COMMAND=1 runs every command of the pages that leaves nothing to fill in")
    failed = [command for command in dict.fromkeys(COMMANDS) if (words := typed(command)) and app.main(words)]
    assert not failed
