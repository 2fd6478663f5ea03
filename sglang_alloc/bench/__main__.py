"""Bench: `python -m sglang_alloc.bench` is `sglang-alloc bench`."""

from __future__ import annotations

import sys

from sglang_alloc.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    main()
