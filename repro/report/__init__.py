"""Figures, claims and reports, drawn from records alone."""
