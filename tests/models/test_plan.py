"""The native pass: the bits of the modules it stands for, and every reason to go by those."""

import copy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import llmcore
from llmcore import device, dispatch
from llmcore.models import KVCache, PagedKVCache
from llmcore.models.packed import pack_weights
from llmcore.models.plan import Plan, into_huge_pages, refuses_cache, refuses_call, refuses_model

pytestmark = pytest.mark.skipif(
    llmcore.native.module is None, reason=f"the native kernels: {llmcore.native.why_not}"
)

SHAPES = {
    "llama": {},
    "untied": {"tied_embeddings": False},
    "bias": {"bias": True, "kv_heads": 1},
    "wide_heads": {"head_width": 12},
    "parallel": {"norm_placement": "parallel", "norm": "layer_norm", "rotary_width": 4},
}


def by_modules(monkeypatch):
    monkeypatch.setattr(Plan, "of", classmethod(lambda *_: None))


@torch.no_grad()
def passes(model, batch=2, kind=KVCache, **options):
    """Logits of a prompt, of single tokens, and of padded ones, over one cache, and its lengths."""
    ids = torch.randint(300, (batch, 40), generator=torch.Generator().manual_seed(0))
    cache = kind(model.config, batch, **options)
    logits = [model(ids[:, :20], cache), model(ids[:, 20:21], cache, last_only=True)]
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[0, :3] = False
    logits.append(model(ids[:, 21:26], cache, mask)[mask])
    logits.append(model(ids[:, 26:27], cache))
    logits.append(model(ids[:, 27:32], cache, mask, last_only=True))
    return [*logits, cache.lengths], cache.plan is not None


def assert_same_bits(model, monkeypatch, **options):
    native, planned = passes(model, **options)
    assert planned
    with monkeypatch.context() as patch:
        by_modules(patch)
        expected, planned = passes(model, **options)
    assert not planned
    for ours, theirs in zip(native, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, "gpt2"])
def test_plan_has_the_bits_of_the_modules(tiny_decoder, gpt2_shape, monkeypatch, shape, dtype):
    model = tiny_decoder(**(gpt2_shape if shape == "gpt2" else SHAPES[shape])).to(dtype)
    assert_same_bits(model, monkeypatch)


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("shape", ["llama", "untied", "gpt2"])
def test_plan_takes_packed_weights(tiny_decoder, gpt2_shape, monkeypatch, shape, format):
    model = tiny_decoder(**(gpt2_shape if shape == "gpt2" else SHAPES[shape]))
    pack_weights(model, format)
    assert_same_bits(model, monkeypatch)
    assert_same_bits(model.to(torch.bfloat16), monkeypatch)


@pytest.mark.parametrize(
    "level", [name for name, lacks in device.cpu_levels().items() if not lacks]
)
def test_plan_at_every_level(tiny_decoder, monkeypatch, level):
    with llmcore.use(f"cpu_{level}"):
        assert_same_bits(tiny_decoder(), monkeypatch)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_plan_has_the_same_bits_on_any_threads(tiny_decoder, threads):
    model, before = tiny_decoder(width=512, feed_forward=1024), torch.get_num_threads()
    expected, _ = passes(model)
    try:
        torch.set_num_threads(threads)
        found, planned = passes(model)
    finally:
        torch.set_num_threads(before)
    assert planned
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_plan_from_several_threads_at_once(tiny_decoder):
    """Each pass has threads of its own, and those of no other."""
    model, before = tiny_decoder(width=512, feed_forward=1024, layers=4), torch.get_num_threads()
    gold, planned = passes(model)
    assert planned

    def passes_by_two(_: int):
        torch.set_num_threads(2)  # of what this thread starts
        assert torch.get_num_threads() == 2
        return passes(model)[0]

    try:
        with ThreadPoolExecutor(3) as pool:
            for found in pool.map(passes_by_two, range(12)):
                assert all(torch.equal(a, b) for a, b in zip(found, gold, strict=True))
    finally:
        torch.set_num_threads(before)


def test_huge_pages_keep_contents():
    whole, small = torch.arange(4 << 20), torch.zeros(1000)
    address = whole.data_ptr()
    moved = into_huge_pages([whole, small, whole])
    assert torch.equal(whole, torch.arange(4 << 20)) and whole.data_ptr() == address
    assert moved % (2 << 20) == 0 and 0 <= moved <= whole.nbytes + (2 << 20)
    assert into_huge_pages([small]) == 0


# In a process of its own, whose C library has no free memory yet: that may lie in huge pages.
HUGE_PAGES = """
import pathlib, torch, llmcore
from llmcore.models.plan import into_huge_pages
def huge():
    lines = pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))
weights = torch.zeros(4 << 20)
weights += 1
before = huge()
moved = into_huge_pages([weights])
print(moved, huge() - before)
x = torch.randn(3072, 4096)
before = huge()
y = llmcore.ops.softmax(x)
print(y.nbytes, huge() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is Linux that counts them")
def test_huge_pages_hold_weights_and_large_results():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("this system gives huge pages to nobody, or to all")
    run = subprocess.run([sys.executable, "-c", HUGE_PAGES], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for line in run.stdout.splitlines():
        wanted, found = map(int, line.split())
        assert found >= wanted // 2, run.stdout  # the system may be short of them


def test_plan_moves_all_weights_into_huge_pages(tiny_decoder, monkeypatch):
    moved = []
    monkeypatch.setattr("llmcore.models.plan.into_huge_pages", moved.extend)
    model = tiny_decoder()
    assert passes(model)[1]
    assert {p.data_ptr() for p in model.parameters()} <= {t.data_ptr() for t in moved}


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_plan_over_other_caches(tiny_decoder, monkeypatch, positions):
    model = tiny_decoder(positions=positions)
    assert_same_bits(model, monkeypatch, capacity=4)
    assert_same_bits(model, monkeypatch, kind=PagedKVCache, page_length=4)
    for dtype in ("bf16", "int8"):
        assert_same_bits(model, monkeypatch, dtype=dtype)
        assert_same_bits(model, monkeypatch, kind=PagedKVCache, page_length=4, dtype=dtype)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert refuses_cache(model, KVCache(model.config, 1, dtype="int8")) == []
    assert refuses_cache(half, KVCache(model.config, 1, dtype="int8"))


def test_plan_with_a_window(tiny_decoder, monkeypatch):
    """Long enough that the cache forgets: slots are not positions any more."""
    model = tiny_decoder(window=100, context_length=2048)
    ids = torch.randint(300, (2, 1300))

    @torch.no_grad()
    def read():
        cache = KVCache(model.config, 2, 64)
        logits = [model(part, cache, last_only=True) for part in ids.split(350, dim=1)]
        assert cache.keys[0].shape[2] < 1300
        return logits

    native = read()
    by_modules(monkeypatch)
    for ours, theirs in zip(native, read(), strict=True):
        assert torch.equal(ours, theirs)


def test_plan_threads_and_batch(tiny_decoder):
    model = tiny_decoder()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone, _ = passes(model)
    finally:
        torch.set_num_threads(threads)
    together, _ = passes(model)
    for one, two in zip(alone, together, strict=True):
        assert torch.equal(one, two)
    single, _ = passes(model, batch=1)
    assert torch.equal(single[0], together[0][:1])


def test_plan_last_token_of_a_prompt(tiny_decoder):
    model = tiny_decoder()
    ids = torch.randint(300, (3, 33))
    with torch.no_grad():
        whole = model(ids, KVCache(model.config, 3))
        last = model(ids, KVCache(model.config, 3), last_only=True)
    assert torch.equal(last, whole[:, -1:])


def test_plan_follows_weights_changed_in_place(tiny_decoder):
    model = tiny_decoder()
    ids = torch.randint(300, (1, 4))
    cache = KVCache(model.config, 1)
    with torch.no_grad():
        model(ids, cache)
        model.norm.weight.mul_(2.0)
        cache.truncate([0])
        after = model(ids, cache)
        assert torch.equal(after, model(ids, KVCache(model.config, 1)))


def in_other_memory(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * 2


@pytest.mark.parametrize(
    "move", [lambda model: model.to(torch.bfloat16), in_other_memory], ids=["dtype", "memory"]
)
def test_plan_follows_weights_that_moved(tiny_decoder, move):
    model, ids = tiny_decoder(), torch.randint(300, (1, 4))
    cache = KVCache(model.config, 1)
    with torch.no_grad():
        model(ids, cache)
        held = [tensor.clone() for tensor in cache.plan.tensors]
        plan = cache.plan
        move(model)
        assert all(map(torch.equal, plan.tensors, held))  # memory that nobody else has got
        cache.truncate([0])
        after = model(ids, cache)
        assert cache.plan is not plan
        assert torch.equal(after, model(ids, KVCache(model.config, 1)))


def test_plan_refuses_what_it_is_not(tiny_decoder):
    model = tiny_decoder()
    assert refuses_model(model) == []
    assert any("grad" in reason for reason in refuses_call())
    with torch.no_grad():
        assert refuses_call() == []
        with torch.autocast("cpu"):
            assert any("autocast" in reason for reason in refuses_call())
        with dispatch.use("reference"):
            assert any("reference" in reason for reason in refuses_call())
    hooked = copy.deepcopy(model)
    hooked.blocks[1].attention.register_forward_hook(lambda *_: None)
    assert any("blocks.1.attention" in reason for reason in refuses_model(hooked))
    replaced = copy.deepcopy(model)
    replaced.blocks[0].feed_forward.down = torch.nn.Linear(48, 32, bias=False)
    assert any("feed_forward.down" in reason for reason in refuses_model(replaced))
    mixed = copy.deepcopy(model)
    mixed.norm.double()
    assert any("float64" in reason for reason in refuses_model(mixed))
    ids = torch.randint(300, (1, 5))
    with torch.no_grad():
        cache = KVCache(model.config, 1)
        hooked(ids, cache)
        assert cache.plan is None


def test_plan_checks_ids(tiny_decoder):
    model = tiny_decoder()
    with torch.no_grad(), pytest.raises(IndexError, match="300"):
        model(torch.tensor([[300]]), KVCache(model.config, 1))
