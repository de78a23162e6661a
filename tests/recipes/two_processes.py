"""What tests/recipes/test_distributed.py runs under torchrun: one start for all cases.

torchrun ... tests/recipes/two_processes.py FOLDER [MECHANISM ...]
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from recipes.lab.console import UserError, run_script
from recipes.lab.training.banner import banner
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings
from recipes.lab.training.trainer import Trainer
from tests.recipes import two_buckets

COMMON = {"steps": 4, "batch_size": 8, "checkpoint_every": 2, "sample_every": 1000,
          "bucket_mb": 1}  # fmt: skip
CASES = {
    "softmax": {"attn": "softmax", "held_out_every": 4},
    "dydila": {"attn": "dydila", "diagnose_every": 2},
    "dydila-accumulate": {"attn": "dydila", "accumulate": 2},
    "checkpointing": {"attn": "dydila", "gradient_checkpointing": True},
    "sharded": {"attn": "dydila", "sharded": True, "held_out_every": 4},
    # A process of four images leaves experts without a gradient.
    "time-experts": {"attn": "sana", "feedforward": "time-experts"},
}


def settings(name: str, **changed) -> Settings:
    """Of a case, or of a mechanism: more steps, at the rate of DiT.

    At 3e-3 some mechanisms enlarge rounding a thousandfold in twenty steps; in one process, the
    images of a step in another order do the same.
    """
    own = {"attn": name, "steps": 20, "learning_rate": 1e-4}
    return Settings(**COMMON | CASES.get(name, own) | changed)


def poison(step: int, rank: int):
    """Makes the batch of one process NaN at one step; returns how to undo it."""
    original = Trainer._batch

    def poisoned(self):
        images, *rest = original(self)
        if self.step == step and self.accelerator.process_index == rank:
            images = images * float("nan")
        return (images, *rest)

    Trainer._batch = poisoned
    return lambda: setattr(Trainer, "_batch", original)


def main(arguments: list[str]) -> int:
    out, names = Path(arguments[0]), arguments[1:]
    Trainer.sample_grid = lambda self, path: None  # the most of a short run's time
    for name in names or CASES:
        assert train(settings(name), Run(out / name)) == 0
    if not names:
        _decisions(out)
        _exactly(out)
        for name, sharded in (("rounded", False), ("rounded-sharded", True)):
            rounded = settings("dydila", gradient_sums="bf16", sharded=sharded)
            assert train(rounded, Run(out / name)) == 0
        found = two_buckets.cases()
        found["notes"] = _notes_of_a_buffer()
        found["told"] = _told_of_one_that_fails()
        found["banner"] = banner(Trainer(settings("sharded")), Run(out / "sharded"), 0)
        (out / f"buckets-{dist.get_rank()}.json").write_text(json.dumps(found))
    (out / f"world-{dist.get_rank()}.json").write_text(json.dumps(dist.get_world_size()))
    return 0


def _decisions(out: Path) -> None:
    assert train(settings("dydila"), Run(out / "half"), should_stop=lambda step: step == 2) == 75
    assert train(settings("dydila"), Run(out / "half-of-one"), resume=True) == 0
    undo = poison(step=2, rank=1)
    assert train(settings("dydila"), Run(out / "poisoned")) == 0
    undo()
    # Only the second process hears the signal.
    assert train(settings("softmax"), Run(out / "told"), should_stop=_tell_second) == 75


def _exactly(out: Path) -> None:
    """What equals "dydila" to the last bit."""
    assert train(settings("dydila", bucket_mb=0), Run(out / "after")) == 0
    resumed = Run(out / "resumed")
    assert train(settings("dydila"), resumed, should_stop=lambda step: step == 2) == 75
    assert train(settings("dydila"), resumed, resume=True) == 0


def _notes_of_a_buffer() -> list[str]:
    """What training says where the processes do not hold one alike."""
    trainer = Trainer(settings("dydila"))
    moved = (b for name, b in trainer.model.named_buffers() if name.endswith("running_mean"))
    next(moved).add_(dist.get_rank())
    for _ in range(2):
        trainer.train_step()
    return trainer.notes


def _told_of_one_that_fails() -> list:
    """What each process learns where the second one's held-out image cannot be read."""
    trainer = Trainer(settings("softmax"))
    data = trainer._held_out

    class Broken:
        def __len__(self):
            return len(data)

        def batch(self, indices):
            if dist.get_rank() == 1:
                raise UserError("the shard is damaged")
            return data.batch(indices)

    trainer._held_out = Broken()
    try:
        trainer.held_out()
    except UserError as error:
        trainer._held_out = data
        return [str(error), error.is_shared, trainer.held_out()]
    return []


def _tell_second(step: int) -> bool:
    if step == 2 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGUSR2)
    return False


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    run_script(main)
