"""The models of Table 1 and any other causal language model of transformers: architecture, size, weights, state."""
