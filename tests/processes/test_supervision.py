"""Worker processes: messages both ways, every kind of death noticed at once, and nothing left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from repro.processes import ChildEndedError, SilenceError, Supervisor

ECHO = """
    import threading
    from repro.processes import run_worker
    def work(parent, config):
        parent.send("ready", greeting=config["greeting"])
        print("a library's chatter on stdout")
        while (message := parent.read())["kind"] != "stop":
            if message["kind"] == "raise":
                raise ValueError("no such layer")
            if message["kind"] == "raise in a thread":
                threading.Thread(target=int, args=("no number",)).start()
                continue
            parent.send("echo", text=message["text"])
    run_worker(work)
"""
PARENT = """
    import os, subprocess, sys
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", child], stdout=open(sys.argv[1], "w"))
    from repro.processes import run_worker
    def work(parent, config):
        parent.send("ready")
        while parent.read()["kind"] != "stop":
            pass
    run_worker(work)
"""


def python(source: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(source), *arguments]


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    with Supervisor(tmp_path) as supervisor:
        yield supervisor


def eventually(condition: Callable[[], bool], within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


def gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_a_worker_gets_its_configuration_and_answers_while_its_prints_stay_in_the_log(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    worker = supervisor.start("echo", python(ECHO), {"greeting": "hello"})
    assert supervisor.expect("ready", 1, 20)[0].message["greeting"] == "hello"
    worker.send("say", text="ü\n")
    assert supervisor.next_event(20).message == {"kind": "echo", "text": "ü\n"}
    supervisor.stop()
    assert worker.returncode == 0
    assert "a library's chatter" in (tmp_path / "echo.log").read_text()


def test_sigkill_of_a_worker_ends_the_wait_and_names_the_worker(supervisor: Supervisor) -> None:
    worker = supervisor.start("decode", python(ECHO), {"greeting": ""})
    supervisor.expect("ready", 1, 20)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(ChildEndedError, match="worker decode was killed by SIGKILL"):
        supervisor.next_event(20)


@pytest.mark.parametrize(
    ("where", "words"), [("raise", "no such layer"), ("raise in a thread", r"invalid literal for int\(\)")]
)
def test_an_exception_in_a_worker_reaches_the_supervisor_in_words(
    where: str, words: str, supervisor: Supervisor
) -> None:
    worker = supervisor.start("prefill", python(ECHO), {"greeting": ""})
    supervisor.expect("ready", 1, 20)
    worker.send(where)
    with pytest.raises(ChildEndedError, match=f"worker prefill failed: ValueError: {words}"):
        supervisor.next_event(20)


def test_a_worker_that_cannot_start_leaves_the_end_of_its_log_in_the_message(supervisor: Supervisor) -> None:
    supervisor.start("prefill", python("raise SystemExit('no such device')"), {})
    with pytest.raises(ChildEndedError, match=r"exited with status 1 .* no such device"):
        supervisor.next_event(20)


def test_silence_is_an_error_that_says_who_is_alive(supervisor: Supervisor) -> None:
    supervisor.start("echo", python(ECHO), {"greeting": ""})
    supervisor.expect("ready", 1, 20)
    with pytest.raises(SilenceError, match="alive: echo"):
        supervisor.next_event(0.05)


def test_an_exception_in_the_run_leaves_no_worker_and_no_grandchild(tmp_path: Path) -> None:
    pid_file = tmp_path / "grandchild"
    pids: list[int] = []

    def run() -> None:
        with Supervisor(tmp_path) as supervisor:
            pids.append(supervisor.start("parent", python(PARENT, str(pid_file)), {}).pid)
            supervisor.expect("ready", 1, 20)
            assert eventually(lambda: pid_file.read_text().strip() != "")
            raise RuntimeError("the run failed")

    with pytest.raises(RuntimeError, match="the run failed"):
        run()
    assert gone(pids[0])
    grandchild = int(pid_file.read_text())
    assert eventually(lambda: gone(grandchild))


def test_workers_die_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    source = f"""
        import sys
        from pathlib import Path
        from repro.processes import Supervisor
        with Supervisor(Path({str(tmp_path)!r})) as supervisor:
            worker = supervisor.start("echo", [sys.executable, "-c", sys.argv[1]], {{"greeting": ""}})
            supervisor.expect("ready", 1, 20)
            print(worker.pid, flush=True)
            supervisor.next_event(60)
    """
    command = python(source, textwrap.dedent(ECHO))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        assert not gone(worker)
        process.kill()
        assert eventually(lambda: gone(worker))
