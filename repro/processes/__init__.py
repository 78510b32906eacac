"""The one owner of child processes: workers, the link's helpers, the transport's process, the tracker and the benchmarks' ends.

A child leads a process group of its own, dies with this process (a signal from the kernel, and EOF on its channel), speaks in framed
messages with bounds and deadlines, beats once a second, and is watched: its death is known within milliseconds, its silence within 10 s.
This room is at the bottom: it imports nothing of the kit but `repro.errors`.

>>> child = Child("worker echo", [sys.executable, "-m", "a.module.that.calls.run_worker"])
>>> child.ask("question", text="…")
>>> child.end()
"""

from repro.processes.beside import beside
from repro.processes.channel import Channel, Message, PeerGone
from repro.processes.child import Child, ChildEndedError, Ended
from repro.processes.cores import Core, Cores, background, hand_out, place, placed
from repro.processes.forked import Forked, apart
from repro.processes.kernel import die_with_parent, run_first, tied, wake_precisely
from repro.processes.pool import each_in_parallel
from repro.processes.programs import foreground, run
from repro.processes.supervision import Event, SilenceError, Supervisor
from repro.processes.warm import Warm
from repro.processes.worker import Parent, run_worker

__all__ = [
    "Channel", "Child", "ChildEndedError", "Core", "Cores", "Ended", "Event", "Forked", "Message", "Parent", "PeerGone", "SilenceError",
    "Supervisor", "Warm", "apart", "background", "beside", "die_with_parent", "each_in_parallel", "foreground", "hand_out", "place",
    "placed", "run", "run_first", "run_worker", "tied", "wake_precisely",
]  # fmt: skip
