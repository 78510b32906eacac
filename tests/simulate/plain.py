"""A second simulator of one PrfaaS cluster and one PD cluster: slow, obvious, and without a line of the first.

One event per decode step, and KVCache in discrete pieces of a layer each. It knows a threshold, least work, first come first served, and
a link that is shared equally by whoever has a piece to send; decode batches are limited by BS_max and, where given, by memory.
"""

import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass, field


@dataclass
class Request:
    id: int
    arrival_s: float
    tokens: int
    output: int
    remote: bool = False
    context: int = 0
    left: int = 0
    pieces_made: int = 0
    pieces_sent: int = 0
    piece_left: float = 0.0
    first_s: float = math.nan
    finish_s: float = math.nan
    preempted: int = 0


@dataclass
class Instance:
    changed: int
    running: list = field(default_factory=list)
    joining: list = field(default_factory=list)
    preempted: deque = field(default_factory=deque)
    stepping: bool = False

    @property
    def size(self):
        return len(self.running) + len(self.joining) + len(self.preempted)


class Plain:
    """`remote` and `local` are profiles; times in seconds, the link's rate in bit/s."""

    def __init__(
        self, local, n_p, n_d, remote=None, n_prfaas=0, threshold=math.inf, rate_bps=math.inf, rtt_s=0.0,
        pieces=57, memory_bytes=math.inf,
    ):  # fmt: skip
        self.local, self.remote, self.threshold = local, remote, threshold
        self.bytes_per_s, self.rtt_s, self.pieces, self.memory = rate_bps / 8, rtt_s, pieces, memory_bytes
        self.free_s = {False: [0.0] * n_p, True: [0.0] * n_prfaas}
        self.number = itertools.count()
        self.decoders = [Instance(next(self.number)) for _ in range(n_d)]
        self.waiting, self.sending = deque(), []
        self.link_s, self.link_plan, self.sent_bytes = 0.0, 0, 0.0
        self.events, self.order = [], itertools.count()

    def at(self, when_s, what, *arguments):
        heapq.heappush(self.events, (when_s, next(self.order), what, arguments))

    def run(self, arrivals):
        """`arrivals`: (time, input tokens, output tokens). Returns the requests as they ended."""
        requests = [Request(number, *row) for number, row in enumerate(arrivals)]
        for request in requests:
            self.at(request.arrival_s, self.arrive, request)
        while self.events:
            now_s, _, what, arguments = heapq.heappop(self.events)
            what(now_s, *arguments)
        return requests

    # Prefill: the instance that is free first.

    def arrive(self, now_s, request):
        request.remote = request.tokens > self.threshold
        profile, free_s = self.remote if request.remote else self.local, self.free_s[request.remote]
        least = min(range(len(free_s)), key=lambda i: free_s[i])
        start_s, work_s = max(now_s, free_s[least]), float(profile.prefill_s(request.tokens))
        free_s[least] = start_s + work_s
        if not request.remote:
            self.at(start_s + work_s, self.ready, request)
            return
        for piece in range(1, self.pieces + 1):
            self.at(start_s + work_s * piece / self.pieces, self.made, request)

    # Link: every request that has an unsent piece gets the same share.

    def made(self, now_s, request):
        self.share(now_s)
        request.pieces_made += 1
        if request not in self.sending:
            request.piece_left = float(self.remote.kv_bytes(request.tokens)) / self.pieces
            self.sending.append(request)
        self.plan_link()

    def share(self, now_s):
        each = (now_s - self.link_s) * self.bytes_per_s / max(len(self.sending), 1)
        self.link_s = now_s
        for request in self.sending:
            request.piece_left -= each
            self.sent_bytes += each

    def plan_link(self):
        self.link_plan += 1
        if self.sending:
            least = min(max(request.piece_left, 0.0) for request in self.sending)
            self.at(self.link_s + least * len(self.sending) / self.bytes_per_s, self.piece_sent, self.link_plan)

    def piece_sent(self, now_s, plan):
        if plan != self.link_plan:
            return
        self.share(now_s)
        size = {id(request): float(self.remote.kv_bytes(request.tokens)) / self.pieces for request in self.sending}
        for request in [one for one in self.sending if one.piece_left <= 1.0]:
            request.pieces_sent += 1
            request.piece_left = size[id(request)]
            if request.pieces_sent == request.pieces_made:
                self.sending.remove(request)
            if request.pieces_sent == self.pieces:
                self.at(now_s + self.rtt_s / 2, self.ready, request)
        self.plan_link()

    # Decode: one event per step.

    def ready(self, now_s, request):
        request.context, request.left = request.tokens, request.output
        self.waiting.append(request)
        self.place(now_s)

    def held(self, instance, ahead):
        """KVCache after the step under way, if any, and `ahead` more."""
        under_way = 1 if instance.stepping else 0
        running = sum(float(self.local.kv_bytes(one.context + under_way + ahead)) for one in instance.running)
        return running + sum(float(self.local.kv_bytes(one.context + ahead)) for one in instance.joining)

    def place(self, now_s, at_boundary=None):
        while self.waiting:
            request = self.waiting[0]
            for instance in sorted(self.decoders, key=lambda one: (one.size, one.changed)):
                full = instance.size >= self.local.batch_max or instance.preempted
                if full or self.held(instance, 1) + float(self.local.kv_bytes(request.context + 1)) > self.memory:
                    continue
                self.waiting.popleft()
                idle = not instance.size
                (instance.joining if instance.stepping else instance.running).append(request)
                instance.changed = next(self.number)
                if idle and instance is not at_boundary:
                    self.step(now_s, instance)
                break
            else:
                return

    def step(self, start_s, instance):
        instance.stepping = True
        context = sum(one.context for one in instance.running)
        self.at(start_s + self.local.decode_step_s(len(instance.running), context), self.boundary, instance)

    def boundary(self, now_s, instance):
        instance.stepping = False
        for one in instance.running:
            one.context, one.left = one.context + 1, one.left - 1
            if math.isnan(one.first_s):
                one.first_s = now_s
            if not one.left:
                one.finish_s = now_s
                instance.changed = next(self.number)
        instance.running = [one for one in instance.running if one.left] + instance.joining
        instance.joining = []
        while len(instance.running) > 1 and self.held(instance, 1) > self.memory:
            instance.preempted.appendleft(instance.running.pop())
            instance.preempted[0].preempted += 1
        stall_s = 0.0
        while instance.preempted and (
            self.held(instance, 1) + float(self.local.kv_bytes(instance.preempted[0].context + 1)) <= self.memory
        ):
            one = instance.preempted.popleft()
            stall_s += float(self.local.prefill_s(one.context))
            instance.running.append(one)
        self.place(now_s, at_boundary=instance)
        if instance.running:
            self.step(now_s + stall_s, instance)
