"""Servers on a GPU: nothing here is collected on a machine without one."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("KERNEL_TEST_DEVICE") == "cuda" else ["test_*.py"]
