"""What SGLang's /v1/loads answers, as recorded from 0.5.23, with as many ranks as a test wants."""

import json
from datetime import datetime, timezone
from typing import Any

ANSWERED_AT = 1_790_000_000.0


def rank(dp_rank: int = 0, age_seconds: float = 0.1, **fields: Any) -> dict[str, Any]:
    """One rank whose last step was `age_seconds` before the answer."""
    load = {
        "timestamp": ANSWERED_AT - age_seconds,
        "dp_rank": dp_rank,
        "num_running_reqs": 1,
        "num_waiting_reqs": 0,
        "num_waiting_uncached_tokens": 0,
        "num_used_tokens": 120,
        "num_total_tokens": 120,
        "max_total_num_tokens": 4096,
        "max_running_requests": 8,
        "token_usage": 0.03,
        "gen_throughput": 12.5,
        "cache_hit_rate": 0.0,
        "utilization": 0.1,
        "total_prefill_uncached_tokens": 0,
        "total_prefill_busy_us": 0,
        "decode_moments": None,
    }
    return {**load, **fields}


def answer(*ranks: dict[str, Any]) -> str:
    """The body of an answer with these ranks."""
    stamp = datetime.fromtimestamp(ANSWERED_AT, timezone.utc).isoformat()
    return json.dumps({"timestamp": stamp, "version": "0.5.23", "loads": list(ranks)})
