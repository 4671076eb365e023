"""How near channel coefficients come to the SHAP values of the feature maps: mean cosines.

    python -P benchmarks/faithfulness/bench_shap.py [--images 256] [--draws 60]

The game: which maps are present, an absent one being zero; its value is the highest logit. Cosines are between vectors
of one coefficient a map, each as its method defines it. Those of LIFT-CAM (by Rescale as published, and by
RevealCancel), of Ablation-CAM (here the drop itself, y(A) - y(A without k): dividing by the score would turn the sign
where it is negative) and of gradient x activation are in units of the score, as SHAP values are; those of XGrad-CAM and
Grad-CAM are slopes, score per activation, so what is measured of them includes that difference. Blocks:

  tiny_vgg               the testbed's trained network on held-out scenes: 12 maps, a head of two linear layers
  tiny_vgg, features.14  one layer earlier, 64 maps, on a quarter as many scenes. Too many maps for all coalitions: the
                         yardstick is the mean over 200 orders (100 antithetic pairs)
  random heads           VGG-type heads, never trained: 8 maps of 14 x 14, ReLU of standard normal numbers, through
                         max-pool 2/2, two hidden layers of 64 and ReLU to ten logits; new weights each draw. "default":
                         torch's initialisation; "normal biases" and "no biases": He's normal weights, and biases that
                         are standard normal or zero. Without biases LIFT-CAM is gradient x activation

Correctness first: SHAP values must sum to y(A) - y(0). No times are measured, so load on the machine does not matter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _harness as harness

import fastcam
from fastcam.methods._method import Passage
from fastcam.methods._perturb import edited_scores
from fastcam.program.targets import resolve_targets
from fastcam.testbed import load, make_scenes, normalize

ROWS = ("shap_cam, 100 orders", "lift_cam", "lift_cam, RevealCancel", "ablation drop", "gradient x activation")
ROWS += ("xgrad_cam", "grad_cam")
#: Best first, as the LIFT-CAM paper claims.
ORDER = ("shap_cam, 100 orders", "lift_cam", "ablation drop", "xgrad_cam", "grad_cam")
INITS = ("default", "normal biases", "no biases")
BATCH, CHUNK = 32, 512


#: SHAP values (B, K), and other coefficients by name.
Drawn = Iterator[tuple[Tensor, dict[str, Tensor]]]
#: Images to the class of each; None: the highest logit's.
Targets = Callable[[Tensor], Tensor] | None


class Coefficients:
    """(B, K) coefficients of a model's arg-max logits by every method, and their yardstick.

    orders   0: SHAP values from all coalitions; else from as many orders
    targets  other logits than the highest
    cancel   also LIFT-CAM's coefficients by RevealCancel in the place of Rescale
    """

    def __init__(self, model: nn.Module, layer: str, orders: int = 0, *, targets: Targets = None, cancel: bool = False):
        def explainer(method: str, **options: Any) -> fastcam.Explainer:
            return fastcam.Explainer(model, method, layer=layer, normalize=False, size="layer", **options)

        how = {"exact": False, "n_orders": orders, "seed": 1} if orders else {"exact": True}
        self._shap = explainer("shap_cam", chunk=CHUNK, **how)
        self._weighted = {name: explainer(name) for name in ("lift_cam", "xgrad_cam", "grad_cam")}
        self._weighted["lift_cam, RevealCancel"] = explainer("lift_cam", rule="reveal_cancel")
        self._sampled = explainer("shap_cam", exact=False, n_orders=100, chunk=CHUNK)
        self._gradients = explainer("hires_cam")
        self._targets = targets

    def shap(self, images: Tensor) -> Tensor:
        found = self._shap(images, self._of(images))
        scale = found.weights.abs().sum(-1)
        if not bool((found.delta.abs() <= 1e-4 * scale).all()):
            raise RuntimeError(f"SHAP values miss the score by up to {float((found.delta.abs() / scale).max()):.3g}")
        return found.weights

    def others(self, images: Tensor) -> dict[str, Tensor]:
        targets = self._of(images)
        found = {name: explainer(images, targets).weights for name, explainer in self._weighted.items()}
        found["shap_cam, 100 orders"] = self._sampled(images, targets).weights
        passed = self._passage(images)
        found["ablation drop"] = passed.scores().unsqueeze(-1) - edited_scores(passed, 0.0, CHUNK)
        found["gradient x activation"] = (passed.gradients() * passed.features).flatten(2).sum(-1)
        return {name: found[name] for name in ROWS}

    def _of(self, images: Tensor) -> Tensor | None:
        return None if self._targets is None else self._targets(images)

    def _passage(self, images: Tensor) -> Passage:
        with torch.no_grad():
            forward = self._gradients._session(images).forward(images, "gradients", by_index=True)
        targets = resolve_targets(self._of(images), forward.output, len(images))
        return Passage(forward, images, forward.features, targets, self._gradients.options)


class Features(nn.Module):
    """ReLU as the layer to explain, and the head behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ReLU()
        self.head = nn.Sequential(
            *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 7 * 7, 64), nn.ReLU()),
            *(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return self.head(self.features(maps))


def scenes(count: int, layer: str = "features", orders: int = 0) -> Drawn:
    """SHAP values and other coefficients of tiny_vgg on `count` held-out scenes, a batch at a time."""
    found = Coefficients(load("tiny_vgg"), layer, orders)
    for start in range(0, count, BATCH):
        images = normalize(make_scenes(min(BATCH, count - start), split="test", seed=0, start=start).images)
        yield found.shap(images), found.others(images)


def random_heads(draws: int, init: str = "default", seed: int = 0) -> Drawn:
    """SHAP values and other coefficients of `draws` heads with one image each; one network, weights drawn again."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Features().double().eval()
        found = Coefficients(model, "features")
        for _ in range(draws):
            for module in model.head:
                if isinstance(module, nn.Linear):
                    module.reset_parameters()
                    if init != "default":
                        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                        nn.init.normal_(module.bias, std=float(init == "normal biases"))
            maps = torch.randn(1, 8, 14, 14, dtype=torch.float64)
            yield found.shap(maps), found.others(maps)


def cosines(drawn: Drawn) -> dict[str, Tensor]:
    """(n,) cosines to SHAP values, for every kind of coefficient."""
    parts: dict[str, list[Tensor]] = {}
    for shap, others in drawn:
        for name, coefficients in others.items():
            found = functional.cosine_similarity(coefficients.double(), shap.double(), dim=-1)
            parts.setdefault(name, []).append(found)
    return {name: torch.cat(many) for name, many in parts.items()}


def row(name: str, values: Tensor) -> dict[str, Any]:
    """Mean of (n,) values, its standard error, and the lowest."""
    return {
        "name": name,
        "mean": float(values.mean()),
        "standard_error": float(values.std() / len(values) ** 0.5),
        "lowest": float(values.min()),
        "n": len(values),
    }


def rows(block: str, drawn: Drawn) -> list[dict[str, Any]]:
    """Cosines to SHAP values for every kind of coefficient."""
    return [row(f"{block}: {name}", values) for name, values in cosines(drawn).items()]


def ordered(block: str, found: list[dict[str, Any]], lift: str = "lift_cam") -> bool:
    """Whether the means of a block fall in the paper's order, with `lift` for LIFT-CAM."""
    means = {row["name"]: row["mean"] for row in found}
    chosen = [means[f"{block}: {lift if name == 'lift_cam' else name}"] for name in ORDER]
    return chosen == sorted(chosen, reverse=True)


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256, help="held-out scenes (default: 256)")
    parser.add_argument("--draws", type=int, default=60, help="random heads (default: 60)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    blocks: dict[str, Drawn] = {
        "tiny_vgg": scenes(options.images),
        "tiny_vgg, features.14": scenes(max(1, options.images // 4), "features.14", orders=200),
    }
    blocks |= {f"random heads, {init}": random_heads(options.draws, init) for init in INITS}
    found = {block: rows(block, drawn) for block, drawn in blocks.items()}
    everything = [row for part in found.values() for row in part]
    harness.table(everything, ["name", "mean", "standard_error", "lowest", "n"])
    harness.write(
        "shap",
        "cpu",
        everything,
        options.out,
        harness.QUALITY_KEYS,
        measure="cosine to SHAP values",
        command=f"python -P benchmarks/faithfulness/bench_shap.py --images {options.images} --draws {options.draws}",
        ordered={block: ordered(block, part) for block, part in found.items()},
        ordered_by_reveal_cancel={
            block: ordered(block, part, "lift_cam, RevealCancel") for block, part in found.items()
        },
    )


if __name__ == "__main__":
    main()
