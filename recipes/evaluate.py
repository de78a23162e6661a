"""Asks a classifier trained on real images whether a run's samples show their class.

    python recipes/evaluate.py runs/digits-sana --samples 100

The classifier (a support vector machine on pixels, from scikit-learn) never sees a generated
image; its accuracy on real images that it has not seen either is reported beside the result.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch

import attnzoo
from recipes.checkpoint import Run
from recipes.console import UserError, run_script, whole
from recipes.data import ImageDataset, load_dataset
from recipes.diffusion import to_uint8
from recipes.sample import sample_run

ACCURACY_FLOOR = 0.95
_MOST_TRAINING_IMAGES = 4000


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python recipes/evaluate.py",
        description="Ask a classifier trained on real images whether samples show their class.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    parser.add_argument("--samples", type=whole(1), default=100, help="images to judge")
    parser.add_argument("--cfg", type=float, default=1.0, help="guidance scale; 1 is without")
    parser.add_argument("--steps", type=whole(1), default=20, help="model evaluations")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the start noise")
    given = parser.parse_args(arguments)
    result = judge(
        Run.open(given.run),
        samples=given.samples,
        cfg=given.cfg,
        steps=given.steps,
        seed=given.seed,
    )
    print(json.dumps(result, indent=2))
    return 0


def judge(
    run: Run, *, samples: int = 100, cfg: float = 1.0, steps: int = 20, seed: int = 0
) -> dict[str, Any]:
    """Samples classes in turn and counts how many the classifier recognises.

    Returns:
        "accepted" of "samples", the classifier's accuracy on held-out real images, and what else
        is needed to repeat it; also written to the run's judge.json.

    Raises:
        UserError: The classifier is too weak on real images to judge generated ones.
    """
    settings = run.config()["settings"]
    source = {
        "resolution": run.config()["data"]["resolution"],
        "level": settings["level"],
        "seed": settings["seed"],
    }
    train = load_dataset(settings["data"], split="train", **source)
    test = load_dataset(settings["data"], split="test", **source)
    classifier, accuracy = _fit(train, test)
    if accuracy < ACCURACY_FLOOR:
        raise UserError(
            f"the classifier recognises only {accuracy:.1%} of real {settings['data']} images; "
            f"below {ACCURACY_FLOOR:.0%} it judges nothing"
        )
    labels = torch.arange(samples) % train.num_classes
    images = sample_run(run, labels=labels, cfg=cfg, steps=steps, seed=seed)
    accepted = int((classifier.predict(_pixels(images)) == labels.numpy()).sum())
    found = run.newest_checkpoint(warn=print)
    result = {
        "accepted": accepted,
        "samples": samples,
        "classifier": "sklearn SVC(rbf) on pixels",
        "classifier_accuracy_on_real": accuracy,
        "attn": settings["attn"],
        "data": settings["data"],
        "trained_steps": found[0] if found else None,
        "cfg": cfg,
        "sampling_steps": steps,
        "seed": seed,
        "versions": {"attnzoo": attnzoo.__version__, "torch": torch.__version__},
    }
    (run.folder / "judge.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def _fit(train: ImageDataset, test: ImageDataset) -> tuple[Any, float]:
    from sklearn.svm import SVC

    count = _MOST_TRAINING_IMAGES if train.infinite else min(len(train), _MOST_TRAINING_IMAGES)
    order = torch.arange(count)
    if not train.infinite:
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(train), generator=generator)[:count]
    images, labels = train.batch(order)
    classifier = SVC(C=10.0).fit(_pixels(images), labels.numpy())
    images, labels = test.batch(torch.arange(min(len(test), 1000)))
    return classifier, float((classifier.predict(_pixels(images)) == labels.numpy()).mean())


def _pixels(images: torch.Tensor) -> np.ndarray:
    # Real and generated images are quantised alike, so that 8 bits never tell them apart.
    return to_uint8(images).flatten(1).numpy().astype(np.float32) / 255


if __name__ == "__main__":
    run_script(main)
