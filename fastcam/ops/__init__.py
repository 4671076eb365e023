"""Functional ops on tensors: checks, backend choice and autograd around one fused kernel each.

The same ops stand at `torch.ops.fastcam.<name>` for graphs and C++; those are not differentiable on their own.
"""

from fastcam.ops.cam_map import cam_map, cam_map_with_raw
from fastcam.ops.channel_weights import channel_weights
from fastcam.ops.mask_by_features import mask_by_features
from fastcam.ops.rescale_multipliers import rescale_multipliers

__all__ = ["cam_map", "cam_map_with_raw", "channel_weights", "mask_by_features", "rescale_multipliers"]
