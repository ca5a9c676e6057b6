"""`llmcore bench step` with a tiny model: the twin is the same model, and the command reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmcore import cli
from llmcore.benchmarks import bench_step
from llmcore.models import Decoder

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = bench_step.dataclasses.replace(
    bench_step.GPT2_SMALL,
    vocab_size=61,
    width=32,
    layers=2,
    heads=2,
    kv_heads=2,
    head_width=16,
    feed_forward=64,
    context_length=80,
)


def test_bench_step_twin_computes_the_same() -> None:
    torch.manual_seed(0)
    model = Decoder(CONFIG)
    plain = bench_step.plain_twin(model)
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in model.parameters())
    ids = torch.randint(61, (3, 17))
    ours, theirs = model.loss(ids, ids), plain(ids, ids)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    for name, parameter in model.named_parameters():
        grad = plain.get_parameter(bench_step.plain_name(name)).grad
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)


def test_bench_step_losses_tell_another_model() -> None:
    assert bench_step.checked(CONFIG) < 1e-5
    pair = bench_step.steppers(CONFIG, (bench_step.OURS, bench_step.EAGER))
    with torch.no_grad():
        pair[1].parameters[0].mul_(1.5)
    for stepper in pair:
        stepper.step((1, 64), 61)
    assert bench_step.difference(pair) > bench_step.NEAR


def test_bench_step_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_step, "QUICK_CONFIG", CONFIG)
    monkeypatch.setattr(bench_step, "QUICK_BATCH", (2, 32))
    path = tmp_path / "found.json"
    assert cli.main(["bench", "step", "--quick", "--threads", "1", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "losses differ by" in out and "1.3x torch eager reached" in out and "AdamW" in out
    found = json.loads(path.read_text())
    assert [m["name"] for m in found["measured"]] == ["llmcore", "torch eager"]
    assert all(len(m["seconds"]) == 3 for m in found["measured"])
    assert found["parts"]["llmcore"]["linear"] > 0
