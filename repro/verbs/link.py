"""Run any program across an emulated link: link up | check | exec -- <command> | clean.

python -m repro link check metro rate_bps=2e9
    make the link, measure it, and say how it compares with what was asked
python -m repro link exec continental -- iperf3 ...
    run a program on the prefill side (or --side decode); the link lives as long as the program
python -m repro link up metro --run demo
    make the link and hold it until Ctrl-C
python -m repro link exec --join demo -- iperf3 ...
    run a program inside the link that another shell holds
python -m repro link clean
    remove what killed runs left behind
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading

from repro.arguments import Parser
from repro.composition import compose
from repro.errors import UserError
from repro.link import leftovers
from repro.link.backends import open_link
from repro.link.link import Link
from repro.link.namespaces import ADDRESSES, inside
from repro.link.spec import LinkSpec, Side
from repro.processes import ChildEndedError, foreground, tied


def main(argv: list[str]) -> int:
    """The tool's entry; returns the exit code."""
    split = argv.index("--") if "--" in argv else len(argv)
    own, command = argv[:split], argv[split + 1 :]
    parser = Parser(prog="python -m repro link", description=__doc__, formatter_class=_Plain)
    parser.add_argument("action", choices=("up", "check", "exec", "clean"))
    parser.add_argument("link", nargs="*", help="a preset of conf/link and key=value changes to it")
    parser.add_argument("--run", default=f"link-{os.getpid()}", help="the run's name (default: by process)")
    parser.add_argument("--join", help="exec: run inside the link that `link up --run NAME` holds")
    parser.add_argument("--side", default="prefill", help="exec: prefill (default) or decode")
    parser.add_argument("--tolerate", action="store_true", help="go on with a link that is off by more than a tenth")
    parser.add_argument("--json", action="store_true", help="check: the whole record as JSON")
    options = parser.parse_intermixed_args(own)
    if options.action == "exec" and not command:
        raise UserError("link exec: no command; accepted: link exec <preset> -- <command> …")
    if options.side not in ADDRESSES:
        raise UserError(f"link: there is no side {options.side!r}; accepted: prefill, decode")
    if options.action == "clean":
        return _clean()
    if options.action == "exec" and options.join:
        return _join(options.join, options.side, command)
    spec = spec_of(options.link)
    with open_link(spec, run=options.run) as link:
        if options.action == "exec":
            _describe(link)
            link.start()
            return foreground(link.command(options.side, tied(command)))
        warnings = link.check(tolerate=options.tolerate)
        if options.json:
            print(json.dumps(link.record(), indent=1))
        else:
            _describe(link)
            _compare(link, warnings)
        if options.action == "up":
            _hold(link)
    return 0


def spec_of(words: list[str]) -> LinkSpec:
    """A link from a preset's name and `key=value` changes.

    Raises:
        UserError: naming the presets that exist, or the key that is wrong.
    """
    changes = []
    for word in words:
        key, assigned, _ = word.partition("=")
        changes.append(f"link.{word}" if assigned else f"link={key}")
    presets = [change for change in changes if change.startswith("link=")]
    return compose(
        [*(presets or ["link=loopback"]), *(change for change in changes if change not in presets)]
    ).settings.link


def _describe(link: Link) -> None:
    spec = link.spec
    rate = "unlimited" if spec.rate_bps is None else f"{spec.rate_bps / 1e9:g} Gbps"
    print(
        f"link {spec.name}: {rate}, {spec.rtt_s * 1e3:g} ms RTT, loss {spec.loss:g}, by {link.backend}", file=sys.stderr
    )
    for line in link.given_up:
        print(f"  given up: {line}", file=sys.stderr)
    for side in ADDRESSES:
        print(f"  {side}: bind {link.listen_host(side)}", file=sys.stderr)


def _compare(link: Link, warnings: list[str]) -> None:
    for direction, found in link.measured.items():
        share = f" = {found.rate_share:.4f} of the ideal" if found.rate_share == found.rate_share else ""
        loss = f", loss {found.loss:.3g} of {found.loss_segments} segments" if found.loss_segments else ""
        print(
            f"{direction}: {found.rate_bps / 1e9:.4f} Gbps of TCP goodput{share}, RTT {found.rtt_s * 1e3:.3f} ms "
            f"(P99 {found.rtt_p99_s * 1e3:.3f}), jitter {found.jitter_s * 1e3:.3f} ms{loss}; "
            f"by {found.probe} in {found.duration_s:.1f} s"
        )
    for line in warnings:
        print(f"warning: {line}")


def _hold(link: Link) -> None:
    link.start()
    print(f"up; Ctrl-C takes it down. Inside: python -m repro link exec --join {link.run} -- <command>", flush=True)
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    if link.helper is not None:
        link.helper.on_end(lambda _: over.set())
    over.wait()
    if link.helper is not None and link.helper.ended is not None:
        raise ChildEndedError(link.helper.ended)


def _join(run: str, side: Side, command: list[str]) -> int:
    for member in leftovers.members():
        if member.run == run and member.owner_alive and member.command.endswith("repro.link.keeper"):
            return foreground(["env", leftovers.mark(run), *inside(member.pid, side, tied(command))])
    raise UserError(f"link exec --join: no link {run!r} is up; accepted: the --run of a `link up` that still runs")


def _clean() -> int:
    killed = leftovers.clean()
    for member in killed:
        print(f"removed {member.pid} of run {member.run}: {member.command}")
    print(f"{len(killed)} leftover processes removed; namespaces and interfaces went with them", file=sys.stderr)
    return 0


class _Plain(argparse.RawDescriptionHelpFormatter):
    """Shows the docstring as it is."""
