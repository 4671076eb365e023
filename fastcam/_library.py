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
    # (B,C,H,W) x (B,K,h,w) -> (count,C,H,W) in the images' dtype; channels_last where the images are channels_last and
    # not also contiguous, else contiguous.
    "mask_by_features": (
        "(Tensor images, Tensor features, SymInt start=0, SymInt? count=None, *, Tensor? noise=None, float scale=1.0, "
        'str order="resize_then_minmax") -> Tensor'
    ),
    # (B,...), the same, and the same or (1,...) -> as empty_like(multipliers): their dtype and, if dense, strides.
    "rescale_multipliers": (
        "(Tensor multipliers, Tensor inputs, Tensor reference, float negative_slope=0.0) -> Tensor"
    ),
}

# Kept at module level: a collected Library takes its ops with it.
LIBRARY = torch.library.Library("fastcam", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
