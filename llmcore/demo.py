"""`llmcore demo`: a small real model answers, is checked against stock PyTorch, and is timed."""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmcore import dispatch
from llmcore.generate import generate, stream
from llmcore.models import Decoder, KVCache, load
from llmcore.models.convert import to_transformers
from llmcore.text import TemplateChat, Tokenizer
from llmcore.verify import FORWARD_FACTOR, Verdict, judge

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
SENTENCE = "The most famous city in the US is"
# Next word: the range its probability lies in, measured with llama.cpp and transformers.
NEXT_WORDS = {
    " New": (0.186, 0.190),
    " Los": (0.027, 0.030),
    " laptop": (0.0, 5e-7),
    " apple": (2e-6, 4e-6),
}
STOCK = "transformers, eager"
DEFINITIONS = "llmcore, definitions"
OURS = "llmcore"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--rounds", type=int, default=3, help="timing rounds (default: 3)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to decode (default: 32)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens to prefill (default: 512)")


def run(args: argparse.Namespace) -> int:
    """The whole demonstration; 1 when an answer or a comparison is not as it should be."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    print("Loading SmolLM2-135M-Instruct ...", flush=True)
    try:
        model, tokenizer = load("smollm2")
    except (OSError, RuntimeError) as error:
        print(f"FAILED: {error}")
        return 1
    passed = [ask(model, tokenizer), show_next_words(model, tokenizer)]
    stock = _stock(model)
    ids = torch.tensor([TemplateChat(tokenizer).encode([_turn(QUESTION)])])
    print("\nLogits of the question, float32, against float64:")
    for name, verdict in compare(model, stock, ids).items():
        passed.append(verdict.passed)
        word = "ok" if verdict.passed else "FAILED"
        print(f"  {name:<52}{verdict.error:.2e}, allowed {verdict.bound:.2e}: {word}")
    contenders = {DEFINITIONS: model, OURS: model} if stock is None else {STOCK: stock, OURS: model}
    show_speed(contenders, args.rounds, args.new_tokens, args.prompt)
    return 0 if all(passed) else 1


def ask(model: Decoder, tokenizer: Tokenizer) -> bool:
    """Stream the answer to the question; whether it is the known one and ended by itself."""
    ids = torch.tensor([TemplateChat(tokenizer).encode([_turn(QUESTION)])])
    print(f"\n  {QUESTION}\n  ", end="")
    answer = ""
    for piece in stream(model, ids, tokenizer, max_new_tokens=48):
        print(piece, end="", flush=True)
        answer += piece
    print()
    if answer != ANSWER:
        print(f"FAILED: expected {ANSWER!r} and the end token")
    return answer == ANSWER


@torch.no_grad()
def show_next_words(model: Decoder, tokenizer: Tokenizer) -> bool:
    """The table of next words; whether each probability lies in its range."""
    ids = torch.tensor([tokenizer.encode(SENTENCE)])
    probabilities = model(ids, last_only=True)[0, 0].softmax(dim=-1)
    print(f'\n  "{SENTENCE} ..."\n')
    right = True
    for word, (low, high) in NEXT_WORDS.items():
        p = float(probabilities[tokenizer.encode(word)[0]])
        fits = low <= p <= high
        right &= fits
        note = "" if fits else f"  FAILED: expected {low:g} to {high:g}"
        print(f"  {word!r:<12}{p:.3f}" + (f"  ({p:.1e})" if p < 5e-4 else "") + note)
    return right


@torch.no_grad()
def compare(model: Decoder, stock: Any | None, ids: Tensor) -> dict[str, Verdict]:
    """Logits (B, T, V) by the yardstick, against the stock model and against our definitions.

    Each judge knows the truth (itself in float64) and what float32 costs itself; ours may cost no
    more than the yardstick allows.
    """
    ours = model(ids)
    with dispatch.use("reference"):
        exact = copy.deepcopy(model).double()(ids)
        verdicts = {"against the definitions": judge(ours, exact, model(ids), FORWARD_FACTOR)}
    del exact
    if stock is not None:
        plain = stock(ids).logits
        exact = copy.deepcopy(stock).double()(ids).logits
        verdict = judge(ours, exact, plain, FORWARD_FACTOR)
        verdicts = {"against stock PyTorch (transformers)": verdict} | verdicts
    return verdicts


def show_speed(contenders: dict[str, Any], rounds: int, new: int, prompt: int) -> None:
    """Time decode and prefill of two contenders in turn; print medians in tokens a second."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = contenders[OURS].config.vocab_size
    short = torch.randint(vocabulary, (1, 32), generator=generator)
    long = torch.randint(vocabulary, (1, prompt), generator=generator)
    threads = torch.get_num_threads()
    print(f"\nTokens/s, float32, {threads} threads, medians of {rounds} rounds in turn:\n")
    first, second = contenders
    print(f"  {'':<36}{first:>22}{second:>12}{'ratio':>9}")
    for label, count, task in (
        (f"{new} tokens after a prompt of 32", new, lambda m: _decode(m, short, new)),
        (f"prefill of {prompt}", prompt, lambda m: _prefill(m, long)),
    ):
        rates = {name: count / t for name, t in _medians(contenders, task, rounds).items()}
        ratio = rates[second] / rates[first]
        print(f"  {label:<36}{rates[first]:>22.1f}{rates[second]:>12.1f}{ratio:>8.2f}x")


def _medians(
    contenders: dict[str, Any], task: Callable[[Any], object], rounds: int
) -> dict[str, float]:
    """Median seconds of each contender, after one untimed turn."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, model in contenders.items():
            backend = "reference" if name == DEFINITIONS else None
            start = time.perf_counter()
            _on(backend, task, model)
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _on(backend: str | None, task: Callable[[Any], object], model: Any) -> None:
    if backend is None:
        task(model)
        return
    with dispatch.use(backend):
        task(model)


def _decode(model: Any, ids: Tensor, new: int) -> None:
    if isinstance(model, Decoder):
        generate(model, ids, max_new_tokens=new, stop=())
    else:
        mask = torch.ones_like(ids)
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )


@torch.no_grad()
def _prefill(model: Any, ids: Tensor) -> None:
    if isinstance(model, Decoder):
        model(ids, KVCache(model.config, 1, ids.shape[1]), last_only=True)
    else:
        model(ids, use_cache=True, logits_to_keep=1)


def _stock(model: Decoder) -> Any | None:
    try:
        return to_transformers(model)
    except ImportError:
        print("\ntransformers is not installed: compared with llmcore's own definitions only.")
        return None


def _turn(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
