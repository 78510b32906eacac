"""Phase profiles: T_prefill, T_decode and S_kv of a model on an accelerator, published, measured or calibrated; clusters and prices."""
