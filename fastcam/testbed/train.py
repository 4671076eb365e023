"""Trains a testbed model from a seed and writes its weights with their accuracy: `python -m fastcam.testbed.train`.

Two passes, each over scenes that are never repeated, with binary cross-entropy on the ten logits, AdamW and a one-cycle
schedule. First close-ups, 48x48 cut around one digit: straight from whole scenes the loss sits at the entropy of the
labels for longer than a whole run takes. So digits' positions are used once, to find the objects' size; whole scenes
then come with class labels only. tiny_vgg trains with batch norm behind its convolutions, folded into them at the end.
tiny_embed starts from tiny_resnet's trunk and sees whole scenes only, with a metric loss: whether two of a batch share
a digit, by logistic regression on the cosine of their embeddings.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .models import EMBEDDERS, MODELS, WEIGHTS, TinyEmbed, TinyVGG, build, load, normalize
from .scenes import GENERATOR_VERSION, Scenes, close_ups, make_scenes

__all__ = ["BRIEF", "BRIEF_MEAN_AP", "Accuracy", "Recipe", "Retrieval", "accuracy", "main", "predict", "retrieval"]
__all__ += ["save", "train"]

log = logging.getLogger("fastcam")

TEST_SEED = 0


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights, apart from the torch version and the machine's arithmetic."""

    model: str
    close_ups: int = 12_800
    scenes: int = 44_800
    batch: int = 32
    rate: float = 4e-3
    decay: float = 0.02
    seed: int = 0


BRIEF = Recipe("tiny_resnet", close_ups=6_400, scenes=4_800)
BRIEF_MEAN_AP = 0.6
"""A minute on one core, and the mean AP it reaches on held-out scenes: shows that the script still trains."""


@dataclass(frozen=True)
class Accuracy:
    """Fractions in [0,1] over a set of scenes.

    top2: the two highest logits are the two digits; exact: the logits above 0 are exactly the two digits;
    mean_ap: average precision of ranking the scenes by a digit's logit, mean over the ten digits.
    """

    top2: float
    exact: float
    mean_ap: float


def train(recipe: Recipe) -> nn.Module:
    """A model in eval mode, trained on the first `close_ups` and then the next `scenes` of the training split.

    Progress is logged ten times a pass. Torch's global seed is set to recipe.seed.
    """
    torch.manual_seed(recipe.seed)
    model = build(recipe.model)
    if isinstance(model, TinyEmbed):
        model.load_state_dict(load("tiny_resnet").state_dict(), strict=False)
        _fit(model.train(), recipe, range(recipe.scenes), _whole, _pair_loss)
        return model.eval().to(memory_format=torch.contiguous_format)
    near: nn.Module = model
    if isinstance(model, TinyVGG):
        model.features = _add_norms(model.features)
        maps = model.fc1.in_features // 144
        near = nn.Sequential(model.features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(maps, 10))
    _fit(near, recipe, range(recipe.close_ups), _close_ups)
    _fit(model, recipe, range(recipe.close_ups, recipe.close_ups + recipe.scenes), _whole)
    model.eval()
    if isinstance(model, TinyVGG):
        model.features = _fold_norms(model.features)
    return model.to(memory_format=torch.contiguous_format)


def _fit(
    model: nn.Module,
    recipe: Recipe,
    indices: range,
    view: Callable[[Scenes], tuple[Tensor, Tensor]],
    measure: Callable[[Tensor, Tensor], Tensor] = functional.binary_cross_entropy_with_logits,
) -> None:
    model.to(memory_format=torch.channels_last)
    steps = len(indices) // recipe.batch
    optimizer = torch.optim.AdamW(model.parameters(), recipe.rate, weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps, pct_start=0.1)
    begin, report, recent = time.perf_counter(), max(1, steps // 10), 0.0
    for step in range(steps):
        start = indices.start + step * recipe.batch
        images, truth = view(make_scenes(recipe.batch, split="train", seed=recipe.seed, start=start, region="strokes"))
        loss = measure(model(normalize(images).contiguous(memory_format=torch.channels_last)), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        recent += loss.item() / report
        if (step + 1) % report == 0:
            log.info("step %d of %d, loss %.4f, %.0f s", step + 1, steps, recent, time.perf_counter() - begin)
            recent = 0.0


def _pair_loss(embeddings: Tensor, truth: Tensor) -> Tensor:
    """Logistic loss of 10 (cos - 1/2) against "shares a digit", over all pairs of a batch; `truth` (N,10) in {0,1}."""
    units = functional.normalize(embeddings)
    one, other = torch.triu_indices(len(units), len(units), 1)
    cosine = (units @ units.T)[one, other]
    shared = ((truth @ truth.T)[one, other] > 0).to(cosine)
    return functional.binary_cross_entropy_with_logits(10 * (cosine - 0.5), shared)


def _whole(scenes: Scenes) -> tuple[Tensor, Tensor]:
    return scenes.images, _two_hot(scenes.labels)


def _close_ups(scenes: Scenes) -> tuple[Tensor, Tensor]:
    views = close_ups(scenes)
    return views.images, functional.one_hot(views.labels, 10).float()


def _add_norms(features: nn.Sequential) -> nn.Sequential:
    layers: list[nn.Module] = []
    for layer in features:
        layers.append(layer)
        if isinstance(layer, nn.Conv2d):
            layers.append(nn.BatchNorm2d(layer.out_channels))
    return nn.Sequential(*layers)


def _fold_norms(features: nn.Sequential) -> nn.Sequential:
    layers: list[nn.Module] = []
    for layer in features:
        if isinstance(layer, nn.BatchNorm2d):
            layers[-1] = fuse_conv_bn_eval(layers[-1], layer)
        else:
            layers.append(layer)
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Retrieval:
    """Fractions in [0,1] over a set of scenes, each looked up among the others by cosine.

    recall1: the most similar scene shares a digit; chance: any other scene does; mean_ap: average precision of the
    scenes that share a digit, mean over queries.
    """

    recall1: float
    chance: float
    mean_ap: float


def retrieval(embeddings: Tensor, labels: Tensor) -> Retrieval:
    """Retrieval by embeddings (N,D) of scenes with two digits each, labels (N,2)."""
    units = functional.normalize(embeddings)
    similarity = (units @ units.T).fill_diagonal_(-2)
    truth = _two_hot(labels)
    shared = (truth @ truth.T > 0).fill_diagonal_(False)
    hits = shared.gather(1, similarity.argsort(1, descending=True)[:, :-1]).double()
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1)
    return Retrieval(
        recall1=hits[:, 0].mean().item(),
        chance=hits.mean().item(),
        mean_ap=((precision * hits).sum(1) / hits.sum(1).clamp(min=1)).mean().item(),
    )


def predict(model: nn.Module, images: Tensor, *, batch: int = 128) -> Tensor:
    """Logits (N,10), or embeddings, of scenes (N,3,S,S) in [0,1]."""
    with torch.inference_mode():
        return torch.cat([model(normalize(part)) for part in images.split(batch)]).clone()


def accuracy(logits: Tensor, labels: Tensor) -> Accuracy:
    """Accuracy of logits (N,10) against the two digits (N,2) of each scene."""
    truth = _two_hot(labels).bool()
    top2 = _two_hot(logits.topk(2).indices).bool()
    order = logits.argsort(0, descending=True)
    hits = truth.gather(0, order).double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1).unsqueeze(1)
    average = (precision * hits).sum(0) / hits.sum(0).clamp(min=1)
    return Accuracy(
        top2=(top2 == truth).all(1).double().mean().item(),
        exact=((logits > 0) == truth).all(1).double().mean().item(),
        mean_ap=average.mean().item(),
    )


def save(model: nn.Module, path: Path, recipe: Recipe, reached: Accuracy | Retrieval, test_scenes: int) -> None:
    """Writes the state dict as safetensors; recipe, accuracy and versions go into its metadata as strings."""
    try:
        from safetensors.torch import save as to_bytes
    except ImportError as error:
        raise ImportError("saving needs safetensors: pip install 'fastcam[testbed]'") from error
    facts = asdict(recipe) | {name: f"{value:.4f}" for name, value in asdict(reached).items()}
    facts |= {"test_scenes": test_scenes, "test_seed": TEST_SEED}
    facts |= {"generator": GENERATOR_VERSION, "torch": torch.__version__}
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    path.write_bytes(to_bytes(state, {name: str(value) for name, value in facts.items()}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, measures on the held-out split, saves, prints the accuracies and the path."""
    parser = argparse.ArgumentParser(
        prog="python -m fastcam.testbed.train",
        description="Train a testbed model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", choices=[*MODELS, *EMBEDDERS], required=True)
    parser.add_argument("--out", type=Path, help="file to write, the shipped weights by default")
    parser.add_argument("--close-ups", type=int, default=Recipe.close_ups, help="scenes of the first pass")
    parser.add_argument("--scenes", type=int, default=Recipe.scenes, help="scenes of the second pass")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--test-scenes", type=int, default=4000, help="held-out scenes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(given.threads)
    recipe = Recipe(given.model, given.close_ups, given.scenes, seed=given.seed)
    model = train(recipe)
    held_out = make_scenes(given.test_scenes, split="test", seed=TEST_SEED, region="strokes")
    judge = retrieval if isinstance(model, TinyEmbed) else accuracy
    reached = judge(predict(model, held_out.images), held_out.labels)
    path = given.out or WEIGHTS / f"{given.model}.safetensors"
    save(model, path, recipe, reached, given.test_scenes)
    print(", ".join(f"{name} {value:.4f}" for name, value in asdict(reached).items()))
    print(path)
    return 0


def _two_hot(labels: Tensor) -> Tensor:
    return torch.zeros(len(labels), 10).scatter_(1, labels, 1.0)


if __name__ == "__main__":
    raise SystemExit(main())
