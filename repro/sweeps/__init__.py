"""Sweeps: many configurations as one record, whose points several processes share and an interruption does not lose."""
