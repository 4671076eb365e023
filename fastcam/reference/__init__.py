"""One short PyTorch implementation per op: what the kernels must agree with, and what runs where none is built."""

from fastcam.reference.cam_map import cam_map
from fastcam.reference.channel_weights import channel_weights
from fastcam.reference.impute_linear import impute_linear
from fastcam.reference.lfi_attend import lfi_attend
from fastcam.reference.lfi_attend_backward import lfi_attend_backward
from fastcam.reference.lfi_mask import lfi_mask
from fastcam.reference.lfi_mask_backward import lfi_mask_backward
from fastcam.reference.mask_by_features import mask_by_features
from fastcam.reference.overlay import overlay
from fastcam.reference.perturb_by_rank import perturb_by_rank
from fastcam.reference.relevance_add import relevance_add
from fastcam.reference.relevance_budgets import relevance_budgets
from fastcam.reference.relevance_combine import relevance_combine
from fastcam.reference.relevance_divide import relevance_divide
from fastcam.reference.relevance_equilibrium import relevance_equilibrium
from fastcam.reference.relevance_split import relevance_split
from fastcam.reference.rescale_multipliers import rescale_multipliers
from fastcam.reference.similarity_weights import similarity_weights

__all__ = [
    "cam_map",
    "channel_weights",
    "impute_linear",
    "lfi_attend",
    "lfi_attend_backward",
    "lfi_mask",
    "lfi_mask_backward",
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
