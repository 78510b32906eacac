"""From the device to the link and back, beside the computation and never in its way (§3.3: transfer overlaps prefill).

A forward pass puts each state that is final; what happens then is not its business. The copy to the host runs on a stream of its own,
behind what computed the state, into memory that is page-locked once and used again and again; a thread waits for each copy in the
order of the puts and hands the state on, so that a sender that is behind holds that thread up and not the forward pass. Memory is
bounded: where the link is so far behind that none is left, `put` waits. A staged state's memory is free again when the last view of
it is gone: a sender sends from where it lies, and nobody has to say when it is done.

On a CPU the same queue, thread and bound stand behind a plain copy. There too the copy is needed: the next chunk overwrites recurrent
states, and a view would keep the whole cache of its chunk alive. Only where whoever takes a state next copies it anyway does it go
straight there.
"""

from __future__ import annotations

import queue
import traceback
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np
import torch

from repro.engine.spans import now_s
from repro.errors import UserError
from repro.kvcache.prefix import grows
from repro.kvcache.state import State
from repro.processes import background
from repro.transport.arena import Arena, Block


class Copies(Protocol):
    """How tensors move between a device and the host."""

    def to_host(self, source: torch.Tensor, target: torch.Tensor, *, changes: bool) -> Callable[[], None]:
        """Begin to copy; what is returned waits until `target` holds `source` as it is now.

        `source` may be dropped at once, and overwritten at once where `changes` says that it will be.
        """

    def to_device(self, sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies that are the computation's to use. The sources may be overwritten when this returns."""

    def lock(self, memory: memoryview) -> None:
        """Page-lock host memory, so that copies to and from it run beside the computation."""

    def computed(self) -> None:
        """Wait for the computation, not for copies."""


class HostCopies:
    """For a model on the CPU: everything happens at once."""

    def to_host(self, source: torch.Tensor, target: torch.Tensor, *, changes: bool) -> Callable[[], None]:
        """As in `Copies`."""
        del changes
        target.copy_(source)
        return _nothing

    def to_device(self, sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """As in `Copies`."""
        return [source.clone() for source in sources]

    def lock(self, memory: memoryview) -> None:
        """As in `Copies`."""

    def computed(self) -> None:
        """As in `Copies`."""


def _nothing() -> None:
    pass


class CudaCopies:
    """For a model on a GPU: one stream for each direction, beside that of the computation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._in = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]

    def to_host(self, source: torch.Tensor, target: torch.Tensor, *, changes: bool) -> Callable[[], None]:
        """As in `Copies`."""
        # The next chunk's kernels may be launched before this copy has begun. A state that they overwrite is put aside on their own
        # stream, where it is small and the memory fast; one that is only ever replaced needs no more than to stay allocated.
        source = source.clone() if changes else source
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._out):
            target.copy_(source, non_blocking=True)
            done.record()
        source.record_stream(self._out)
        return done.synchronize

    def to_device(self, sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """As in `Copies`."""
        computation = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._in):
            copies = [source.to(self._device, non_blocking=True) for source in sources]
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record()
        for copy in copies:
            copy.record_stream(computation)
        computation.wait_event(done)
        done.synchronize()
        return copies

    def lock(self, memory: memoryview) -> None:
        """As in `Copies`. Raises UserError where the driver refuses."""
        address = np.frombuffer(memory, np.uint8).ctypes.data
        status = torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, 0)  # type: ignore[no-untyped-call]
        if int(status) != 0:
            raise UserError(f"staging: {memory.nbytes} bytes of host memory cannot be page-locked ({status})")

    def computed(self) -> None:
        """As in `Copies`."""
        torch.cuda.current_stream(self._device).synchronize()


class SpreadCopies:
    """For a model that lies on several devices: each tensor goes by the copies of the device that it lies on."""

    def __init__(self, parts: Mapping[torch.device, Copies]) -> None:
        self.parts = parts
        self._first = next(iter(parts.values()))

    def to_host(self, source: torch.Tensor, target: torch.Tensor, *, changes: bool) -> Callable[[], None]:
        """As in `Copies`."""
        return self.parts[source.device].to_host(source, target, changes=changes)

    def to_device(self, sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """As in `Copies`, to the first device."""
        return self._first.to_device(sources)

    def lock(self, memory: memoryview) -> None:
        """As in `Copies`: what is page-locked for one device is so for all."""
        self._first.lock(memory)

    def computed(self) -> None:
        """As in `Copies`."""
        for copies in self.parts.values():
            copies.computed()


def copies_over(devices: Collection[torch.device]) -> Copies:
    """The copies of one device, or of several."""
    parts = {device: copies_of(str(device)) for device in devices}
    return SpreadCopies(parts) if len(parts) > 1 else next(iter(parts.values()))


def copies_of(device: str) -> Copies:
    """The copies of a device by its torch name."""
    found = torch.device(device)
    return CudaCopies(found) if found.type == "cuda" else HostCopies()


class _Staged(NamedTuple):
    lane: Lane
    state: State
    wait: Callable[[], None]
    put_s: float


class Staging:
    """Host memory of `capacity_bytes` through which states leave, and the thread that hands them on."""

    def __init__(self, copies: Copies, capacity_bytes: int) -> None:
        self.copies = copies
        self._arena = Arena(capacity_bytes, retain_bytes=capacity_bytes)
        copies.lock(self._arena.kept)
        # A finalizer may run in any thread, even one that holds a lock: all it does is to note the block here. None only wakes.
        self._freed: queue.SimpleQueue[Block | None] = queue.SimpleQueue()
        self._queue: queue.Queue[_Staged] = queue.Queue()
        background(self._run, name="staging")

    @contextmanager
    def lane(self, deliver: Callable[[State, float, float], None]) -> Iterator[Lane]:
        """States put inside are delivered in their order, from the staging thread, before this ends.

        `deliver(state, put_s, copied_s)` gets a tensor on the host, and when its copy began and ended. What it raises is raised
        by the next `put`, or here at the end.
        """
        lane = Lane(self, deliver)
        try:
            yield lane
        finally:
            self._queue.join()
        lane.check()

    def _enqueue(self, lane: Lane, state: State, *, settled: bool) -> None:
        put_s = now_s()
        if settled or not state.tensor.numel():
            self._queue.put(_Staged(lane, state, _nothing, put_s))
            return
        target = self._memory_like(state.tensor, lane)
        wait = self.copies.to_host(state.tensor, target, changes=not grows(state.kind))
        staged = State(state.layer, state.kind, state.slot, state.start, state.end, target)
        self._queue.put(_Staged(lane, staged, wait, put_s))

    def _memory_like(self, tensor: torch.Tensor, lane: Lane) -> torch.Tensor:
        size = tensor.numel() * tensor.element_size()
        while True:
            while not self._freed.empty():
                self._free(self._freed.get())
            lane.check()
            if (block := self._arena.allocate(size)) is not None:
                break
            if not self._arena.used_bytes:
                raise UserError(
                    f"engine.staging_bytes: {self._arena.capacity_bytes} is too small for a state of {size} bytes"
                )
            self._free(self._freed.get())
        memory = np.frombuffer(self._arena.view(block, size), np.uint8)
        weakref.finalize(memory, self._freed.put, block)
        return torch.from_numpy(memory).view(tensor.dtype).view(tensor.shape)

    def _free(self, block: Block | None) -> None:
        if block is not None:
            self._arena.free(block)

    def _run(self) -> None:
        while True:
            if not _hand_on(self._queue.get()):
                self._freed.put(None)
            self._queue.task_done()


def _hand_on(staged: _Staged) -> bool:
    # A function of its own, so that no variable of a waiting loop keeps the last state's memory.
    return staged.lane.hand_on(staged)


class Lane:
    """One request's way through the staging memory."""

    def __init__(self, staging: Staging, deliver: Callable[[State, float, float], None]) -> None:
        self._staging, self._deliver = staging, deliver
        self._error: Exception | None = None

    def put(self, state: State, *, settled: bool = False) -> None:
        """Send a state on its way. Waits only where the staging memory is full.

        A `settled` state lies in host memory that nobody writes to, and is handed on from there.
        """
        self.check()
        self._staging._enqueue(self, state, settled=settled)

    def check(self) -> None:
        """Raise what `deliver` raised."""
        if self._error is not None:
            raise self._error

    def hand_on(self, staged: _Staged) -> bool:
        """Deliver, and say whether all is well: what follows a failure has nowhere to go, though its copy must end."""
        try:
            staged.wait()
            if self._error is None:
                self._deliver(staged.state, staged.put_s, now_s())
        except Exception as error:
            self._error = self._error or _as_told(error)
        return self._error is None


class Straight:
    """The way of state that lies on the host to one who copies it at once: no staging memory, no second thread."""

    def __init__(self, deliver: Callable[[State, float], None]) -> None:
        self._deliver = deliver

    def __enter__(self) -> Straight:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def put(self, state: State, *, settled: bool = False) -> None:
        """Deliver a state, and when that began. What `deliver` raises is raised here."""
        del settled
        self._deliver(state, now_s())


def _as_told(error: Exception) -> Exception:
    """The error with its traceback as text: the frames of a traceback hold the state, and with it staging memory."""
    error.add_note(traceback.format_exc())
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
