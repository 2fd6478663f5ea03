"""Budgeted routing kernels: each beside its torch twin."""
