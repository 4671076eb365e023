"""One short PyTorch implementation per op: what the kernels must agree with, and what runs where none is built."""

from fastcam.reference.cam_map import cam_map
from fastcam.reference.channel_weights import channel_weights
from fastcam.reference.mask_by_features import mask_by_features
from fastcam.reference.rescale_multipliers import rescale_multipliers

__all__ = ["cam_map", "channel_weights", "mask_by_features", "rescale_multipliers"]
