"""The words of the shared table that change while a server runs, and what they mean."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from sglang_alloc.shared_table_layout import CALM_TOKENS_WORDS, WORKER_SLOT_WORDS

GENERATION_MASK = 0xFFFF_FFFF
BUDGET_LIMIT = 0xFFFF
# `CalmBudgets.running_requests` where their number does not matter.
RUNNING_ANY = 0xFFFF
_GENERATION_HALF = 1 << 31

# The code of a source in `WorkerCounters.acknowledged_source` is its index here.
SOURCES = ("none", "controller", "override", "fallback")


def source_code(source: Literal["none", "controller", "override", "fallback"]) -> int:
    """Return the code of a source."""
    return SOURCES.index(source)


class Selector(NamedTuple):
    """One selector word, unpacked; budgets in activations per token over all MoE layers."""

    generation: int
    prefill_budget: int
    decode_budget: int


class CalmBudgets(NamedTuple):
    """The budgets of calm steps, at least the selector's.

    A step is calm if it leaves no request waiting and fewer than `running_requests` were running
    before it.
    """

    prefill_budget: int
    decode_budget: int
    running_requests: int = RUNNING_ANY


class Selection(NamedTuple):
    """The budgets to use now, and who decided them; without `calm`, the same in every step."""

    source: Literal["controller", "override", "fallback"]
    generation: int
    prefill_budget: int
    decode_budget: int
    calm: CalmBudgets | None = None


class Override(NamedTuple):
    """A person's budgets, in force until `deadline_ns` of the monotonic clock."""

    prefill_budget: int
    decode_budget: int
    generation: int
    deadline_ns: int
    actor: str


class Fallback(NamedTuple):
    """What to use when no controller is alive; the budgets count for kind "budget" only."""

    kind: Literal["full", "hold", "budget"]
    prefill_budget: int = 0
    decode_budget: int = 0


class WorkerCounters(NamedTuple):
    """What one rank reports, in the order of its slot's words; counters since its start.

    `acknowledged_source` indexes `SOURCES`. The `sampled_` words count a sample of the steps:
    tokens, and the activations that those tokens kept over all MoE layers.
    `distinct_experts` sums over the sampled decode steps and the layers. `last_step_ns` is of the
    monotonic clock. `kept_mass_millionths` is the share of router weight kept, last sample.
    """

    pid: int = 0
    rank: int = 0
    acknowledged_generation: int = 0
    acknowledged_source: int = 0
    prefill_budget: int = 0
    decode_budget: int = 0
    steps: int = 0
    fallbacks: int = 0
    sampled_prefill_tokens: int = 0
    sampled_prefill_activations: int = 0
    sampled_decode_tokens: int = 0
    sampled_decode_activations: int = 0
    sampled_decode_steps: int = 0
    distinct_experts: int = 0
    last_step_ns: int = 0
    kept_mass_millionths: int = 0

    def follows_controller(self, generation: int) -> bool:
        """Tell whether the rank obeys the controller's selector of this generation.

        Only then its calm steps have the calm budgets that were written with it.
        """
        following = (self.acknowledged_source, self.acknowledged_generation)
        return following == (source_code("controller"), generation)


class CalmTokens(NamedTuple):
    """How many tokens one rank served, by phase, since its start.

    Those that are calm were in steps that had the calm budgets, or would have had them.
    """

    calm_prefill: int = 0
    prefill: int = 0
    calm_decode: int = 0
    decode: int = 0


assert len(WorkerCounters._fields) == WORKER_SLOT_WORDS
assert len(CalmTokens._fields) == CALM_TOKENS_WORDS
_NO_TOKENS = CalmTokens()


class WorkerSlot:
    """The 16 words, and 4 of calm tokens, that one rank, and no other process, writes."""

    def __init__(
        self, words: memoryview, calm_words: memoryview, is_intact: Callable[[], bool]
    ) -> None:
        """Take the slot's words, writable views of format "Q", and a test of the file."""
        self._words = words
        self._calm_words = calm_words
        self._is_intact = is_intact

    def store(self, counters: WorkerCounters, tokens: CalmTokens = _NO_TOKENS) -> None:
        """Write every word, `pid` last, so that a slot with a pid has been filled once.

        Into a file that was shortened or overwritten in place nothing is written: counters are
        not worth a server.
        """
        if self._is_intact():
            # All tokens before the calm ones of a phase: who reads between has no more of these.
            for index in range(CALM_TOKENS_WORDS - 1, -1, -1):
                self._calm_words[index] = tokens[index]
            for index in range(WORKER_SLOT_WORDS - 1, -1, -1):
                self._words[index] = counters[index]


def pack_word(generation: int, prefill_budget: int, decode_budget: int) -> int:
    """Return the u64 of a selector or an override; the budgets must fit 16 bits."""
    return generation << 32 | prefill_budget << 16 | decode_budget


def pack_calm_word(generation: int, calm: CalmBudgets) -> int:
    """Return the u64 of calm budgets, whose numbers must fit 16 bits."""
    upper = (generation & BUDGET_LIMIT) << 16 | calm.running_requests
    return pack_word(upper, calm.prefill_budget, calm.decode_budget)


def calm_of_word(word: int, generation: int) -> CalmBudgets | None:
    """Split a calm word; None where it belongs to another generation of the selector."""
    upper, prefill_budget, decode_budget = unpack_word(word)
    if word == 0 or upper >> 16 != generation & BUDGET_LIMIT:
        return None
    return CalmBudgets(prefill_budget, decode_budget, upper & RUNNING_ANY)


def unpack_word(word: int) -> Selector:
    """Split a selector or override word."""
    return Selector(word >> 32, word >> 16 & BUDGET_LIMIT, word & BUDGET_LIMIT)


def next_generation(generation: int) -> int:
    """Return the generation after this one: 32 bits that wrap past 0, which means never."""
    return generation % GENERATION_MASK + 1


def is_newer_generation(candidate: int, reference: int) -> bool:
    """Tell whether `candidate` was written after `reference`, less than 2**31 changes apart."""
    return 0 < (candidate - reference & GENERATION_MASK) < _GENERATION_HALF
