"""The live system: workers in processes of their own, their supervisor, and a record of what happened.

Prefill and decode run as separate operating-system processes, as in the paper's two clusters (§3.1), and KVCache
crosses nothing but the link between them. The supervisor speaks to its workers in JSON messages: requests and events, never
state.
"""
