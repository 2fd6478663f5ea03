"""Offline story, judging: what every rule costs in quality at equal measured activations."""
