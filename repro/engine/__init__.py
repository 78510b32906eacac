"""Prefill and decode engines: what turns a prompt into KVCache, and KVCache into tokens, on one device."""
