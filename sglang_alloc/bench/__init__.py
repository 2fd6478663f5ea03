"""Benches: what a budget buys on this machine, beside stock SGLang in the same run."""
