"""Bench: `python -m sglang_alloc.bench.solve`, how long solving every budget takes."""

import time

import numpy as np

from sglang_alloc.solve import solve_all_budgets

SHAPES = ((26, 6), (48, 8), (61, 8), (96, 16), (94, 8))
REPEATS = 5


def best_seconds(layers: int, top_k: int) -> float:
    """Return the best time of solving all L * (K - 1) + 1 budgets of random sensitivities."""
    sensitivity = np.random.default_rng(0).normal(size=(layers, top_k))
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        solve_all_budgets(sensitivity)
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    """Print one line per shape."""
    print("layers,top_k,budgets,best_seconds")
    for layers, top_k in SHAPES:
        print(f"{layers},{top_k},{layers * (top_k - 1) + 1},{best_seconds(layers, top_k):.4f}")


if __name__ == "__main__":
    main()
