"""How good attribution maps are, as functions of maps."""

from .stability import map_iou, map_stability

__all__ = ["map_iou", "map_stability"]
