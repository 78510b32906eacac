"""The tools around the experiments: `python -m repro <verb>`, one thin module each."""
