"""Two processes compute what one computes, and decide together."""

import json
import re
from typing import Any

import pytest
import torch
from torch import nn

import attnzoo
from recipes.lab import distributed
from recipes.lab.console import UserError
from recipes.lab.distributed import check_parts
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.state import load_checkpoint
from recipes.lab.training.trainer import Trainer
from tests.recipes import reliability
from tests.recipes.reliability import deviation, weights
from tests.recipes.two_processes import CASES, settings


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the children have: two threads on two busy cores make a run ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Runs of two processes, and under one/ those of one process."""
    out = tmp_path_factory.mktemp("distributed")
    reliability.processes(out)
    return out


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(out, name):
    loss, weight = deviation(Run(out / name), Run(out / "one" / name))
    assert loss < 1e-6
    assert weight < 3e-5  # Adam divides differences of rounding by small gradients


@pytest.mark.parametrize("name", ["softmax", "sharded"])
def test_the_held_out_loss_of_two_processes_is_that_of_one(out, name):
    two, one = (Run(folder / name).read_log()[-1] for folder in (out, out / "one"))
    for key in ("held_out_loss", "held_out_loss_model", "held_out_loss_quarter_4"):
        assert two[key] == pytest.approx(one[key], rel=1e-5)


@pytest.mark.slow
def test_two_processes_equal_one_for_every_mechanism(tmp_path):
    found = reliability.mechanisms(tmp_path, attnzoo.list_attention())
    assert len(found) >= 10
    assert {name: gap for name, gap in found.items() if gap[0] > 1e-6 or gap[1] > 1e-5} == {}


@pytest.mark.parametrize("name", ["after", "resumed"])
def test_neither_buckets_nor_a_stop_change_a_bit(out, name):
    assert deviation(Run(out / name), Run(out / "dydila")) == (0, 0)


def test_sums_in_bfloat16_differ_by_rounding_and_shards_round_alike(out):
    loss, weight = deviation(Run(out / "rounded"), Run(out / "dydila"))
    assert 1e-7 < loss < 1e-3 and weight > 3e-4
    loss, weight = deviation(Run(out / "rounded-sharded"), Run(out / "rounded"))
    assert loss < 1e-6 and weight < 3e-5


@pytest.fixture(scope="module")
def buckets(out):
    """What two_buckets.py found, by process."""
    return [json.loads((out / f"buckets-{rank}.json").read_text()) for rank in (0, 1)]


def test_buckets_add_up_what_one_flat_sum_does(buckets):
    for found in buckets:
        assert not [name for name, case in found.items() if "equal" in case
                    and case["equal"] not in (True, [True] * 3)]  # fmt: skip
    assert len(found) >= 21


def test_all_processes_reduce_the_same_buckets_in_the_same_order(buckets):
    """Also where a layer has a gradient in one of them only, and the backward sums of its own."""
    lengths = [
        {name: [length for length, _ in case["events"]] for name, case in found.items()
         if "events" in case}
        for found in buckets
    ]  # fmt: skip
    assert lengths[0] == lengths[1]
    each, pairs, after = (lengths[0][f"{size} one"] for size in ("each", "pairs", "after"))
    # Two numbers of the step come last.
    assert each == [16, 256, 256, 256, 256, 16, 256, 256, 48, 2]
    assert pairs == [272, 512, 272, 512, 48, 2] and after == [1568, 48, 2]


def test_a_bucket_is_reduced_while_the_backward_goes_on(buckets):
    def begun(rank, name):
        return sum(is_inside for _, is_inside in buckets[rank][name]["events"])

    # Up to the layer that has no gradient, and with it what lies behind.
    for name in ("each both", "each, micro-steps", "each, compiled"):
        assert (begun(0, name), begun(1, name)) == (5, 5), name
    assert begun(0, "pairs both") == 2
    # The process without a gradient waits for the end, the other does not.
    assert (begun(0, "each one"), begun(1, "each one")) == (0, 5)
    assert begun(0, "after both") == 0


def test_a_backbone_gives_gradients_in_the_order_of_the_buckets(buckets):
    found = buckets[0]["backbone"]
    pairs = list(zip(found["begun"], found["best"], strict=True))
    # In the model's own order nothing begins before the end.
    assert len(pairs) >= 10 and max(at - best for at, best in pairs) < 0.15


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_recorded_step_adds_up_what_one_flat_sum_does(buckets):
    assert all(found["recorded"] == [True, True] for found in buckets)


def test_a_backward_that_breaks_off_leaves_the_next_step_right(buckets):
    assert all(found["broken off"] == {"begun": 3, "equal": True} for found in buckets)


def test_a_training_that_is_over_holds_no_memory(buckets):
    assert all(found["freed"] == [True, True] for found in buckets)


def test_a_gradient_that_comes_too_late_is_no_silent_error(buckets):
    assert all("twice in one backward" in found["twice"] for found in buckets)


def test_a_buffer_that_processes_do_not_share_is_named_once(buckets):
    for found in buckets:
        (said,) = found["notes"]
        assert re.match(r"not alike in all processes: buffer 'blocks\.0\.\S+running_mean';", said)


def test_only_what_a_checkpoint_would_hold_is_compared(monkeypatch):
    model = nn.Module()
    for name, kind, is_kept in (
        ("mean", torch.float32, True), ("count", torch.int64, True),
        ("phase", torch.complex64, True), ("table", torch.float32, False),
    ):  # fmt: skip
        model.register_buffer(name, torch.ones(2, dtype=kind), persistent=is_kept)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda *_: None)
    assert distributed.differing_buffers(nn.Linear(2, 2)) == []
    for change, found in ((1.0, ["mean", "count"]), (1e-6, [])):
        monkeypatch.setattr(distributed.dist, "broadcast", lambda z, _, by=change: z.copy_(z + by))
        assert distributed.differing_buffers(model) == found


def test_what_one_process_cannot_read_all_refuse_and_go_on_alike(buckets):
    told = [found["told"] for found in buckets]
    assert told[0][:2] == ["the shard is damaged", True] and told[0] == told[1]


FAILING = """
import os
import attnzoo

@attnzoo.register_attention("failing")
class Failing(attnzoo.get_attention("softmax")):
    def forward(self, x, grid):
        assert os.environ["RANK"] == "0" or not self.training or not x.requires_grad, "my own bug"
        return super().forward(x, grid)
"""


def test_what_one_process_fails_by_is_all_that_is_seen(tmp_path, commands):
    (tmp_path / "failing.py").write_text(FAILING)
    script = reliability.ROOT / "recipes" / "train.py"
    flags = ["--import", "failing.py", "--attn", "failing", "--out", "run", "--steps", "2"]
    status, said = commands.launch(2, script, *flags, cwd=tmp_path)
    assert status == 1 and said.count("Traceback") == 1 and "AssertionError: my own bug" in said
    assert "gloo" not in said and "peer" not in said
    noted = json.loads((tmp_path / "run" / "status.json").read_text())
    assert noted["reason"] == "process 1: AssertionError: my own bug"


class Idle(attnzoo.get_attention("softmax")):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.idle = nn.Parameter(torch.ones(2, 2))


def test_a_parameter_without_a_gradient_counts_as_zero_on_one_process_too(monkeypatch):
    monkeypatch.setattr(attnzoo.registry, "_REGISTRY", dict(attnzoo.registry._REGISTRY))
    attnzoo.register_attention("idle")(Idle)
    trainer = Trainer(settings("idle", weight_decay=0.5, learning_rate=0.1, warmup_steps=0))
    trainer.train_step()
    idle = trainer.model.blocks[0].attention.idle
    assert idle in trainer.optimizer.state and torch.allclose(idle, torch.tensor(0.95))


def test_the_cost_of_a_sharded_model_is_that_of_the_whole(buckets):
    assert "0.00932 G multiply-accumulates per image" in buckets[0]["banner"]


@pytest.mark.parametrize("name", ["half", "half-of-one"])
def test_a_run_continues_on_another_number_of_processes(out, name):
    loss, weight = deviation(Run(out / name), Run(out / "one" / "dydila"))
    assert loss < 1e-5 and weight < 3e-5


def test_what_cannot_be_sharded_is_named_before_the_first_step():
    nobody: Any = None
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    model.head = nn.Linear(2, 2, dtype=torch.bfloat16)
    model.embedding = nn.Sequential(nn.Linear(2, 2, dtype=torch.bfloat16))  # its 0 is no block's
    check_parts(model)
    model.blocks[0].gate = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(UserError, match=r"'blocks\.0\.gate' has no dimension .* drop --sharded"):
        check_parts(model)
    model.blocks[0].gate = nn.Parameter(torch.ones(1, dtype=torch.float64))
    with pytest.raises(UserError, match=r"torch\.float32 and 'blocks\.0\.gate' torch\.float64 in"):
        check_parts(model)
    model.blocks[0].gate.requires_grad_(False)
    model.blocks[1].tied = model.blocks[1].weight
    check_parts(model)
    model.head.tied = model.blocks[1].weight
    with pytest.raises(UserError, match=r"'blocks\.1\.weight' and 'head\.tied' are one tensor"):
        distributed.shard(model, nobody)


def test_gradient_checkpointing_changes_nothing(out):
    loss, weight = deviation(Run(out / "one" / "checkpointing"), Run(out / "one" / "dydila"))
    # The statistics of batch norm are updated twice by half, which rounds otherwise.
    assert loss == 0 and weight < 1e-6


def test_one_process_loads_what_shards_saved(out):
    run = Run(out / "sharded")
    trainer = Trainer(settings("dydila"))
    step, folder = run.newest_checkpoint(warn=pytest.fail)
    load_checkpoint(trainer, step, folder)
    assert trainer.train_step()[0]["step"] == step + 1


def test_a_poisoned_batch_of_one_process_is_skipped_by_both(out):
    entries = Run(out / "poisoned").read_log()
    assert [entry["loss"] is None for entry in entries] == [False, False, True, False]
    assert "nan" in entries[2]["skipped"] and entries[3]["skipped_in_all"] == 1
    for part in ("model", "ema"):
        assert all(
            tensor.isfinite().all() for tensor in weights(Run(out / "poisoned"), part).values()
        )


def test_a_signal_to_one_process_stops_both(out):
    run = Run(out / "told")
    assert [entry["step"] for entry in run.read_log()] == [1, 2, 3]
    assert run.newest_checkpoint(warn=pytest.fail)[0] == 3


def test_mechanisms_report_themselves_alike(out):
    for run in (Run(out / "dydila"), Run(out / "one" / "dydila")):
        said = [entry["blocks"] for entry in run.read_log() if "blocks" in entry]
        assert len(said) == 2 and sorted(said[0]) == ["0", "1", "2", "3"]
        block = said[-1]["3"]
        assert len(block["gamma"][0]) == 9 and block["lambda"]
        assert sum(block["projector.query"]["usage"]) == pytest.approx(1, abs=1e-5)
        assert 0 < block["projector.query"]["entropy"] <= 1.0987


def test_micro_steps_and_processes_share_out_one_batch():
    whole = Trainer(settings("softmax"))
    parts = Trainer(settings("dydila-accumulate"))
    for one, other in zip(whole._batch(), parts._batch(), strict=True):
        assert torch.equal(one, other)
