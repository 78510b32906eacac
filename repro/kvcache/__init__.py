"""Take a KVCache apart, frame it, put it together: what crosses the link in Prefill-as-a-Service (§3.2, §3.3)."""
