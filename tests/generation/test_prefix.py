"""The prefix cache: same bits as without, what it holds and lets go, and files one can trust."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from generation_runs import alone, assert_same, random_prompts, run, shapes_of_passes, task_of

from llmcore import use
from llmcore.generation.prefix import PrefixCache, common_length, fingerprint
from llmcore.generation.reading import Reader
from llmcore.models import KVCache, PagedKVCache

pytestmark = pytest.mark.usefixtures("native_kernels")


def read(model, cache, ids, **options):
    """Let the prefix cache remember this text."""
    reader = Reader(model, KVCache(model.config, 1, **options))
    reader.read(ids)
    cache.add(ids, reader.cache.take(0))


@pytest.mark.parametrize("options", [{}, {"paged": True}, {"cache_dtype": "int8"}], ids=str)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_prefix_changes_no_bit(tiny_decoder, monkeypatch, options, batch_size):
    """A system prompt and a conversation that grows: only what is new is computed."""
    model = tiny_decoder()
    prefixes = PrefixCache(model, dtype=options.get("cache_dtype"))
    system, first, second = random_prompts(15, 4, 6)
    options["new"] = 8
    setup = {"prefixes": prefixes, "batch_size": batch_size}
    prompts = [system + first, system + second]
    expected = alone(model, prompts, **options)
    assert_same(run(task_of(model, prompts, **setup, **options)), expected)
    assert len(prefixes) == 2
    talk = [[*prompts[1], *expected[0][1], 9, 8, 7], [*system, 3, 4]]
    expected = alone(model, talk, **options)
    shapes = shapes_of_passes(model, monkeypatch)
    assert_same(run(task_of(model, talk, **setup, **options)), expected)
    # The last token of an answer has not been in a pass: it and the 3 new ones are read; the other
    # text has 2 new tokens.
    reads = [shape for shape in shapes if shape[1] > 1]
    assert reads == ([(1, 4), (1, 2)] if batch_size == 1 else [(2, 4)])
    assert shapes[0] == reads[0]


def test_prefix_answer_broken_off_is_not_lost(tiny_decoder):
    from llmcore.generation.batch import steps

    model = tiny_decoder()
    prefixes, [prompt] = PrefixCache(model), random_prompts(10)
    answer = steps(task_of(model, [prompt], prefixes=prefixes))
    tokens = [next(answer).tokens[0] for _ in range(5)]
    answer.close()
    assert prefixes.longest([*prompt, *tokens]).length == 14


def test_prefix_least_recently_used_leaves_first(tiny_decoder):
    model = tiny_decoder()
    first, second, third = random_prompts(10, 10, 10)
    size = 10 * 2 * 3 * 2 * 8 * 4  # tokens, keys and values, layers, heads, width, bytes
    prefixes = PrefixCache(model, max_bytes=2 * size + 100)
    for text in (first, second):
        read(model, prefixes, text)
    assert prefixes.nbytes == 2 * size
    assert prefixes.longest(first[:4]).length == 4
    read(model, prefixes, third)
    assert len(prefixes) == 2 and prefixes.nbytes == 2 * size
    assert prefixes.longest(second) is None
    assert prefixes.longest(first).length == prefixes.longest(third).length == 10
    read(model, prefixes, random_prompts(30)[0])  # too large for all
    assert prefixes.longest(first).length == 10


def test_prefix_longer_text_takes_the_shorter_ones_place(tiny_decoder):
    model = tiny_decoder()
    prefixes, [text] = PrefixCache(model), random_prompts(12)
    for length in (5, 12, 9):
        read(model, prefixes, text[:length])
    assert len(prefixes) == 1
    assert prefixes.longest([*text, 4]).length == 12
    assert prefixes.longest([*text[:7], 1]).length == 7


def test_prefix_is_forgotten_when_the_weights_change(tiny_decoder, tmp_path):
    model = tiny_decoder()
    prefixes, [text] = PrefixCache(model), random_prompts(12)
    before = fingerprint(model)
    for change in (
        lambda weight: weight.mul_(1.5),
        lambda weight: setattr(weight, "data", weight.data.clone()),
    ):
        read(model, prefixes, text)
        prefixes.save(tmp_path / "text", text)
        assert prefixes.longest(text) is not None
        with torch.no_grad():
            change(model.blocks[1].feed_forward.up.weight)
        assert prefixes.longest(text) is None
    assert fingerprint(model) != before


def test_prefix_bitten_off_by_a_window_is_not_kept(tiny_decoder):
    model = tiny_decoder(context_length=900, window=40)
    prefixes, [text] = PrefixCache(model), random_prompts(700)
    read(model, prefixes, text[:100])
    reader = Reader(model, PagedKVCache(model.config, 1), prefixes)
    assert reader.read(text).shape == (1, 300)
    assert reader.cache.take(0).first > 0
    prefixes.add(text, reader.cache.take(0))
    assert prefixes.longest(text).length == 100


def test_common_length():
    assert common_length([], [1]) == common_length([2], [1]) == 0
    assert common_length([1, 2, 3], [1, 2]) == common_length((1, 2, 4), (1, 2, 3)) == 2


@pytest.fixture
def saved(tiny_decoder, tmp_path):
    """A model, a text, and the file of it."""
    model, [text] = tiny_decoder(), random_prompts(20)
    prefixes = PrefixCache(model)
    read(model, prefixes, text)
    prefixes.save(tmp_path / "text.safetensors", text)
    return model, text, tmp_path / "text.safetensors"


@pytest.mark.parametrize("dtype", [None, "bf16", "int8"])
def test_prefix_from_a_file_changes_no_bit(tiny_decoder, tmp_path, monkeypatch, dtype):
    model, [text] = tiny_decoder(), random_prompts(20)
    path = tmp_path / "new folder" / "text"
    prefixes = PrefixCache(model, dtype=dtype)
    read(model, prefixes, text, dtype=dtype)
    prefixes.save(path, text)
    assert [p.name for p in path.parent.iterdir()] == ["text"]
    twin = tiny_decoder()
    again = PrefixCache(twin, dtype=dtype)
    assert again.load(path) == text
    prompt = [*text, 5, 6]
    expected = alone(model, [prompt], cache_dtype=dtype)
    shapes = shapes_of_passes(model, monkeypatch)
    assert_same(run(task_of(twin, [prompt], prefixes=again, cache_dtype=dtype)), expected)
    assert shapes[0] == (1, 2)


def refused(path, model, message, **options):
    with pytest.raises(ValueError, match=message) as caught:
        PrefixCache(model, **options).load(path)
    assert str(path) in str(caught.value)


def test_prefix_file_of_something_else_is_refused(saved, tiny_decoder, tmp_path):
    model, _, path = saved
    refused(path, tiny_decoder(seed=1), "it belongs to another model")
    refused(path, tiny_decoder(norm_eps=1e-6), "it belongs to another model")
    refused(path, model, "kept in another dtype", dtype="int8")
    refused(path, model, "7680 bytes, more than max_bytes, 100", max_bytes=100)
    with use("reference"):
        refused(path, model, "other kernels computed it")
    foreign = tmp_path / "foreign"
    safetensors.torch.save_file({"keys.0": torch.zeros(2, 3)}, foreign)
    refused(foreign, model, "it is no file of a text's keys and values")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        PrefixCache(model).load(tmp_path / "nowhere")


def test_prefix_file_that_is_damaged_is_refused(saved, tmp_path):
    model, _, path = saved
    whole, bad = path.read_bytes(), tmp_path / "bad"
    generator = torch.Generator().manual_seed(0)
    for length in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:length])
        refused(bad, model, "is not a whole safetensors file")
    for data in (b"garbage" * 1000, bytes(5000), whole + b"x"):
        bad.write_bytes(data)
        refused(bad, model, "is not a whole safetensors file")
    for place in torch.randint(len(whole), (60,), generator=generator).tolist():
        bad.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        refused(
            bad, model, r"safetensors file|its numbers are|belongs|version|dtype|kernels|no file"
        )
    bad.write_bytes(whole.replace(b'"version":"1"', b'"version":"2"'))
    refused(bad, model, "it is in another version of the format")
    assert PrefixCache(model).load(path)


def test_prefix_saves_only_what_it_holds(saved):
    model, text, path = saved
    prefixes = PrefixCache(model)
    read(model, prefixes, text)
    with pytest.raises(ValueError, match="of these 21 tokens only the first 20 are held"):
        prefixes.save(path, [*text, 3])
    prefixes.save(path, text[:7])
    assert PrefixCache(model).load(path) == text[:7]


KILLED = """
import os, sys, torch
from llmcore.generation.prefix import _write_whole
from pathlib import Path
real, when = getattr(os, sys.argv[1]), sys.argv[1]
def stopped(*args, **options):
    print("now", flush=True)
    sys.stdin.read()
    return real(*args, **options)
setattr(os, when, stopped)
_write_whole(Path(sys.argv[2]), b"half of a file")
"""


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_prefix_process_killed_in_the_write_leaves_no_bad_file(saved, moment):
    """Killed with the data in the file, and before the file has its name: the old one stands."""
    model, text, path = saved
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, moment, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert PrefixCache(model).load(path) == text


def test_prefix_failed_write_leaves_nothing_behind(saved, monkeypatch):
    model, text, path = saved
    prefixes = PrefixCache(model)
    prefixes.load(path)
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        prefixes.save(path, text[:5])
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert PrefixCache(model).load(path) == text


def test_prefix_refuses(tiny_decoder):
    model = tiny_decoder()
    prefixes, [text] = PrefixCache(model), random_prompts(4)
    with pytest.raises(ValueError, match="max_bytes must be 0 or more, got -1"):
        PrefixCache(model, max_bytes=-1)
    with pytest.raises(ValueError, match="dtype must be None or one of"):
        PrefixCache(model, dtype="fp8")
    with pytest.raises(ValueError, match="prefix_cache belongs to another model"):
        task_of(tiny_decoder(), [text], prefixes=prefixes)
    with pytest.raises(ValueError, match="prefix_cache holds None, cache_dtype is int8"):
        task_of(model, [text], prefixes=prefixes, cache_dtype="int8")
    cache = KVCache(model.config, 1)
    Reader(model, cache).read(text)
    with pytest.raises(ValueError, match="ids: 3 tokens, and kept has 4"):
        prefixes.add(text[:3], cache.take(0))
