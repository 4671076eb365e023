"""Networks that are trained to explain themselves."""

from .backbones import densenet_bc, resnet, resnext29, without_classifier
from .lfi_cam import LFICAM, FeatureImportanceNetwork, LFICAMOutput
from .train import load
from .truncate import features_of

__all__ = [
    "LFICAM",
    "FeatureImportanceNetwork",
    "LFICAMOutput",
    "densenet_bc",
    "features_of",
    "load",
    "resnet",
    "resnext29",
    "without_classifier",
]
