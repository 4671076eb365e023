"""`Gallery`: features and embeddings of images, kept for later comparisons."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcam._tensor_file import read_tensors

__all__ = ["Gallery"]


@dataclass(frozen=True, eq=False)
class Gallery:
    """Features and embeddings of N images, so that their network need not run again.

    features    (N, K, *spatial) of the layer, as the network gives them
    embeddings  (N, D)
    labels      (N,) integers, or None
    image       an image's own (C, *spatial)
    layer       name of the layer
    length      that the network brings its embeddings to in the end, or None (these are from before that)
    weights     hash of the weights that the features were computed with, or None: not known, as of features that were
                computed elsewhere
    """

    features: Tensor
    embeddings: Tensor
    labels: Tensor | None
    image: tuple[int, ...]
    layer: str
    length: float | None
    weights: str | None = None

    def __repr__(self) -> str:
        made = f"weights {self.weights}" if self.weights else "of unknown weights"
        shape = ", ".join(str(size) for size in self.features.shape)
        return f"Gallery(layer={self.layer!r}, features=({shape}) {self.features.dtype}, {made})"

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: Any) -> Gallery:
        """The images of `rows`: a slice, integers or a mask."""
        with contextlib.suppress(TypeError):
            rows = [operator.index(rows)]
        labels = None if self.labels is None else self.labels[rows]
        return dataclasses.replace(self, features=self.features[rows], embeddings=self.embeddings[rows], labels=labels)

    def save(self, path: str | Path) -> None:
        """Write it to a file, by `torch.save`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        # Of a part of a gallery, its own memory is written, not that of the whole.
        parts = {name: each.clone() if isinstance(each, Tensor) else each for name, each in fields.items()}
        torch.save(parts, path)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Gallery:
        """The gallery that `save` wrote; reads no pickled code. Raises ValueError for another file.

        An explainer that uses it compares the hash of its weights with the one stored, and what its network makes of
        the first features with their embedding.
        """
        found = read_tensors(path, "gallery", device)
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(found, dict) or set(found) | {"weights"} != names:
            raise ValueError(f"{path} is no gallery: it was not written by Gallery.save")
        return cls(**found)
