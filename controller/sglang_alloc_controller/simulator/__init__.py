"""Simulator: the control story in simulated time, against a model of SGLang's batching."""
