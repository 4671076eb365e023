"""Writes the tables of README and docs from the registry and the committed result files; `--check` fails when they are
stale.

python -P benchmarks/readme.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import fastcam

sys.path.insert(0, str(Path(__file__).resolve().parent / "faithfulness"))
import page

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / fastcam.__version__

#: Row of the cam_family suite -> what the README calls it and what it is held against.
CAM_ROWS = {
    "cam": ("`cam`, layer4, maps at 224 x 224", "1.03"),
    "grad_cam": ("`grad_cam`, same", "1.03"),
    "xgrad_cam": ("`xgrad_cam`, same", "1.03"),
    "hires_cam": ("`hires_cam`, same", "1.03"),
    "grad_cam_pp": ("`grad_cam_pp`, same", "1.03"),
    "layer_cam": ("`layer_cam`, same", ""),
    "eigen_cam": ("`eigen_cam`, same", ""),
    "eigen_grad_cam": ("`eigen_grad_cam`, same", ""),
    "grad_cam, 100 targets": ("`grad_cam`, 100 targets an image", "1.10"),
    "grad_cam, layer3": ("`grad_cam`, layer3 (head with a backward pass)", None),
    "grad_cam, channels_last": ("`grad_cam`, `channels_last=True`", ""),
    "pytorch-grad-cam": ("pytorch-grad-cam 1.5.7, GradCAM", ""),
    "torchcam (no resize)": ("TorchCAM 0.5.0, GradCAM, maps at 7 x 7", ""),
    "captum (no resize)": ("Captum 0.9.0, LayerGradCam, maps at 7 x 7", ""),
}

#: Row of the deep_lift suite -> what the README calls it and its goal.
CONTRIBUTION_ROWS = {
    "resnet50 lift_cam": ("ResNet-50, `lift_cam`, layer4 (closed form)", "1.03"),
    "resnet50 a_fmi": ("ResNet-50, `a_fmi`, layer4, black reference kept from the first call", "1.05"),
    "resnet50 ablation_cam": ("ResNet-50, `ablation_cam`, layer4 (closed form)", "1.05"),
    "resnet50 shap_cam": ("ResNet-50, `shap_cam`, layer4 (closed form)", ""),
    "resnet50 smooth_grad_cam_pp": ("ResNet-50, `smooth_grad_cam_pp`, layer4 (closed form)", ""),
    "resnet50 full_grad": ("ResNet-50, `full_grad`", ""),
    "resnet50 deep_lift": ("ResNet-50, `deep_lift` at the pixels, black reference kept", "3.5"),
    "resnet50 captum LayerDeepLift": ("ResNet-50, Captum LayerDeepLift, layer4", ""),
    "vgg16 lift_cam": ("VGG-16, `lift_cam`, features.29", "1.15"),
    "vgg16 a_fmi": ("VGG-16, `a_fmi`, features.29", ""),
    "vgg16 ablation_cam": ("VGG-16, `ablation_cam`, features.29 (512 head runs an image)", ""),
    "vgg16 shap_cam": ("VGG-16, `shap_cam`, features.29, 2 orders of 512 maps", ""),
    "vgg16 captum LayerDeepLift": ("VGG-16, Captum LayerDeepLift, features.29", ""),
    "vgg16 deep_lift": ("VGG-16, `deep_lift` at the pixels, black reference kept", "half of Captum's"),
    "vgg16 captum DeepLift": ("VGG-16, Captum DeepLift at the pixels", ""),
}

#: Row of the relevance suite, less its network -> what the README calls it and its goal on either.
RELEVANCE_ROWS = {
    "lrp epsilon_plus": ("`lrp`, `epsilon_plus`", {"resnet50": "2.5", "vgg16": "2.8"}),
    "lrp epsilon_plus_flat": ("`lrp`, `epsilon_plus_flat`", {}),
    "lrp epsilon_alpha2_beta1": ("`lrp`, `epsilon_alpha2_beta1`", {"resnet50": "4", "vgg16": "4"}),
    "attribution_equilibrium": ("`attribution_equilibrium`", {"resnet50": "5", "vgg16": "5"}),
    "relevance_cam": ("`relevance_cam`, layer3 / features.22", {"resnet50": "1.5"}),
    "rap": ("`rap`", {"resnet50": "6", "vgg16": "6"}),
    "clrp": ("`clrp`", {}),
    "sglrp": ("`sglrp`", {}),
    "guided_backprop": ("`guided_backprop`", {}),
    "zennit epsilon_plus": ("Zennit 0.5.1, EpsilonPlus", {}),
    "zennit epsilon_alpha2_beta1": ("Zennit 0.5.1, EpsilonAlpha2Beta1", {}),
}
#: Figure of the equilibrium suite -> the column's title.
EQUILIBRIUM_COLUMNS = {
    "hit": "hit", "target": "on target", "other": "on the other", "background": "on background",
    "negative": "background < 0", "oirr": "OIRR", "total": "total",
}  # fmt: skip

#: Method -> suite and rows its cost in the table of methods comes from, and what the row's network is called there.
MEASURED_AS = {"resnet50": "ResNet-50", "vgg16": "VGG-16"}

#: Block and row of the shap suite -> what the README calls it.
SHAP_BLOCKS = {
    "tiny_vgg": "`features`",
    "tiny_vgg, features.14": "`features.14`",
    "random heads, default": "torch's default",
    "random heads, normal biases": "normal biases",
    "random heads, no biases": "no biases",
}
SHAP_ROWS = {
    "shap_cam, 100 orders": "`shap_cam`, 100 orders",
    "lift_cam, RevealCancel": '`lift_cam`, `rule="reveal_cancel"`',
    "ablation drop": "Ablation-CAM",
    "gradient x activation": "gradient x activation, summed",
}

#: Row of the references suite -> what the README calls it.
REFERENCE_ROWS = {
    **{
        f"a_fmi, {variant}{signed}": f'`a_fmi`, `variant="{variant}"`{signed and ", 12 x 12"}'
        for signed in ("", ", signed")
        for variant in ("mean_multiplier", "contribution_ratio", "contribution", "swap")
    },
    "deep_lift": "`deep_lift` at the pixels",
    "deep_lift, pooled": "`deep_lift`, pooled to 12 x 12",
    "integrated gradients": "integrated gradients",
    "integrated gradients, pooled": "integrated gradients, pooled to 12 x 12",
}

ADAPTED = {
    "grad_cam": "pytorch-grad-cam",
    "captum": "Captum",
    "zennit": "Zennit",
    "torchcam": "TorchCAM",
    "quantus": "Quantus",
}
ADAPTER_GOALS = {
    "grad_cam GradCAM resnet50 layer4": "2.5",
    "captum DeepLift vgg16": "2",
    "zennit epsilon_plus_flat resnet50": "4",
    "zennit epsilon_alpha2_beta1 resnet50": "4",
    "quantus PixelFlipping LeNet 28 x 28, 784 steps": "5",
    "quantus PixelFlipping resnet18 32 x 32, 96 steps": "5",
    "quantus PixelFlipping resnet18 224 x 224, 12 steps": "5",
}

#: Part of a job -> what the docs call it.
PARTS = {"forward": "the network", "decode": "decoding"}

CAM_MAP_SHAPES = ("8x2048x7x7", "8x512x14x14", "8x256x56x56", "32x2048x7x7", "64x2048x14x14", "64x1024x28x28")


def load(suite: str, machines: str = "*") -> tuple[dict[str, Any], dict[str, dict[str, Any]], str]:
    """Metadata, rows by name, and path of the suite's newest CPU result file, of `machines` (a pattern) only."""
    documents = [(json.loads(path.read_text()), path) for path in RESULTS.glob(f"{suite}--{machines}--cpu.json")]
    document, path = max(documents, key=lambda found: found[0]["metadata"]["time"])
    return document["metadata"], {row["name"]: row for row in document["results"]}, str(path.relative_to(ROOT))


def measured(suite: str) -> bool:
    """Whether a CPU result file of the suite is there."""
    return any(RESULTS.glob(f"{suite}--*--cpu.json"))


def machine(meta: dict[str, Any]) -> str:
    return f"{meta['threads']} cores of an {meta['cpu']} ({meta['isa']}), torch {meta['packages']['torch']}"


def methods() -> str:
    return "\n".join(
        f"| `{name}` | {row['summary']} | {cost(name)} | {row['source']} |" for name, row in fastcam.methods().items()
    )


def cost(method: str) -> str:
    """What the method was measured to cost, in plain forward passes of the network named."""
    family, contributions, perturbed, walked = (
        load(suite)[1] if measured(suite) else {} for suite in ("cam_family", "deep_lift", "score_cam", "relevance")
    )
    found = []
    for net, label in MEASURED_AS.items():
        row = contributions.get(f"{net} {method}")
        found += [f"{row['times_forward']:.2f} {label}"] if row else []
        row = walked.get(f"{net} {'lrp epsilon_plus_flat' if method == 'lrp' else method}")
        found += [f"{row['times_forward']:.2f} {label}"] if row else []
    if method == "sfam" and measured("pairs"):
        found.append(f"{load('pairs')[1]['pair, no head']['multiple']:.2f} x two passes, ResNet-50")
    if method == "lfi_cam" and measured("lfi_cam_cost"):
        found.append(f"{load('lfi_cam_cost')[1]['ResNet-18, batch 8, explainer']['multiple']:.2f} LFI-CAM ResNet-18")
    if method == "deconvnet":
        found.append("as `guided_backprop`")
    if method in family:
        found.append(f"{family[method]['times_forward']:.2f} ResNet-50")
    if method in perturbed:
        found.append(f"{perturbed[method]['times_forward']:.0f} ResNet-18 (512 maps)")
    if method in ("ss_cam", "is_cam"):  # by definition: the average over n runs of Score-CAM
        found.append("n x `score_cam`")
    return ", ".join(found) or "not measured yet"


def numbers() -> str:
    meta, rows, path = load("cam_family")
    head = rows["layer4 + fc forward"]["times_forward"]
    lines = [
        f"ResNet-50, random weights, batch 8, 224 x 224, float32, {machine(meta)}. *F* is the model's own forward under "
        "`inference_mode` in the same rounds; each row is the median over rounds of time / F, after its maps were checked. "
        f"[{Path(path).name}]({path}), from `python -P benchmarks/methods/bench_cam_family.py`, on a shared, noisy machine.",
        "",
        "| what | x F | goal |",
        "| --- | ---: | ---: |",
    ]
    for name, (label, goal) in CAM_ROWS.items():
        if name in rows and rows[name]["match"]:
            bound = f"{1 + 1.6 * head:.2f} (F + 1.6 head forwards)" if goal is None else goal
            lines.append(f"| {label} | {rows[name]['times_forward']:.2f} | {bound} |")
    lines += [
        "",
        *bf16_numbers(),
        f"The first call in a fresh process, capture included, takes {meta['first_call_extra_s']:.2f} s more than the "
        f"plain forward (goal 1.5 s). Peak memory of `grad_cam` is {meta['peak_ratio']:.2f} x that of the plain no-grad "
        f"forward (goal 1.1). Maps of the bf16 run have a cosine similarity of {meta['bf16_cosine_testbed']:.5f} to "
        "float32 on the testbed (goal 0.999).",
        "",
        *contribution_numbers(),
        "",
        *relevance_numbers(),
        "",
        *score_cam_numbers(),
        "",
        *cam_map_numbers(),
    ]
    return "\n".join(lines)


def bf16_numbers() -> list[str]:
    """The run with bf16 arithmetic, from the newest file of a processor that has it."""
    if not any(RESULTS.glob("cam_family--*avx512*--cpu.json")):
        return []
    meta, rows, path = load("cam_family", "*avx512*")
    row = rows.get("grad_cam, bf16 channels_last")
    if row is None or not row["match"]:
        return []
    return [
        '`grad_cam` with `precision="bf16"`, `channels_last=True` takes '
        f"{row['times_forward']:.2f} F (goal 0.40) on a processor with bf16 arithmetic ({machine(meta)}; "
        f"[{Path(path).name}]({path})).",
    ]


def contribution_numbers() -> list[str]:
    if not measured("deep_lift"):
        return ["Contribution methods: not measured yet (`python -P benchmarks/methods/bench_deep_lift.py`)."]
    meta, rows, path = load("deep_lift")
    lines = [
        f"Contribution methods, batch 8, 224 x 224, float32, {machine(meta)}; *F* as above, of the network named. "
        f"[{Path(path).name}]({path}), from `python -P benchmarks/methods/bench_deep_lift.py`. Captum's DeepLift refuses "
        "torchvision's ResNet-50, whose ReLU modules are re-used.",
        "",
        "| what | x F | goal |",
        "| --- | ---: | ---: |",
    ]
    for name, (label, goal) in CONTRIBUTION_ROWS.items():
        if name in rows and rows[name]["match"]:
            lines.append(f"| {label} | {rows[name]['times_forward']:.2f} | {goal} |")
    captum = rows.get("vgg16 captum DeepLift")
    if captum and not captum["match"]:
        lines.append(
            f"| VGG-16, Captum DeepLift at the pixels; its contributions do not add up here (C4 in docs/parity.md) | "
            f"{captum['times_forward']:.2f} | |"
        )
    ours, theirs = meta["peak_mib_deep_lift_vgg16"], meta["peak_mib_captum_vgg16"]
    lines += [
        "",
        f"Peak memory of pixel `deep_lift` on VGG-16 is {ours:.0f} MiB above the loaded model, Captum's {theirs:.0f} MiB "
        f"({ours / theirs:.2f} x, goal 0.5).",
    ]
    return lines


def relevance_numbers() -> list[str]:
    if not measured("relevance"):
        return ["Relevance methods: not measured yet (`python -P benchmarks/methods/bench_relevance.py`)."]
    meta, rows, path = load("relevance")
    lines = [
        f"Relevance methods to the pixels, batch 8, 224 x 224, float32, {machine(meta)}; *F* as above, of the network named. "
        f"[{Path(path).name}]({path}), from `python -P benchmarks/methods/bench_relevance.py`; every map is compared with "
        "the PyTorch references', composites with Zennit's, before the clock starts.",
        "",
        "| what | ResNet-50, x F | goal | VGG-16, x F | goal |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, (label, goals) in RELEVANCE_ROWS.items():
        cells = []
        for net in MEASURED_AS:
            row = rows.get(f"{net} {name}")
            cells += [f"{row['times_forward']:.2f}" if row and row["match"] else "", goals.get(net, "")]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    peaks = {}
    for net, label in MEASURED_AS.items():
        base = meta[f"peak_mib {net} autograd"]
        named = {
            what: meta[f"peak_mib {net} {what}"] / base for what in ("lrp epsilon_plus", "attribution_equilibrium")
        }
        peaks[label] = ", ".join(f"`{what}` {share:.2f} x" for what, share in named.items())
    speed = [
        f"{rows[f'{net} zennit {name}']['times_ours']:.1f} x on {label} ({name})"
        for net, label in MEASURED_AS.items()
        for name in ("epsilon_plus", "epsilon_alpha2_beta1")
        if f"{net} zennit {name}" in rows
    ]
    lines += [
        "",
        f"Zennit takes {', '.join(speed)} as long (goal: at least 4 x). Peak memory, of autograd's own forward and backward: "
        + "; ".join(f"{label} {text}" for label, text in peaks.items())
        + " (goal: at most 2 x).",
    ]
    return lines


def score_cam_numbers() -> list[str]:
    if not measured("score_cam"):
        return ["Score-CAM: not measured yet (`python -P benchmarks/methods/bench_score_cam.py`)."]
    meta, rows, path = load("score_cam")
    mine, half = rows["score_cam"], rows.get("score_cam, bf16 channels_last")
    bf16 = f"{half['times_torchcam']:.2f} x" if half else "not measured, this processor has no bf16 arithmetic"
    return [
        f"Score-CAM on ResNet-18, one image, 512 masks in chunks of {meta['chunk']}: {mine['times_torchcam']:.2f} x the "
        f"time of TorchCAM 0.5.0 (goal 0.9); in bf16 and channels_last: {bf16} (goal 0.5). Peak memory is "
        f"{meta['peak_mib_chunk_8']:.0f} MiB at chunks of 8 and {meta['peak_mib_chunk_32']:.0f} MiB at 32: it follows the "
        f"chunk. [{Path(path).name}]({path}), from `python -P benchmarks/methods/bench_score_cam.py`.",
    ]


def cam_map_numbers() -> list[str]:
    meta, rows, path = load("cam_map")
    lines = [
        "`fastcam.ops.cam_map` (weighted sum, ReLU, resize to 224 x 224, min-max in one op): times faster than the eager "
        "composition peers use (multiply, sum, ReLU, `interpolate`, `amin`/`amax`), than the same with a batched matrix "
        "product, and than warm `torch.compile` of the reference; and its share of `copy_` bandwidth for the same bytes. "
        f"{machine(meta)}; float32, NCHW. [{Path(path).name}]({path}), from "
        "`python -P benchmarks/ops/bench_cam_map.py`; all layouts, dtypes and the losses stand there and in the "
        "`channel_weights` file beside it.",
        "",
        "| features | eager | eager, matrix product | `torch.compile` | copy bandwidth |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for shape in CAM_MAP_SHAPES:
        row = rows[f"{shape} to 224x224, float32 contiguous"]
        cells = " | ".join(f"{row['speedup'][key]:.1f}" for key in ("eager", "bmm", "compile"))
        lines.append(f"| {shape} | {cells} | {row['pct_copy']:.0f} % |")
    return lines


def faithfulness() -> str:
    meta, rows, path = load("shap")
    blocks = list(meta["ordered"])
    lines = [
        "Mean cosine, ± its standard error, between channel coefficients and the SHAP values of the feature maps (game: which "
        "maps are present; value: the highest logit). `features`: the 12 maps of the testbed's `tiny_vgg` on held-out scenes, "
        "all 4096 coalitions; `features.14`: its 64 maps one layer earlier, against 200 orders; the rest: untrained heads with "
        "two hidden layers and 8 maps, by how their biases are drawn. Slopes (`grad_cam`, `xgrad_cam`) are in other units than "
        f"SHAP values, which is part of what is measured. [{Path(path).name}]({path}), from `{meta['command']}`.",
        "",
        "| coefficients | " + " | ".join(SHAP_BLOCKS[block] for block in blocks) + " |",
        "| --- |" + " ---: |" * len(blocks),
    ]
    names = [name.removeprefix(f"{blocks[0]}: ") for name in rows if name.startswith(f"{blocks[0]}: ")]
    for name in names:
        cells = [rows[f"{block}: {name}"] for block in blocks]
        figures = " | ".join(f"{cell['mean']:.4f} ± {cell['standard_error']:.4f}" for cell in cells)
        lines.append(f"| {SHAP_ROWS.get(name, f'`{name}`')} | {figures} |")
    draws = " | ".join(str(rows[f"{block}: {names[0]}"]["n"]) for block in blocks)
    lines.append(f"| images or heads | {draws} |")
    lines += [
        "",
        "The LIFT-CAM paper's order (sampled SHAP, LIFT-CAM, Ablation-CAM, XGrad-CAM, Grad-CAM) "
        + held_for(meta["ordered"])
        + '; with RevealCancel in the place of the published Rescale (`rule="reveal_cancel"`) it '
        + held_for(meta["ordered_by_reveal_cancel"])
        + ". Gaps of less than two standard errors decide nothing. Heads trained with VGG's dropout on the same maps: "
        "[docs/faithfulness.md](docs/faithfulness.md).",
    ]
    return "\n".join(lines)


def held_for(ordered: dict[str, bool]) -> str:
    """Blocks of the shap suite in which the paper's order holds, and in which it does not."""
    sides = (
        ("holds", [SHAP_BLOCKS[block] for block, holds in ordered.items() if holds]),
        ("does not hold", [SHAP_BLOCKS[block] for block, holds in ordered.items() if not holds]),
    )
    return " and ".join(f"{verb} for {', '.join(names)}" for verb, names in sides if names)


def references() -> str:
    if not measured("references"):
        return "References compared: not measured yet (`python -P benchmarks/faithfulness/bench_references.py`)."
    meta, rows, path = load("references")
    models = list(meta["less_sensitive_than_deep_lift"])
    first = rows[f"{models[0]}: deep_lift"]
    gap = rows["tiny_resnet: size of CAM(x'_1) - CAM(x'_2) relative to the map"]
    lines = [
        "Mean rank correlation (Spearman), ± its standard error, of a method's heat maps under two references, over all pairs "
        f"of black, white, mean, blur and noise, on {first['n']} held-out scenes. Heat maps are at image size; rows at 12 x 12 "
        "compare signed maps at the same resolution, since smooth maps rank alike more easily. `a_fmi` is a reconstruction "
        f"from its paper's abstract. [{Path(path).name}]({path}), from `{meta['command']}`.",
        "",
        "| heat maps | " + " | ".join(f"`{model}`" for model in models) + " |",
        "| --- |" + " ---: |" * len(models),
    ]
    for name, label in REFERENCE_ROWS.items():
        cells = [rows[f"{model}: {name}"] for model in models]
        lines.append(f"| {label} | " + " | ".join(f"{c['mean']:.3f} ± {c['standard_error']:.3f}" for c in cells) + " |")
    lines += [
        "",
        "On `tiny_resnet`, whose head pools and is linear, two references' maps differ by CAM(x'_1) - CAM(x'_2): "
        f"{gap['mean']:.2f} ± {gap['standard_error']:.2f} of the maps' size (2-norm).",
    ]
    return "\n".join(lines)


def equilibrium() -> str:
    if not measured("equilibrium"):
        return "Two objects: not measured yet (`python -P benchmarks/faithfulness/bench_equilibrium.py`)."
    meta, rows, path = load("equilibrium")
    lines = [
        "Pixel maps for one of two digits, held-out scenes of the testbed: highest pixel on the digit, shares of the positive "
        "values, share of background pixels below zero, mean positive value off the digit over that on it (OIRR, median), "
        f"total of the unnormalised map (median). [{Path(path).name}]({path}), from `{meta['command']}`.",
    ]
    for model in ("tiny_vgg", "tiny_resnet"):
        lines += [
            "",
            f"| `{model}` | " + " | ".join(EQUILIBRIUM_COLUMNS.values()) + " |",
            "| --- |" + " ---: |" * len(EQUILIBRIUM_COLUMNS),
        ]
        for name, row in rows.items():
            if name.startswith(f"{model}: "):
                cells = [f"{row[key]:.3f}" if abs(row[key]) < 1e4 else f"{row[key]:.1e}" for key in EQUILIBRIUM_COLUMNS]
                lines.append(f"| {name.removeprefix(f'{model}: ')} | " + " | ".join(cells) + " |")
    drifts = []
    for model in ("tiny_vgg", "tiny_resnet"):
        for method in ("attribution_equilibrium", "grad_cam", "lrp, z+ everywhere"):
            steps = [
                row["mean"] for name, row in rows.items() if name.startswith(f"{model}, randomised: {method} after ")
            ]
            drifts += [f"`{model}` {method} {steps[0]:.2f}, {steps[-1]:.2f}"] if steps else []
    lines += [
        "",
        "Weights drawn anew layer by layer from the top, Spearman's correlation with the trained model's signed maps after the "
        f"last layer and after all: {'; '.join(drifts)}.",
    ]
    return "\n".join(lines)


def sfam() -> str:
    if not measured("sfam"):
        return "Not measured yet (`python -P benchmarks/faithfulness/bench_sfam.py`)."
    meta, rows, path = load("sfam")
    model = meta["model"]
    lines = [
        f"{rows['sfam, cosine']['n']} pairs of held-out scenes that share exactly one digit, embedded by the testbed's `tiny_embed`, which finds "
        f"a scene with a common digit at rank 1 in {100 * model['recall1']:.0f} % of cases (chance {100 * model['chance']:.0f} %; mean average precision "
        f"{model['mean_ap']:.3f}). *hit*: share of maps that peak on the shared digit, over both images, ± standard error; *energy*: share "
        "of the map's mass there; *other*: share that peak on the digit that is not shared; *deletion*: mean cosine while embedding "
        f"channels are removed in the order of a row's weights, lower is better. [{Path(path).name}](../{path}), from `{meta['command']}`.",
        "",
        "| map | hit | energy | other | deletion |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        curve = f"{row['deletion']:.3f} ± {row['deletion_error']:.3f}" if row.get("deletion") is not None else ""
        hit = f"{row['hit']:.3f} ± {row['standard_error']:.3f}"
        lines.append(f"| {name} | {hit} | {row['energy']:.3f} | {row['other']:.3f} | {curve} |")
    best = max((row["hit"], name) for name, row in rows.items() if not name.startswith("sfam"))[1]
    dots = rows["similarity map"]
    orders = {
        name: row["deletion"] for name, row in rows.items() if row.get("deletion") is not None and row is not dots
    }
    first = min(orders, key=lambda name: orders[name])
    peak = dots["deletion_at_peak"]
    lines += [
        "",
        f"The best place to point is given by {best}. Of the table's orders, channels go fastest in that of {first}; the similarity map's own "
        "order is that of sfam, cosine, since what a channel adds to the map, summed over the image, is its contribution to the cosine. In the "
        f"order of what a channel adds at the map's highest place they go {'faster' if peak < orders[first] else 'more slowly'}: {peak:.3f} ± "
        f"{dots['deletion_at_peak_error']:.3f}.",
    ]
    return "\n".join([*lines, *pair_costs()])


def pair_costs() -> list[str]:
    if not measured("pairs"):
        return ["", "Costs: not measured yet (`python -P benchmarks/methods/bench_pairs.py`)."]
    meta, rows, path = load("pairs")
    lines = [
        "",
        f"ResNet-50, random weights, float32, {machine(meta)}; a pair of batches of 8 at 224 x 224 in multiples of the two plain forward "
        f"passes, and one query against 1000 stored feature maps (2048 x 7 x 7) beside the same in eager PyTorch pair by pair. "
        f"[{Path(path).name}](../{path}), from `{meta['command']}`.",
        "",
        "| what | measured | goal |",
        "| --- | ---: | ---: |",
    ]
    for name, row in rows.items():
        if "multiple" in row:
            lines.append(f"| {name} | {row['multiple']:.3f} x | {'1.03 x' if name == 'pair, no head' else ''} |")
        elif row.get("speedup"):
            stored, whole = row["speedup"]["eager loop"], row["speedup"]["eager loop with features"]
            lines.append(
                f"| {name} | {stored:.1f} x faster; {whole:.0f} x if the loop computes its features | 10 x faster |"
            )
    return lines


def lfi_cam() -> str:
    if not measured("lfi_cam"):
        return "Not measured yet (`python -P benchmarks/faithfulness/bench_lfi_cam.py --work runs`)."
    meta, rows, path = load("lfi_cam")
    kinds = {
        "plain": ("ResNet-8, Grad-CAM", "grad_cam"), "lfi_cam": ("LFI-CAM", "lfi_cam"),
        "abn": ("attention branch network", "abn"), "": ("Grad-CAM of the LFI-CAM network", "grad_cam of lfi_cam"),
    }  # fmt: skip
    lines = [
        "Close-ups of the testbed's digits, 32 x 32 pixels, ten classes, ResNet-8, from scratch. Accuracy and pointing (share of maps that "
        "peak on the digit): mean of three seeds ± standard error, 2000 held-out images. Stability: intersection over union of the "
        "maps above 100/255 between five models (three seeds, half the rate, five times the weight decay), and by the released "
        f"script's formula. [{Path(path).name}](../{path}), from `{meta['command']}`.",
        "",
        "| network, map | parameters | accuracy | stability | released formula | pointing |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]

    def cell(name: str) -> str:
        row = rows.get(name)
        return "" if row is None else f"{row['mean']:.3f} ± {row['standard_error']:.3f}"

    for kind, (title, map_name) in kinds.items():
        size = rows[f"accuracy, {kind}"]["parameters"] if kind else None
        stable = f"stability, {map_name}"
        cells = [
            f"{size:,}" if size else "",
            cell(f"accuracy, {kind}"),
            cell(stable),
            f"{rows[stable]['released']:.3f}",
        ]
        lines.append(f"| {title} | " + " | ".join(cells) + f" | {cell(f'pointing, {map_name}')} |")
    lines.append(f"| a random place | | | | | {rows['pointing, random']['mean']:.3f} |")
    gap = rows["stability, lfi_cam"]["mean"] - rows["stability, abn"]["mean"]
    lost = rows["accuracy, plain"]["mean"] - rows["accuracy, lfi_cam"]["mean"]
    lines += [
        "",
        f"LFI-CAM's maps overlap {abs(gap):.2f} {'more' if gap > 0 else 'less'} between models than those of the attention branch network (the paper's "
        f"order{'' if gap > 0 else ' does not hold here'}); its accuracy is {100 * abs(lost):.1f} points {'below' if lost > 0 else 'above'} the plain network's.",
    ]
    return "\n".join([*lines, *attention_costs()])


def attention_costs() -> list[str]:
    lines = []
    if measured("lfi"):
        meta, rows, path = load("lfi")
        lines += [
            "",
            f"Attention part alone (masks, attention, attended features; forward and backward, importance convolutions excluded), batch 32, "
            f"float32, {machine(meta)}; goals: twice as fast as a plain PyTorch module, half the memory saved for the backward pass. "
            f"[{Path(path).name}](../{path}), from `{meta.get('command', 'python -P benchmarks/ops/bench_lfi.py')}`.",
            "",
            "| features | x faster than eager | than `torch.compile` | saved, MiB | plain module, MiB |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for name, row in rows.items():
            if "float32" in name and row.get("speedup"):
                saved = row["saved_mib"]
                lines.append(
                    f"| {name} | {row['speedup']['eager']:.1f} | {row['speedup']['compile']:.1f} | {saved['ours']:.1f} | {saved['eager']:.1f} |"
                )
    if measured("lfi_cam_cost"):
        meta, rows, path = load("lfi_cam_cost")
        lines += [
            "",
            f"Inference, in multiples of backbone, importance convolutions and classifier without the attention (goal 1.02), {machine(meta)}. "
            f"[{Path(path).name}](../{path}), from `{meta['command']}`.",
            "",
            '| network | `LFICAM` | plain PyTorch formulas | `Explainer(model, "lfi_cam")`, maps at image size |',
            "| --- | ---: | ---: | ---: |",
        ]
        for name in dict.fromkeys(key.rsplit(", ", 1)[0] for key in rows):
            cells = [f"{rows[f'{name}, {key}']['multiple']:.3f}" for key in ("ours", "plain", "explainer")]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def metric_costs() -> str:
    if not measured("metrics"):
        return "Not measured yet (`python -P benchmarks/metrics/bench_metrics.py`)."
    meta, rows, path = load("metrics")
    lines = [
        f"Float32, {machine(meta)}, {meta['chunk']} inputs a pass. [{Path(path).name}](../{path}), from `{meta['command']}`; results "
        "are compared before anything is timed.",
        "",
        "| what | measured | goal |",
        "| --- | ---: | ---: |",
    ]
    for name, row in rows.items():
        if not row["match"]:
            continue
        if "multiple" in row:
            lines.append(f"| {name} | {row['multiple']:.2f} x the bare forward passes | 1.1 x |")
        else:
            goal = "10 x" if name.startswith("road") else ""
            lines.append(
                f"| {name} | {row['speedup']['pytorch-grad-cam']:.1f} x faster than pytorch-grad-cam | {goal} |"
            )
    return "\n".join(lines)


def adapters() -> str:
    if not measured("adapters"):
        return "Not measured yet (`python -P benchmarks/adapters/bench_adapters.py`)."
    meta, rows, path = load("adapters")
    lines = [
        "Time of the library's own call over that of the adapter's, in the same rounds, after the results were compared; random weights, "
        f"float32, batch 8, 224 x 224 unless the row says otherwise; {machine(meta)}. [{Path(path).name}](../{path}), from "
        "`python -P benchmarks/adapters/bench_adapters.py`, on a shared, noisy machine.",
        "",
        "| library | call | the library's, ms | fastcam's, ms | times faster | goal |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        peer, _, call = name.partition(" ")
        theirs, ours = row["baselines_us"][peer] / 1e3, row["median_us"] / 1e3
        speedup = "no match" if row["speedup"] is None else f"{row['speedup'][peer]:.2f}"
        lines.append(
            f"| {ADAPTED[peer]} | {call} | {theirs:.1f} | {ours:.1f} | {speedup} | {ADAPTER_GOALS.get(name, '1')} |"
        )
    return "\n".join(lines)


def profile() -> str:
    meta, rows, path = load("profile_resnet50")
    lines = [
        f"{machine(meta)}, load average {meta['load']:.1f} when the file was written. [{Path(path).name}](../{path}).",
        "",
        "| method | by | batch | precision | ms (quartiles apart) | x forward | trunk, head, rules, post, other | peak MiB |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows.values():
        stages = row.get("stages_us") or {}
        shares = ", ".join(f"{part / sum(stages.values()):.0%}".replace("%", " %") for part in stages.values())
        lines.append(
            f"| {row['method']} | {row['backend']} | {row['batch']} | {row['precision']} | {row['median_us'] / 1e3:.1f} "
            f"({row['iqr_us'] / 1e3:.1f}) | {row['times_forward']:.2f} | {shares} | {row['peak_mib']:.0f} |"
        )
    return "\n".join(lines)


#: Op suites, in the order of the table.
OP_SUITES = (
    "cam_map", "channel_weights", "mask_by_features", "lfi", "overlay", "perturb_by_rank", "relevance_ops",
    "rescale_multipliers", "similarity_weights",
)  # fmt: skip


def ops() -> str:
    lines = [
        "Times faster than the plain expression in PyTorch (eager) and than `torch.compile` of it: least, middle and greatest over all "
        "shapes, dtypes and layouts of the suite, and the row that is least; share of the measured copy bandwidth in the rows that move "
        f"most bytes. C++ kernels, {machine(load(OP_SUITES[0], 'amd-epyc-2c-avx512')[0])}; every row was compared with the float64 "
        "reference before it was timed.",
        "",
        "| suite | rows | x eager | least at | x `torch.compile` | least at | % of copy |",
        "| --- | ---: | ---: | --- | ---: | --- | ---: |",
    ]
    for suite in OP_SUITES:
        _, rows, path = load(suite, "amd-epyc-2c-avx512")
        valid = [row for row in rows.values() if row["match"]]
        cells = []
        for baseline in ("eager", "compile"):
            ratios = sorted((row["speedup"][baseline], row["name"]) for row in valid if baseline in row["speedup"])
            cells.append(f"{ratios[0][0]:.2f}, {ratios[len(ratios) // 2][0]:.1f}, {ratios[-1][0]:.0f}")
            cells.append(ratios[0][1])
        most = max(row["bytes_moved"] for row in valid)
        largest = sorted(row["pct_copy"] for row in valid if row["bytes_moved"] >= most / 2)
        share = f"{largest[0]:.0f} to {largest[-1]:.0f}" if len(largest) > 1 else f"{largest[0]:.0f}"
        lines.append(f"| [{suite}](../{path}) | {len(valid)} | " + " | ".join(cells) + f" | {share} |")
    return "\n".join(lines)


def job_rates() -> str:
    meta, rows, path = load("jobs")
    lines = [
        f"ResNet-18, `lift_cam`, 224 x 224, float32, {machine(meta)}, load average {meta['load']:.1f} when the file was written. A job's "
        "rate beside that of its slower part alone, in images/s: medians over rounds in which they take turns (so ratios mean more "
        "than rates), their range in brackets. With JPEG files one core decodes and the others compute. "
        f"[{Path(path).name}](../{path}), from `{meta.get('command', 'python -P benchmarks/jobs/bench_throughput.py')}`.",
        "",
        "| images | decoding alone | network alone | job | of the slower | goal |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        if not row["match"]:
            continue
        rates = row["rates"]
        decode = f"{rates['decode']:.1f}" if "decode" in rates else ""
        spread = f"{row['ratio']:.2f} x ({min(row['ratios']):.2f} to {max(row['ratios']):.2f}), {PARTS[row['of']]}"
        title = "in memory, prepared" if name == "decoded" else name.replace("jpeg", "JPEG")
        goal = "0.95" if name == "decoded" else "0.9"
        lines.append(f"| {title} | {decode} | {rates['forward']:.1f} | {rates['job']:.1f} | {spread} | {goal} x |")
    if measured("jobs_memory"):
        _, rows, path = load("jobs_memory")
        row = rows["jpeg files"]
        lines += [
            "",
            f"Resident memory grew by {row['growth_mib']:.1f} MiB between item 1,000 and item {row['images']:,} "
            f"([{Path(path).name}](../{path})). No GPU has been measured.",
        ]
    return "\n".join(lines)


def job_storage() -> str:
    meta, rows, path = load("jobs_storage")
    lines = [
        "Bytes an item of one shard of random values, which compress worst, ids and hashes included "
        f"([{Path(path).name}](../{path}), from `{meta['command']}`). `du -sb` of a store of your own data, divided by its "
        "items, replaces it:",
        "",
        "| maps, float16 | scores | an item | 1.28 M | 1 B | rows a shard |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        size, _, scores = name.partition(", ")
        kept = scores or "those of the targets"
        each = row["bytes_per_item"]
        cells = [scaled(each), scaled(each * 1.28e6), scaled(each * 1e9), f"{row['shard_rows']:,}"]
        lines.append(f"| {size} | {kept} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def scaled(size: float) -> str:
    """Bytes with three digits and a decimal prefix."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


#: Document -> its sections.
DOCUMENTS = {
    "README.md": {
        "methods": methods,
        "numbers": numbers,
        "faithfulness": faithfulness,
        "references": references,
        "equilibrium": equilibrium,
    },
    "docs/similarity.md": {"sfam": sfam},
    "docs/lfi-cam.md": {"lfi_cam": lfi_cam},
    "docs/faithfulness.md": {"claims": page.claims, "heads": page.heads, "tables": page.tables},
    "docs/metrics.md": {"costs": metric_costs},
    "docs/adapters.md": {"adapters": adapters},
    "docs/profiling.md": {"profile": profile, "ops": ops},
    "docs/jobs.md": {"rates": job_rates, "storage": job_storage},
}


def filled(document: str, text: str) -> str:
    for section, table in ((name, make()) for name, make in DOCUMENTS[document].items()):
        pattern = rf"(<!-- {section}: start -->\n).*?(<!-- {section}: end -->)"
        text, count = re.subn(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{document} must hold the markers of section {section!r} once")
    return text


def main() -> None:
    for document in DOCUMENTS:
        path = ROOT / document
        text = path.read_text()
        wanted = filled(document, text)
        if "--check" not in sys.argv[1:]:
            path.write_text(wanted)
        elif text != wanted:
            raise SystemExit(f"{document} is stale: run python -P benchmarks/readme.py")


if __name__ == "__main__":
    main()
