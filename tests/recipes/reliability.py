"""Measures what docs/reliability.md promises, and writes its figures.

    python -m tests.recipes.reliability

Takes about twenty minutes on two cores. The tests call the same functions.
"""

import contextlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

import attnzoo
from recipes.lab.data.encoding import encode
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings
from recipes.lab.training.state import save_checkpoint
from recipes.lab.training.trainer import Trainer
from tests.recipes import crash, two_processes

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"


def _child(*arguments, launcher=()):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=3000, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def crashes(folder, last=None, child=_child):
    """Crashes at every act of the checkpoint protocol, or at the ``last`` ones of a run."""
    arguments = [crash.__file__, "points", folder, *([] if last is None else [last])]
    return json.loads(child(*arguments).splitlines()[-1])


def kills(folder, count, child=_child):
    """SIGKILL at random moments."""
    return json.loads(child(crash.__file__, "kills", folder, count).splitlines()[-1])


def weights(run, part):
    """Floating-point tensors of "model" or "ema" in a run's newest checkpoint."""
    found = run.newest_checkpoint(warn=print)
    tensors = load_file(found[1] / part / "diffusion_pytorch_model.safetensors")
    return {k: v for k, v in tensors.items() if v.is_floating_point()}


def deviation(one, other):
    """Largest difference of the losses, and of the weights of model and average."""
    losses = [[entry["loss"] for entry in run.read_log()] for run in (one, other)]
    gap = max(abs(a - b) for a, b in zip(*losses, strict=True))
    pairs = [(weights(one, part), weights(other, part)) for part in ("model", "ema")]
    return gap, max((a[n] - b[n]).abs().max().item() for a, b in pairs for n in a)


# torchrun, because accelerate launch --cpu starts one process whatever it is told.
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def _two(out, *names):
    _child(two_processes.__file__, out, *names, launcher=TORCHRUN)
    assert [(out / f"world-{rank}.json").read_text() for rank in (0, 1)] == ["2", "2"]


@contextlib.contextmanager
def no_pictures():
    """Sample grids take the most of a short run's time."""
    undo, Trainer.sample_grid = Trainer.sample_grid, lambda self, path: None
    try:
        yield
    finally:
        Trainer.sample_grid = undo


def processes(out):
    """Trains every case of two_processes.py in two processes and in one, under ``out``."""
    case = two_processes.settings
    with no_pictures():
        half = Run(out / "half-of-one")
        assert train(case("dydila"), half, should_stop=lambda step: step == 2) == 75
        for name in two_processes.CASES:
            assert train(case(name), Run(out / "one" / name)) == 0
        _two(out)
        assert train(case("dydila"), Run(out / "half"), resume=True) == 0
    return {
        name: deviation(Run(out / name), Run(out / "one" / reference))
        for name, reference in [
            *((name, name) for name in two_processes.CASES),
            ("half", "dydila"),
            ("half-of-one", "dydila"),
        ]
    }


def mechanisms(out, names):
    """Deviation of two processes from one, for each mechanism."""
    with no_pictures():
        for name in names:
            assert train(two_processes.settings(name), Run(out / "one" / name)) == 0
    _two(out, *names)
    return {name: deviation(Run(out / name), Run(out / "one" / name)) for name in names}


def memory(steps=1000, warm_up=100):
    """Growth of the resident memory in percent over ``steps``, in this process."""
    trainer = Trainer(Settings(attn="sana", batch_size=2))
    page = resource.getpagesize()

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    for _ in range(warm_up):
        trainer.train_step()
    before = resident()
    for _ in range(steps):
        trainer.train_step()
    return 100 * (resident() - before) / before


def compiled(steps=50):
    """Largest difference of the losses with and without torch.compile."""
    losses = []
    for compile_it in ("off", "on"):
        trainer = Trainer(Settings(attn="sana", batch_size=4, compile=compile_it))
        losses.append([trainer.train_step()[0]["loss"] for _ in range(steps)])
    return max(abs(a - b) for a, b in zip(*losses, strict=True))


def overhead(out, steps=20):
    """Seconds of a step and of a save, and the save in percent of 100 steps."""
    trainer = Trainer(Settings(attn="dydila"))
    run = Run(out)
    trainer.train_step()
    began = time.perf_counter()
    for _ in range(steps):
        trainer.train_step()
    step = (time.perf_counter() - began) / steps
    saves = []
    for _ in range(3):
        trainer.step += 1
        began = time.perf_counter()
        assert save_checkpoint(trainer, run) is None
        saves.append(time.perf_counter() - began)
    size = sum(f.stat().st_size for f in run.newest_checkpoint(print)[1].rglob("*") if f.is_file())
    save = sorted(saves)[1]
    return {"step": step, "save": save, "percent": 100 * save / (100 * step), "mb": size / 1e6}


def make_vae(folder):
    """Saves a VAE of factor 2, small enough for a test."""
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    ).save_pretrained(folder)
    return str(folder)


def draw(path, generator):
    """Saves a picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(generator.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(path)


def latents(out, steps=20):
    """Largest difference of the losses on cached latents and encoding on the fly, by dtype."""
    vae, generator = make_vae(out / "vae"), np.random.default_rng(0)
    for name in "abcd":
        for number in range(3):
            draw(out / "images" / name / f"{number}.png", generator)
    common = {"attn": "sana", "batch_size": 4, "steps": steps}
    runs = {"fly": {"data": str(out / "images"), "vae": vae, "resolution": 16}}
    for dtype in ("fp32", "fp16"):
        encode(out / "images", out / dtype, vae=vae, resolution=16, dtype=dtype)
        runs[dtype] = {"data": str(out / dtype)}
    losses = {}
    for name, options in runs.items():
        assert train(Settings(**common, **options), Run(out / f"run-{name}")) == 0
        losses[name] = [entry["loss"] for entry in Run(out / f"run-{name}").read_log()]
    return {
        dtype: max(abs(a - b) for a, b in zip(losses[dtype], losses["fly"], strict=True))
        for dtype in ("fp32", "fp16")
    }


def main():
    torch.set_num_threads(1)
    grown = memory()  # first, because memory that others have freed would hide what it takes
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        names = ("crashes", "kills", "processes", "mechanisms", "overhead", "latents")
        parts = [folder / name for name in names]
        for part in parts:
            part.mkdir()
        crashed, killed = crashes(parts[0]), kills(parts[1], 20)
        gaps = processes(parts[2])
        others = mechanisms(parts[3], attnzoo.list_attention())
        cost, cached = overhead(parts[4]), latents(parts[5])
    rows = [
        (
            "a crash before and inside every write, sync, rename and delete",
            f"{crashed['survived']} of {crashed['tried']} survived, bit for bit",
        ),
        (
            "kill -9 at random moments",
            f"{killed['killed']} kills, {killed['unloadable']} unloadable; {killed['equal']} of "
            f"{killed['runs']} runs equal bit for bit in the end",
        ),
    ]
    for name, (loss, weight) in gaps.items():
        what = {
            "half": "dydila, begun by two processes and ended by one",
            "half-of-one": "dydila, begun by one process and ended by two",
            "sharded": "dydila, FSDP2",
            "checkpointing": "dydila, the same with gradient checkpointing",
            "dydila-accumulate": "dydila, the same with 2 micro-steps",
        }.get(name, f"{name}, gradients added up in buckets")
        rows.append(
            (f"two processes against one: {what}", f"loss {loss:.1e}, weights {weight:.1e}")
        )
    loss, weight = (max(gap[i] for gap in others.values()) for i in (0, 1))
    rows += [
        (
            f"two processes against one: the worst of {len(others)} mechanisms, 20 steps at 1e-4",
            f"loss {loss:.1e}, weights {weight:.1e}",
        ),
        ("cached latents against encoding on the fly, float32", f"loss {cached['fp32']:.1e}"),
        ("the same, float16", f"loss {cached['fp16']:.1e}"),
        ("torch.compile on and off, 50 steps", f"loss {compiled():.1e}"),
        ("resident memory over 1000 steps", f"{grown:+.2f} %"),
        (
            f"a save of {cost['mb']:.0f} MB every 100 steps of {cost['step'] * 1e3:.0f} ms",
            f"{cost['save'] * 1e3:.0f} ms, {cost['percent']:.1f} % of the time",
        ),
    ]
    table = "\n".join(["| tried | outcome |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, CPU, one thread."
    text = re.sub(
        f"{BEGIN}.*{END}",
        lambda _: f"{BEGIN}\n{table}\n\n{versions}\n{END}",
        PAGE.read_text(),
        flags=re.DOTALL,
    )
    PAGE.write_text(text)
    print(table)


if __name__ == "__main__":
    main()
