"""Reads what the benchmark and the recipes leave behind: plain JSON, here as pandas tables.

python examples/read_results.py                      # the committed benchmark of a GPU
python examples/read_results.py --run runs/digits-sana
python examples/read_results.py --benchmark out.json # of pytest bench/ --benchmark-json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd

PUBLISHED = Path(__file__).parents[1] / "docs" / "plots" / "gpu.json"


def milliseconds(file: Path) -> pd.DataFrame:
    """Milliseconds of one forward of the widest layers, by mechanism and resolution."""
    report = json.loads(file.read_text(encoding="utf-8"))
    rows = []
    for entry in report["benchmarks"]:
        # A compact file keeps the most frequent value of each key once.
        info: dict[str, Any] = {**report.get("usual", {}), **entry["extra_info"]}
        # On a GPU the replay of a CUDA graph is the device's own time, without the launching.
        median = info.get("device_seconds", entry["stats"])["median"]
        rows.append({**info, "milliseconds": 1e3 * median})
    frame = pd.DataFrame(rows).query("kind == 'layer' and mode == 'forward'")
    frame = frame[(frame["width"] == frame["width"].max()) & ~frame["compiled"].astype(bool)]
    return frame.pivot_table("milliseconds", "label", "resolution", aggfunc="min").round(3)


def scores(run: Path) -> pd.DataFrame:
    """Metrics of a run: one row per metric, one column per guidance scale, real images last."""
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return pd.DataFrame({**metrics["results"], "real images": metrics["real_floor"]})


def losses(run: Path, rows: int = 10) -> pd.DataFrame:
    """The mean training loss over each tenth of a run, and the last step of that tenth."""
    log = pd.read_json(run / "log.jsonl", lines=True)
    tenth = pd.Series(range(len(log))) * rows // len(log)
    return log.groupby(tenth).agg({"step": "max", "loss": "mean"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Show results as tables.")
    parser.add_argument("--benchmark", type=Path, default=PUBLISHED, help="JSON of the suite")
    parser.add_argument("--run", type=Path, help="folder of an evaluated run")
    given = parser.parse_args()
    tables = [milliseconds(given.benchmark)]
    if given.run:
        tables = [losses(given.run), scores(given.run)]
    for table in tables:
        print(f"{table.to_string()}\n")
