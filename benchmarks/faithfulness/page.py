"""Sections of docs/faithfulness.md from the committed result files; `benchmarks/readme.py` puts them in and checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fastcam

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / fastcam.__version__

#: Table -> metric -> column title with the better direction, decimals, and whether its median is shown.
TABLES: dict[str, dict[str, tuple[str, int, bool]]] = {
    "Perturbation": {
        "insertion_auc": ("insertion ↑", 3, False),
        "deletion_auc": ("deletion ↓", 3, False),
        "road": ("ROAD ↑", 3, False),
        "most_relevant_first": ("most relevant first ↑", 3, False),
        "average_drop": ("average drop ↓", 3, False),
        "increase_in_confidence": ("increase ↑", 2, False),
        "average_drop_in_deletion": ("drop in deletion ↑", 3, False),
    },
    "Localisation": {
        "pointing_game": ("pointing ↑", 2, False),
        "energy_pointing": ("energy ↑", 3, False),
        "outside_inside_ratio": ("outside / inside, median ↓", 3, True),
        "localisation_iou": ("IoU at 0.5 ↑", 3, False),
        "average_precision": ("average precision ↑", 3, False),
    },
    "Other": {
        "sparsity": ("sparsity", 2, False),
        "max_sensitivity": ("max-sensitivity ↓", 2, False),
        "randomised": ("all layers randomised ↓", 2, False),
        "shap_agreement": ("cosine to SHAP ↑", 3, False),
    },
}
MODELS = {"tiny_resnet": "pooling and one linear layer", "tiny_vgg": "two linear layers with ReLU"}


def load(suite: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]], str]:
    """Metadata, rows by name, and a link to the suite's newest CPU result file."""
    documents = [(json.loads(path.read_text()), path) for path in RESULTS.glob(f"{suite}--*--cpu.json")]
    document, path = max(documents, key=lambda found: found[0]["metadata"]["time"])
    link = f"[{path.name}](../{path.relative_to(ROOT)})"
    return document["metadata"], {row["name"]: row for row in document["results"]}, link


def cell(row: dict[str, Any], metric: str, digits: int, median: bool) -> str:
    found = row["metrics"].get(metric)
    if found is None or found["n"] == 0:
        return ""
    if median:
        return "∞" if found["median"] is None else f"{found['median']:.{digits}f}"
    return f"{found['mean']:.{digits}f} ± {1.96 * found['standard_error']:.{digits}f}"


def measured() -> bool:
    return any(RESULTS.glob("faithfulness--*--cpu.json"))


def tables() -> str:
    if not measured():
        return "Not measured yet (`make faithfulness`)."
    meta, rows, link = load("faithfulness")
    n, few = meta["images"] * len(meta["seeds"]), meta["robust"] * len(meta["seeds"])
    lines = [
        f"Mean ± 1.96 standard errors (95 %) over {n} held-out scenes, {meta['images']} of each of {len(meta['seeds'])} seeds, one digit a "
        f"scene; max-sensitivity and randomisation over {few}. Intervals are those of one method alone: two methods on the same "
        f"images differ more surely than overlapping intervals say. `random pixels` and `random blobs` are noise. {link}, from "
        f"`{meta['command']}`; means of each seed stand there too.",
    ]
    for model, head in MODELS.items():
        for title, columns in TABLES.items():
            own = [row for row in rows.values() if row["model"] == model]
            costly = title == "Other"
            lines += [
                "",
                f"### {title}, `{model}` ({head})",
                "",
                "| method | "
                + " | ".join(label for label, _, _ in columns.values())
                + (" | x forward |" if costly else " |"),
                "| --- |" + " ---: |" * (len(columns) + costly),
            ]
            for row in own:
                name = row["method"] if row["method"].startswith("random") else f"`{row['method']}`"
                cells = [cell(row, metric, digits, median) for metric, (_, digits, median) in columns.items()]
                if costly:
                    cells.append("" if row["times_forward"] is None else f"{row['times_forward']:.1f}")
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


#: Block of the shap_heads suite -> what the page calls it.
HEADS = {
    "shipped": "as shipped: 64, no dropout",
    "shipped, a digit that is there": "as shipped, logit of a digit that is there",
    "shipped, second logit": "as shipped, second highest logit",
    "64, dropout": "64, dropout",
    "64-64, dropout": "64, 64, dropout",
    "256-256": "256, 256, no dropout",
    "256-256, dropout": "256, 256, dropout",
    "256-256, dropout, 4 x as long": "256, 256, dropout, trained 4 x as long",
    "max-pool, 256-256": "max-pool, 256, 256, no dropout",
    "max-pool, 256-256, dropout": "max-pool, 256, 256, dropout",
}
COEFFICIENTS = {
    "lift_cam": "`lift_cam`",
    "lift_cam, RevealCancel": "by RevealCancel",
    "ablation drop": "Ablation-CAM",
    "gradient x activation": "gradient x activation",
    "xgrad_cam": "`xgrad_cam`",
    "grad_cam": "`grad_cam`",
}


def heads() -> str:
    """Which heads LIFT-CAM is nearest to SHAP for."""
    if not any(RESULTS.glob("shap_heads--*--cpu.json")):
        return "Not measured yet (`python -P benchmarks/faithfulness/bench_shap_heads.py`)."
    meta, rows, link = load("shap_heads")
    seeds = len(meta["top2, 64, dropout"])
    lines = [
        "Mean cosine to the SHAP values of `tiny_vgg`'s 12 maps (all 4096 coalitions), under its own head and under heads trained anew "
        f"on the same maps: widths of the hidden layers, dropout of 0.5 behind each or none, max-pool as in VGG or none; {seeds} seeds "
        f"each, {rows['shipped: lift_cam']['n']} held-out scenes. The difference is of LIFT-CAM and Ablation-CAM image by image, ± its "
        "standard error (pairs of image and head taken for independent); *yes*: LIFT-CAM before Ablation-CAM before XGrad-CAM before Grad-CAM, the first by more than 1.96 standard "
        f"errors. All settings of the suite are shown. {link}, from `{meta['command']}`.",
        "",
        "| hidden layers | " + " | ".join(COEFFICIENTS.values()) + " | difference | the paper's order |",
        "| --- |" + " ---: |" * (len(COEFFICIENTS) + 1) + " --- |",
    ]
    for block, label in HEADS.items():
        means = [rows[f"{block}: {name}"]["mean"] for name in COEFFICIENTS]
        gap = rows[f"{block}: lift_cam less ablation drop"]
        lines.append(
            f"| {label} | "
            + " | ".join(f"{mean:.3f}" for mean in means)
            + f" | {gap['mean']:+.4f} ± {gap['standard_error']:.4f} | {in_order(rows, block)} |"
        )
    return "\n".join(lines)


def in_order(rows: dict[str, dict[str, Any]], block: str) -> str:
    """Whether the LIFT-CAM paper's order holds in a block of the shap_heads suite."""
    gap = rows[f"{block}: lift_cam less ablation drop"]
    means = [rows[f"{block}: {name}"]["mean"] for name in ("lift_cam", "ablation drop", "xgrad_cam", "grad_cam")]
    if gap["mean"] < -1.96 * gap["standard_error"]:
        return "no, Ablation-CAM first"
    if abs(gap["mean"]) <= 1.96 * gap["standard_error"]:
        return "undecided"
    return "yes" if means == sorted(means, reverse=True) else "LIFT-CAM first, not the rest"


def verdict(better: dict[str, Any], worse: dict[str, Any], higher: bool) -> tuple[str, str]:
    """Whether one mean beats another by more than 1.96 standard errors of the difference of independent samples, and
    the figures."""
    gap = (better["mean"] - worse["mean"]) * (1 if higher else -1)
    error = 1.96 * (better["standard_error"] ** 2 + worse["standard_error"] ** 2) ** 0.5
    said = "holds" if gap > error else "does not hold, the other way round" if gap < -error else "undecided"
    return said, f"{better['mean']:.3f} against {worse['mean']:.3f}"


def without_interval(better: float, worse: float, higher: bool) -> tuple[str, str]:
    """The same where no error is known."""
    said = "holds" if (better > worse) == higher else "does not hold"
    return f"{said}, no interval", f"{better:.3f} against {worse:.3f}"


def claims() -> str:
    lines = [
        "*Holds* and *does not hold* mean a difference of more than 1.96 standard errors, the two samples taken for independent; "
        "*undecided* less. Of methods on the same images, which rise and fall together, that asks more than it need. Verdicts are "
        "about these two small networks and this data, not about the papers' own.",
        "",
        "| claim | where | here | figures | from |",
        "| --- | --- | --- | --- | --- |",
    ]
    for claim, where, (said, figures), source in [*of_suites(), *of_table()]:
        lines.append(f"| {claim} | {where} | {said} | {figures} | {source} |")
    return "\n".join(lines)


Claim = tuple[str, str, tuple[str, str], str]


def of_suites() -> list[Claim]:
    """Claims that other suites measure."""
    found: list[Claim] = []
    _, rows, link = load("references")
    for model in MODELS:
        ours, other = rows[f"{model}: a_fmi, mean_multiplier"], rows[f"{model}: deep_lift, pooled"]
        found.append(
            ("A-FMI is less sensitive to the reference than pixel DeepLIFT (rank correlation between references, DeepLIFT pooled to "
             "the same grid)", f"`{model}`", verdict(ours, other, True), link)
        )  # fmt: skip
    _, rows, link = load("shap")
    for block in ("tiny_vgg", "tiny_vgg, features.14"):
        layer = "last layer" if block == "tiny_vgg" else "`features.14`"
        for rival in ("ablation drop", "gradient x activation", "xgrad_cam", "grad_cam"):
            said = verdict(rows[f"{block}: lift_cam"], rows[f"{block}: {rival}"], True)
            found.append((f"LIFT-CAM is closer to SHAP values than {rival}", f"`tiny_vgg`, {layer}", said, link))
        said = verdict(rows[f"{block}: lift_cam, RevealCancel"], rows[f"{block}: ablation drop"], True)
        found.append(
            (
                "LIFT-CAM by RevealCancel, not as published, is closer to SHAP values than ablation drop",
                f"`tiny_vgg`, {layer}",
                said,
                link,
            )
        )
    _, rows, link = load("equilibrium")
    for model in MODELS:
        ours, other = rows[f"{model}: attribution_equilibrium"], rows[f"{model}: grad_cam"]
        found.append(
            ("Attribution Equilibrium points better than Grad-CAM", f"`{model}`", verdict(ours, other, True), link)
        )
        said = without_interval(ours["oirr"], other["oirr"], False)
        found.append(("and has a smaller outside-inside ratio (medians)", f"`{model}`", said, link))
    _, rows, link = load("sfam")
    ours, other = rows["sfam, cosine"], rows["grad_cam"]
    found.append(("SFAM localises what two images share better than Grad-CAM of the similarity", "`tiny_embed`, pointing",
                  verdict(ours, other, True), link))  # fmt: skip
    energy = without_interval(ours["energy"], other["energy"], True)
    found.append(("and holds more of its map's energy there", "`tiny_embed`", energy, link))
    deletion = [{"mean": row["deletion"], "standard_error": row["deletion_error"]} for row in (ours, other)]
    found.append(("SFAM orders channels better than Grad-CAM of the similarity", "`tiny_embed`, deletion of channels",
                  verdict(*deletion, False), link))  # fmt: skip
    _, rows, link = load("lfi_cam")
    for rival, label in (("abn", "an attention branch network's"), ("grad_cam", "Grad-CAM's")):
        said = verdict(rows["stability, lfi_cam"], rows[f"stability, {rival}"], True)
        found.append((f"LFI-CAM's maps are more stable between models than {label}", "ResNet-8, close-ups", said, link))
    return found


def of_table() -> list[Claim]:
    """Claims read off the table above."""
    if not measured():
        return []
    _, rows, link = load("faithfulness")
    found: list[Claim] = []

    def compare(claim: str, ours: str, other: str, metric: str, higher: bool) -> None:
        for model in MODELS:
            pair = [rows.get(f"{model}: {name}", {}).get("metrics", {}).get(metric) for name in (ours, other)]
            if all(each and each["n"] > 1 for each in pair):
                found.append((claim, f"`{model}`", verdict(pair[0], pair[1], higher), link))

    for metric, higher, label in (
        ("average_drop", False, "a smaller average drop"),
        ("increase_in_confidence", True, "more increases in confidence"),
        ("average_drop_in_deletion", True, "a larger drop in deletion"),
    ):
        compare(f"LIFT-CAM has {label} than Grad-CAM", "lift_cam", "grad_cam", metric, higher)
    compare("Score-CAM has a smaller average drop than Grad-CAM", "score_cam", "grad_cam", "average_drop", False)
    compare("Grad-CAM++ has a smaller average drop than Grad-CAM", "grad_cam_pp", "grad_cam", "average_drop", False)
    compare("A-FMI has a larger insertion area than Grad-CAM", "a_fmi", "grad_cam", "insertion_auc", True)
    compare("with Attribution Equilibrium's pixels first the target is recognised more often than with LRP's",
            "attribution_equilibrium", "lrp", "most_relevant_first", True)  # fmt: skip
    compare("guided backpropagation depends less on the weights than Grad-CAM does", "guided_backprop", "grad_cam",
            "randomised", True)  # fmt: skip
    return found
