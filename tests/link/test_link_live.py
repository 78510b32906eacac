"""Links that are really made. Programs on both sides are processes of their own, as workers are."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from repro.errors import UserError
from repro.link import Link, LinkChange, LinkSpec, leftovers, open_link
from repro.link.link import NamespacedLink, Unavailable

ROOT = Path(__file__).parents[2]

#: Takes what comes on one connection and prints its hash, and when the bytes came, in tenths of a second.
SINK = """
import hashlib, socket, sys, time
listener = socket.create_server((sys.argv[1], 0))
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
digest, came, chunk = hashlib.sha256(), {}, None
while chunk := connection.recv(1 << 16):
    digest.update(chunk)
    tenth = int(time.monotonic() * 10)
    came[tenth] = came.get(tenth, 0) + len(chunk)
print(digest.hexdigest(), *(f"{tenth}:{count}" for tenth, count in came.items()), flush=True)
"""

#: Sends so many bytes made from a seed and prints their hash.
SOURCE = """
import hashlib, random, socket, sys
host, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
data = random.Random(1).randbytes(size)
with socket.create_connection((host, port)) as connection:
    connection.sendall(data)
print(hashlib.sha256(data).hexdigest())
"""


@pytest.fixture
def opened() -> Iterator[Callable[..., Link]]:
    """Opens links and closes them; skips where this machine cannot make the backend."""
    links: list[Link] = []

    def make(**asked: object) -> Link:
        spec = LinkSpec(**asked)  # type: ignore[arg-type]
        try:
            links.append(open_link(spec, run=f"test-{os.getpid()}-{len(links)}"))
        except Unavailable as missing:
            pytest.skip(str(missing))
        return links[-1]

    yield make
    for link in links:
        link.close()


def python(link: Link, side: str, program: str, *arguments: str) -> subprocess.Popen[str]:
    command = link.command(side, [sys.executable, "-c", program, *arguments])  # type: ignore[arg-type]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def send_across(link: Link, size: int) -> tuple[bool, dict[float, int]]:
    """Send `size` bytes from prefill to decode; whether they came unchanged, and how many came when (seconds, by tenths)."""
    sink = python(link, "decode", SINK, link.listen_host("decode"))
    assert sink.stdout is not None
    host, port = link.dial(int(sink.stdout.readline()))
    link.start()
    source = python(link, "prefill", SOURCE, host, str(port), str(size))
    sent, _ = source.communicate(timeout=60)
    got, *tenths = sink.communicate(timeout=60)[0].split()
    pairs = (pair.split(":") for pair in tenths)
    return got == sent.strip(), {int(tenth) / 10: int(count) for tenth, count in pairs}


@pytest.mark.parametrize("backend", ["netem", "packet", "tbf", "relay", "none"])
def test_bytes_cross_every_backend_unchanged_and_the_link_says_what_it_gave_up(
    opened: Callable[..., Link], backend: str
) -> None:
    delay = {} if backend == "tbf" else {"rtt_s": 0.01}
    link = opened(backend=backend, rate_bps=200e6, **delay)
    unchanged, _ = send_across(link, 2_000_000)
    assert unchanged
    assert link.backend == backend
    assert bool(link.given_up) == (backend in ("relay", "none")) or not link.facts.get("realtime", True)


def test_bytes_survive_loss_bursts_and_jitter_because_real_tcp_runs_end_to_end(opened: Callable[..., Link]) -> None:
    link = opened(
        backend="packet", rate_bps=50e6, rtt_s=0.01, loss=0.01, loss_burst_segments=3.0, jitter_s=0.002, queue_s=0.02
    )
    unchanged, _ = send_across(link, 2_000_000)
    assert unchanged
    assert link.signals().forward.lost_segments > 0


def test_an_outage_stalls_tcp_and_then_it_goes_on_unharmed(opened: Callable[..., Link]) -> None:
    outage = LinkChange(0.8, for_s=2.0, rate_bps=0.0)
    link = opened(backend="packet", rate_bps=20e6, rtt_s=0.01, schedule=(outage,))
    unchanged, came = send_across(link, 4_000_000)
    assert unchanged
    moments = sorted(came)
    longest = max(later - earlier for earlier, later in itertools.pairwise(moments))
    assert longest > 1.5
    assert sum(count for moment, count in came.items() if moment > moments[0] + 2) > 0


@pytest.mark.parametrize("backend", ["packet", "relay"])
def test_a_link_is_measured_and_found_as_asked(opened: Callable[..., Link], backend: str) -> None:
    link = opened(backend=backend, rate_bps=50e6, rtt_s=0.05)
    link.check()  # raises if off by a tenth
    record = link.record()
    assert record["backend"] == backend
    assert record["asked"]["rtt_s"] == 0.05
    assert record["measured"]["forward"]["rtt_s"] > 0.05


def test_loss_is_measured_per_segment_on_both_sides_of_a_super_packet(opened: Callable[..., Link]) -> None:
    link = opened(backend="packet", rate_bps=300e6, loss=0.02)
    found = link.measure()
    deviation = (0.02 * 0.98 / found.loss_segments) ** 0.5
    # What is lost to a busy machine is counted by the link itself, and is not its loss.
    others = link.signals().forward
    slack = others.overrun_packets * 45 / found.loss_segments
    assert abs(found.loss - 0.02) < 4 * deviation + slack


@pytest.mark.parametrize(
    ("asked", "refusal"),
    [
        ({"rate_bps": 400e9, "backend": "packet"}, r"link\.rate_bps.*measured to carry here"),
        ({"rate_bps": 1e9, "rtt_s": 2e-6, "backend": "packet"}, r"link\.rtt_s.*floor"),
    ],
)
def test_what_this_machine_cannot_hold_is_refused_with_the_measured_limit(
    opened: Callable[..., Link], asked: dict[str, object], refusal: str
) -> None:
    with pytest.raises(UserError, match=refusal):
        opened(**asked).check()


def test_a_backend_refuses_what_it_cannot_do_at_all() -> None:
    with pytest.raises(UserError, match="tbf refuses a delay"):
        open_link(LinkSpec(rate_bps=1e9, rtt_s=0.01, backend="tbf"), run="refused")


def test_there_are_only_two_sides(opened: Callable[..., Link]) -> None:
    with pytest.raises(UserError, match="no side 'eth9'"):
        opened(backend="none").command("eth9", ["true"])  # type: ignore[arg-type]


@pytest.mark.parametrize("control", ["cubic", "bbr", "reno"])
def test_congestion_control_and_buffers_are_set_inside_the_link_only(opened: Callable[..., Link], control: str) -> None:
    if control not in Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split():
        pytest.skip(f"this kernel has no {control}")
    outside = Path("/proc/sys/net/ipv4/tcp_wmem").read_text()
    link = opened(backend="packet", rate_bps=1e9, rtt_s=0.1, congestion_control=control)
    sink = python(link, "decode", SINK, link.listen_host("decode"))
    assert sink.stdout is not None
    host, port = link.dial(int(sink.stdout.readline()))
    program = (
        "import socket, sys; c = socket.create_connection((sys.argv[1], int(sys.argv[2]))); "
        "print(c.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b'\\0').decode())"
    )
    found, _ = python(link, "prefill", program, host, str(port)).communicate(timeout=20)
    sink.communicate(timeout=20)
    assert found.strip() == control == link.facts["congestion_control"]
    assert link.facts["tcp_buffer_bytes"] >= 2 * link.spec.bdp_bytes()
    assert Path("/proc/sys/net/ipv4/tcp_wmem").read_text() == outside


def test_an_emulation_scales_what_tcp_waits_before_it_sends_again(opened: Callable[..., Link]) -> None:
    name = Path("/proc/sys/net/ipv4/tcp_rto_min_us")
    if not name.exists():
        pytest.skip("this kernel lets no namespace have a retransmission timeout of its own")
    outside = name.read_text()
    link = opened(backend="packet", rate_bps=1e8, rto_min_s=0.02)
    for side in ("prefill", "decode"):
        found, _ = python(link, side, f"print(open({str(name)!r}).read())").communicate(timeout=20)
        assert int(found) == 20_000
    assert name.read_text() == outside


def test_two_links_at_once_do_not_meet(opened: Callable[..., Link]) -> None:
    first, second = (opened(backend="packet", rate_bps=100e6) for _ in range(2))
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda link=link: results.append(send_across(link, 500_000)[0]))
        for link in (first, second)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [True, True]


def test_a_dead_server_ends_the_client_behind_a_relay(opened: Callable[..., Link]) -> None:
    link = opened(backend="relay", rate_bps=20e6, rtt_s=0.02)
    sink = python(link, "decode", SINK, link.listen_host("decode"))
    assert sink.stdout is not None
    host, port = link.dial(int(sink.stdout.readline()))
    source = python(link, "prefill", SOURCE, host, str(port), "100000000")
    time.sleep(0.5)
    sink.kill()
    assert source.wait(timeout=20) != 0


def resources() -> tuple[int, int, set[str], int]:
    """File descriptors, threads, interfaces of the host and children of this process."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return (
        len(list(Path("/proc/self/fd").iterdir())),
        threading.active_count(),
        {path.name for path in Path("/sys/class/net").iterdir()},
        len(children),
    )


def test_links_that_come_and_go_leave_nothing_behind() -> None:
    spec = LinkSpec(rate_bps=1e9, rtt_s=0.01, backend="auto")
    open_link(spec, run="warm-up").close()
    before = resources()
    # `scripts/bench link` does fifty; a dozen find a leak as well.
    for _ in range(12):
        with open_link(spec, run="cycles"):
            pass
    assert resources() == before
    assert not [member for member in leftovers.members() if member.run == "cycles"]


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_a_killed_run_takes_its_link_along_and_the_next_start_removes_what_survived(
    opened: Callable[..., Link],
) -> None:
    opened(backend="packet", rate_bps=1e9)  # skips where there is no such backend
    program = textwrap.dedent(
        """
        import subprocess, time
        from repro.link import LinkSpec, open_link
        link = open_link(LinkSpec(rate_bps=1e9, backend="packet"), run="doomed")
        subprocess.Popen(link.command("decode", ["sleep", "1000"]), start_new_session=True)
        print("up", flush=True)
        time.sleep(1000)
        """
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "up\n"
    doomed = [member for member in leftovers.members() if member.run == "doomed"]
    assert wait_until(lambda: any(member.command == "sleep 1000" for member in of_run("doomed")))
    assert len(doomed) >= 3  # the keeper and two forwarders
    assert all(member.owner_alive for member in doomed)
    assert not leftovers.clean(), "a living run's link is not a leftover"

    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    assert wait_until(lambda: [member.command for member in of_run("doomed")] == ["sleep 1000"])
    with open_link(LinkSpec(backend="none"), run="next"):
        assert wait_until(lambda: not of_run("doomed"))


def of_run(run: str) -> list[leftovers.Member]:
    return [member for member in leftovers.members() if member.run == run]


def test_a_killed_keeper_ends_its_forwarders_and_is_reported(opened: Callable[..., Link]) -> None:
    link = opened(backend="packet", rate_bps=1e9)
    assert isinstance(link, NamespacedLink)
    for member in of_run(link.run):
        if member.command.endswith("repro.link.keeper"):
            os.kill(member.pid, signal.SIGKILL)
    assert wait_until(lambda: not of_run(link.run))
    with pytest.raises(UserError, match="link keeper was killed by SIGKILL"):
        link.signals()


def unprivileged_python() -> str:
    """An interpreter that a user without any privilege may start."""
    for candidate in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        if shutil.which(candidate) is None:
            continue
        check = "import sys, subprocess; sys.exit(sys.version_info < (3, 11) or subprocess.call([sys.executable, '-c', '']))"
        if subprocess.run([*as_nobody(), candidate, "-c", check], capture_output=True, cwd="/").returncode == 0:
            return candidate
    pytest.skip("no Python 3.11 here that an unprivileged user may start")


def as_nobody() -> list[str]:
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv of util-linux is needed to leave root")
    return ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


def test_an_unprivileged_user_gets_the_best_rootless_backend() -> None:
    interpreter = unprivileged_python()
    program = textwrap.dedent(
        """
        from repro.link import LinkSpec, open_link
        with open_link(LinkSpec(rate_bps=50e6, rtt_s=0.02, loss=0.001), run="rootless") as link:
            link.check(tolerate=True)  # without priority a busy machine may be off by more than a tenth
            print(link.backend, link.facts.get("rootless"), len(link.given_up))
        """
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*as_nobody(), interpreter, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=60)
    assert done.returncode == 0, done.stderr
    backend, rootless, given_up = done.stdout.split()
    if backend == "relay":  # user namespaces are forbidden here: then it must say what that costs
        assert int(given_up) >= 2
    else:
        assert rootless == "True"
        assert backend in ("netem", "packet")
        assert backend == "netem" or int(given_up) >= 1


def test_the_tool_runs_a_program_across_a_link() -> None:
    command = [
        sys.executable,
        "-m",
        "repro",
        "link",
        "exec",
        "metro",
        "rate_bps=1e8",
        "backend=relay",
        "--",
        "echo",
        "hi",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0
    assert done.stdout == "hi\n"
    assert "given up" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "nowhere"], "link: 'nowhere' does not exist; accepted: 5g"),
        (["check", "ratebps=3"], "link.ratebps: no such key"),
        (["exec", "metro"], "no command"),
        (["exec", "--join", "nobody", "--", "true"], "no link 'nobody' is up"),
        (["exec", "--side", "left", "metro", "--", "true"], "no side 'left'"),
    ],
)
def test_the_tool_s_mistakes_end_in_one_line(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "repro", "link", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
