"""Small real-data tasks with ground-truth masks, tiny trained models, and the demo that runs every method on them.

    scenes = testbed.make_scenes(8)                                  # images, labels, masks, boxes
    model = testbed.load("tiny_resnet")
    maps = fastcam.attribute(model, testbed.normalize(scenes.images), targets=scenes.labels).maps
    testbed.pointing_accuracy(maps, scenes.masks)

Needs the extra `testbed` (scikit-learn, scikit-image, safetensors, pillow); importing does not load them.
"""

from .models import ATTENDERS, EMBEDDERS, MEAN, MODELS, STD, build, load, metadata, normalize
from .pointing import pointing_accuracy, pointing_hits
from .scenes import CloseUps, Scenes, close_ups, make_scenes

__all__ = [
    "ATTENDERS",
    "EMBEDDERS",
    "MEAN",
    "MODELS",
    "STD",
    "CloseUps",
    "Scenes",
    "build",
    "close_ups",
    "load",
    "make_scenes",
    "metadata",
    "normalize",
    "pointing_accuracy",
    "pointing_hits",
]
