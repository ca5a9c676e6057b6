"""The loop: the same bits after a stop, the same steps on two processes, and what it computes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_runs import (
    Stopping,
    small_data,
    small_model,
    small_trainer,
    validation,
)

from llmcore.history import Recurrent
from llmcore.text.data import Batch, Packed
from llmcore.train import Interrupted, Recipe, checkpoint
from llmcore.train.loop import Interrupt

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path: Path) -> Packed:
    return small_data(tmp_path)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_loop_resumes_to_the_same_bits(tmp_path: Path, data: Packed) -> None:
    whole = small_trainer(tmp_path / "whole", data, validation=validation(data))
    whole.run()
    cut = tmp_path / "cut"
    stopped = small_trainer(
        cut,
        Stopping(data, 11, ZeroDivisionError()),
        checkpoint_every=3,
        validation=validation(data),
    )
    with pytest.raises(ZeroDivisionError):  # as a kill: in the middle of the sixth step
        stopped.run()
    again = small_trainer(cut, data, checkpoint_every=3, validation=validation(data))
    again.run()
    assert same(whole.model, again.model)
    assert again.step == 8 and again.tokens == whole.tokens
    records = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "whole", cut)
    ]
    for one, other in zip(*records, strict=True):
        assert one["loss"] == other["loss"] and one["step"] == other["step"]
    last = checkpoint.Checkpoint.read(checkpoint.found_in(cut / "checkpoints")[-1])
    assert last.step == 8 and len(checkpoint.found_in(cut / "checkpoints")) == 1


def test_loop_learns_and_reports(tmp_path: Path, data: Packed) -> None:
    trainer = small_trainer(
        tmp_path / "run", data, recipe={"steps": 30, "average": None}, validation=validation(data)
    )
    before = trainer.validate()
    trainer.run()
    assert trainer.validate() < before - 1.0
    assert not trainer.model.training
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 31))


def test_loop_step_is_adamw_on_the_mean_over_all_targets(tmp_path: Path, data: Packed) -> None:
    """Two batches of different numbers of targets, by the formula, with torch's plain AdamW."""

    class Uneven:
        def batch(self, position: int) -> Batch:
            whole = data.batch(position)
            ids, targets = whole.inputs["ids"], whole.inputs["targets"].clone()
            targets[0, : 7 + position] = -100
            count = int((targets >= 0).sum())
            return Batch({"ids": ids, "targets": targets}, count, ids.numel())

    changes = {"steps": 1, "average": None, "clip": 0.1, "warm_up": 0}
    trainer = small_trainer(tmp_path / "run", Uneven(), recipe=changes)
    trainer.run()
    plain = small_model()
    batches = [Uneven().batch(i) for i in range(2)]
    losses = [plain.loss(**b.inputs, reduction="sum") for b in batches]
    (sum(losses) / sum(b.targets for b in batches)).backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in plain.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), foreach=False).step()
    for name, parameter in plain.named_parameters():
        ours = trainer.model.get_parameter(name)
        # A step of Adam is about the rate whatever the gradient, so that the signs of gradients
        # near zero decide: rounding may not move them.
        torch.testing.assert_close(ours, parameter, rtol=0, atol=1e-5)


def test_loop_average_is_what_it_says(tmp_path: Path, data: Packed) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def note(path: Path) -> None:
        seen.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})

    trainer = small_trainer(
        tmp_path / "run", data, recipe={"steps": 3}, checkpoint_every=1, describe=note
    )
    average = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.run()
    for weights in seen:
        average = {n: 0.5 * average[n] + 0.5 * weights[n] for n in average}
    assert len(seen) == 3
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, average[name])


def test_loop_refuses_another_recipe_and_another_model(tmp_path: Path, data: Packed) -> None:
    small_trainer(tmp_path / "run", data, recipe={"steps": 1}).run()
    with pytest.raises(ValueError, match="run with steps 1, this one has 2"):
        small_trainer(tmp_path / "run", data, recipe={"steps": 2}).run()
    other = Recurrent(type(small_model().config)("gru", 257, 16, layers=2))
    with pytest.raises(ValueError, match="of another model"):
        small_trainer(tmp_path / "run", data, recipe={"steps": 1}, model=other).run()


def test_loop_stops_when_the_loss_is_no_number(tmp_path: Path, data: Packed) -> None:
    model = small_model()
    model.embedding.weight.data[40] = math.nan
    with pytest.raises(FloatingPointError, match="loss of step"):
        small_trainer(tmp_path / "run", data, model=model).run()


def test_loop_bf16(tmp_path: Path, data: Packed) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        trainer = small_trainer(
            tmp_path / precision, data, recipe={"precision": precision, "steps": 4}
        )
        trainer.run()
        lines = (tmp_path / precision / "metrics.jsonl").read_text().splitlines()
        losses[precision] = [json.loads(line)["loss"] for line in lines]
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert losses["fp32"] != losses["bf16"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=1e-2)


def test_loop_ctrl_c_leaves_a_checkpoint(tmp_path: Path, data: Packed) -> None:
    class Pressing:
        """Ctrl-C while the third step is at work."""

        def batch(self, position: int) -> Batch:
            if position == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return data.batch(position)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(Interrupted, match="step 3"):
            small_trainer(tmp_path / "cut", Pressing()).run()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(KeyboardInterrupt), Interrupt():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    again = small_trainer(tmp_path / "cut", data)
    again.run()
    whole = small_trainer(tmp_path / "whole", data)
    whole.run()
    assert same(again.model, whole.model)


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("learning_rate", 0.0), ("clip", -1.0), ("precision", "fp8"), ("average", 1.0)],
)
def test_recipe_refuses(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} must be"):
        Recipe(**{"steps": 1, field: value})


def test_recipe_rate() -> None:
    recipe = Recipe(steps=110, learning_rate=1.0, warm_up=10, final_rate=0.1)
    assert [recipe.rate(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert recipe.rate(60) == pytest.approx(0.55) and recipe.rate(110) == pytest.approx(0.1)
    rates = [recipe.rate(step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


WORKER = """
import sys, json, torch
sys.path.insert(0, sys.argv[4])
from pathlib import Path
from training_runs import small_trainer, validation
from llmcore.text.data import Packed
from llmcore.text.shards import Shards
from llmcore.train import Processes
torch.set_num_threads(1)
processes = Processes(sys.argv[3])
data = Packed(Shards(Path(sys.argv[1]) / "data"), length=24, rows=3)
trainer = small_trainer(
    Path(sys.argv[2]), data, processes=processes, validation=validation(data), checkpoint_every=3
)
trainer.run()
processes.leave()
"""


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_loop_two_processes_take_the_steps_of_one(
    tmp_path: Path, data: Packed, parallel: str
) -> None:
    """The sums are rounded in another order: losses and weights differ by that and no more."""
    one = small_trainer(tmp_path / "one", data, validation=validation(data))
    one.run()
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    tests = str(Path(__file__).resolve().parent)
    folder = tmp_path / parallel
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(script), str(tmp_path), str(folder), parallel, tests]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    records = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", parallel)
    ]
    assert len(records[0]) == 8
    for ours, theirs in zip(*records, strict=True):
        assert theirs["tokens"] == ours["tokens"]
        assert theirs.keys() == ours.keys()
        for key in {"loss", "gradient_norm", "validation_loss"} & ours.keys():
            assert theirs[key] == pytest.approx(ours[key], rel=1e-6)
    found = checkpoint.Checkpoint.read(checkpoint.found_in(folder / "checkpoints")[-1])
    assert found.step == 8 and found.average is not None
    for name, parameter in one.model.named_parameters():
        torch.testing.assert_close(found.average[name], parameter.detach(), rtol=0, atol=1e-5)
