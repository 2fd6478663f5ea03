"""Every SGLang release in the declared range has every seam, with the names the plugin uses."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from sglang_releases import RELEASES, ReleaseSource, offered_releases, open_release
from source_definitions import annotated_fields, calls, enum_values, find_definition, functions

from sglang_alloc.compatibility import (
    SUPPORTED_SGLANG,
    Signature,
    is_before,
    seam_problems,
    unsupported_version,
)
from sglang_alloc.compatibility_seams import (
    FUSED_TOPK,
    GROUPED_TOPK,
    SEAMS,
    SKIPS_UNASKED,
    ZEROS_IN_PLACE,
)
from sglang_alloc.moe_backends import DISPATCHERS, GRAPHS, RUNNERS
from sglang_alloc.server_check import REFUSED_OPTIONS

_SCHEDULER = "sglang.srt.managers.scheduler"
_LOOPS = [
    (_SCHEDULER, "event_loop_normal"),
    (_SCHEDULER, "event_loop_overlap"),
    ("sglang.srt.disaggregation.prefill", "event_loop_normal_disagg_prefill"),
    ("sglang.srt.disaggregation.prefill", "event_loop_overlap_disagg_prefill"),
    ("sglang.srt.disaggregation.decode", "event_loop_normal_disagg_decode"),
    ("sglang.srt.disaggregation.decode", "event_loop_overlap_disagg_decode"),
]
_TRITON_RUNNER = "sglang.srt.layers.moe.moe_runner.triton"


@pytest.fixture(scope="module", params=RELEASES)
def release(request: pytest.FixtureRequest) -> Iterator[ReleaseSource]:
    source = open_release(request.param)
    yield source
    source.close()


def test_every_seam_is_in_the_release(release: ReleaseSource) -> None:
    problems = []
    for seam in SEAMS:
        definition = find_definition(release, seam.target)
        if definition is None:
            problems.append(f"{seam.target} is missing; it is needed to {seam.why}")
        else:
            problems += seam_problems(seam, definition)
    assert problems == []


def test_the_triton_runner_passes_filter_expert_by_keyword(release: ReleaseSource) -> None:
    kernel_calls = calls(release, _TRITON_RUNNER, "_fused_moe_kernel_sequence")
    assert kernel_calls
    assert all("filter_expert" in _keywords(call) for call in kernel_calls)


def test_a_sorted_buffer_gets_a_dropped_slots_zeros_before_0_5_23_alone(
    release: ReleaseSource,
) -> None:
    """Why the plugin keeps TMA out of the second product there."""
    text = release.module_text("sglang.kernels.ops.moe.fused_moe_triton_kernels")
    assert text is not None
    spares_sorted = "not (c_sorted or" in text
    assert spares_sorted == (not is_before(release.version, ZEROS_IN_PLACE))


def test_the_products_skip_a_dropped_slot_unasked_from_0_5_23_on(release: ReleaseSource) -> None:
    """So experts that must not have their activation filtered are served from there on."""
    text = release.module_text("sglang.kernels.ops.moe.fused_moe_triton_kernels")
    assert text is not None
    wait_to_be_asked = "if filter_expert and off_experts == -1" in text
    assert wait_to_be_asked == is_before(release.version, SKIPS_UNASKED)
    assert "off_experts == -1" in text


def test_topk_passes_its_own_config_to_select_experts_by_keyword(release: ReleaseSource) -> None:
    routing_calls = calls(release, "sglang.srt.layers.moe.topk", "select_experts")
    assert len(routing_calls) >= 3  # native, CUDA and CPU
    assert all(
        ast.unparse(_keywords(call)["topk_config"]) == "self.topk_config" for call in routing_calls
    )


@pytest.mark.parametrize("gate", [GROUPED_TOPK, FUSED_TOPK])
def test_select_experts_tells_its_gates_all_by_keyword(release: ReleaseSource, gate: str) -> None:
    """Our routing takes their place where it knows every keyword that says something."""
    module, _, name = gate.rpartition(".")
    gate_calls = calls(release, module, name)
    assert gate_calls
    for call in gate_calls:
        assert not call.args
        assert {"gating_output", "topk", "renormalize", "scoring_func"} <= set(_keywords(call))
        assert ("num_expert_group" in _keywords(call)) == (gate == GROUPED_TOPK)
    text = release.module_text(module)
    assert text is not None
    assert "grouped_topk = grouped_topk_xpu if _is_xpu else grouped_topk_gpu" in text


def test_select_experts_hands_its_slots_on_by_keyword_before_they_are_recorded(
    release: ReleaseSource,
) -> None:
    (call,) = calls(release, "sglang.srt.layers.moe.topk", "_post_process_topk_ids")
    passed = {name: ast.unparse(value) for name, value in _keywords(call).items()}
    wanted = ("topk_ids", "topk_weights", "topk_config")
    assert [passed[name] for name in wanted] == list(wanted)
    text = release.module_text("sglang.srt.layers.moe.topk")
    assert text is not None
    select_experts = text[text.index("def select_experts(") :]
    recorder = "get_global_expert_distribution_recorder()"
    assert select_experts.index("_post_process_topk_ids(") < select_experts.index(recorder)


@pytest.mark.parametrize(("module", "loop"), _LOOPS)
def test_a_batch_is_formed_before_it_is_run_in_every_loop(
    release: ReleaseSource, module: str, loop: str
) -> None:
    """So that what is left in the queue, when `run_batch` begins, waits behind that batch."""
    (function,) = functions(release, module, loop)
    text = ast.unparse(function)
    forms = text.index("batch_to_run(")
    assert text.count("= self.run_batch(batch)") == 1
    assert forms < text.index("= self.run_batch(batch)")
    assert "waiting_queue" not in text[forms:]


def test_a_batch_takes_its_requests_out_of_the_queue(release: ReleaseSource) -> None:
    text = release.module_text(_SCHEDULER)
    assert text is not None
    assert "self.waiting_queue = [x for x in self.waiting_queue if x not in can_run_set]" in text


def test_a_forward_is_begun_by_the_thread_that_runs_its_batch(release: ReleaseSource) -> None:
    """Else the next batch's count of waiting requests might come before its forward."""
    (run_batch,) = functions(release, _SCHEDULER, "run_batch")
    assert "self.model_worker.forward_batch_generation(" in ast.unparse(run_batch)
    worker = "sglang.srt.managers.tp_worker"
    *_, of_tensor_parallel = functions(release, worker, "forward_batch_generation")
    assert "self.model_runner.forward(" in ast.unparse(of_tensor_parallel)


def test_plugins_are_loaded_in_the_scheduler_and_in_the_main_process(
    release: ReleaseSource,
) -> None:
    assert calls(release, "sglang.srt.managers.scheduler", "load_plugins")
    assert calls(release, "sglang.srt.entrypoints.engine", "load_plugins")


def test_every_option_that_is_refused_is_still_an_option(release: ReleaseSource) -> None:
    """A renamed option would otherwise read as absent, and so as fine."""
    fields = annotated_fields(release, "sglang.srt.server_args", "sglang.srt.arg_groups")
    missing = set(REFUSED_OPTIONS) - fields
    assert missing <= {"enable_nvidia_megakernel"}
    assert ("enable_nvidia_megakernel" in missing) == (release.version != "0.5.23")


def test_every_backend_of_the_release_is_judged(release: ReleaseSource) -> None:
    utils, graphs = "sglang.srt.layers.moe.utils", "sglang.srt.model_executor.cuda_graph_config"
    assert enum_values(release, utils, "MoeRunnerBackend") - set(RUNNERS) == set()
    assert enum_values(release, utils, "MoeA2ABackend") - set(DISPATCHERS) == set()
    assert enum_values(release, graphs, "Backend") - set(GRAPHS) == set()


def test_the_cpu_engine_calls_the_stand_in_kernel_with_six_arguments(
    release: ReleaseSource,
) -> None:
    (call,) = calls(release, "sglang.srt.mem_cache.allocation", "assign_req_to_token_pool_cpu")
    assert len(call.args) == 6
    assert call.keywords == []


def test_a_renamed_parameter_function_or_module_is_noticed(release: ReleaseSource) -> None:
    definition = find_definition(release, SEAMS[0].target)
    assert isinstance(definition, Signature)
    renamed = SEAMS[0]._replace(needs=("hidden_states", "router_logits", "config"))
    assert len(seam_problems(renamed, definition)) == 1
    assert find_definition(release, "sglang.srt.layers.moe.topk.select_expertz") is None
    assert find_definition(release, "sglang.srt.no_such_module.select_experts") is None


def test_pip_offers_no_release_in_the_range_that_is_not_tested() -> None:
    in_range = {version for version in offered_releases() if not unsupported_version(version)}
    untested = sorted(in_range - set(RELEASES))
    assert not untested, f"{untested} are in the range {SUPPORTED_SGLANG} but not in RELEASES"
    assert in_range == set(RELEASES)


def _keywords(call: ast.Call) -> dict[str | None, ast.expr]:
    return {keyword.arg: keyword.value for keyword in call.keywords}
