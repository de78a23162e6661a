"""One planned run of a comparison: its name, its folder, and what has come of it.

``OUT/runs/NAME`` holds planned.json (what the run is), run/ (the ordinary run), output.txt and,
once it has ended, result.json. Whatever happens to one run happens in its own process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backbones.pattern import names_in
from recipes.lab.console import printable
from recipes.lab.evaluation.scores import spelled_today
from recipes.lab.files import read_json, refuse_links, write_json
from recipes.lab.imports import origins
from recipes.lab.training.held_out import IMAGES
from recipes.lab.training.settings import Settings

OK = "ok"
EARLIER = "earlier.json"  # a result that the run goes on from
EVALUATORS = ".evaluators"  # folder beside runs/, shared by all of them
# What earlier versions called the folders, files and columns of a comparison.
OLD_NAMES = {"runs": "cells", "planned.json": "cell.json", "runs.csv": "cells.csv", "run": "cell"}
# A setting that is added later is part of a run's name only where it is not at its default, so
# that the runs of an earlier version are found.
_FIRST_SETTINGS = (
    "accumulate", "adam_beta2", "attn", "attn_options", "batch_size", "checkpoint_every",
    "class_count", "class_seed", "compile", "data", "decay", "diagnose_every", "ema_decay",
    "ema_ramp", "gradient_checkpointing", "gradient_clip", "keep_every", "label_dropout",
    "learning_rate", "level", "patch_size", "precision", "preset", "protocol", "resolution",
    "sample_every", "seed", "sharded", "size", "skip_limit", "steps", "strict", "vae",
)  # fmt: skip
_DEFAULTS = dataclasses.asdict(Settings())
# What is only looked at on the way makes no other run.
_NOT_NAMED = ("held_out_every", "held_out_images")
SMALLCNN = ("smallcnn",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a comparison.

    Attributes:
        label: Name of the mechanism or of the variant of it.
        settings: Of the run.
        cfgs: Guidance scales to measure.
        samples: Images per scale; 0 measures only what training logs.
        sampling_steps: Model evaluations per image.
        imports: Files (absolute) or modules that register mechanisms of the user's own.
        vae: Folder or hub id of what decodes latents; None takes what these remember.
        real: Folder of real images to measure with; None takes the data's own.
        extractors: Names of what looks at the images, each of one trained run.
        extractor_weights: File of the one that needs weights; None looks where they belong.
        held_out: Images for the held-out loss after training; 0 is content with training's own.
    """

    label: str
    settings: Settings
    cfgs: tuple[float, ...]
    samples: int
    sampling_steps: int
    imports: tuple[str, ...] = ()
    vae: str | None = None
    real: str | None = None
    extractors: tuple[str, ...] = SMALLCNN
    extractor_weights: str | None = None
    held_out: int = IMAGES

    @property
    def name(self) -> str:
        """Name of the folder, which another setting would change."""
        settings = self.settings
        key = dataclasses.asdict(self)
        # Of VAEs only the one that made the latents is taken; extractors share a run.
        del key["vae"], key["extractors"], key["extractor_weights"], key["held_out"]
        if self.real is None:
            del key["real"]
        key["settings"] = {
            name: value
            for name, value in key["settings"].items()
            if name in _FIRST_SETTINGS or (value != _DEFAULTS.get(name) and name not in _NOT_NAMED)
        }
        # As it was called when it was a switch.
        compiled = settings.compile
        key["settings"]["compile"] = {"auto": False, "on": True}.get(compiled, compiled)
        # The same folder has the same name in every locale.
        data = os.fsencode(settings.data).decode("utf-8", "surrogateescape")
        key["settings"]["data"] = data
        # Where a file lies does not count, and what it holds counts for its own mechanisms.
        files = [source for source in self.imports if is_file(source)]
        key["imports"] = [source for source in self.imports if source not in files]
        names = names_in(settings.attn)
        if files and (own := origins(names)):
            hashes = {name: origin["sha256"] for name, origin in own.items()}
            key["code"] = hashes if len(names) > 1 else hashes[settings.attn]
        text = json.dumps(key, sort_keys=True, default=list)
        parts = [Path(data).name, settings.level, str(settings.resolution or "native")]
        if settings.protocol != "controlled":
            parts.append(settings.protocol)
        readable = re.sub(r"[^A-Za-z0-9]+", "-", "-".join([*parts, self.label])).strip("-")
        digest = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:8]
        return f"{readable[:150]}-seed-{settings.seed}-{digest}"

    def folder(self, out: Path) -> Path:
        """Where the run lives under ``out``; that of an earlier version where there is one."""
        return known_as(out, "runs", self.name)

    def prepare(self, out: Path) -> Path:
        """Makes the run's folder under ``out``.

        Raises:
            UserError: Something in it is a link, which would lead writing out of it.
            CannotWrite: The system refuses.
        """
        folder = self.folder(out)
        for name in ("planned.json", "result.json", EARLIER, "output.txt", "run"):
            refuse_links(out, folder / name)
        write_json(folder / "planned.json", dataclasses.asdict(self))
        return folder


def known_as(folder: Path, name: str, below: str = "") -> Path:
    """``folder / name / below``, or its path under the old name where only that exists."""
    new, old = folder / name / below, folder / OLD_NAMES[name] / below
    return old if old.exists() and not new.exists() else new


def is_file(source: str) -> bool:
    """Whether a value of ``--import`` is a file, not a module."""
    return source.endswith(".py") or os.sep in source


def read_result(folder: Path, name: str = "result.json") -> dict[str, Any] | None:
    """What a run has come to, or None where it has not ended or the file is damaged."""
    file = folder / name
    if not file.is_file():
        return None
    try:
        found = read_json(file, "result")
        if not _is_result(found):
            raise ValueError(f"result {str(file)!r} is damaged: it is not what a run leaves")
    except ValueError as error:
        print(f"{printable(str(error))}; the run counts as not done", file=sys.stderr)
        return None
    if metrics := found.get("metrics"):
        for values in (metrics["real_floor"], *metrics["results"].values()):
            values |= {spelled_today(label): values.pop(label) for label in [*values]}
    return found


def is_done(result: Mapping[str, Any] | None, extractors: Sequence[str]) -> bool:
    """Whether a result is that of a run that is done and was measured with all of these."""
    if result is None or result["state"] != OK:
        return False
    return set(extractors) <= {*result["metrics"].get("extractors", SMALLCNN)}


def set_aside(folder: Path) -> None:
    """Takes a result away before the run begins; seconds, and numbers once done, are kept."""
    found, earlier = read_result(folder), read_result(folder, EARLIER)
    if found is not None:
        if found["state"] != OK and earlier is not None and earlier["state"] == OK:
            found = earlier | {"wall_seconds": found.get("wall_seconds")}
        write_json(folder / EARLIER, found)
    (folder / "result.json").unlink(missing_ok=True)


def _is_result(found: Any) -> bool:
    match found:
        case {"error": error} if not isinstance(error, str | None):
            return False
        case {"wall_seconds": seconds} if not (seconds is None or _is_number(seconds)):
            return False
        case {
            "state": "ok",
            "cost": dict(cost),
            "metrics": {"results": dict(results), "real_floor": dict()} as metrics,
            "curve": list(curve),
        }:
            return (
                all(value is None or _is_number(value) for value in cost.values())
                and all(_is_scale(cfg) and isinstance(of, dict) for cfg, of in results.items())
                and all(
                    isinstance(point, list) and len(point) == 2 and all(map(_is_number, point))
                    for point in curve
                )
                and all(map(_is_point, found.get("held_out_curve", ())))
                and _is_number(metrics.get("resolution", 0))
                and isinstance(metrics.get("device"), str | None)
                and _are_texts(metrics.get("versions", {}), "torch", missing=None)
                and (
                    metrics.get("evaluator") is None
                    or _are_texts(metrics["evaluator"], "name", "sha256", missing=0)
                )
            )
        case {"state": str(state)}:
            return state != OK and "metrics" not in found
    return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_point(value: Any) -> bool:
    return isinstance(value, dict) and "step" in value and all(map(_is_number, value.values()))


def _is_scale(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _are_texts(group: Any, *names: str, missing: int | None) -> bool:
    kinds = str | None if missing is None else str
    return isinstance(group, dict) and all(isinstance(group.get(n, missing), kinds) for n in names)
