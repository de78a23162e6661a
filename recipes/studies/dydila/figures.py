"""The paper's figures from runs of one's own.

cost        multiply-accumulates against resolution (Fig. 1a); needs no run
projectors  most used projector of every block and class (Fig. 5)
maps        attention of one query after each component of DyDiLA (Fig. 6)
factors     differential factors over depth (Fig. 7)
tsne        features of generated images, of random and of confusable classes (Fig. 11)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from attnzoo.contract import Attention
from attnzoo.counting import count_macs
from backbones import build_backbone
from recipes.lab.console import UserError
from recipes.lab.diffusion import to_uint8
from recipes.lab.drawing.canvas import (
    Figure,
    ListedColormap,
    Rectangle,
    panels,
    plain,
    sns,
)
from recipes.lab.drawing.drawn import Drawn, NotWithoutRun, hooked, wrapped
from recipes.lab.drawing.palette import color_of, marker_of
from recipes.lab.drawing.pictures import image_grid
from recipes.lab.evaluation.evaluate import default_cache
from recipes.lab.evaluation.features import smallcnn_of
from recipes.studies.comparison.summary import grouped_by

# Okabe and Ito's colors for classes, which have no color of their own.
_DISTINCT = ["#0072B2", "#E69F00", "#009E73", "#CC79A7"]


def cost_figure(runs: Sequence[Drawn]) -> Figure:
    """Fig. 1a: cost of one forward against resolution, size L, in latent space."""
    rows = []
    for model in ("DiT", "Sana", "DyDi-LiT"):
        for resolution in (256, 512, 1024, 2048):
            with torch.device("meta"):
                built = build_backbone(model, "L", "paper", resolution)
            gmacs = count_macs(built, resolution=resolution).total / 1e9
            rows.append({"model": model, "pixels": resolution, "GMACs": gmacs})
    frame = pd.DataFrame(rows)
    figure, axis = panels(1, 1, width=5.4, height=4)
    for model, group in frame.groupby("model", sort=False):
        axis[0, 0].plot(
            group.pixels, group.GMACs, label=model, color=color_of(str(model)),
            marker=marker_of(str(model)), lw=2, ms=7, alpha=0.9,
        )  # fmt: skip
        last = group.iloc[-1]
        axis[0, 0].annotate(
            f"{last.GMACs:,.0f}", (last.pixels, last.GMACs), (6, 0 if model != "Sana" else -12),
            textcoords="offset points", color=color_of(str(model)),
        )  # fmt: skip
    axis[0, 0].set(
        xscale="log", yscale="log", xlabel="image side in pixels",
        ylabel="billion multiply-accumulates", title="one forward, size L, patch 2, latents",
        xlim=(220, 3400),
    )  # fmt: skip
    axis[0, 0].set_xticks([256, 512, 1024, 2048], ["256", "512", "1024", "2048"])
    axis[0, 0].minorticks_off()
    axis[0, 0].legend(frameon=False)
    return figure


def projector_figure(runs: Sequence[Drawn]) -> Figure:
    """Fig. 5: the projector that most tokens choose, over all steps of sampling."""
    drawn = next((one for one in runs if one.blocks_with("projectors")), None)
    if drawn is None:
        raise NotWithoutRun("it needs a run of dydila")
    classes = min(10, len(drawn.class_names))
    blocks = drawn.blocks_with("projectors")
    layers = [drawn.layers[block] for block in blocks]
    experts = layers[0].config.n_projectors  # type: ignore[attr-defined]
    counts = torch.zeros(2, classes, len(layers), experts)

    def see(index: int, layer: Attention, x: Tensor, grid: tuple[int, int]) -> None:
        # Under guidance the second half of a batch is unconditional.
        routes = layer.routes(x[: len(x) // 2], grid)  # type: ignore[operator]
        for side, name in enumerate(("projector.query", "projector.key")):
            found = torch.bincount(routes[name].flatten(), minlength=experts)
            counts[side, current, index] += found

    with hooked(layers, see):
        for current in range(classes):
            drawn.draw(torch.full((4,), current), cfg=drawn.cfg)
    share = counts.amax(-1) / counts.sum(-1)
    choice = counts.argmax(-1)
    figure, axes = panels(1, 2, width=0.62 * classes + 1.4, height=0.5 * len(layers) + 2.2)
    for axis, name, numbers, shares in zip(
        axes.flat, ("query", "key"), choice, share, strict=True
    ):
        texts = np.array([f"{n + 1}\n{s:.0%}" for n, s in zip(numbers.T.flatten().tolist(),
                          shares.T.flatten().tolist(), strict=True)])  # fmt: skip
        sns.heatmap(
            numbers.T, annot=texts.reshape(len(layers), classes), fmt="", cbar=False, ax=axis,
            cmap=ListedColormap(sns.color_palette("colorblind", experts)), vmin=-0.5,
            vmax=experts - 0.5, linewidths=1, annot_kws={"size": 10},
            xticklabels=[plain(name) for name in drawn.class_names[:classes]],
            yticklabels=[str(block + 1) for block in blocks],
        )  # fmt: skip
        axis.set(title=f"{name}: most used projector, its share", ylabel="block")
        axis.tick_params(axis="y", rotation=0)
        axis.tick_params(axis="x", rotation=0 if len(drawn.class_names[0]) < 3 else 60)
    return figure


def map_figure(runs: Sequence[Drawn]) -> Figure:
    """Fig. 6: where one query looks, in runs without and with the components of DyDiLA.

    Every given run shows its own map, a mixture that of each mechanism, from the block nearest to
    the middle; DyDiLA's is shown after each of its components too, with the others taken out of
    the very same weights.
    """
    if not runs:
        raise NotWithoutRun("it needs a run")
    shown: list[tuple[str, np.ndarray, int]] = []
    for drawn in runs:
        images, noisy, labels = drawn.noisy_images(1)
        inputs = drawn.inputs_of_layers(noisy, labels)
        # The token that lies on the lightest part of the image.
        light = torch.nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), inputs[0][1])
        query = int(light[0, 0].flatten().argmax())
        for index in drawn.middle_blocks:
            layer, (x, grid) = drawn.layers[index], inputs[index]
            label = drawn.label
            if len(drawn.middle_blocks) > 1:
                label = f"{label}, block {index + 1}: {layer.name}"
            if type(layer).attention_map is Attention.attention_map:
                print(f"maps: {label} is left out, it has no attention map")
                continue
            for stage, config in stages(layer):
                weights = map_with(layer, config, x, grid)[0].mean(0)[query]
                name = f"{label}\n{stage}" if stage else label
                shown.append((name, weights.reshape(grid).numpy(), query))
    if not shown:
        raise NotWithoutRun("it needs a run whose mechanism has an attention map")
    figure, axes = panels(1, len(shown) + 1, width=2.9, height=3.0)
    images, _, _ = runs[0].noisy_images(1)
    axes[0, 0].imshow(image_grid(images, columns=1, gap=0))
    axes[0, 0].set(title="image (before noise)")
    for axis, (name, weights, query) in zip(axes.flat[1:], shown, strict=True):
        # Subtracting maps makes weights negative: each panel has its own span.
        sns.heatmap(weights, ax=axis, cmap="cividis", square=True, cbar_kws={"shrink": 0.6})
        row, column = divmod(query, weights.shape[1])
        axis.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor="#D55E00", lw=2.5))
        axis.set_title(wrapped(name), fontsize=9)
    for axis in axes.flat[: len(shown) + 1]:
        axis.set_axis_off()
    return figure


def stages(layer: Attention) -> list[tuple[str, Any]]:
    """(name, configuration) of DyDiLA with more and more of its components."""
    config: Any = layer.config
    if not hasattr(config, "differential"):
        return [("", config)]
    alone = dataclasses.replace(config, differential="none")
    found = []
    if config.kernel != "relu":
        found.append(("Q, K with ReLU alone", dataclasses.replace(alone, kernel="relu")))
    if config.differential != "none":
        return [*found, ("+ measure kernel", alone), ("+ difference from projections", config)]
    return [*found, ("+ measure kernel" if found else "", config)]


@torch.no_grad()
def map_with(layer: Attention, config: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The attention map (b, heads, n, n) of the same weights under another configuration."""
    own, layer.config = layer.config, config
    try:
        return layer.attention_map(x, grid)
    finally:
        layer.config = own


def factor_figure(runs: Sequence[Drawn]) -> Figure:
    """Fig. 7: the mean factor that tokens choose, block by block."""
    rows = []
    for drawn in runs:
        blocks = drawn.blocks_with("lambda_")
        if not blocks:
            continue
        _, noisy, labels = drawn.noisy_images(16)
        inputs = drawn.inputs_of_layers(noisy, labels)
        for index in blocks:
            layer, (x, grid) = drawn.layers[index], inputs[index]
            for name, route in layer.routes(x, grid).items():  # type: ignore[operator]
                kind, _, side = name.partition(".")
                if kind == "differential":
                    factors = layer.lambda_[-1 if side == "key" else 0].detach()  # type: ignore
                    mean = factors[route].mean().item()
                    rows.append({"run": drawn, "side": side, "block": index + 1, "factor": mean})
    if not rows:
        raise NotWithoutRun("it needs a run of dydila or dydila-map")
    frame = pd.DataFrame(rows)
    figure, axes = panels(1, 1, width=6, height=4)
    for (drawn, side), group in grouped_by(frame, ["run", "side"]):
        style = {"query": "-", "key": "--", "map": "-"}[str(side)]
        axes[0, 0].plot(
            group.block, group.factor, ls=style, color=drawn.color, marker=marker_of(drawn.attn),
            label=wrapped(f"{drawn.label}: {side}", 34),
        )  # fmt: skip
    axes[0, 0].set(xlabel="block", ylabel="mean differential factor")
    axes[0, 0].set_xticks(sorted(frame.block.unique()))
    axes[0, 0].legend(frameon=False, fontsize=9)
    return figure


def tsne_figure(runs: Sequence[Drawn]) -> Figure:
    """Fig. 11: features of generated images; a row of random and a row of confusable classes."""
    from sklearn.manifold import TSNE

    if not runs:
        raise NotWithoutRun("it needs a run")
    first = runs[0]
    if len(first.class_names) < 2 or 2 * first.per_class < 4:
        raise NotWithoutRun("it needs two classes and two images of each")
    real, train, test = first.real
    see = smallcnn_of(train, test, real.kind, cache=default_cache(first.run))
    order = torch.randperm(len(first.class_names), generator=torch.Generator().manual_seed(0))
    groups = {
        "random": sorted(order[:4].tolist()),
        "confusable": confusable_classes(first, see),
    }
    figure, axes = panels(2, len(runs), width=4, height=3.7)
    for column, drawn in enumerate(runs):
        if drawn.class_names != first.class_names:
            raise UserError(f"{drawn.run.folder} and {first.run.folder} are of different data")
        for row, (kind, classes) in enumerate(groups.items()):
            labels = torch.tensor(classes).repeat_interleave(drawn.per_class)
            features = see(to_uint8(drawn.draw(labels, cfg=drawn.cfg))).pool.numpy()
            places = TSNE(
                random_state=0, init="pca", perplexity=min(30, (len(labels) - 1) / 3)
            ).fit_transform(features)
            axis = axes[row, column]
            for index, label in enumerate(classes):
                chosen = labels.numpy() == label
                axis.scatter(
                    *places[chosen].T, s=16, color=_DISTINCT[index], marker="osD^"[index % 4],
                    label=plain(first.class_names[label]), alpha=0.8, linewidths=0,
                )  # fmt: skip
            axis.set_title(wrapped(f"{drawn.label}: {kind} classes", 38))
            axis.set(xticks=[], yticks=[])
            axis.legend(fontsize=9, markerscale=1.2)
    return figure


def confusable_classes(drawn: Drawn, see: Any, size: int = 4) -> list[int]:
    """The classes that the evaluator mixes up most on real images, added one by one."""
    _, _, test = drawn.real
    images, labels = test.batch(torch.arange(min(len(test), 1000)))
    probability = see(to_uint8(images)).logits.softmax(1)
    count = len(drawn.class_names)
    # Of a small folder the held-out images may lack a class.
    mixed = torch.stack([probability[labels == c].mean(0).nan_to_num() for c in range(count)])
    mixed = (mixed + mixed.T).fill_diagonal_(0)
    chosen = list(divmod(int(mixed.argmax()), count))
    while len(chosen) < min(size, count):
        towards = mixed[chosen].sum(0)
        towards[chosen] = -1
        chosen.append(int(towards.argmax()))
    return sorted(chosen)


FIGURES: dict[str, Callable[[Sequence[Drawn]], Figure]] = {
    "cost": cost_figure,
    "projectors": projector_figure,
    "maps": map_figure,
    "factors": factor_figure,
    "tsne": tsne_figure,
}
