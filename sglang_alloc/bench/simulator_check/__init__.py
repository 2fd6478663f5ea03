"""Bench: the same trace through a real SGLang server and through the simulator, side by side."""
