"""The discrete-event simulator: the same scheduler under queues, batches, a shared link, caches and failures; seeded, virtual clock."""

from repro import native

native.prefer()
