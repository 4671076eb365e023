"""Other libraries' interfaces over fastcam: `grad_cam`, `torchcam`, `captum`, `zennit`, `quantus`.

Each module needs the library it stands in for (extra 'peers') and is imported on its own:

    from fastcam.adapters.grad_cam import GradCAM

or left to `fastcam.adapters.accelerate("pytorch_grad_cam")`, which makes scripts use it as they are.
"""

from fastcam.adapters._accelerate import Acceleration, accelerate

__all__ = ["Acceleration", "accelerate"]
