"""Small made-up runs of the demo whose numbers can be worked out by hand."""

from sglang_alloc.demo.calibration import ClosedLoop, RequestShape
from sglang_alloc.demo.comparison import Comparison
from sglang_alloc.demo.heldout_loss import Level, LevelLoss
from sglang_alloc.demo.load import RequestRecord
from sglang_alloc.demo.load_plan import LoadPlan, Slo
from sglang_alloc.demo.observation import BudgetInForce, GaugeSample, RunRecord
from sglang_alloc.demo.report import DemoResult
from sglang_alloc.demo.trace import LoadPhase, Trace
from sglang_alloc.server_runs.served_steps import Step

SLO = Slo(ttft_seconds=1.0, itl_seconds=0.1)
PHASES = (
    LoadPhase("calm", 10.0, 0.2),
    LoadPhase("burst", 10.0, 0.4),
    LoadPhase("calm again", 10.0, 0.2),
)
FULL = 40


def make_record(
    request_id: int,
    *,
    due: float,
    ttft: float | None = 0.5,
    gaps: tuple[float, ...] = (0.05, 0.05),
    phase: str = "calm",
    error: str | None = None,
) -> RequestRecord:
    first = None if ttft is None else due + ttft
    return RequestRecord(
        request_id=request_id,
        phase=phase,
        due_second=due,
        sent_second=due,
        first_token_second=first,
        finished_second=(first or due) + sum(gaps),
        inter_token_seconds=gaps if ttft is not None else (),
        prompt_tokens=100 if ttft is not None else 0,
        output_tokens=1 + len(gaps) if ttft is not None else 0,
        error=error,
    )


def make_run(
    *requests: RequestRecord,
    budgets: tuple[tuple[float, int, int], ...] = ((0.0, FULL, FULL),),
    queue: tuple[float, ...] = (0.0, 0.0),
    calm_budgets: tuple[tuple[float, int, int], ...] = ((0.0, FULL, FULL),),
    steps: tuple[Step, ...] | None = None,
) -> RunRecord:
    """Make a run; unless told otherwise, each request has steps to itself, at the full budget."""
    return RunRecord(
        trace=Trace(PHASES, ()),
        requests=requests,
        gauges=tuple(GaugeSample(float(i), depth, 1.0) for i, depth in enumerate(queue)),
        budgets=tuple(BudgetInForce(*entry) for entry in budgets),
        calm_budgets=tuple(BudgetInForce(*entry) for entry in calm_budgets),
        steps=steps_alone(*requests) if steps is None else steps,
    )


def steps_alone(*requests: RequestRecord, busy: tuple[int, int] | None = None) -> tuple[Step, ...]:
    """Return the steps of requests that met nobody: one prefill, and a decode for each later token.

    A token comes when the step after its own is over. They are calm at FULL; `busy` has the prefill
    and the decode budget of those of the burst, where they are not.
    """
    steps = []
    for request in requests:
        if request.first_token_second is None:
            continue
        is_calm = busy is None or request.phase != "burst"
        prefill_budget, decode_budget = (FULL, FULL) if is_calm or busy is None else busy
        begun, second = request.due_second, request.first_token_second
        steps.append(Step(begun, "prefill", prefill_budget, request.prompt_tokens, is_calm))
        begun = (begun + second) / 2
        for gap in request.inter_token_seconds:
            steps.append(Step(begun, "decode", decode_budget, 1, is_calm))
            begun, second = second, second + gap
    return tuple(steps)


def make_loop(
    requests_per_second: float, ttft: float = 0.1, itl: float = 0.02, clients: int = 8
) -> ClosedLoop:
    return ClosedLoop(clients, 8.0, requests_per_second, ttft, itl)


def make_plan() -> LoadPlan:
    return LoadPlan(
        phases=PHASES,
        slo=SLO,
        idle=make_loop(3.0),
        full=make_loop(6.0),
        one_below=make_loop(7.0),
        floor=make_loop(9.0),
    )


def make_result(
    before: RunRecord, controlled: RunRecord, after: RunRecord, model: str = "tiny-moe"
) -> DemoResult:
    return DemoResult(
        model=model,
        mode="threshold",
        shape=RequestShape(100, 3),
        runs=Comparison(make_plan(), before, controlled, after),
        full_budget=FULL,
        floor_budget=13,
        max_predicted_loss=0.15,
        full_loss=LevelLoss(Level(FULL, FULL, 1.0), (1.0, 1.2, 1.4)),
        level_losses=(
            LevelLoss(Level(FULL, FULL, 0.5), (1.0, 1.2, 1.4)),
            LevelLoss(Level(20, 30, 0.5), (1.1, 1.3, 1.8)),
        ),
        scored_tokens=384,
    )


def make_full_run(burst_ttft: float = 4.0) -> RunRecord:
    """A run at full quality that misses in the burst, or keeps it with a `burst_ttft` below 1."""
    return make_run(
        make_record(0, due=1.0),
        make_record(1, due=12.0, ttft=burst_ttft, phase="burst"),
        make_record(2, due=25.0, phase="calm again"),
        queue=(0.0, 5.0, 1.0),
    )


def make_controlled_run() -> RunRecord:
    requests = (
        make_record(0, due=1.0),
        make_record(1, due=12.0, ttft=0.8, phase="burst"),
        make_record(2, due=25.0, phase="calm again"),
    )
    return make_run(
        *requests,
        steps=steps_alone(*requests, busy=(20, 30)),
        budgets=((0.0, FULL, FULL), (11.0, 20, 30), (20.0, FULL, FULL)),
        queue=(0.0, 2.0, 1.0),
    )


def make_usual_result(model: str = "tiny-moe") -> DemoResult:
    """Full quality misses in the burst; the controlled run lowers the budgets and keeps it."""
    return make_result(make_full_run(), make_controlled_run(), make_full_run(5.0), model)
