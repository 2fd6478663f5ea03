"""Data story: which of SGLang's MoE backends skip a dropped slot, and why others are refused.

Read in SGLang 0.5.16 to 0.5.23; docs/backends.md is the same table for people, and a test compares
them. "Reads as skipping" means that the source does skip id -1 and nobody ran it here: what reads
well may still multiply, or gather, what it then throws away.
"""

from __future__ import annotations

from typing import NamedTuple


class Verdict(NamedTuple):
    """Whether a budget is served on a backend, and the reason."""

    works: bool
    reason: str


def _refused(reason: str) -> Verdict:
    return Verdict(False, reason)


_IN_KERNEL = "it routes inside its kernel, past the point where slots are dropped"
_OTHER_DEVICE = "it is for other devices than NVIDIA GPUs"
_FLASHINFER = "FlashInfer's compiled kernel has not been seen to skip an id of -1 within a token"
_ADAPTERS = "adapters on experts have not been shown to take a dropped slot"

# By the value of SGLang's MoeRunnerBackend, as the layer's own runner has it on CUDA.
RUNNERS: dict[str, Verdict] = {
    "triton": Verdict(
        True,
        "blocks of id -1 return before they read a weight; seen in a test of SGLang's own kernels, "
        "interpreted and on an H200; FP8 whose activations have one dynamic scale for all rows "
        "needs SGLang 0.5.23",
    ),
    "auto": _refused("the layer does not tell which kernel it will take"),
    "triton_kernel": _refused(_IN_KERNEL),
    "flashinfer_trtllm": _refused(_IN_KERNEL),
    "experimental_sgl_trtllm": _refused(_IN_KERNEL),
    "flashinfer_mxfp4": _refused(_IN_KERNEL),
    "flashinfer_megamoe": _refused(_IN_KERNEL),
    "flashinfer_trtllm_routed": _refused(
        "it packs ids and weights into one word, and an id of -1 has not been seen to be skipped"
    ),
    "flashinfer_cutlass": _refused(_FLASHINFER),
    "flashinfer_cutedsl": _refused(_FLASHINFER),
    "cutlass": _refused(
        "its preparation reads as skipping from 0.5.23 on, and was a compiled kernel before"
    ),
    "deep_gemm": _refused(
        "its preparation reads as skipping, but sizes its buffers for all slots, and none was run"
    ),
    "marlin": _refused(
        "AWQ, GPTQ and MXFP4 weights; in 0.5.23 it reads as skipping a prefix of -1 blocks, before "
        "that it was compiled without it"
    ),
    "experimental_sgl_marlin": _refused("as marlin"),
    "humming": _refused("its alignment reads as leaving -1 out, and it was not run"),
    "hpc_ops": _refused("a compiled kernel that has not been seen to skip an id of -1"),
    "lora_cutedsl": _refused(_ADAPTERS),
    "lora_triton": _refused(_ADAPTERS),
    "lora_marlin": _refused(_ADAPTERS),
    "aiter": _refused(_OTHER_DEVICE),
    "ascend": _refused(_OTHER_DEVICE),
    "intel_xpu": _refused(_OTHER_DEVICE),
}

_UNTESTED = (
    "has not been shown to skip a single dropped slot, nor to keep the padding of all ranks out"
)

# By the value of SGLang's MoeA2ABackend: what moves tokens between expert-parallel ranks.
DISPATCHERS: dict[str, Verdict] = {
    "none": Verdict(True, "nothing is moved: experts are not sharded"),
    "deepep": _refused(_UNTESTED),
    "deepep_v2": _refused(_UNTESTED),
    "mooncake": _refused(_UNTESTED),
    "nixl": _refused(_UNTESTED),
    "pplx": _refused(_UNTESTED),
    "flashinfer": _refused(_UNTESTED),
    "megamoe": _refused("routes, moves and multiplies in one kernel"),
    "flashinfer_megamoe": _refused("routes, moves and multiplies in one kernel"),
    "customized": _refused("is not SGLang's own"),
    "mori": _refused(_OTHER_DEVICE),
    "ascend_fuseep": _refused(_OTHER_DEVICE),
    "ascend_tp": _refused(_OTHER_DEVICE),
}

# By SGLang's name of how a phase's CUDA graphs are captured.
GRAPHS: dict[str, Verdict] = {
    "full": Verdict(True, "what is captured reads the budget from tensors at fixed addresses"),
    "breakable": Verdict(
        True, "the MoE layers are in captured pieces, which read the same tensors"
    ),
    "disabled": Verdict(True, "eager execution"),
    "tc_piecewise": _refused(
        "torch.compile would trace the budget into the model, which is untested: use breakable, "
        "full or disabled"
    ),
}
