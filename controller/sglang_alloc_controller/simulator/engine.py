"""Simulator, third step: SGLang's continuous batching, one engine step after another. Pure.

A prefill step takes waiting requests in order of arrival, up to `chunk_tokens` prompt tokens, as
long as a running slot and KV memory are free; the last prompt may be cut and goes on in the next
step. Prefill goes before decode, as in SGLang. A decode step gives every running request one token;
equal decode steps in a row are taken at once, so the cost is per request and not per token.

A step ends before its tokens are seen, and the budgets are those in force when it began. A request
reserves KV memory for its prompt and its whole answer (SGLang guesses the answer and retracts).
"""

import math
from bisect import bisect_right
from heapq import heappop, heappush
from operator import add
from typing import NamedTuple

from sglang_alloc.errors import ConfigurationError
from sglang_alloc.shared_table import CalmBudgets
from sglang_alloc_controller.samples import RankTime
from sglang_alloc_controller.simulator.latency_counts import LatencyCounts
from sglang_alloc_controller.simulator.plant import Plant
from sglang_alloc_controller.simulator.workload import Workload

_NEVER = math.inf
# Times are sums of step times; a boundary missed by rounding alone counts as met.
_ROUNDING = 1e-9


class Outcome(NamedTuple):
    """What became of one request."""

    request: int
    finished_seconds: float
    ttft_seconds: float
    """NaN: it was lost before its first token."""
    itl_seconds: float
    """Mean over its tokens after the first; 0 for one token."""
    lost: bool


class _Started(NamedTuple):
    """A request whose first token is out."""

    ttft_seconds: float
    first_token_seconds: float


class Obeyed(NamedTuple):
    """What the tokens of one phase were computed with."""

    tokens: int = 0
    budget_tokens: int = 0
    """Sum over them of the budget in force."""
    calm_tokens: int = 0
    """Those of calm steps."""

    @property
    def mean_budget(self) -> float:
        """Activations per token; NaN without tokens."""
        return self.budget_tokens / self.tokens if self.tokens else math.nan

    @property
    def calm_ratio(self) -> float:
        """Share of the tokens in calm steps; NaN without tokens."""
        return self.calm_tokens / self.tokens if self.tokens else math.nan


class Engine:
    """One server in simulated time, which begins at second 0."""

    def __init__(self, workload: Workload, plant: Plant, budgets: tuple[int, int]) -> None:
        """Begin empty at (prefill, decode) budgets; `plant` says what steps cost.

        Raises:
            ConfigurationError: a request is larger than the KV memory, and would wait for ever.
        """
        largest = max(map(add, workload.prompt_tokens, workload.output_tokens), default=0)
        if largest > plant.kv_tokens:
            raise ConfigurationError(
                f"A prompt and its answer have {largest} tokens together, and the simulated server "
                f"has KV memory for {plant.kv_tokens}. Simulate shorter prompts or answers: some "
                "are four times as long as the median, and in long-prompts four times that."
            )
        self._plant = plant
        self._arrivals = [*workload.arrival_seconds, _NEVER]
        self._prompts, self._outputs = list(workload.prompt_tokens), list(workload.output_tokens)
        self._head = self._tail = 0  # waiting: the requests from head to tail
        self._running: list[
            tuple[int, int]
        ] = []  # heap of (decode step of its last token, request)
        self._started: dict[int, _Started] = {}
        self._cut: tuple[int, int] | None = None  # (request, prompt tokens left)
        self._kv_used = 0
        self._steps = 0
        self._fresh: list[float] = []  # first tokens since the last decode step, when
        self._token_at = 0.0  # when the last decode step ended
        self._step_end = _NEVER
        self._prefilled: tuple[int, ...] | None = None  # whom the prefill step under way completes
        self._decode_seconds = self._decode_loss = 0.0  # of the decode step under way
        self._decode_step: dict[tuple[int, int], float] = {}  # seconds by batch and budget
        self._prefill_step: dict[tuple[int, int], float] = {}  # seconds by tokens and budget
        self.now_seconds = 0.0
        self.slowdown_ratio = 1.0
        self.ttft = LatencyCounts(plant.ttft_edges)
        self.itl = LatencyCounts(plant.itl_edges)
        self.outcomes: list[Outcome] = []
        self.loss_sum = 0.0  # nats, over the generated tokens
        self.generated_tokens = 0
        self.lost_requests = 0
        self.prefilled_tokens = 0  # prompt tokens computed since the start
        self._work = [0.0] * len(RankTime._fields)  # since the start
        self._step_seconds = 0.0  # of the prefill step under way
        self._step_tokens = 0  # of the prefill step under way
        # Fields of Obeyed, and tokens of steps that had no larger budgets for being calm.
        self._prefill_obeyed, self._decode_obeyed = [0, 0, 0, 0], [0, 0, 0, 0]
        self._step_budget, self._step_is_calm = 0, False  # of the step under way
        self._step_has_calm_budgets = False
        self.set_budgets(*budgets)

    def set_budgets(self, prefill: int, decode: int, calm: CalmBudgets | None = None) -> None:
        """Put budgets in force from the next step on; `calm`: others while the engine is calm."""
        self.prefill_budget, self.decode_budget, self.calm = prefill, decode, calm

    def _in_force(self) -> tuple[int, int, bool]:
        """Return both budgets of the step that begins now and whether it is calm.

        Behind it head to tail wait.
        """
        calm, is_calm = self.calm, self._head == self._tail
        self._step_has_calm_budgets = False
        if calm is None:
            return self.prefill_budget, self.decode_budget, is_calm
        if is_calm and len(self._running) < calm.running_requests:
            self._step_has_calm_budgets = True
            return calm.prefill_budget, calm.decode_budget, True
        return self.prefill_budget, self.decode_budget, False

    @property
    def obeyed(self) -> tuple[Obeyed, Obeyed]:
        """What prefill and decode tokens were computed with; a restart does not end the count."""
        return Obeyed(*self._prefill_obeyed[:3]), Obeyed(*self._decode_obeyed[:3])

    @property
    def busy_tokens(self) -> tuple[int, int]:
        """Prefill and decode tokens of steps that had no larger budgets for being calm."""
        return self._prefill_obeyed[3], self._decode_obeyed[3]

    @property
    def waiting_requests(self) -> int:
        """Requests that have arrived and whose prefill has not begun."""
        return self._tail - self._head

    @property
    def running_requests(self) -> int:
        """Requests that hold KV memory."""
        return len(self._running) + (self._cut is not None) + self._being_prefilled()

    @property
    def work(self) -> RankTime:
        """What the engine has done since its start."""
        return RankTime(*self._work)

    @property
    def done(self) -> bool:
        """Tell whether every request of the workload has been answered or lost."""
        return len(self.outcomes) == len(self._prompts)

    def late_requests(self, ttft_seconds: float) -> int:
        """Return how many requests wait for their first token longer than this already."""
        before = bisect_right(self._arrivals, self.now_seconds - ttft_seconds, 0, self._tail)
        return max(0, before - self._head)

    def offer(self, arrival_seconds: float, prompt_tokens: int, output_tokens: int) -> None:
        """Add a request behind all others, whose arrival lies ahead: a balancer's decision.

        Clones made before share their requests with this engine and must not be used any more.
        """
        self._arrivals.insert(len(self._prompts), arrival_seconds)
        self._prompts.append(prompt_tokens)
        self._outputs.append(output_tokens)

    def advance(self, until_seconds: float) -> None:
        """Let time pass; a step that is under way then goes on in the next call."""
        while self.now_seconds < until_seconds:
            if self._step_end <= until_seconds:
                self._finish_step()
            elif self._step_end < _NEVER or not self._begin_step(until_seconds):
                self.now_seconds = until_seconds
                self._arrive()
                return

    def restart(self, until_seconds: float) -> None:
        """Lose all requests and counters now, and whatever arrives until the engine is back."""
        self._arrive()
        held = [request for _, request in self._running]
        cut = [] if self._cut is None else [self._cut[0]]
        for request in (*held, *(self._prefilled or ()), *cut, *range(self._head, self._tail)):
            self._lose(request)
        self._running, self._started, self._cut, self._prefilled = [], {}, None, None
        self._kv_used, self._fresh, self._step_end = 0, [], _NEVER
        self._head = self._tail
        while self._arrivals[self._tail] < until_seconds:
            self._lose(self._tail)
            self._tail += 1
        self._head = self._tail
        self.now_seconds = self._token_at = until_seconds
        self.ttft, self.itl = LatencyCounts(self.ttft.edges), LatencyCounts(self.itl.edges)
        self.prefilled_tokens, self._work = 0, [0.0] * len(RankTime._fields)

    def clone(self) -> "Engine":
        """Return a copy that goes its own way, with outcomes and sums of its own from now on."""
        other = object.__new__(Engine)
        other.__dict__.update(self.__dict__)
        other._running, other._started = list(self._running), dict(self._started)
        other._fresh = list(self._fresh)
        other.ttft, other.itl = self.ttft.copy(), self.itl.copy()
        other._work = list(self._work)
        other._prefill_obeyed = list(self._prefill_obeyed)
        other._decode_obeyed = list(self._decode_obeyed)
        other.outcomes = []
        return other

    def _arrive(self) -> None:
        while self._arrivals[self._tail] <= self.now_seconds:
            self._tail += 1

    def _being_prefilled(self) -> int:
        return 0 if self._prefilled is None else len(self._prefilled)

    def _begin_step(self, until_seconds: float) -> bool:
        """Begin a step, or several that end in time; False: nothing to do until then."""
        self._arrive()
        if self._cut is not None or self._admits():
            self._begin_prefill()
            return True
        if self._running:
            self._begin_decode(until_seconds)
            return True
        arrival = self._arrivals[self._tail]
        if arrival > until_seconds:
            return False
        self.now_seconds = self._token_at = arrival
        return True

    def _admits(self) -> bool:
        """Tell whether the first waiting request could start now."""
        if self._head == self._tail or len(self._running) >= self._plant.max_running_requests:
            return False
        return self._kv_used + self._kv_need(self._head) <= self._plant.kv_tokens

    def _kv_need(self, request: int) -> int:
        return self._prompts[request] + self._outputs[request]

    def _begin_prefill(self) -> None:
        prompts = self._prompts
        completed: list[int] = []
        shares: list[tuple[int, int]] = []  # (request, prompt tokens of it in this step)
        tokens, cut = 0, None
        if self._cut is not None:
            request, rest = self._cut
            tokens = min(rest, self._plant.chunk_tokens)
            shares.append((request, tokens))
            if tokens < rest:
                cut = (request, rest - tokens)
            else:
                completed.append(request)
        room = self._plant.chunk_tokens - tokens
        slots = self._plant.max_running_requests - len(self._running) - len(completed)
        while room > 0 and slots > 0 and cut is None and self._fits():
            request = self._head
            self._head += 1
            self._kv_used += self._kv_need(request)
            taken = min(room, prompts[request])
            shares.append((request, taken))
            tokens, room, slots = tokens + taken, room - taken, slots - 1
            if taken < prompts[request]:
                cut = (request, prompts[request] - taken)
            else:
                completed.append(request)
        self._prefilled, self._cut, self._step_tokens = tuple(completed), cut, tokens
        budget, _, is_calm = self._in_force()
        self._charge(shares, budget)
        self._step_budget, self._step_is_calm = budget, is_calm
        seconds = self._prefill_step.get((tokens, budget), 0.0)
        if not seconds:
            seconds = self._plant.times.prefill.at(tokens, budget)
            self._prefill_step[tokens, budget] = seconds
        self._step_seconds = seconds * self.slowdown_ratio
        self._step_end = self.now_seconds + self._step_seconds

    def _fits(self) -> bool:
        if self._head >= self._tail:
            return False
        return self._kv_used + self._kv_need(self._head) <= self._plant.kv_tokens

    def _charge(self, shares: list[tuple[int, int]], budget: int) -> None:
        """Count what these shares of the prompts' states cost each token of the answers."""
        loss = self._plant.prefill_loss(budget)
        for request, tokens in shares:
            self.loss_sum += tokens / self._prompts[request] * loss * self._outputs[request]

    def _begin_decode(self, until_seconds: float) -> None:
        batch, (_, budget, is_calm) = len(self._running), self._in_force()
        self._step_budget, self._step_is_calm = budget, is_calm
        seconds = self._decode_step.get((batch, budget), 0.0)
        if not seconds:
            seconds = self._plant.times.decode.at(batch, budget)
            self._decode_step[batch, budget] = seconds
        seconds *= self.slowdown_ratio
        steps = self._running[0][0] - self._steps
        # A request that waits now waits for a running one to end; one that comes may start at once,
        # or end the calm.
        starts = batch < self._plant.max_running_requests or self.calm is not None
        if self._head == self._tail and starts:
            gap = self._arrivals[self._tail] - self.now_seconds
            if gap < steps * seconds:
                steps = max(1, math.ceil(gap / seconds - _ROUNDING))
        in_time = int((until_seconds - self.now_seconds) / seconds + _ROUNDING)
        self._decode_seconds, self._decode_loss = seconds, self._plant.decode_loss(budget)
        if in_time >= 1:
            self._decode(min(steps, in_time))
        else:
            self._step_end = self.now_seconds + seconds

    def _finish_step(self) -> None:
        if self._prefilled is None:
            self.now_seconds, self._step_end = self._step_end - self._decode_seconds, _NEVER
            self._decode(1)
            return
        self.now_seconds, self._step_end = self._step_end, _NEVER
        completed, self._prefilled = self._prefilled, None
        self.prefilled_tokens += self._step_tokens
        self._count(self._prefill_obeyed, self._step_tokens)
        self._work[3] += self._step_tokens
        self._work[4] += self._step_seconds
        for request in completed:
            self._first_token(request)

    def _first_token(self, request: int) -> None:
        ttft = self.now_seconds - self._arrivals[request] + self._plant.request_seconds
        self.ttft.observe(ttft, 1)
        self.generated_tokens += 1
        rest = self._outputs[request] - 1
        if not self._running and not self._fresh:
            self._token_at = self.now_seconds
        if rest == 0:
            self._kv_used -= self._kv_need(request)
            self.outcomes.append(Outcome(request, self.now_seconds, ttft, 0.0, False))
            return
        self._started[request] = _Started(ttft, self.now_seconds)
        self._fresh.append(self.now_seconds)
        heappush(self._running, (self._steps + rest, request))

    def _decode(self, steps: int) -> None:
        """Take `steps` equal decode steps from now on; no request ends before the last of them."""
        batch, seconds = len(self._running), self._decode_seconds
        end = self.now_seconds + seconds
        for token_at in self._fresh:
            self.itl.observe(end - token_at, 1)
        older = batch - len(self._fresh)
        if older:
            self.itl.observe(end - self._token_at, older)
        if steps > 1:
            self.itl.observe(seconds, batch * (steps - 1))
        self._fresh.clear()
        self.now_seconds = self._token_at = self.now_seconds + steps * seconds
        tokens, work = batch * steps, self._work
        self._steps += steps
        work[0] += steps
        work[1] += steps * seconds
        work[2] += tokens
        self._count(self._decode_obeyed, tokens)
        self.generated_tokens += tokens
        self.loss_sum += self._decode_loss * tokens
        while self._running and self._running[0][0] == self._steps:
            self._finish_request(heappop(self._running)[1])

    def _finish_request(self, request: int) -> None:
        started = self._started.pop(request)
        gaps = self._outputs[request] - 1
        itl = (self.now_seconds - started.first_token_seconds) / gaps
        self._kv_used -= self._kv_need(request)
        self.outcomes.append(Outcome(request, self.now_seconds, started.ttft_seconds, itl, False))

    def _lose(self, request: int) -> None:
        started = self._started.get(request)
        ttft = math.nan if started is None else started.ttft_seconds
        self.outcomes.append(Outcome(request, self.now_seconds, ttft, math.nan, True))
        self.lost_requests += 1

    def _count(self, obeyed: list[int], tokens: int) -> None:
        obeyed[0] += tokens
        obeyed[1] += tokens * self._step_budget
        if self._step_is_calm:
            obeyed[2] += tokens
        if not self._step_has_calm_budgets:
            obeyed[3] += tokens
