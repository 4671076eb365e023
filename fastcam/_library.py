"""Every op fastcam registers with PyTorch: one library, one schema a line.

The op surface exists without a build. `fastcam/ops/<op>.py` registers the reference and the fake implementation,
`csrc/<device>/<op>` the C++ and CUDA ones, and `fastcam.backends` puts the Triton launcher on the CUDA key where that
key is still free. All ops are functional: inputs are neither changed nor returned as views, each result is fresh.
"""

from __future__ import annotations

import torch

SCHEMAS = {
    # The maps alone: a composite of the overload below, so kernels need not know it. It is defined first because
    # torch.ops.fastcam.cam_map(...) takes the first overload that fits the arguments.
    "cam_map": (
        "(Tensor features, Tensor weights, Tensor? reference=None, bool relu=True, bool normalize=True, "
        "SymInt[]? size=None) -> Tensor"
    ),
    # (B,K,H,W) x coefficients (B[,T],K) or multipliers (B[,T],K,H,W) -> contiguous maps (B[,T],*size) and raw
    # (B[,T],H,W) in the accumulation dtype, and a bool flag per map: all of M was finite before ReLU.
    "cam_map.with_raw": (
        "(Tensor features, Tensor weights, Tensor? reference=None, bool relu=True, bool normalize=True, "
        "SymInt[]? size=None) -> (Tensor maps, Tensor raw, Tensor finite)"
    ),
    # (B,K,H,W) x (B[,T],K,H,W) -> contiguous (B[,T],K) in the accumulation dtype.
    "channel_weights": '(Tensor features, Tensor multipliers, Tensor? reference=None, str mode="mean") -> Tensor',
    # (N,C,H,W), bool (N,H,W) -> contiguous (N,C,H,W) in the images' dtype
    "impute_linear": "(Tensor images, Tensor missing, int iterations=12) -> Tensor",
    # LFI-CAM, features (B,K,h,w). Results shaped like them are as empty_like(features); grey and importance may be in
    # the accumulation dtype. (B,1,h,w) -> masks
    "lfi_mask": "(Tensor features, Tensor grey) -> Tensor",
    "lfi_mask_backward": "(Tensor grad, Tensor features, Tensor grey) -> Tensor",
    # (B,K) -> the features' kin, and contiguous (B,1,h,w) maps in the accumulation dtype
    "lfi_attend": (
        '(Tensor features, Tensor importance, str constant_map="raw") -> '
        "(Tensor attended, Tensor attention, Tensor raw)"
    ),
    # -> the features' kin, and contiguous (B,K) in importance's dtype
    "lfi_attend_backward": (
        "(Tensor grad_attended, Tensor? grad_attention, Tensor? grad_raw, Tensor features, Tensor importance, "
        'Tensor attention, Tensor raw, str constant_map="raw") -> (Tensor grad_features, Tensor grad_importance)'
    ),
    # (B,C,H,W) x (B,K,h,w) -> (count,C,H,W) in the images' dtype; channels_last where the images are channels_last and
    # not also contiguous, else contiguous.
    "mask_by_features": (
        "(Tensor images, Tensor features, SymInt start=0, SymInt? count=None, *, Tensor? noise=None, float scale=1.0, "
        'str order="resize_then_minmax") -> Tensor'
    ),
    # (B,3|1,H,W), (B[,T],H,W), (L,3) -> contiguous uint8 (B[,T],H,W,3).
    "overlay": (
        "(Tensor images, Tensor maps, Tensor table, float alpha=0.8, bool signed=False, *, float[]? mean=None, "
        "float[]? std=None) -> Tensor"
    ),
    # (B,C,H,W), (1|B,C,1|H,1|W), (B,H,W), (S,) -> (B,S,C,H,W) in the images' dtype, images one after the other, each
    # channels_last where the images are and are not also contiguous, else contiguous.
    "perturb_by_rank": ("(Tensor images, Tensor baseline, Tensor ranks, Tensor counts, *, bool keep=False) -> Tensor"),
    # (B,...), the same, and the same or (1,...) -> as empty_like(multipliers): their dtype and, if dense, strides.
    "rescale_multipliers": (
        "(Tensor multipliers, Tensor inputs, Tensor reference, float negative_slope=0.0) -> Tensor"
    ),
    # The relevance_* ops: everything (B,...) of one dtype, results with the strides of empty_like(relevance).
    "relevance_divide": "(Tensor relevance, Tensor divisor, Tensor? factor=None, float epsilon=1e-06) -> Tensor",
    "relevance_add": (
        "(Tensor relevance, Tensor first, Tensor second, Tensor? factor=None, float epsilon=1e-06) -> (Tensor, Tensor)"
    ),
    # -> (B,2C,...): the messages of the positive weights, then those of the negative ones; channels_last where the
    # relevance is, else contiguous.
    "relevance_split": (
        "(Tensor relevance, Tensor output, Tensor positive, Tensor? factor=None, *, str rule, float first=2.0, "
        "float second=1.0, float epsilon=1e-06) -> Tensor"
    ),
    # -> contiguous (B,2) in the accumulation dtype: what the positive and the negative entries of an image add up to.
    "relevance_budgets": "(Tensor relevance) -> Tensor",
    # divisors (3B,...) -> (3B,...)
    "relevance_equilibrium": "(Tensor relevance, Tensor budgets, Tensor divisors, float ratio=2.0) -> Tensor",
    # inputs (B,...), parts (3B,...) -> (B,...), as empty_like(inputs)
    "relevance_combine": (
        "(Tensor inputs, Tensor parts, Tensor budgets, bool shift=True, float threshold=0.0) -> Tensor"
    ),
    # (B|1,D) twice -> contiguous contributions (B,D), weights (B,D) and total (B,) in the accumulation dtype.
    "similarity_weights": (
        '(Tensor first, Tensor second, str term="cosine", str weighting="minmax", bool dissimilarity=False) -> '
        "(Tensor contributions, Tensor weights, Tensor total)"
    ),
}

# Kept at module level: a collected Library takes its ops with it.
LIBRARY = torch.library.Library("fastcam", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
