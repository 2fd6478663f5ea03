"""Bench: what budgeted routing costs and what a smaller budget buys, beside what is possible."""
