"""Data story, step 0: every place where SGLang is touched, what we rely on there, and why.

Read in SGLang 0.5.16 to 0.5.23. What differs inside that range is named as `old|new`. What only
objects have, such as the weights that a quantisation method gives to a layer of experts, cannot be
looked for in a class: the proof before the server is ready runs into it (`plugin_proof.py`).
"""

from typing import Literal, NamedTuple


class Seam(NamedTuple):
    """One dotted path inside SGLang and the names that must be found there.

    needs, by kind:
      function  its parameters: those before "*" lead the signature in this order, those after it
                are accepted by keyword;
      class     attributes, methods, fields or members; "a|b" means either name;
      constant  the values that are accepted.
    why: completes the sentence "it is needed to ...".
    """

    target: str
    kind: Literal["function", "class", "constant"]
    needs: tuple[str, ...]
    why: str


_MOE = "sglang.srt.layers.moe"
_TOPK = f"{_MOE}.topk"
_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
_RECEIVER = "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_GRAPHS = "sglang.srt.model_executor.runner"
_HOOKS = "sglang.srt.plugins.hook_registry"

# What the plugin puts hooks on.
SELECT_EXPERTS = f"{_TOPK}.select_experts"
GROUPED_TOPK = f"{_TOPK}.grouped_topk"  # on a GPU another name of what the seam describes
FUSED_TOPK = f"{_TOPK}.fused_topk"
ROUTED_SLOTS = f"{_TOPK}._post_process_topk_ids"
LOAD_MODEL = f"{_RUNNER}.load_model"
INITIALIZE = f"{_RUNNER}.initialize"
FORWARD = f"{_RUNNER}.forward"
RUN_BATCH = f"{_SCHEDULER}.run_batch"
PULL_REQUESTS = f"{_RECEIVER}._pull_raw_reqs"
RECEIVE_REQUESTS = f"{_RECEIVER}.recv_requests"
CPU_EXPERTS = f"{_MOE}.fused_moe_native.moe_forward_native"
DECODE_GRAPHS = f"{_GRAPHS}.decode_cuda_graph_runner.DecodeCudaGraphRunner.capture"
PREFILL_GRAPHS = f"{_GRAPHS}.prefill_cuda_graph_runner.PrefillCudaGraphRunner.capture"
NEW_REQUEST = "sglang.srt.managers.schedule_batch.Req.__init__"
NEW_BATCH = "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new"
VERIFY_PARAMETERS = "sglang.srt.sampling.sampling_params.SamplingParams.verify"
TRITON_EXPERTS = f"{_MOE}.moe_runner.triton_utils.fused_moe._fused_moe_kernel_sequence"

DOWN_USES_TMA = 10  # place of `down_moe_use_tma` among the arguments of TRITON_EXPERTS
ZEROS_IN_PLACE = (0, 5, 23)  # from here on TRITON_EXPERTS writes no zeros into a sorted buffer
SKIPS_UNASKED = (0, 5, 23)  # from here on its products skip id -1 without `filter_expert`, too

SEAMS: tuple[Seam, ...] = (
    Seam(
        SELECT_EXPERTS,
        "function",
        ("hidden_states", "router_logits", "topk_config"),
        "have a layer's tokens routed with the layer's own configuration",
    ),
    Seam(
        f"{GROUPED_TOPK}_gpu",
        "function",
        (
            *("*", "gating_output", "topk", "renormalize", "num_expert_group", "topk_group"),
            *("routed_scaling_factor", "apply_routed_scaling_factor_on_output"),
        ),
        "route by our own kernel where that is asked for",
    ),
    Seam(
        FUSED_TOPK,
        "function",
        ("*", "gating_output", "topk", "renormalize"),
        "route by our own kernel where that is asked for",
    ),
    Seam(
        ROUTED_SLOTS,
        "function",
        ("*", "topk_ids", "topk_weights", "topk_config"),
        "drop the slots beyond the budget before recorders see the routing of a layer",
    ),
    Seam(
        "sglang.srt.eplb.expert_distribution.get_global_expert_distribution_recorder",
        "function",
        (),
        "keep the proof's tokens out of the recorded distribution of experts",
    ),
    Seam(
        "sglang.srt.eplb.expert_distribution.ExpertDistributionRecorder",
        "class",
        ("disable_this_region",),
        "keep the proof's tokens out of the recorded distribution of experts",
    ),
    Seam(
        f"{_TOPK}.TopK",
        "class",
        ("layer_id", "topk_config"),
        "find the MoE layers of the model and tell which one is routing",
    ),
    Seam(
        f"{_TOPK}.TopKConfig",
        "class",
        # Renamed in 0.5.23; top_k counts these columns in every release.
        ("top_k", "num_fused_shared_experts|num_shared_topk_slots"),
        "keep the columns of the shared experts",
    ),
    Seam(
        f"{_TOPK}.StandardTopKOutput",
        "class",
        ("topk_weights", "topk_ids", "router_logits"),
        "read and replace the routing of a layer",
    ),
    Seam(
        LOAD_MODEL,
        "function",
        ("self",),
        "bind the table to the loaded model before memory is sized",
    ),
    Seam(
        INITIALIZE,
        "function",
        ("self",),
        "prove that the routing obeys the budget before the server is ready",
    ),
    Seam(
        FORWARD,
        "function",
        ("self", "forward_batch"),
        "put the budget of the batch's phase in force before its first layer",
    ),
    Seam(
        RUN_BATCH,
        "function",
        ("self", "batch"),
        "see how many requests run, and how many a batch leaves waiting",
    ),
    Seam(
        _SCHEDULER,
        "class",
        ("waiting_queue", "running_batch", "disagg_decode_prealloc_queue"),
        "see how many requests run, and how many a batch leaves waiting",
    ),
    Seam(
        "sglang.srt.disaggregation.decode.DecodePreallocQueue",
        "class",
        ("queue", "retracted_queue"),
        "see how many requests a batch leaves waiting, on a server that decodes for others",
    ),
    Seam(
        "sglang.srt.disaggregation.decode.DecodeRequest",
        "class",
        ("waiting_for_input",),
        "see how many requests a batch leaves waiting, on a server that decodes for others",
    ),
    Seam(
        _RUNNER,
        "class",
        ("model", "model_config", "server_args", "device", "is_draft_worker"),
        "compare the table with the model that is served",
    ),
    Seam(
        "sglang.srt.configs.model_config.ModelConfig",
        "class",
        ("hf_config",),
        "compare the table with the model that is served",
    ),
    Seam(
        f"{_MOE}.fused_moe_triton.layer.FusedMoE",
        "class",
        ("quant_method", "moe_runner_config"),
        "find the experts of the model and tell which kernel computes them",
    ),
    Seam(
        "sglang.srt.model_executor.forward_batch_info.ForwardMode",
        "class",
        ("is_decode", "is_extend", "is_target_verify", "is_mixed"),
        "tell prefill from decode",
    ),
    Seam(
        VERIFY_PARAMETERS,
        "function",
        ("self", "vocab_size"),
        "answer a request for a budget that it cannot have",
    ),
    Seam(
        "sglang.srt.sampling.sampling_params.SamplingParams",
        "class",
        ("custom_params",),
        "read a request's own budget",
    ),
    Seam(
        NEW_REQUEST,
        "function",
        ("self", "*", "sampling_params", "priority"),
        "note a request's own budget when it reaches the scheduler",
    ),
    Seam(
        NEW_BATCH,
        "function",
        # A class method: seen from outside its first parameter is the batch.
        ("batch", "model_runner"),
        "tell which tokens of a forward belong to which request",
    ),
    Seam(
        "sglang.srt.managers.schedule_batch.ScheduleBatch",
        "class",
        ("reqs", "decoding_reqs", "forward_mode"),
        "tell which tokens of a forward belong to which request, and how many requests run",
    ),
    Seam(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch",
        "class",
        ("forward_mode", "input_ids", "extend_seq_lens_cpu", "spec_info"),
        "tell which tokens of a forward belong to which request",
    ),
    Seam(
        PULL_REQUESTS,
        "function",
        ("self",),
        "let a change of budget join the broadcast on the leading rank",
    ),
    Seam(
        RECEIVE_REQUESTS,
        "function",
        ("self",),
        "take the change out of the broadcast on every rank, before the same batch",
    ),
    Seam(
        "sglang.srt.distributed.parallel_state.get_tensor_model_parallel_rank",
        "function",
        (),
        "write the counters of a rank into its own slot",
    ),
    Seam(
        "sglang.srt.distributed.communication_op.tensor_model_parallel_all_reduce",
        "function",
        ("input_",),
        "add the ranks' parts of an expert's output, when saliencies are recorded",
    ),
    Seam(
        DECODE_GRAPHS,
        "function",
        ("self",),
        "tell that graphs of decode steps are captured",
    ),
    Seam(
        PREFILL_GRAPHS,
        "function",
        ("self",),
        "tell that graphs of prefill are captured",
    ),
    Seam(
        f"{_MOE}.utils.get_moe_a2a_backend",
        "function",
        (),
        "refuse a dispatcher that has not been shown to skip a dropped slot",
    ),
    Seam(
        CPU_EXPERTS,
        "function",
        ("layer", "x", "topk_output", "moe_runner_config"),
        "run only the kept slots through the experts on the CPU",
    ),
    Seam(
        TRITON_EXPERTS,
        "function",
        (
            *("hidden_states", "w1", "w2", "topk_weights", "topk_ids", "sorted_token_ids"),
            *("expert_ids", "num_tokens_post_padded", "config", "down_config"),
            *("down_moe_use_tma", "*", "filter_expert"),
            *("use_fp8_w8a8", "per_channel_quant", "a2_scale", "block_shape"),
        ),
        "let the Triton experts skip dropped slots when no expert is sharded",
    ),
    Seam(
        f"{_HOOKS}.HookRegistry.register",
        "function",
        # A class method: seen from outside its first parameter is the target.
        ("target", "hook", "hook_type"),
        "put the hooks in place",
    ),
    Seam(f"{_HOOKS}.HookType", "class", ("BEFORE", "AFTER", "AROUND"), "say when a hook runs"),
    Seam(
        "sglang.srt.plugins.GENERAL_PLUGINS_GROUP",
        "constant",
        ("sglang.srt.plugins",),
        "be found by SGLang through our entry point",
    ),
    Seam(
        "sglang.srt.plugins.load_plugins",
        "function",
        (),
        "be loaded in every process of the server",
    ),
)
