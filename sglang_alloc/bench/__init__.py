"""Measurements of speed; nothing here is needed to serve."""
