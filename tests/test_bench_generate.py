"""`llmcore bench generate` with a tiny random model: goals, peers, what it prints and writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import needs_native

from llmcore import cli
from llmcore.benchmarks import bench_generate, engine_process, engines, line_up
from llmcore.models import Decoder, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=64,
    width=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=16,
    feed_forward=96,
    context_length=64,
)
DECODE, PREFILL = engines.Job("decode", 2, 8, 1, 3), engines.Job("prefill", 1, 0, 16, 1)


def tiny() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(CONFIG).eval()
    for parameter in model.parameters():  # far from noise, in every width
        parameter.data.mul_(4 if parameter.ndim == 2 else 1)
    return model


def speed(name: str, side: str, width: str, seconds: float) -> bench_generate.Speed:
    return bench_generate.Speed(name, side, width, (seconds,))


def outcome(job: engines.Job, *speeds: Any, **found: Any) -> bench_generate.Outcome:
    return bench_generate.Outcome(job, list(speeds), **found)


def line(job: engines.Job, ours: bench_generate.Speed, *peers: Any) -> bench_generate.Line:
    return bench_generate.Line(outcome(job, ours, *peers), ours, None)


def test_bench_generate_goals() -> None:
    ours = speed("llmcore int8", engines.OURS, "int8", 1.0)
    llama = speed("llama.cpp Q8_0", engines.LLAMA_CPP, "int8", 1.5)
    eager = speed("HF eager fp32", engines.HUGGING_FACE, "fp32", 9.0)
    job = bench_generate.AFTER_32
    assert line(job, ours, llama, eager).reached is True
    assert line(job, ours, llama, speed("HF eager fp32", eager.side, "fp32", 7.0)).reached is False
    assert line(job, ours, llama).reached is None
    assert line(job, ours, speed("llama.cpp Q8_0", llama.side, "int8", 1.3), eager).reached is False
    assert line(bench_generate.EIGHT, ours, llama, eager).reached is None
    prefill = line(bench_generate.PREFILL, ours, llama, eager)
    assert prefill.reached is True and prefill.ratios["all"] == 1.5
    assert prefill.peers["peer"] is llama


def test_bench_generate_says_which_rows_are_noisy() -> None:
    ours = speed("llmcore int8", engines.OURS, "int8", 1.0)
    llama = speed("llama.cpp Q8_0", engines.LLAMA_CPP, "int8", 1.5)
    other = speed("llama.cpp F32", engines.LLAMA_CPP, "fp32", 3.0)
    calm, disturbed = (dataclasses.replace(llama, waited=share) for share in (0.04, 0.06))
    job = bench_generate.AFTER_32
    for row, noisy in (
        (line(job, ours, llama), False),  # nobody counted
        (line(job, ours, calm), False),
        (line(job, ours, disturbed), True),
        (line(job, ours, calm, dataclasses.replace(other, waited=0.9)), False),  # not compared
        (line(job, dataclasses.replace(ours, waited=0.06), calm), True),
        (dataclasses.replace(line(job, ours), outcome=outcome(job, ours, waited=0.06)), True),
    ):
        assert row.is_noisy is noisy
        assert bench_generate.text_of(row).endswith("NOISY") is noisy
    said = "\n".join(bench_generate.everybody(outcome(job, ours, disturbed)))
    assert said.count("NOISY: waited 6 %") == 1


@pytest.mark.parametrize("job", [DECODE, PREFILL], ids=lambda job: job.name)
def test_bench_generate_refuses_another_model(job: engines.Job) -> None:
    torch.manual_seed(1)
    ours, other = engines.Llmcore(tiny(), "fp32"), engines.Llmcore(Decoder(CONFIG).eval(), "fp32")
    rounds = bench_generate.Rounds(0.0, 1, 1)
    first, second = bench_generate.hold(job, [ours, other], 64, rounds).speeds
    assert first.seconds and first.likeness == pytest.approx(1)
    assert not second.seconds and "correlation" in second.why_not


def test_bench_generate_counts_what_a_pass_reads() -> None:
    engine = engines.Llmcore(tiny(), "fp32")
    matrices = 64 * 64 + 2 * (128 * 64 + 64 * 64 + 192 * 64 + 64 * 96)
    cached = 2 * 2 * 2 * 16 * 4 * 8 * 2
    assert engine.bytes_of(DECODE) == 4 * matrices + cached
    assert engine.operations_of(DECODE) == 2 * 2 * matrices


@needs_native
def test_bench_generate_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> engines.Engine:
        raise ImportError("no such library")

    peer = line_up.Entry("nobody", engines.OTHERS, "fp32", missing)
    monkeypatch.setattr(line_up, "model_of", lambda shape: (tiny(), None))
    monkeypatch.setattr(line_up, "peers_of", lambda *args: [peer])
    monkeypatch.setattr(bench_generate, "Hosted", lambda make: make())
    monkeypatch.setattr(bench_generate, "JOBS", (DECODE, PREFILL))
    monkeypatch.setattr(bench_generate, "QUICK", bench_generate.Rounds(0.0, 1, 1))
    monkeypatch.setattr(bench_generate, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(engines.Llmcore, "outside", lambda engine: (1.0, 0.2))
    path = tmp_path / "found.json"
    command = ["bench", "generate", "--quick", "--shape", "0.5b", "--json", str(path)]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "nobody takes no part: ImportError: no such library" in out
    assert "(20.0 %) outside of the native call; at most 10 %: NO" in out
    found = json.loads(path.read_text())
    assert [row["width"] for row in found["table"]] == [*engines.WIDTHS] * 2
    assert all(row["tokens_per_s"] > 0 for row in found["table"])


@needs_native
def test_bench_generate_sees_the_native_calls() -> None:
    step, outside = engines.Llmcore(tiny(), "fp32").outside(tokens=4, rounds=1)
    assert 0 < outside < step


def make_tiny() -> engines.Engine:
    return engines.Llmcore(tiny(), "fp32")


def make_nothing() -> engines.Engine:
    raise ImportError("no such library")


def test_bench_generate_engine_in_a_process_of_its_own() -> None:
    with pytest.raises(engine_process.Refused, match="ImportError: no such library"):
        engine_process.Hosted(make_nothing)
    hosted, here = engine_process.Hosted(make_tiny), engines.Llmcore(tiny(), "fp32")
    ids = DECODE.ids(64)
    with torch.no_grad():
        gold, logits = here.prepare(DECODE, ids), hosted.prepare(DECODE, ids)
    assert gold is not None and logits is not None and torch.equal(gold, logits)
    assert (hosted.name, hosted.side, hosted.width) == (here.name, here.side, here.width)
    assert hosted.seconds() > 0 and hosted.bytes_of(DECODE) == here.bytes_of(DECODE)
    with pytest.raises(engine_process.Refused, match="AttributeError"):
        hosted.ask("nothing")
    hosted.close()
    hosted.end()
    assert hosted.process.exitcode == 0


def test_bench_generate_repeats_a_disturbed_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    hosted = object.__new__(engine_process.Hosted)
    turns = iter([(0.5, 1.0), (0.1, 3.0), (0.01, 2.0), (0.0, 4.0)])
    monkeypatch.setattr(hosted, "ask", lambda method: next(turns))
    assert (hosted.seconds(), hosted.waited) == (2.0, 0.01)
    turns = iter([(0.5, 1.0), (0.1, 3.0), (0.3, 2.0), (0.0, 4.0)])
    assert (hosted.seconds(), hosted.waited) == (3.0, 0.1)
    turns = iter([(None, 5.0), (0.0, 4.0)])  # nobody counts
    assert (hosted.seconds(), hosted.waited) == (5.0, None)


@needs_native
def test_bench_generate_hugging_face_returns_to_its_context() -> None:
    pytest.importorskip("transformers")
    from llmcore.models.convert import to_transformers

    model, ids = tiny(), DECODE.ids(64)
    stock = engines.HuggingFace(to_transformers(model), "fp32")
    with torch.no_grad():
        gold = engines.Llmcore(model, "fp32").prepare(DECODE, ids)
        first, again = stock.prepare(DECODE, ids), None
        for _ in range(2):
            stock.seconds()
            assert stock.cache.get_seq_length() == DECODE.context
            again = stock.logits(stock.step(stock.pieces[0]))
            stock.rewind()
    assert gold is not None and first is not None and again is not None
    assert torch.equal(first, again) and bench_generate.likeness(first, gold) > 0.999
