"""Exported programs against `fastcam.attribute`, for other images and numbers of them, and run without fastcam."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastcam
from fastcam import _decompositions, relevance
from fastcam._testing.models import gap_linear, residual, seeded, structured, torchvision_models, vgg_like


def images(count: int, seed: int = 0, side: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def agree(program, model, method, *, targets=None, tolerance=2e-6, side=16, **options):
    """For other numbers of images than the example's, one included."""
    for count in (1, 5):
        batch, chosen = images(count, seed=count, side=side), targets
        if isinstance(targets, torch.Tensor):
            chosen = (torch.arange(count) % 5).reshape(-1, *(1,) * (targets.ndim - 1)).repeat(1, *targets.shape[1:])
            chosen = chosen.reshape(count, *targets.shape[1:])
        scores, maps = program.module()(batch, *([chosen] if isinstance(chosen, torch.Tensor) else []))
        expected = fastcam.attribute(model, batch, method, targets=chosen, **options)
        torch.testing.assert_close(maps, expected.maps, rtol=0, atol=tolerance)
        torch.testing.assert_close(scores, expected.scores, rtol=0, atol=tolerance)


def pooled(rank: int = 2) -> nn.Module:
    """Feature maps of three sizes, by a max pool and a stride."""

    def build() -> nn.Module:
        conv, pool = (nn.Conv2d, nn.MaxPool2d) if rank == 2 else (nn.Conv3d, nn.MaxPool3d)
        average = nn.AdaptiveAvgPool2d(1) if rank == 2 else nn.AdaptiveAvgPool3d(1)
        first, second = conv(3, 6, 3, 1, 1), conv(6, 8, 3, 2, 1)
        return nn.Sequential(first, nn.ReLU(), pool(2), second, nn.ReLU(), average, nn.Flatten(), nn.Linear(8, 5))

    return seeded(build)


def two_linear() -> nn.Module:
    """A head with a backward pass of its own, through a global pool."""

    def build() -> nn.Module:
        features = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU())
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5))
        return nn.Sequential(features, head)

    return seeded(build)


class Gated(nn.Module):
    """A squeeze-and-excitation gate."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.gate, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x).relu()
        return self.fc((x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()).mean((2, 3)))


CASES = [
    ("full_grad", pooled, None, {}),
    ("lift_cam", vgg_like, torch.tensor([3, 1]), {}),
    ("a_fmi", vgg_like, torch.tensor([[0, 2], [4, 4]]), {"size": (20, 12)}),
    ("lrp", lambda: seeded(Gated), 4, {}),
    ("attribution_equilibrium", two_linear, None, {}),
]
MORE = [
    ("attribution_equilibrium", residual, None, {}),
    ("lift_cam", gap_linear, None, {}),
    ("grad_cam_pp", vgg_like, "top2", {"size": "layer", "normalize": False}),
    ("hires_cam", residual, torch.tensor([1, 2]), {}),
    ("lrp", residual, None, {}),
    ("lrp", vgg_like, None, {"composite": "epsilon_gamma_box", "low": -3.0, "high": 3.0}),
    ("relevance_cam", vgg_like, None, {}),
    ("eigen_cam", residual, None, {}),
    ("rap", vgg_like, None, {}),
    ("full_grad", residual, None, {}),
    ("deep_lift", residual, None, {}),
]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


@pytest.mark.parametrize(("method", "build", "targets", "options"), CASES)
def test_program_equals_attribute(method, build, targets, options):
    model = build()
    program = fastcam.export_program(model, method, images(2), targets=targets, **options)
    agree(program, model, method, targets=targets, **options)
    # Plain ATen operators, under the model's own names.
    operators = [n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert operators
    assert {operator.namespace for operator in operators} == {"aten"}
    assert set(program.state_dict) <= set(model.state_dict())
    # None of which reads memory by its layout, as global pools of channels_last features and their gradients do.
    assert not [operator for operator in operators if "strided" in operator.name()]
    # None of which waits for a number: what is made of it can be captured as a CUDA graph.
    syncs = ("_local_scalar_dense", "item", "nonzero", "unique", "masked_select", "equal.default")
    assert not [operator for operator in operators if operator.name().removeprefix("aten::").startswith(syncs)]
    assert not any(isinstance(n.meta.get("val"), (torch.SymBool, torch.SymFloat)) for n in program.graph.nodes)


def test_volumes():
    """Whose maps are resized in three dimensions."""
    model = pooled(3)
    clips = torch.randn(3, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for method in ("grad_cam", "full_grad"):
        program = fastcam.export_program(model, method, clips[:2])
        expected = fastcam.attribute(model, clips, method).maps
        torch.testing.assert_close(program.module()(clips)[1], expected, rtol=0, atol=2e-6)


def test_what_cannot_be_explained_is_masked():
    model = gap_linear()
    program = fastcam.export_program(model, "grad_cam", images(2), targets=[0, 1])
    batch = images(3)
    batch[1, 0, 0, 0] = torch.nan
    _, maps = program.module()(batch, torch.tensor([0, 1, 7]))
    assert (maps[1:] == 0).all()
    expected = fastcam.attribute(model, batch[:1], "grad_cam", targets=[0]).maps
    torch.testing.assert_close(maps[:1], expected, rtol=0, atol=2e-6)


def test_structured_output_and_callable_target():
    model = structured("dict")
    options = {"targets": lambda output: output["logits"][:, 2] - output["logits"][:, 0], "layer": "features"}
    program = fastcam.export_program(model, "grad_cam", images(2), **options)
    scores, maps = program.module()(images(4, seed=3))
    expected = fastcam.attribute(model, images(4, seed=3), "grad_cam", **options)
    torch.testing.assert_close(scores["aux"], expected.scores["aux"], rtol=0, atol=2e-6)
    torch.testing.assert_close(maps, expected.maps, rtol=0, atol=2e-6)


def test_saved_program_runs_without_fastcam(tmp_path):
    model, batch = vgg_like(), images(5, seed=5)
    program = fastcam.export_program(model, "lift_cam", images(2))
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save(batch, tmp_path / "images.pt")
    fresh_process(
        tmp_path,
        """
        import torch
        program = torch.export.load("program.pt2").module()
        torch.save(program(torch.load("images.pt"))[1], "maps.pt")
        """,
    )
    expected = fastcam.attribute(model, batch, "lift_cam").maps
    torch.testing.assert_close(torch.load(tmp_path / "maps.pt"), expected, rtol=0, atol=2e-6)


def fresh_process(folder: Path, code: str) -> None:
    """Runs `code` in `folder`, where nothing of fastcam may be imported."""
    lines = [line[8:] for line in code.splitlines()]
    lines += ["import sys", "assert not [name for name in sys.modules if name.split('.')[0] == 'fastcam']"]
    (folder / "served.py").write_text("\n".join(lines))
    result = subprocess.run([sys.executable, "-P", "served.py"], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


ONNX_CASES = [
    ("grad_cam", gap_linear, {}),
    ("lift_cam", vgg_like, {}),
    ("a_fmi", vgg_like, {}),
    ("lrp", residual, {"composite": "epsilon_alpha2_beta1_flat"}),
    ("attribution_equilibrium", residual, {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "build", "options"), ONNX_CASES)
def test_onnx(tmp_path, method, build, options):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    model, batch = build(), images(5, seed=5)
    program = fastcam.export_program(model, method, images(2), targets=[1, 1], **options)
    save_onnx(program, tmp_path)
    targets = torch.arange(5)
    expected = fastcam.attribute(model, batch, method, targets=targets, **options)
    scores, maps = served_by_onnxruntime(tmp_path, batch, targets)
    torch.testing.assert_close(maps, expected.maps, rtol=0, atol=1e-4)
    torch.testing.assert_close(scores, expected.scores, rtol=0, atol=1e-4)


def save_onnx(program: torch.export.ExportedProgram, folder: Path) -> None:
    options = {"output_names": ["scores", "maps"], "verbose": False}
    options["optimize"] = len(program.graph.nodes) < 10_000  # its time grows faster than they do
    torch.onnx.export(program, (), folder / "program.onnx", **options)


def served_by_onnxruntime(folder: Path, *inputs: torch.Tensor) -> list[torch.Tensor]:
    for i, tensor in enumerate(inputs):
        torch.save(tensor, folder / f"{i}.pt")
    fresh_process(
        folder,
        f"""
        import onnxruntime, torch
        session = onnxruntime.InferenceSession("program.onnx", providers=["CPUExecutionProvider"])
        inputs = [torch.load(str(i) + ".pt").numpy() for i in range({len(inputs)})]
        names = [one.name for one in session.get_inputs()]
        found = session.run(["scores", "maps"], dict(zip(names, inputs)))
        torch.save([torch.from_numpy(one) for one in found], "found.pt")
        """,
    )
    return torch.load(folder / "found.pt")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lift_cam", "lrp"])
def test_compiled_ahead_of_time(tmp_path, method):
    model, batch = residual(), images(5, seed=5)
    program = fastcam.export_program(model, method, images(2))
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package.pt2"))
    torch.save(batch, tmp_path / "images.pt")
    fresh_process(
        tmp_path,
        """
        import torch
        run = torch._inductor.aoti_load_package("package.pt2")
        torch.save(run(torch.load("images.pt"))[1], "maps.pt")
        """,
    )
    expected = fastcam.attribute(model, batch, method).maps
    torch.testing.assert_close(torch.load(tmp_path / "maps.pt"), expected, rtol=0, atol=1e-5)


ZOO = ["resnet18", "vgg11_bn", "densenet121", "mobilenet_v2", "efficientnet_b0"]
ZOO_METHODS = ["grad_cam", "lift_cam", "a_fmi", "lrp", "attribution_equilibrium"]


def clear_of_steps(model: nn.Module, batch: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` images whose activations stay farthest from 0.

    Attribution Equilibrium asks which are above it. Where one of a million is nearer than rounding, two right programs
    answer differently, and their maps are apart by up to 1e-3.
    """
    twin = copy.deepcopy(model).double()
    nearest = torch.full((len(batch),), torch.inf, dtype=torch.float64)

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        distance = inputs[0].abs().flatten(1)
        torch.minimum(nearest, torch.where(distance > 0, distance, torch.inf).amin(1), out=nearest)

    for module in twin.modules():
        if isinstance(module, (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Conv2d)):
            module.register_forward_pre_hook(look)
    with torch.no_grad():
        twin(batch.double())
    return batch[nearest.topk(count).indices]


@pytest.mark.slow
@pytest.mark.parametrize("method", ZOO_METHODS)
@pytest.mark.parametrize("name", ZOO)
def test_torchvision(tmp_path, name, method):
    """Through onnxruntime where it is installed; random weights, with the batch norms of images seen once.

    Without those a deep network's features are rounding noise of 1e-9 around a constant, and so are scaled maps of it.
    """
    model = seeded(lambda: getattr(torchvision_models(), name)(weights=None))
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images(8, seed=9, side=64))
    model.eval()
    example, batch = images(2, side=64), clear_of_steps(model, images(64, seed=5, side=64), 3)
    options = {}
    # DenseNet's pools average signed features: shares of sums near 0 have no digits.
    if (name, method) == ("densenet121", "lrp"):
        options["composite"] = dataclasses.replace(relevance.named("epsilon_plus_flat"), pool=relevance.Gradient())
    program = fastcam.export_program(model, method, example, **options)
    expected = fastcam.attribute(model, batch, method, **options)
    scores, maps = program.module()(batch)
    torch.testing.assert_close(maps, expected.maps, rtol=0, atol=1e-4)
    torch.testing.assert_close(scores, expected.scores, rtol=1e-4, atol=1e-4)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    save_onnx(program, tmp_path)
    scores, maps = served_by_onnxruntime(tmp_path, batch)
    torch.testing.assert_close(maps, expected.maps, rtol=0, atol=1e-4)


def test_errors_say_why():
    model = gap_linear()
    with pytest.raises(fastcam.ExportError, match=r"score_cam.*no straight line.*it decides by numbers"):
        fastcam.export_program(model, "score_cam", images(2))
    with pytest.raises(ValueError, match="cannot raise on numbers"):
        fastcam.export_program(model, "grad_cam", images(2), on_nonfinite="raise")
    with pytest.raises(ValueError, match="compile is for explainers that run in Python"):
        fastcam.export_program(model, "grad_cam", images(2), compile=True)
    with pytest.raises(TypeError, match="method must be a name, such as 'lift_cam'; got Tensor"):
        fastcam.export_program(model, images(2), "grad_cam")
    with pytest.raises(ValueError, match="at least one image"):
        fastcam.export_program(model, "grad_cam", images(0))
    with pytest.raises(ValueError, match="did you mean 'lift_cam'"):
        fastcam.export_program(model, "lift_can", images(2))
    handle = model.features.register_forward_hook(lambda *_: None)
    try:
        with pytest.raises(fastcam.ExportError, match="forward hooks"):
            fastcam.export_program(model, "grad_cam", images(2))
    finally:
        handle.remove()


def test_model_is_untouched():
    model = residual().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.warns(UserWarning, match="train mode"):
        fastcam.export_program(model, "lrp", images(2))
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None and not isinstance(p, torch._subclasses.FakeTensor)
               for p in model.parameters())  # fmt: skip
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool3d(2),
        nn.AdaptiveMaxPool2d((3, 5)),
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d((2, 3), (1, 2), (1, 0), count_include_pad=False),
        nn.AvgPool2d(2, divisor_override=3),
        nn.AdaptiveAvgPool2d((3, 4)),
        nn.AdaptiveAvgPool3d((2, 1, 3)),
        nn.Conv2d(2, 4, 3, 2, 1, dilation=2, groups=2),
        nn.ConvTranspose2d(2, 4, 3, 2, 1, output_padding=1),
    ],
    ids=str,
)
def test_decompositions_equal_autograd(pool):
    """Float64, against autograd's own kernels."""
    pool = pool.double().requires_grad_(False)
    shape = (2, 2, 9, 8, 7) if "3d" in type(pool).__name__ else (2, 2, 9, 8)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = pool(x)
    seed = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (expected,) = torch.autograd.grad(y, x, seed)

    def back(x, seed):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(pool(leaf), leaf, seed)[0]

    graph = torch.fx.experimental.proxy_tensor.make_fx(back, decomposition_table=_decompositions.table())(x, seed)
    assert not [node for node in graph.graph.nodes if "backward" in str(node.target)]
    torch.testing.assert_close(graph(x, seed), expected, rtol=1e-12, atol=1e-12)
