"""What every rule reads on the device: the layers' rows in force, and what a step's layers share.

All tensors stay at their addresses while CUDA graphs that recorded them live. Their owner refreshes
them with asynchronous copies; no kernel takes a budget as a Python number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_alloc_kernels.step_statistics import StepSums


class LayerRows(NamedTuple):
    """One phase's row in force, for L MoE layers of E experts; float32, absent parts None.

    limits: (L,) what the rule compares with: a quota (slots per token; `token` takes fractions)
        or a threshold on the score; in `union` either says which slots open the set.
    gains: (L,) factor on kept weights; 1 changes nothing.
    references: (L,) number of best slots by whose mass kept weights are normalised (reference
        renormalisation, arXiv 2609.04575). The slots kept are always in that mass, so 1
        normalises over what was kept, and K or more changes nothing.
    saliency: (L, E) the score of a slot is its weight times its expert's saliency.
    caps: (L,) distinct experts up to which `union` fills its set with the heaviest candidates. For
        the bench: no budget table has caps, so no server fills them in.
    """

    limits: torch.Tensor
    gains: torch.Tensor | None = None
    references: torch.Tensor | None = None
    saliency: torch.Tensor | None = None
    caps: torch.Tensor | None = None


class StepTensors(NamedTuple):
    """What the layers of one step share; absent parts None.

    num_valid_tokens: (1,) int32, rows from here on are padding: ids -1, weights 0, not counted.
    floors: (T or more,) int32, slots that a token keeps at least, its best ones. A floor of K or
        more protects the token: all slots, the router's weights without gain, and in `token` mode
        no part in the contest.
    ceilings: (T or more,) int32, slots that a token keeps at most; stronger than the floor. One
        below K keeps the token out of the contest of mode `token`, too.
    sums: where the layers add up what they did.
    """

    num_valid_tokens: torch.Tensor | None = None
    floors: torch.Tensor | None = None
    ceilings: torch.Tensor | None = None
    sums: StepSums | None = None


NO_STEP_TENSORS = StepTensors()
