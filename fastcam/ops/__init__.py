"""Functional ops on tensors: checks, backend choice and autograd around one fused kernel each.

The same ops stand at `torch.ops.fastcam.<name>` for graphs and C++; those are not differentiable on their own.
"""

from fastcam.ops import lfi_attend_backward, lfi_mask_backward  # noqa: F401  (registered, not for callers)
from fastcam.ops.cam_map import cam_map, cam_map_with_raw
from fastcam.ops.channel_weights import channel_weights
from fastcam.ops.impute_linear import impute_linear
from fastcam.ops.lfi_attend import lfi_attend
from fastcam.ops.lfi_mask import lfi_mask
from fastcam.ops.mask_by_features import mask_by_features
from fastcam.ops.overlay import overlay
from fastcam.ops.perturb_by_rank import perturb_by_rank
from fastcam.ops.relevance_add import relevance_add
from fastcam.ops.relevance_budgets import relevance_budgets
from fastcam.ops.relevance_combine import relevance_combine
from fastcam.ops.relevance_divide import relevance_divide
from fastcam.ops.relevance_equilibrium import relevance_equilibrium
from fastcam.ops.relevance_split import relevance_split
from fastcam.ops.rescale_multipliers import rescale_multipliers
from fastcam.ops.similarity_weights import similarity_weights

__all__ = [
    "cam_map",
    "cam_map_with_raw",
    "channel_weights",
    "impute_linear",
    "lfi_attend",
    "lfi_mask",
    "mask_by_features",
    "overlay",
    "perturb_by_rank",
    "relevance_add",
    "relevance_budgets",
    "relevance_combine",
    "relevance_divide",
    "relevance_equilibrium",
    "relevance_split",
    "rescale_multipliers",
    "similarity_weights",
]
