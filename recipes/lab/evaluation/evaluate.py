"""One evaluation of a run: what is measured with what, checked first, then done and written."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator

from recipes.lab.console import UserError, warn
from recipes.lab.data.datasets import ImageDataset, entry_of
from recipes.lab.data.latents import is_latent_folder
from recipes.lab.distributed import make_accelerator, of_all, on_main
from recipes.lab.evaluation.archives import load_npz, save_npz
from recipes.lab.evaluation.features import Extractor, Features, SmallCNN, smallcnn_of
from recipes.lab.evaluation.measure import Measure
from recipes.lab.evaluation.real import RealImages, fresh_images, real_images
from recipes.lab.evaluation.reference import Reference
from recipes.lab.evaluation.scores import (
    FEWEST,
    KID_SUBSET_SIZE,
    KID_SUBSETS,
    NEIGHBORS,
    label_of,
)
from recipes.lab.evaluation.shards import Images, Plan, generate, read_shards
from recipes.lab.files import read_json, refuse_links, require_writable, write_json
from recipes.lab.provenance import code_digest, provenance
from recipes.lab.sampling import RunSampler, read_checkpoint
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.held_out import IMAGES as HELD_OUT_IMAGES
from recipes.lab.training.held_out import (
    NAMES,
    TIMES,
    held_out_losses,
    held_out_numbers,
    images_needed,
    missing_classes,
    open_held_out,
    paired_by_image,
)
from recipes.lab.training.settings import resumed_settings

WEIGHTED = ("efficientnet-lite0", "inception")  # extractors that come with weights of their own


def evaluate(
    run: Run,
    *,
    cfgs: Sequence[float] = (1.0,),
    plan: Plan | None = None,
    extractor: str | Extractor = "smallcnn",
    weights_file: Path | None = None,
    reference: Path | None = None,
    real: Path | str | None = None,
    images: Path | None = None,
    npz: Path | None = None,
    cache: Path | None = None,
    vae: str | None = None,
    held_out: int = HELD_OUT_IMAGES,
    imports: Sequence[str] = (),
    device: str | None = None,
    cuda_graph: str = "auto",
    compile: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Generates images of a run, measures them, and writes metrics.json into the run.

    The run's weights are read once, so that all scales are of one checkpoint, whatever a training
    that goes on beside does. Everything is checked before anything is sampled or overwritten.

    Args:
        run: A trained run.
        cfgs: Guidance scales, each measured apart.
        plan: What to generate; its own scale is not used.
        extractor: "smallcnn", "efficientnet-lite0", "inception", or an object like
            ``features.Extractor``.
        weights_file: Of Inception, or of EfficientNet-Lite0.
        reference: ADM-style file to compare with; None takes the test images.
        real: Folder of real images; None takes those that the run remembers.
        images: ADM-style file to measure instead of the run's images.
        npz: Folder to write the images to.
        cache: Folder of trained evaluators.
        vae: Folder or hub id of the VAE that decodes; None takes the one the run remembers.
        held_out: Images for the held-out loss; 0 leaves it out.
        imports: What the caller has imported already.
        device: Where images are generated; None takes the process' own.
        cuda_graph: See ``RunSampler``.
        compile: See ``RunSampler``.
        progress: Whether to show bars, and say why steps are launched eagerly.

    Returns:
        What was measured; empty on every process but the first. metrics.json holds it beside
        the scales of earlier calls that differ in nothing else.

    Raises:
        UserError: An argument does not fit, or the evaluator is too weak on real images and
            there is no exact classifier either.
        CannotWrite: The system refuses to write.
    """
    plan = plan or Plan()
    config = run.config()
    class_names = config["data"]["class_names"]
    cache = cache or default_cache(run)
    accelerator = make_accelerator(is_patient=True)
    names: dict[str, float] = {}
    draw = given = None
    if images is None:
        names = _names_of_scales(cfgs)
        _check_plan(plan)
        checkpoint = on_main(accelerator, lambda: read_checkpoint(run, plan.weights))
        draw = RunSampler(
            run,
            plan.weights,
            device or accelerator.device,
            vae=vae,
            imports=imports,
            checkpoint=checkpoint,
            cuda_graph=cuda_graph,
            compile=compile,
            calls=len(names) * -(-plan.samples // plan.batch_size) * plan.steps,
            say=warn if progress and accelerator.is_main_process else None,
        )
        del checkpoint
        for cfg in names.values():
            draw.check(cfg=cfg, **plan.sampling())
    elif vae is not None or npz is not None:
        raise UserError("--images measures a file as it is: drop --vae and --npz")
    on_main(accelerator, lambda: _check_places(run, cache, npz, names))
    if images is not None:
        given = _given_images(images, len(class_names))
    source, reason = real_images(run, config, real)
    compared = Reference.of_file(reference) if reference else None
    if source is None and (compared is None or extractor == "smallcnn"):
        what = (
            "the small evaluator is trained on real images" if compared else "nothing to compare"
        )
        raise UserError(
            f"{reason}, and {what}: pass --real FOLDER with real images by class, or --reference "
            f"FILE.npz with --extractor inception"
        )
    shape = _shape(config, draw, given)
    train = test = None
    with accelerator.main_process_first():
        if source is not None:
            train, test = source.open()
            has = (test.resolution, test.resolution, test.channels)
            _check_size(has, shape, repr(source.data))
        see = _extractor(extractor, weights_file, source, train, test, cache, progress)
    if given is not None:
        _check_size(given.pixels.shape[1:], shape, str(images))
    if compared is not None and compared.pixels is not None:
        _check_size(compared.pixels.shape[1:], shape, compared.source)

    warnings = _weakness(see, source)
    if warnings:
        see = None
    if test is not None and compared is None and (missing := missing_classes(test, len(test))):
        warnings.append(
            f"{len(missing)} of {len(class_names)} classes ({', '.join(missing[:5])}) have no "
            f"real image to compare with: every distance counts the model's images of them as "
            f"errors; give more images"
        )
    ours = None if test is None else Reference.of_dataset(test, "test")
    compared = compared or ours
    assert compared is not None
    if see is not None and compared.moments:
        _check_width(see, compared, shape)
    shapes = None
    # The exact classifier knows the shapes, whoever else looks.
    if (
        source is not None
        and source.kind == "shapes"
        and ours is not None
        and ours.pixels is not None
    ):
        shapes = ours.pixels, source.level
    measure = Measure(see, compared, class_names, cache, shapes)

    # All processes take part in generating and in looking; the first one puts it together.
    results: dict[str, dict[str, Any]] = {}
    unmeasured: dict[str, dict[str, str]] = {}
    losses: dict[str, float] = {}
    held_out_facts: dict[str, Any] | None = None
    if draw is not None and held_out:
        try:
            losses, held_out_facts = _held_out(config, draw, held_out, accelerator)
        except UserError as error:  # what the images score does not depend on it
            unmeasured["model"] = {label_of(NAMES[0], plan.weights): str(error)}
    for name, cfg in names.items() or [("images", None)]:
        started = time.perf_counter()
        if given is not None:
            pictures, features = given, see(given.pixels) if see else None
        else:
            shown = dataclasses.replace(plan, cfg=cfg)
            pictures, features = _look(run, shown, draw, see, accelerator, progress)
        if not accelerator.is_main_process:
            continue
        numbers, found, unmeasured[name] = measure(pictures, features)
        results[name] = {**numbers, **losses}
        results[name]["seconds"] = round(time.perf_counter() - started, 3)
        warnings += [line for line in found if line not in warnings]
        if npz is not None:
            save_npz(npz / f"cfg-{name}.npz", pictures.pixels, labels=pictures.labels)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return {}
    real_floor: dict[str, Any] = {}
    described = None
    if source is not None and train is not None:
        fresh = Images.all_finite(*fresh_images(train, plan.samples))
        real_floor, _, unmeasured["real images"] = measure(
            fresh, see(fresh.pixels) if see else None, are_real=True
        )
        if isinstance(see, SmallCNN):
            # It may have been trained on these very images.
            real_floor[label_of("class_accuracy", see.name)] = see.accuracy
        described = {name: getattr(source, name) for name in ("data", "class_count", "class_seed")}
        described["sha256"] = train.identity()["sha256"]
    result = {
        "run": str(run.folder),
        **{name: config["settings"][name] for name in ("attn", "data", "level")},
        "resolution": shape[0],
        "results": results,
        "real_floor": real_floor,
        "not_measured": {name: reasons for name, reasons in unmeasured.items() if reasons},
        "held_out": held_out_facts,
        "warnings": warnings + _lines_of(unmeasured),
        "evaluator": _describe_extractor(see, source),
        "real": described,
        "reference": {
            "source": compared.source,
            "count": None if compared.pixels is None else len(compared.pixels),
            "sha256": compared.digest,
        },
        "sampling": _describe_sampling(config, plan, draw) if draw else {"images": str(images)},
        "processes": accelerator.num_processes,
        "device": str(accelerator.device.type),
        **provenance(),
    }
    write_json(run.metrics_file, _beside_earlier(run, result))
    return result


def _beside_earlier(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    """A result with the scales in metrics.json, or a warning that they are of something else."""
    try:
        earlier: Any = read_json(run.metrics_file)
        old, new = _facts(earlier), _facts(result)
        differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        both = [found["held_out"] for found in (earlier, result) if found["held_out"]]
        if len(both) == 2:
            names = ("weights", "images", "times", "sha256")
            differing += [f"held-out {n}" for n in names if both[0][n] != both[1][n]]
        if differing:
            warn(
                f"{run.metrics_file} held {', '.join(earlier['results'])} of another evaluation "
                f"({', '.join(differing)}), which this one replaces"
            )
            return result
        return {
            **result,
            "results": {**earlier["results"], **result["results"]},
            "not_measured": {
                **{name: why for name, why in earlier["not_measured"].items()
                   if name in earlier["results"]},
                **result["not_measured"],
            },
            "held_out": result["held_out"] or earlier["held_out"],
            "warnings": list(dict.fromkeys([*earlier["warnings"], *result["warnings"]])),
        }  # fmt: skip
    except (UserError, KeyError, TypeError, AttributeError):  # none, or not one of these
        return result


def _facts(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the numbers of an evaluation are of, beside the guidance scale."""
    names = ("resolution", "evaluator", "real", "reference", "device", "versions", "commit")
    return {**result["sampling"], **{name: result[name] for name in names}}


def _held_out(
    config: Mapping[str, Any], draw: RunSampler, images: int, accelerator: Accelerator
) -> tuple[dict[str, float], dict[str, Any]]:
    """The model's held-out loss by reported name, and what it is of."""
    settings, _ = resumed_settings(config["settings"], {})
    encoder = None if is_latent_folder(settings.data) else draw.vae
    dataset = open_held_out(settings, encoder)
    found = held_out_losses(
        draw.model, draw.diffusion, dataset, images, accelerator, device=draw.device
    )
    by_image = found.mean(dim=1)
    facts = {
        "weights": draw.checkpoint.weights,
        "images": len(found),
        "times": TIMES,
        "error": by_image.std().item() / len(found) ** 0.5,
        "sha256": dataset.identity()["sha256"],
        "by_image": [float(f"{loss:.7g}") for loss in by_image.tolist()],
    }
    names = held_out_numbers(found).items()
    return {label_of(name, draw.checkpoint.weights): loss for name, loss in names}, facts


def _names_of_scales(cfgs: Sequence[float]) -> dict[str, float]:
    """Each guidance scale under the name that its results get."""
    if not cfgs:
        raise UserError("give at least one guidance scale, such as --cfg 1.0,4.0")
    # Two that "g" would print alike are written out.
    return {f"{cfg:g}" if float(f"{cfg:g}") == cfg else repr(float(cfg)): cfg for cfg in cfgs}


def _check_plan(plan: Plan) -> None:
    if plan.samples < FEWEST:
        raise UserError(f"{plan.samples} images are too few to measure; take at least {FEWEST}")
    if plan.shard_size < 1:
        raise UserError(f"a shard must hold at least 1 image, got {plan.shard_size}")
    if not 0 <= plan.seed < 2**63:
        raise UserError(f"the seed must lie in 0 to 2**63 - 1, got {plan.seed}")


def _check_places(run: Run, cache: Path, npz: Path | None, names: Mapping[str, float]) -> None:
    places = [cache / "evaluator.safetensors", run.metrics_file, run.classifier_file]
    if names:
        places.append(refuse_links(run.folder, run.evaluation / "trial"))
    for place in places + [npz / f"cfg-{name}.npz" for name in names if npz is not None]:
        require_writable(place)


def _given_images(file: Path, num_classes: int) -> Images:
    pixels, labels = load_npz(file)
    if pixels is None or labels is None or len(pixels) != len(labels):
        raise UserError(f"{file} must hold images (arr_0) and as many labels (labels, arr_1)")
    if len(pixels) < FEWEST:
        raise UserError(
            f"{file} holds {len(pixels)} images, which are too few to measure; give at least "
            f"{FEWEST}"
        )
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise UserError(
            f"{file} holds the label {int(outside[0])}, and the run has the classes 0 to "
            f"{num_classes - 1}"
        )
    return Images.all_finite(pixels, labels)


def _shape(
    config: Mapping[str, Any], draw: RunSampler | None, given: Images | None
) -> tuple[int, int, int]:
    """(h, w, c) of the run's images; a VAE's channels go by the images that are given."""
    if draw is not None:
        channels, height, width = draw.image_shape
        return height, width, channels
    assert given is not None
    data, latent = config["data"], config["data"].get("latent")
    side = data["resolution"] * (latent["factor"] if latent else 1)
    return side, side, given.pixels.shape[-1] if latent else data["channels"]


def _check_size(has: Sequence[int], wanted: Sequence[int], source: str) -> None:
    if tuple(has) != tuple(wanted):
        text, other = ("x".join(map(str, shape)) for shape in (has, wanted))
        raise UserError(
            f"{source} holds images of {text}, but the run's are {other}; compare at one "
            f"resolution"
        )


def _check_width(see: Extractor, compared: Reference, shape: tuple[int, int, int]) -> None:
    found = see(torch.zeros(2, *shape, dtype=torch.uint8))
    for kind, moments in compared.moments.items():
        has, wanted = len(moments.mean), getattr(found, kind).shape[1]
        if has != wanted:
            raise UserError(
                f"{compared.source} holds statistics of {has} {kind} features, and {see.name} has "
                f"{wanted}: they are of another extractor"
            )


def _extractor(
    name: str | Extractor,
    weights_file: Path | None,
    source: RealImages | None,
    train: ImageDataset | None,
    test: ImageDataset | None,
    cache: Path,
    progress: bool,
) -> Extractor:
    if name not in WEIGHTED and weights_file is not None:
        raise UserError(
            "--extractor-weights is for --extractor inception or efficientnet-lite0; pass both or "
            "neither"
        )
    if not isinstance(name, str):
        return name
    if name in WEIGHTED:
        return load_extractor(name, weights_file)
    if name != "smallcnn":
        raise UserError(
            f"extractor {name!r} is unknown; there are smallcnn, efficientnet-lite0 and inception"
        )
    assert source is not None and train is not None and test is not None
    return smallcnn_of(train, test, source.kind, cache=cache, progress=progress)


def load_extractor(name: str, weights_file: Path | None) -> Extractor:
    """One of ``WEIGHTED`` with the weights of a local file.

    Raises:
        UserError: The file is missing, is another one, or does not fit.
    """
    if name == "inception":
        from recipes.lab.evaluation.inception import load_inception

        return load_inception(weights_file)
    from recipes.lab.evaluation.efficientnet import load_efficientnet

    return load_efficientnet(weights_file)


def _weakness(see: Extractor, source: RealImages | None) -> list[str]:
    """The warning that a classifier is too weak on real images to measure, or none.

    Raises:
        UserError: It is, and there is no exact classifier either.
    """
    if not isinstance(see, SmallCNN) or source is None:
        return []
    floor = entry_of(source.kind).accuracy_floor
    if see.accuracy >= floor:
        return []
    weak = (
        f"the evaluator recognizes only {see.accuracy:.1%} of real {source.kind} images, and "
        f"below {floor:.0%} it measures nothing; choose a higher resolution or another one"
    )
    if source.kind != "shapes":
        raise UserError(weak)
    return [f"{weak}; only the exact classifier's numbers are given"]


def _look(
    run: Run,
    plan: Plan,
    draw: RunSampler | None,
    extractor: Extractor | None,
    accelerator: Accelerator,
    progress: bool,
) -> tuple[Images, Features | None]:
    """The images, and their features in the images' order whichever process computed them."""
    rank, world = accelerator.process_index, accelerator.num_processes
    folder = generate(
        run, plan, rank=rank, world=world, draw=draw, progress=progress and rank == 0
    )  # fmt: skip
    accelerator.wait_for_everyone()
    shown = read_shards(folder, plan)
    if extractor is None:
        return shown, None

    def mine() -> list[tuple[int, Any]]:
        return [
            (number, tuple(extractor(shown.pixels[shard.start : shard.stop])))
            for number, shard in list(enumerate(plan.shards()))[rank::world]
        ]

    ordered = sorted(of_all(accelerator, mine), key=lambda pair: pair[0])
    return shown, Features.concatenate([Features(*parts) for _, parts in ordered])


def default_cache(run: Run) -> Path:
    """Where trained evaluators are cached: beside the run, for all runs of that folder."""
    return run.folder.resolve().parent / ".evaluators"


def _lines_of(unmeasured: Mapping[str, Mapping[str, str]]) -> list[str]:
    """One line for each reason, with the metrics and columns that it keeps empty."""
    lines = []
    for column, reasons in unmeasured.items():
        for reason in dict.fromkeys(reasons.values()):
            metrics = ", ".join(name for name, why in reasons.items() if why == reason)
            where = column if column in ("images", "model", "real images") else f"cfg {column}"
            lines.append(f"{where}: {metrics} not measured: {reason}")
    return lines


def _describe_extractor(
    extractor: Extractor | None, source: RealImages | None
) -> dict[str, Any] | None:
    if extractor is None:
        return None
    found = {
        "name": extractor.name,
        "sha256": extractor.digest,
        "kid": f"{KID_SUBSETS} subsets of up to {KID_SUBSET_SIZE}, cubic kernel, seed 0",
        "neighbors": f"precision and recall k={NEIGHBORS['precision']}, "
        f"density and coverage k={NEIGHBORS['coverage']}",
        "code_sha256": code_digest(),
    }
    if isinstance(extractor, SmallCNN) and source is not None:
        found |= {
            "accuracy_on_real": extractor.accuracy,
            "accuracy_floor": entry_of(source.kind).accuracy_floor,
            "features": "standardized by real training images",
        }
    return found


def _describe_sampling(config: Mapping[str, Any], plan: Plan, draw: RunSampler) -> dict[str, Any]:
    latent = config["data"].get("latent")
    return {
        **{name: getattr(plan, name) for name in ("samples", "steps", "seed", "weights")},
        "sampler": plan.sampler or draw.diffusion.default_sampler,
        "guided_channels": plan.cfg_channels or "all",
        "labels": f"{plan.labels}, shuffled",
        "precision": plan.precision,
        "weights_sha256": draw.checkpoint.digest,
        "trained_steps": draw.checkpoint.step,
        "vae_sha256": latent["sha256"] if latent else None,
    }


def classify(run: Run, *, samples: int = 100) -> dict[str, Any]:
    """How many of a run's images, without guidance, a classifier takes for their class.

    Returns:
        "accepted" of "samples", and "accuracy_on_real" of the classifier; also in classifier.json.
    """
    return verdict(run, evaluate(run, plan=Plan(samples=samples)))


def verdict(run: Run, result: Mapping[str, Any]) -> dict[str, Any]:
    """What the classifier found at an evaluation's first scale; also in classifier.json."""
    found = next(iter(result["results"].values()))
    accuracy = found.get("class_accuracy[smallcnn]")
    accepted = {
        "accepted": None if accuracy is None else round(accuracy * found["count"]),
        "samples": found["count"],
        "accuracy_on_real": (result["evaluator"] or {}).get("accuracy_on_real"),
    }
    write_json(run.classifier_file, accepted)
    return accepted


def table(result: Mapping[str, Any]) -> str:
    """The numbers as text: one row per metric, one column per guidance scale, and the floor."""
    columns = {
        name if name == "images" else f"cfg {name}": found
        for name, found in result["results"].items()
    }
    if result["real_floor"]:
        columns["real images"] = result["real_floor"]
    frame = pd.DataFrame(columns).drop(index=["not_finite_images"])
    lines = [frame.map(lambda v: "" if v is None or v != v else f"{v:.4g}").to_string()]
    if facts := result["held_out"]:
        lines.append(
            f"held-out loss: {facts['images']} images at {facts['times']} times; its own error "
            f"over them is {facts['error']:.2g}, and --against RUN compares image by image"
        )
    return "\n".join(lines)


def check_comparable(other: Run) -> None:
    """Refuses a run that an evaluation cannot be compared with, before it begins.

    Raises:
        UserError: It has not been evaluated, or without a held-out loss.
    """
    if not other.metrics_file.is_file():
        raise UserError(f"--against {other.folder} has not been evaluated yet: evaluate it first")
    metrics = read_json(other.metrics_file, "the metrics", f"evaluate {other.folder} again")
    if isinstance(metrics, dict) and not metrics.get("held_out"):
        raise UserError(
            f"--against {other.folder} has no held-out loss: evaluate it without --held-out 0, or "
            f"train it with --hold-out where its data has no test images"
        )


def compared_by_image(result: Mapping[str, Any], other: Run) -> str:
    """How the held-out loss of an evaluation differs from another run's, image by image.

    Args:
        result: Of ``evaluate``.
        other: A run that has been evaluated too.

    Raises:
        UserError: The other one is not evaluated, one of the two has no held-out loss, or they
            are of different images.
    """
    again = f"evaluate {other.folder} again"
    metrics, ours = read_json(other.metrics_file, "the metrics", again), result.get("held_out")
    try:
        theirs = metrics.get("held_out")
        if not ours or not theirs:
            raise UserError(f"this run or {other.folder} has no held-out loss to compare")
        is_other = any(ours[name] != theirs[name] for name in ("sha256", "images", "times"))
        losses = torch.tensor(theirs["by_image"], dtype=torch.float64)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"the metrics {str(other.metrics_file)!r} are damaged; {again}") from error
    if is_other:
        raise UserError(
            f"the held-out losses of this run and {other.folder} are of different images: "
            f"evaluate both on the same data, with the same --held-out"
        )
    first = torch.tensor(ours["by_image"], dtype=torch.float64)[:, None]
    second = losses[:, None]
    mean, error = paired_by_image(first, second)
    scale = 100 / second.mean().item()
    needed = images_needed(first, second)
    enough = f"{math.ceil(needed)} images" if math.isfinite(needed) else "no number of images"
    return (
        f"held-out loss against {other.folder}: {scale * mean:+.2g} % ± {scale * error:.1g} "
        f"(standard error over {len(first)} images, of one seed each); {enough} would make that "
        f"error a tenth of the difference"
    )
