"""`llmcore bench accelerate`: models of Hugging Face, as they come and after llmcore.accelerate.

Every family with random weights at a small size, and some shapes that people run. Stock and
accelerated models have the same weights and take turns, round by round. Prints the section of
docs/accelerate.md as it stands there (Markdown, to standard output; what is under way goes to
standard error): what is swapped, the largest difference of outputs, and how many times as fast it
is to read a prompt, to decode, and to train.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import llmcore
from llmcore.swap.report import Report

from . import machine, memory, roofline
from .report import JsonFile
from .timing import Contender

WIDTH, HEADS, LAYERS, INNER, TOKENS = 256, 8, 4, 704, 8192
NAMED = {
    "vocab_size": TOKENS,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**NAMED, "num_key_value_heads": HEADS // 2}
SLIDING = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2}
BOTH_SIDES = {
    "vocab_size": TOKENS,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}


@dataclass(frozen=True)
class Family:
    """A model of transformers at a small size; `takes` is "text", "picture" or "sound"."""

    name: str
    config: str
    model: str
    sizes: dict[str, Any]
    takes: str = "text"
    generates: bool = True


FAMILIES = (
    Family("GPT-2", "GPT2Config", "GPT2LMHeadModel", {
        "vocab_size": TOKENS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS,
        "n_positions": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }),
    Family("Llama", "LlamaConfig", "LlamaForCausalLM", GROUPED),
    Family("Qwen2", "Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    Family("Qwen3", "Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 32}),
    Family("Mistral", "MistralConfig", "MistralForCausalLM", {**GROUPED, "sliding_window": 64}),
    Family("Phi", "PhiConfig", "PhiForCausalLM", GROUPED),
    Family("OPT", "OPTConfig", "OPTForCausalLM", {
        **NAMED, "ffn_dim": INNER, "word_embed_proj_dim": WIDTH,
    }),
    Family("GPT-NeoX", "GPTNeoXConfig", "GPTNeoXForCausalLM", NAMED),
    Family("Gemma 2", "Gemma2Config", "Gemma2ForCausalLM", {**GROUPED, "head_dim": 32, **SLIDING}),
    Family("Gemma 3", "Gemma3TextConfig", "Gemma3ForCausalLM", {
        **GROUPED, "head_dim": 32, **SLIDING,
    }),
    Family("GPT-OSS", "GptOssConfig", "GptOssForCausalLM", {
        **GROUPED, "head_dim": 32, **SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2,
    }),
    Family("T5", "T5Config", "T5ForConditionalGeneration", {
        "vocab_size": TOKENS, "d_model": WIDTH, "d_kv": 32, "d_ff": INNER, "num_layers": LAYERS,
        "num_heads": HEADS, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
    }),
    Family("BART", "BartConfig", "BartForConditionalGeneration", BOTH_SIDES),
    Family("Marian", "MarianConfig", "MarianMTModel", BOTH_SIDES),
    Family("Whisper", "WhisperConfig", "WhisperForConditionalGeneration", {
        **BOTH_SIDES, "num_mel_bins": 80, "max_source_positions": 200, "max_target_positions": 128,
        "suppress_tokens": None, "begin_suppress_tokens": None,
    }, takes="sound"),
    Family("BERT", "BertConfig", "BertForMaskedLM", NAMED, generates=False),
    Family("MiniLM", "BertConfig", "BertModel", {
        **NAMED, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536,
    }, generates=False),
    Family("ViT", "ViTConfig", "ViTForImageClassification", {
        "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "intermediate_size": INNER, "image_size": 64, "patch_size": 8,
    }, takes="picture", generates=False),
)  # fmt: skip


@dataclass
class Row:
    """A model: what was swapped, max|new - old| of its output, and times as fast as stock."""

    name: str
    swapped: dict[str, int]
    left: list[str]
    difference: float
    ratios: dict[str, float | None] = field(default_factory=dict)
    milliseconds: dict[str, tuple[float, float]] = field(default_factory=dict)


Call = Callable[[nn.Module], Any]


def build(family: Family) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**family.sizes)
    return getattr(transformers, family.model)(config).eval()


def arguments(family: Family, model: Any, length: int) -> dict[str, Tensor]:
    """Two of what the model takes; text of this length."""
    draw = torch.Generator().manual_seed(1)
    if family.takes == "picture":
        return {"pixel_values": torch.randn(2, 3, 64, 64, generator=draw)}
    ids = torch.randint(3, TOKENS, (2, length), generator=draw)
    found = {"input_ids": ids}
    if family.takes == "sound":
        found = {"input_features": torch.randn(2, 80, 400, generator=draw)}
    if model.config.is_encoder_decoder:
        found["decoder_input_ids"] = ids[:, : length // 2].contiguous()
    return found


def main_output(output: Any) -> Tensor:
    """The logits, or what the model gives first."""
    found: Tensor = next(v for k, v in output.items() if k != "loss")
    return found


def jobs(
    family: Family, model: Any, length: int = 128, new: int = 12
) -> Iterator[tuple[str, Call]]:
    """What is timed; a model without a loss or without generation leaves one out."""
    given = arguments(family, model, length)

    @torch.no_grad()
    def prefill(model: Any) -> Tensor:
        return main_output(model.eval()(**given))

    yield "prefill", prefill
    if family.generates:
        prompt = {k: v[:1, :16] if k == "input_ids" else v[:1] for k, v in given.items()}
        prompt.pop("decoder_input_ids", None)
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        if "input_ids" in prompt:
            prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])

        def decode(model: Any) -> Tensor:
            found: Tensor = model.eval().generate(
                **prompt, max_new_tokens=new, min_new_tokens=new, **options
            )
            return found

        yield "decode", decode
    labelled = dict(given)
    if family.takes == "picture":
        labelled["labels"] = torch.tensor([0, 1])
    elif "Model" not in family.model.removesuffix("LMHeadModel").removesuffix("MTModel"):
        labelled["labels"] = labelled.pop("decoder_input_ids", next(iter(given.values())))
    else:
        return

    def train(model: Any) -> Any:
        loss = model.train()(**labelled).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    yield "training step", train


def in_turns(call: Call, models: list[Any], rounds: int, warm: bool = False) -> list[float]:
    """Median seconds of a call of each model, after one that isn't timed unless they are warm."""
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(1 if warm else 0, rounds + 1):
        for model, found in zip(models, seconds, strict=True):
            start = time.perf_counter()
            call(model)
            if turn:
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in seconds]


def compare(family: Family, rounds: int) -> Row:
    """A family's row: held against stock, then timed."""
    stock = build(family)
    ours = copy.deepcopy(stock)
    row = swapped_row(family, stock, ours)
    for name, call in jobs(family, stock):
        before, after = in_turns(call, [stock, ours], rounds)
        row.ratios[name] = before / after
        row.milliseconds[name] = (before * 1e3, after * 1e3)
    return row


def swapped_row(family: Family, stock: nn.Module, ours: nn.Module) -> Row:
    """What `accelerate` does with a copy of the stock model, and their difference."""
    report = llmcore.accelerate(ours)
    _, prefill = next(jobs(family, stock))
    difference = (prefill(ours) - prefill(stock)).abs().max().item()
    return Row(family.name, report.structures(), left_of(report), difference)


def left_of(report: Report) -> list[str]:
    """Kinds of modules that hold weights and were left, and what else has a reason."""
    return sorted({left.kind for left in report.left})


# Shapes that people run


@dataclass
class Shape:
    """One figure: stock and accelerated, in milliseconds.

    operations           of its products, for the share of the FMA peak that it reaches
    stock_memory, ours_memory   the most that a call takes beyond its results, in bytes
    """

    name: str
    stock: float
    ours: float
    goal: float
    operations: int | None = None
    stock_memory: int | None = None
    ours_memory: int | None = None

    @property
    def ratio(self) -> float:
        return self.stock / self.ours

    def shares(self, peak: float) -> tuple[float, float] | None:
        """What either reaches of `peak` operations a second."""
        if self.operations is None:
            return None
        return tuple(self.operations / (ms * 1e-3) / peak for ms in (self.stock, self.ours))  # type: ignore[return-value]


def fma_peak() -> float:
    """float32 operations a second of this machine on torch's threads: its fastest turn."""
    probe = roofline.fma()
    seconds = []
    for _ in range(40):
        start = time.perf_counter()
        probe.call()
        seconds.append(time.perf_counter() - start)
    return probe.amount / min(seconds)


def operations_of(call: Callable[[], Any]) -> int:
    """Two for each multiply-add of the products in a call of a stock model."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def smollm2_shapes(rounds: int) -> Iterator[Shape]:
    """Decoding of SmolLM2-135M after a prompt of 32, in float32 and with int8 weights."""
    from llmcore.models.convert import to_transformers

    model, _ = llmcore.models.load("smollm2")
    stock = to_transformers(model, "eager")
    del model
    ids = torch.randint(3, 49152, (1, 32), generator=torch.Generator().manual_seed(1))
    mask, new = torch.ones_like(ids), 24

    def decode(model: Any) -> Any:
        options = {"do_sample": False, "min_new_tokens": new, "pad_token_id": 0}
        return model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)

    for weights, goal in ((None, 2.0), ("int8", 4.0)):
        ours = copy.deepcopy(stock)
        llmcore.accelerate(ours, weights=weights)
        before, after = in_turns(decode, [stock, ours], rounds)
        name = f"SmolLM2-135M, decode, {weights or 'fp32'}, ms a token"
        yield Shape(name, before * 1e3 / new, after * 1e3 / new, goal)
        del ours


def bert_shape(rounds: int) -> Iterator[Shape]:
    """BERT-base's shape reading 8 texts of 128 tokens."""
    import transformers

    torch.manual_seed(0)
    stock = transformers.BertModel(transformers.BertConfig()).eval()
    ids = torch.randint(3, 30522, (8, 128), generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def encode(model: Any) -> Any:
        return model(input_ids=ids).last_hidden_state

    stock.set_attn_implementation("eager")
    operations = operations_of(lambda: encode(stock))
    for attention in ("eager", "sdpa"):
        stock.set_attn_implementation(attention)
        ours = copy.deepcopy(stock)
        llmcore.accelerate(ours)
        before, after = in_turns(encode, [stock, ours], rounds)
        name = f"BERT-base, 8 x 128, stock in {attention}"
        yield Shape(name, before * 1e3, after * 1e3, 1.3, operations)


def gpt2_shape(rounds: int) -> Iterator[Shape]:
    """A training step of GPT-2 small's shape on 4 texts of 512 tokens, with dropout as it comes.

    Two rounds at most: a step takes seconds.
    """
    import transformers

    torch.manual_seed(0)
    stock = transformers.GPT2LMHeadModel(transformers.GPT2Config()).train()
    ids = torch.randint(3, 50257, (4, 512), generator=torch.Generator().manual_seed(1))

    def step(model: Any) -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    stock.set_attn_implementation("eager")
    operations = operations_of(lambda: step(stock))
    stock.set_attn_implementation("sdpa")
    ours = copy.deepcopy(stock)
    llmcore.accelerate(ours)
    peaks = []
    for model in (stock, ours):  # the gradients stay, and are none of what a step needs besides
        gc.collect()
        peaks.append(memory.extra(Contender("", lambda m=model: step(m)), 1))  # type: ignore[misc]
    before, after = in_turns(step, [stock, ours], min(rounds, 2), warm=True)
    name = "GPT-2 small, 4 x 512, training step"
    yield Shape(name, before * 1e3, after * 1e3, 1.3, operations, peaks[0], peaks[1])


SHAPES: dict[str, Callable[[int], Iterator[Shape]]] = {
    "SmolLM2-135M": smollm2_shapes,
    "BERT-base": bert_shape,
    "GPT-2 small": gpt2_shape,
}


# The command


def run(args: argparse.Namespace, threads: int) -> int:
    """The command: the section of docs/accelerate.md that has its figures, or the named rows of it.

    2 where a name is unknown, or transformers is not installed.
    """
    known, named = (*(f.name for f in FAMILIES), *SHAPES), args.ops[1:]
    for name in named:
        if name not in known:
            print(f"accelerate: got {name!r}, expected some of {', '.join(known)}")
            return 2
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: pip install 'llmcore[demo]'")
        return 2
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rounds = 3 if args.quick else 7
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        settings = {"rounds": rounds, "threads": threads, "transformers": transformers.__version__}
        found = Found(settings, fma_peak())
        with contextlib.suppress(KeyboardInterrupt):  # what it has so far is printed
            measure(found, rounds, named or known)
    finally:
        torch.set_num_threads(before)
    print("", *section(found), sep="\n")
    path = args.json or machine.results_file()
    found.write(path)
    print(f"results: {path}", file=sys.stderr)
    return 0


def measure(found: Found, rounds: int, chosen: Sequence[str]) -> None:
    """The chosen rows, one after the other."""
    begin = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - begin:5.0f} s  {text}", file=sys.stderr, flush=True)

    for family in (f for f in FAMILIES if f.name in chosen):
        found.rows.append(compare(family, rounds))
        say(row_text(found.rows[-1]))
    for shapes in (row for name, row in SHAPES.items() if name in chosen):
        for shape in shapes(rounds):
            found.shapes.append(shape)
            say(shape_text(shape, found.peak))
    found.peak = max(found.peak, fma_peak())


@dataclass
class Found(JsonFile):
    """All of a run."""

    settings: dict[str, Any]
    peak: float  # float32 operations a second
    rows: list[Row] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "machine": machine.describe(),
            "settings": self.settings,
            "fma_peak": self.peak,
            "models": [asdict(row) for row in self.rows],
            "shapes": [asdict(shape) for shape in self.shapes],
        }


HEADER = (
    "| model | swapped | left | max difference | prefill | decode | training step |",
    "|---|---|---|---|---|---|---|",
)
SHAPE_HEADER = (
    "| | stock, ms | accelerated, ms | times as fast | to reach | of the FMA peak | memory |",
    "|---|---|---|---|---|---|---|",
)


def section(found: Found) -> Iterator[str]:
    """Both tables and what they were measured on, as in docs/accelerate.md."""
    described, settings = machine.describe(), found.settings
    versions = {**described["versions"], "transformers": settings["transformers"]}
    yield (
        f"{described['cpu']}, {settings['threads']} threads, float32, medians of "
        f"{settings['rounds']} rounds in turn; "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}:"
    )
    yield from ("", *HEADER, *map(row_text, found.rows), "")
    yield f"Shapes that people run; this machine's FMA peak is {found.peak / 1e9:.0f} GFLOP/s:"
    yield from ("", *SHAPE_HEADER, *(shape_text(s, found.peak) for s in found.shapes), "")


def row_text(row: Row) -> str:
    ratios = (row.ratios.get(name) for name in ("prefill", "decode", "training step"))
    cells = ("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios)
    return (
        f"| {row.name} | {swapped_text(row)} | {', '.join(row.left)} | {row.difference:.0e} | "
        f"{' | '.join(cells)} |"
    )


def swapped_text(row: Row) -> str:
    return ", ".join(f"{name} {count}" for name, count in row.swapped.items())


def shape_text(shape: Shape, peak: float) -> str:
    memory, share = "-", "-"
    if shape.stock_memory is not None and shape.ours_memory is not None:
        memory = f"{shape.stock_memory / 1e9:.2f} GB -> {shape.ours_memory / 1e9:.2f} GB"
    if (shares := shape.shares(peak)) is not None:
        share = " -> ".join(f"{s:.0%}" for s in shares)
    return (
        f"| {shape.name} | {shape.stock:.1f} | {shape.ours:.1f} | {shape.ratio:.2f} | "
        f"{shape.goal:.1f} | {share} | {memory} |"
    )
