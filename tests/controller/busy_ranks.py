"""The pages of an engine of eight data-parallel ranks that answers more and more requests."""

from loads_answers import answer, rank

RANKS = 8
PROMPT_TOKENS, OUTPUT_TOKENS, BATCH = 100, 20, 16


def metrics_page(requests: int) -> str:
    """Return /metrics of ranks that have answered so many requests each, all within the SLOs."""
    return "".join(_rank_lines(f'dp_rank="{one}",tp_rank="0"', requests) for one in range(RANKS))


def loads_page(requests: int) -> str:
    """Return /v1/loads of the same, with steps of 4 ms of decode and 5 ms of prefill."""
    tokens = requests * OUTPUT_TOKENS
    steps = tokens / BATCH
    moments = [steps, tokens, 4e3 * steps, BATCH * tokens, 4e3 * tokens, tokens]
    return answer(
        *(
            rank(
                one,
                num_running_reqs=BATCH,
                decode_moments=moments,
                total_prefill_uncached_tokens=requests * PROMPT_TOKENS,
                total_prefill_busy_us=5000 * requests,
            )
            for one in range(RANKS)
        )
    )


def _rank_lines(labels: str, requests: int) -> str:
    latencies = (
        ("time_to_first_token", 1.0, requests),
        ("inter_token_latency", 0.05, requests * OUTPUT_TOKENS),
    )
    lines = [
        f'sglang:{name}_seconds_bucket{{{labels},is_streaming="true",le="{edge}"}} {events}'
        for name, within, events in latencies
        for edge in (within, "+Inf")
    ]
    lines += [
        f"sglang:num_queue_reqs{{{labels}}} 0",
        f"sglang:num_running_reqs{{{labels}}} {BATCH}",
        f'sglang:realtime_tokens_total{{{labels},mode="prefill_compute"}} '
        f"{requests * PROMPT_TOKENS}",
    ]
    return "\n".join(lines) + "\n"
