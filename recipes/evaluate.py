"""Measures the images of a run: FID, sFID, KID, sKID, IS, precision, recall and more.

    python recipes/evaluate.py runs/digits-sana --cfg 1.0,4.0 --samples 1000

The numbers go into the run's metrics.json with all that is needed to trust and repeat them. The
images are kept in shards: an interrupted evaluation goes on with the missing ones. On several
processes, ``torchrun --standalone --nproc_per_node 2 recipes/evaluate.py ...`` gives the same
numbers to the last digit.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from recipes.lab.console import UserError, numbers, run_script, user_errors, whole
from recipes.lab.data.datasets import ImageDataset
from recipes.lab.diffusion import SAMPLERS
from recipes.lab.evaluation.features import (
    Extractor,
    Features,
    SmallCNN,
    accuracy_floor,
    fresh_images,
    real_sets,
    require_accuracy,
    smallcnn,
)
from recipes.lab.evaluation.measure import Measure
from recipes.lab.evaluation.reference import KID_SUBSET_SIZE, KID_SUBSETS, NEIGHBOURS, Reference
from recipes.lab.evaluation.scores import (
    FEWEST,
    label_of,
)
from recipes.lab.evaluation.shards import (
    Images,
    Plan,
    checkpoint_digest,
    generate,
    load_npz,
    read_shards,
    save_npz,
)
from recipes.lab.files import write_json
from recipes.lab.provenance import code_digest, provenance
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.distributed import make_accelerator
from recipes.sample import RunSampler


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    given = _parser().parse_args(arguments)
    run = Run.open(given.run)
    result = evaluate(
        run,
        cfgs=given.cfg,
        plan=Plan(
            samples=given.samples,
            cfg_channels=given.cfg_channels,
            steps=given.steps,
            sampler=given.sampler,
            seed=given.seed,
            weights=given.weights,
            labels=given.labels,
            shard_size=given.shard_size,
            batch_size=given.batch_size,
        ),
        extractor=given.extractor,
        weights_file=given.inception_weights,
        reference=given.reference,
        images=given.images,
        npz=given.npz,
        cache=given.cache,
        progress=True,
    )
    if result:  # empty on every process but the first
        print(table(result))
        for line in result["warnings"]:
            print(f"warning: {line}", file=sys.stderr)
        _verdict(run, result)
        print(f"all of it: {run.folder / 'metrics.json'}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(0.2)  # gloo's threads may abort the process if it exits at once
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python recipes/evaluate.py", description="Measure the images of a run."
    )
    flag = parser.add_argument
    flag("run", metavar="RUN", help="folder of the run")
    flag("--cfg", type=numbers(float), default=[1.0], help="guidance scales, such as 1.0,4.0")
    flag("--samples", type=whole(FEWEST), default=1000, help="images per guidance scale")
    flag("--steps", type=whole(1), default=20, help="model evaluations per image")
    flag("--sampler", choices=SAMPLERS, help="default: dpm++, or euler-flow")
    flag("--cfg-channels", type=whole(1), help="guide only the first channels, as DiT does (3)")
    flag("--seed", type=whole(0), default=0, help="of noise and labels")
    flag("--weights", choices=["ema", "model"], default="ema")
    flag("--labels", choices=["balanced", "random"], default="balanced", help="classes to ask for")
    flag("--shard-size", type=whole(1), default=250, help="images per resumable shard")
    flag("--batch-size", type=whole(1), default=64, help="images per model call")
    flag("--extractor", choices=["smallcnn", "inception"], default="smallcnn")
    flag("--inception-weights", type=Path, help="local file; nothing is ever downloaded")
    flag("--reference", type=Path, help="ADM-style .npz instead of the test images")
    flag("--images", type=Path, help="measure the images of this .npz instead of generating")
    flag("--npz", type=Path, help="folder for the images as ADM-style .npz, one per scale")
    flag("--cache", type=Path, help="trained evaluators (default: .evaluators beside the run)")
    return parser


def evaluate(
    run: Run,
    *,
    cfgs: Sequence[float] = (1.0,),
    plan: Plan | None = None,
    extractor: str | Extractor = "smallcnn",
    weights_file: Path | None = None,
    reference: Path | None = None,
    images: Path | None = None,
    npz: Path | None = None,
    cache: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Generates images of a run, measures them, and writes metrics.json into the run.

    Args:
        run: A trained run.
        cfgs: Guidance scales, each measured apart.
        plan: What to generate; its own scale is not used.
        extractor: "smallcnn", "inception", or an object like ``features.Extractor``.
        weights_file: Of Inception.
        reference: ADM-style file to compare with; None takes the test images.
        images: ADM-style file to measure instead of the run's images.
        npz: Folder to write the images to.
        cache: Folder of trained evaluators.
        progress: Whether to show bars.

    Returns:
        What metrics.json holds; empty on every process but the first.

    Raises:
        UserError: An argument does not fit, or the evaluator is too weak on real images and
            there is no exact judge either.
    """
    accelerator = make_accelerator()
    plan = plan or Plan()
    settings, data = run.config()["settings"], run.config()["data"]
    names = list(data["class_names"])
    with accelerator.main_process_first():
        with user_errors():
            train, test = real_sets(
                settings["data"], resolution=data["resolution"], level=settings["level"]
            )
        judge_level = settings["level"] if settings["data"] == "shapes" else None
        see, kept_in = extractor, cache or default_cache(run)
        if isinstance(extractor, str):
            see = _built_in(extractor, settings, data, kept_in, weights_file, progress)
    warnings: list[str] = []
    if isinstance(see, SmallCNN):
        try:
            require_accuracy(see, settings["data"])
        except UserError as error:
            if judge_level is None:
                raise
            warnings.append(f"{error}; only the exact judge's numbers are given")
            see = None
    real = Reference.of_dataset(test, "test")
    compared = Reference.of_file(reference) if reference else real
    _check_size(compared.pixels, test, str(reference))
    judged = None if judge_level is None else (real.pixels, judge_level)
    measure = Measure(see, compared, names, kept_in, judged)

    # All processes take part in generating and in looking; the first one puts it together.
    results: dict[str, dict[str, Any]] = {}
    for cfg in cfgs if images is None else [None]:
        started = time.perf_counter()
        shown = plan if cfg is None else dataclasses.replace(plan, cfg=cfg)
        pictures, features = _look(run, shown, images, test, see, accelerator, progress)
        if not accelerator.is_main_process:
            continue
        name = "images" if cfg is None else f"{cfg:g}"
        results[name], found = measure(pictures, features)
        results[name]["seconds"] = round(time.perf_counter() - started, 3)
        warnings += [line for line in found if line not in warnings]
        if npz is not None:
            save_npz(npz / f"cfg-{name}.npz", pictures.pixels, labels=pictures.labels)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return {}
    pixels, labels = fresh_images(train, plan.samples)
    finite = torch.ones(len(labels), dtype=torch.bool)
    fresh = Images(pixels, labels, finite)
    floor, _ = measure(fresh, see(pixels) if see else None, are_real=True)
    if isinstance(see, SmallCNN):
        # It may have been trained on these very images.
        floor[label_of("class_accuracy", see.name)] = see.accuracy
    result = {
        "run": str(run.folder),
        "attn": settings["attn"],
        "data": settings["data"],
        "level": settings["level"],
        "resolution": data["resolution"],
        "results": results,
        "real_floor": floor,
        "warnings": warnings,
        "evaluator": _describe_extractor(see, settings["data"]),
        "reference": {
            "source": compared.source,
            "count": None if compared.pixels is None else len(compared.pixels),
            "sha256": compared.digest,
        },
        "sampling": _describe_sampling(run, plan, images),
        "processes": accelerator.num_processes,
        "device": str(accelerator.device.type),
        **provenance(),
    }
    write_json(run.folder / "metrics.json", result)
    return result


def _look(
    run: Run,
    plan: Plan,
    images: Path | None,
    test: ImageDataset,
    extractor: Extractor | None,
    accelerator: Accelerator,
    progress: bool,
) -> tuple[Images, Features | None]:
    """The images, and their features in the images' order whichever process computed them."""
    rank, world = accelerator.process_index, accelerator.num_processes
    if images is not None:
        pixels, labels = load_npz(images)
        if pixels is None or labels is None or len(pixels) != len(labels):
            raise UserError(
                f"{images} must hold images (arr_0) and as many labels (labels, arr_1)"
            )
        _check_size(pixels, test, str(images))
        shown = Images(pixels, labels, torch.ones(len(pixels), dtype=torch.bool))
        return shown, extractor(pixels) if extractor else None
    folder = generate(
        run,
        plan,
        rank=rank,
        world=world,
        device=accelerator.device,
        progress=progress and accelerator.is_main_process,
    )
    accelerator.wait_for_everyone()
    shown = read_shards(folder, plan)
    if extractor is None:
        return shown, None
    mine = [
        (number, tuple(extractor(shown.pixels[shard.start : shard.stop])))
        for number, shard in list(enumerate(plan.shards()))[rank::world]
    ]
    gathered = mine if world == 1 else gather_object(mine)
    ordered = sorted(gathered, key=lambda pair: pair[0])
    return shown, Features.concatenate([Features(*parts) for _, parts in ordered])


def _built_in(
    name: str,
    settings: dict[str, Any],
    data: dict[str, Any],
    cache: Path,
    weights_file: Path | None,
    progress: bool,
) -> Extractor:
    if name == "inception":
        from recipes.lab.evaluation.inception import load_inception

        return load_inception(weights_file)
    return smallcnn(
        settings["data"],
        resolution=data["resolution"],
        level=settings["level"],
        cache=cache,
        progress=progress,
    )


def default_cache(run: Run) -> Path:
    """Where trained evaluators are kept: beside the run, for all runs of that folder."""
    return run.folder.resolve().parent / ".evaluators"


def _check_size(pixels: Tensor | None, test: ImageDataset, source: str) -> None:
    if pixels is None:
        return
    wanted = (test.resolution, test.resolution, test.channels)
    if tuple(pixels.shape[1:]) != wanted:
        raise UserError(
            f"{source} holds images of {'x'.join(map(str, pixels.shape[1:]))}, but the run's are "
            f"{'x'.join(map(str, wanted))}; compare at one resolution"
        )


def _describe_extractor(extractor: Extractor | None, data: str) -> dict[str, Any] | None:
    if extractor is None:
        return None
    found = {
        "name": extractor.name,
        "sha256": extractor.digest,
        "kid": f"{KID_SUBSETS} subsets of up to {KID_SUBSET_SIZE}, cubic kernel, seed 0",
        "neighbours": f"precision and recall k={NEIGHBOURS['precision']}, "
        f"density and coverage k={NEIGHBOURS['coverage']}",
        "code_sha256": code_digest(),
    }
    if isinstance(extractor, SmallCNN):
        found |= {
            "accuracy_on_real": extractor.accuracy,
            "accuracy_floor": accuracy_floor(data),
            "features": "standardised by real training images",
        }
    return found


def _describe_sampling(run: Run, plan: Plan, images: Path | None) -> dict[str, Any]:
    if images is not None:
        return {"images": str(images)}
    step, digest = checkpoint_digest(run, plan.weights)
    return {
        "samples": plan.samples,
        "steps": plan.steps,
        "sampler": plan.sampler or RunSampler(run, plan.weights, "cpu").default_sampler,
        "guided_channels": plan.cfg_channels or "all",
        "seed": plan.seed,
        "labels": f"{plan.labels}, shuffled",
        "weights": plan.weights,
        "weights_sha256": digest,
        "trained_steps": step,
    }


def judge(run: Run, *, samples: int = 100) -> dict[str, Any]:
    """How many of a run's images, without guidance, a classifier takes for their class.

    Returns:
        "accepted" of "samples", and "accuracy_on_real" of the classifier; also in judge.json.
    """
    return _verdict(run, evaluate(run, plan=Plan(samples=samples)))


def _verdict(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    found = next(iter(result["results"].values()))
    accuracy = found.get("class_accuracy[smallcnn]")
    verdict = {
        "accepted": None if accuracy is None else round(accuracy * found["count"]),
        "samples": found["count"],
        "accuracy_on_real": (result["evaluator"] or {}).get("accuracy_on_real"),
    }
    write_json(run.folder / "judge.json", verdict)
    return verdict


def table(result: dict[str, Any]) -> str:
    """The numbers as text: one row per metric, one column per guidance scale, and the floor."""
    columns = {
        name if name == "images" else f"cfg {name}": found
        for name, found in result["results"].items()
    }
    columns["real images"] = result["real_floor"]
    frame = pd.DataFrame(columns).drop(index=["not_finite_images"])
    return frame.map(lambda v: "" if v is None or v != v else f"{v:.4g}").to_string()


if __name__ == "__main__":
    run_script(main)
