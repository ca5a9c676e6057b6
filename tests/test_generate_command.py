"""Prompts in, answers out: what generate gives, each once, whatever interrupts it."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from llmcore import cli, generate, generate_command, model_arguments
from llmcore.models import save
from llmcore.text import TemplateChat

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["the hat", "hi", "", "12 and 12", "hi", "a" * 60, "the"]


@pytest.fixture
def pair(tiny_decoder, tiny_tokenizer, monkeypatch):
    model = tiny_decoder(vocab_size=len(tiny_tokenizer), eos_ids=(0, *range(2, 20)))
    monkeypatch.setattr(model_arguments, "load", lambda name, weights: (model, tiny_tokenizer))
    return model, tiny_tokenizer


@pytest.fixture
def files(tmp_path):
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("\n".join(PROMPTS) + "\n")
    return source, target


def command(files, *more):
    arguments = ["--input", str(files[0]), "--output", str(files[1]), "--max-new-tokens", "9"]
    return cli.main(["generate", "somewhere", *arguments, *more])


def lines(path):
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(found, key=lambda line: line["index"])


@pytest.mark.parametrize("more", [[], ["--temperature", "1.5", "--top-k", "50", "--stop", "an"]])
def test_generate_command_writes_what_generate_gives(pair, files, more, capsys):
    model, tokenizer = pair
    options = {"temperature": 1.5, "top_k": 50, "stop": "an"} if more else {}
    assert command(files, "--seed", "3", "--batch-size", "2", *more) == 0
    found = lines(files[1])
    prompts = [prompt for prompt in PROMPTS if prompt]
    assert [(line["index"], line["prompt"]) for line in found] == list(enumerate(prompts))
    for index, line in enumerate(found):
        if len(line["prompt"]) == 60:
            assert line["finish_reason"] == "error" and (line["text"], line["tokens"]) == ("", 0)
            assert line["error"] == "60 tokens and 9 new ones exceed the context length of 64"
            continue
        text, logprobs = generate(
            model, line["prompt"], tokenizer=tokenizer, max_new_tokens=9, seed=3 + index,
            return_logprobs=True, **options,
        )  # fmt: skip
        assert (line["text"], line["tokens"]) == (text, logprobs.shape[1])
        assert line["finish_reason"] == "stop" or line["tokens"] == 9
    assert {line["finish_reason"] for line in found} == {"stop", "length", "error"}
    tokens = sum(line["tokens"] for line in found)
    assert f"6 of 6 prompts, {tokens} tokens in " in capsys.readouterr().err


def test_generate_command_reads_json_lines(pair, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('"the\\nhat"\n{"prompt": "hi", "id": 7}\n\n')
    assert command((source, target)) == 0
    assert [line["prompt"] for line in lines(target)] == ["the\nhat", "hi"]
    source.write_text('"hi"\n{"text": "hi"}\n')
    target.unlink()
    assert command((source, target)) == 1 and not target.exists()


def test_generate_command_in_the_models_template(pair, files):
    model, tokenizer = pair
    files[0].write_text("hi\n")
    assert command(files, "--chat") == 0
    ids = torch.tensor([TemplateChat(tokenizer).encode([{"role": "user", "content": "hi"}])])
    new = generate(model, ids, max_new_tokens=9)[0, ids.shape[1] :].tolist()
    text = tokenizer.decode(token for token in new if token not in model.config.eos_ids)
    assert lines(files[1])[0]["text"] == text


@pytest.mark.parametrize("cut", [0, 1, 20])
def test_generate_command_resumes(pair, files, capsys, cut):
    """What is there is kept, a line that was cut off is done again: the same answers as in one."""
    more = ["--temperature", "1.5", "--seed", "3"]
    assert command(files, *more) == 0
    whole, first = lines(files[1]), files[1].read_bytes()
    kept = first[: first.index(b"\n", first.index(b"\n") + 1) + 1]
    files[1].write_bytes(first[: len(kept) + cut])
    capsys.readouterr()
    assert command(files, *more) == 0
    assert files[1].read_bytes().startswith(kept) and lines(files[1]) == whole
    captured = capsys.readouterr()
    assert "2 of 6 prompts are answered in" in captured.out and "4 of 4 prompts" in captured.err
    assert command(files, *more) == 0
    assert lines(files[1]) == whole


def test_generate_command_refuses_another_output(pair, files, capsys):
    for content in ('{"index": 1, "prompt": "the hat"}\n', "no JSON\n", '{"index": -1}\n'):
        files[1].write_text(content)
        assert command(files) == 1
        assert "line 1: no answer to a prompt of this input" in capsys.readouterr().err
        assert files[1].read_text() == content


def test_generate_command_refuses(pair, files, tmp_path, capsys):
    for more, message in (
        (["--top-k", "5"], "set a temperature"),
        (["--batch-size", "0"], "batch_size must be"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--stop", ""], "an empty text would end"),
        (["--input", str(tmp_path / "none")], "none"),
    ):
        assert command(files, *more) == 1
        assert message in capsys.readouterr().err and not files[1].exists()


def test_generate_command_interrupted_keeps_what_is_done(pair, files, monkeypatch, capsys):
    finished = generate_command.finished

    def interrupted(task):
        for count, answer in enumerate(finished(task)):
            if count == 2:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(generate_command, "finished", interrupted)
    assert command(files) == 130
    assert len(lines(files[1])) == 3  # with the one that is too long
    assert "3 of 6 prompts" in capsys.readouterr().err
    monkeypatch.undo()


def test_generate_command_killed(tiny_decoder, tiny_tokenizer, tmp_path):
    """SIGINT to the process itself: whole lines only, and the run can be taken up again."""
    model = tiny_decoder(vocab_size=len(tiny_tokenizer), context_length=4096, eos_ids=())
    save(model, tiny_tokenizer, tmp_path / "model")
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("the hat\n" * 200)
    # A process that was started in the background ignores SIGINT, and so would its children.
    code = (
        "import signal, sys; from llmcore import cli; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "generate", str(tmp_path / "model"), "--threads", "1",
         "--input", str(source), "--output", str(target), "--max-new-tokens", "100",
         "--batch-size", "2"],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and not (target.exists() and target.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(600) == 130
    finally:
        process.kill()
    found = lines(target)
    assert 0 < len(found) < 200 and all(line["tokens"] == 100 for line in found)
