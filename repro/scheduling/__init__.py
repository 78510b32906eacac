"""The scheduler of §3.4: throughput model, grid search, and one scheduler object with routers, loops and KVCache manager; pure."""

from repro import native

native.prefer()
