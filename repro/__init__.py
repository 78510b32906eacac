"""Reproduction kit for *Prefill-as-a-Service: KVCache of Next-Generation Models Could Go Cross-Datacenter*."""
