"""`llmcore serve`: a tiny model behind transformers' server, asked over HTTP."""

from __future__ import annotations

import importlib.util
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from families import build, word_tokenizer

from llmcore.cli import main

WORDS = "w5 w7 w11"
HANGS = 600
"""Seconds after which whoever waits gives up: a server is slow where other processes work."""


def test_serve_says_what_is_wrong(capsys, monkeypatch):
    assert main(["serve", "smollm2", "--weights", "int3"]) == 1
    assert "int3" in capsys.readouterr().err
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert main(["serve", "smollm2"]) == 1
    assert "pip install 'llmcore[serve]'" in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama and its tokenizer in Hugging Face's form."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<s> {{ m['content'] }} {% endfor %}"
    build("llama").save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def server(folder):
    """Its address and process; interrupted afterwards."""
    for package in ("fastapi", "uvicorn", "openai", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "llmcore", "serve", "tiny", "--port", port, "--threads", "1"]
    output = folder.parent / "output"
    with output.open("w") as file:
        process = subprocess.Popen(
            command, cwd=folder.parent, stdout=file, stderr=subprocess.STDOUT, text=True
        )
    address = f"http://localhost:{port}/v1"
    try:
        for _ in range(4 * HANGS):
            assert process.poll() is None, output.read_text()
            try:
                urllib.request.urlopen(f"{address}/models", timeout=HANGS).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.25)
        else:
            pytest.fail(f"no answer: {output.read_text()}")
        yield address, process, output
    finally:
        process.kill()
        process.wait()


def post(address: str, **body) -> str:
    request = urllib.request.Request(
        f"{address}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=HANGS) as answer:
        return answer.read().decode()


@pytest.mark.slow
def test_serve_answers_whole_and_streamed(server):
    address, process, output = server
    with urllib.request.urlopen(f"{address}/models", timeout=HANGS) as listed:
        assert [model["id"] for model in json.load(listed)["data"]] == ["tiny"]
    tokenizer = word_tokenizer()
    ids = tokenizer(f"<s> {WORDS}", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = build("llama").generate(ids, max_new_tokens=6, do_sample=False)
    expected = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": WORDS}],
        "max_tokens": 6,
        "temperature": 0,
    }
    whole = json.loads(post(address, **body))["choices"][0]["message"]["content"]
    assert whole == expected and whole
    pieces = []
    for line in post(address, **body, stream=True).splitlines():
        if line.startswith("data: {"):
            delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
            pieces.append(delta.get("content") or "")
    assert len(pieces) > 2 and "".join(pieces).strip() == expected
    process.send_signal(signal.SIGINT)
    # As any command; 0 where the process was started in the background and ignores SIGINT.
    assert process.wait(HANGS) in (0, 130), output.read_text()
    assert "swapped: " in output.read_text()
