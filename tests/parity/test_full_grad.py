"""FullGrad against pytorch-grad-cam 1.5.7, which takes convolutions' and batch norms' biases, channel by channel."""

from __future__ import annotations

import contextlib

import pytest
import torch

import fastcam
from fastcam._testing import models

pytestmark = pytest.mark.peers
with contextlib.suppress(ImportError):  # the peer imports torchvision, which may need help beside a CPU-only torch
    models.torchvision_models()
peer = pytest.importorskip("pytorch_grad_cam", reason="needs grad-cam, extra 'peers'")

from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget  # noqa: E402


def test_per_channel_maps(case):
    """It works in float32 and resizes every channel; the sum before the resize is the same map."""
    x, classes = case.images(2), case.classes(2)
    cam = peer.FullGrad(case.peer, [])
    want = torch.from_numpy(cam(x, [ClassifierOutputTarget(c) for c in classes]))
    cam.activations_and_grads.release()
    got = fastcam.attribute(case.net, x, "full_grad", targets=classes, postprocess="per_channel")
    assert float(want.amax()) > 0.99
    torch.testing.assert_close(got.maps.float(), want, rtol=0, atol=1e-4)
    other = fastcam.attribute(case.net, x, "full_grad", targets=classes)
    assert float((other.maps.float() - want).abs().max()) > 1e-2  # the authors' form is another map
