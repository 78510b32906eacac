"""Children forked of a warm process: imported once, apart from each other, noticed and gone as any other child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_supervision import eventually, gone, python

from repro.errors import UserError
from repro.processes import Child, Warm

#: `warm` leaves what it was given and a line per call; with "threads" it leaves a thread too.
PROGRAM = """
    import os, sys, threading, time
    found = {}
    def warm(config):
        found.update(config)
        print("warmed", flush=True)
        if "threads" in config:
            threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        if "wrong" in config:
            raise ValueError(config["wrong"])
    def work(parent, config):
        print("a library's chatter", flush=True)
        parent.send("ready", found=found, name=config["name"], threads=os.environ["OMP_NUM_THREADS"],
                    cores=sorted(os.sched_getaffinity(0)), group=os.getpgid(0), open=sorted(os.listdir("/proc/self/fd")))
        while (message := parent.read())["kind"] != "stop":
            if message["kind"] == "exit":
                os._exit(message["status"])
"""
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
Made = Callable[..., Warm]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    """Makes a warm process of that program."""
    (tmp_path / "warm_program.py").write_text(textwrap.dedent(PROGRAM))
    warm: list[Warm] = []

    def make(**config: Any) -> Warm:
        environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
        warm.append(Warm("warm one", Warm.program("warm_program"), config, environment, tmp_path / "warm.log"))
        return warm[-1]

    yield make
    for one in warm:
        one.close()
        assert gone(one.pid)


def forked(warm: Warm, name: str, tmp_path: Path, **options: Any) -> tuple[Child, dict[str, Any], list[str]]:
    """A fork that is at work, what it said of itself, and a list that gets the words of its end."""
    said, ends = list[Any](), list[str]()
    child = Child(
        f"instance {name}",
        warm,
        hear=lambda message, _: said.append(message),
        stderr=tmp_path / f"{name}.log",
        **options,
    )
    child.on_end(lambda ended: ends.append(str(ended)))
    child.send("config", name=name)
    assert eventually(lambda: bool(said), 60)
    return child, said[0], ends


def test_forks_of_a_process_that_was_warmed_once_are_children_of_their_own(made: Made, tmp_path: Path) -> None:
    warm, core = made(greeting="hello"), min(os.sched_getaffinity(0))
    one, said, _ = forked(warm, "one", tmp_path)
    other, of_other, _ = forked(warm, "other", tmp_path, cores=[core])
    assert said["found"] == of_other["found"] == {"greeting": "hello"}
    assert (said["name"], of_other["name"]) == ("one", "other")
    assert (tmp_path / "warm.log").read_text() == "warmed\n"
    assert (tmp_path / "one.log").read_text() == (tmp_path / "other.log").read_text() == "a library's chatter\n"
    assert (said["group"], of_other["group"]) == (one.pid, other.pid)
    assert of_other["cores"] == [core]
    # Nothing of its sibling or of the orders is open there: streams, channel, and what lists this.
    assert len(of_other["open"]) == 5
    for child, its in ((one, said), (other, of_other)):
        assert its["threads"] == "1"
        assert b"OMP_NUM_THREADS=1" in Path(f"/proc/{child.pid}/environ").read_bytes()
        child.end()
        assert child.returncode == 0


def test_the_end_of_a_fork_is_told_in_the_words_of_any_child_and_hurts_no_other(made: Made, tmp_path: Path) -> None:
    warm = made()
    killed, _, of_killed = forked(warm, "killed", tmp_path)
    stopped, _, of_stopped = forked(warm, "stopped", tmp_path)
    left, _, of_left = forked(warm, "left", tmp_path)
    os.kill(killed.pid, signal.SIGKILL)
    os.kill(stopped.pid, signal.SIGSTOP)
    left.send("exit", status=3)
    assert eventually(lambda: bool(of_killed and of_left and stopped.suspected()), 20)
    assert of_killed[0].startswith(f"instance killed was killed by SIGKILL (pid {killed.pid})")
    assert of_left[0].startswith("instance left exited with status 3 before the run was over")
    assert (killed.wait(20), left.wait(20)) == (-signal.SIGKILL, 3)
    assert "is stopped" in str(stopped.suspected())
    assert not of_stopped
    # A number is given back at once.
    assert not Path(f"/proc/{killed.pid}").exists()
    stopped.kill()
    assert stopped.returncode == -signal.SIGKILL


def test_forks_end_with_their_warm_process_and_it_makes_no_more(made: Made, tmp_path: Path) -> None:
    warm = made()
    child, _, ends = forked(warm, "one", tmp_path)
    os.kill(warm.pid, signal.SIGKILL)
    assert child.wait(20) == -signal.SIGKILL
    assert eventually(lambda: ends)
    assert ends[0].startswith("instance one was killed by SIGKILL")
    assert eventually(lambda: warm.ended)
    with pytest.raises(UserError, match="warm one has ended"):
        Child("instance two", warm)


def test_a_process_with_threads_is_not_forked(made: Made) -> None:
    with pytest.raises(UserError, match=r"cannot be forked .*it has 2 threads"):
        Child("instance one", made(threads=True))


def test_what_is_wrong_with_a_program_is_left_to_the_child_to_say(made: Made, tmp_path: Path) -> None:
    child, said, _ = forked(made(wrong="no such model"), "one", tmp_path)
    assert said["found"] == {"wrong": "no such model"}
    assert "no such model" in (tmp_path / "warm.log").read_text()
    child.end()


def test_even_a_stopped_fork_is_gone_once_the_head_was_killed(tmp_path: Path) -> None:
    (tmp_path / "warm_program.py").write_text(textwrap.dedent(PROGRAM))
    head = python(
        f"""
        import threading
        from pathlib import Path
        from repro.processes import Child, Warm
        folder = Path({str(tmp_path)!r})
        warm = Warm("warm one", Warm.program("warm_program"), {{}}, {{"PYTHONPATH": str(folder), **{ENVIRONMENT}}}, folder / "warm.log")
        ready = threading.Event()
        child = Child("instance one", warm, hear=lambda *_: ready.set())
        child.send("config", name="one")
        ready.wait()
        print(warm.pid, child.pid, flush=True)
        threading.Event().wait()
        """
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(head, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        warm, child = map(int, process.stdout.readline().split())
        os.kill(child, signal.SIGSTOP)
        process.kill()
    assert eventually(lambda: gone(warm) and gone(child), 20)


def test_what_is_computed_apart_leaves_this_process_as_it_was() -> None:
    source = """
        from repro.processes import apart
        found = []
        print(apart(lambda: found.append(1) or b"1" * 100_000) == b"1" * 100_000, found)
        print(apart(lambda: found[0]), found)
    """
    done = subprocess.run(
        python(source),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=True,
    )
    assert done.stdout == "True []\nb'' []\n"
    assert "IndexError" in done.stderr
