"""`llmcore chat`: a conversation with a model in the terminal."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from llmcore.generate import stream
from llmcore.generation.prefix import PrefixCache
from llmcore.model_arguments import (
    add_model,
    add_sampling,
    add_weights,
    load_model,
    sampling_options,
)
from llmcore.models import Decoder
from llmcore.text import Tokenizer, chat_of
from llmcore.text.chat import Message

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_weights(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    add_sampling(parser, max_new_tokens=512)


def run(args: argparse.Namespace) -> int:
    """Talks until the input ends; 1 when there is no such model, or none that one can talk to."""
    try:
        options = sampling_options(args)
        model, tokenizer = load_model(args, args.weights)
        conversation = Conversation(
            model, tokenizer, args.system, args.max_new_tokens, seed=args.seed, **options
        )
    except (OSError, RuntimeError, ValueError) as error:
        print(f"llmcore chat: {error}", file=sys.stderr)
        return 1
    print(HELP, flush=True)
    for line in _lines():
        if line == "/exit":
            break
        if line == "/reset":
            conversation.reset()
            print("(forgotten)")
        elif line.startswith("/"):
            print(HELP)
        elif line:
            _answer(conversation, line)
    return 0


def _lines() -> Iterator[str]:
    """What the user types, until the input ends. Ctrl-C gives up the line, not the program."""
    prompt = ""
    if sys.stdin.isatty():
        prompt = "> "
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input then knows the arrow keys)
    while True:
        try:
            yield input(prompt).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()


def _answer(conversation: "Conversation", text: str) -> None:
    try:
        for piece in conversation.say(text):
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" (stopped)")
    except ValueError as error:
        print(f"({error})")


class Conversation:
    """What was said so far, and what the model's caches hold of it: a turn reads only what is new.

    When it outgrows the model's context, the oldest turns leave.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        system: str | None,
        max_new_tokens: int,
        **options: Any,
    ) -> None:
        """options: Sampling's, and seed. ValueError for a tokenizer without a way to chat."""
        self.chat = chat_of(tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.max_new_tokens = max_new_tokens
        self.options = options
        self.prefixes = PrefixCache(model)
        self.turns: list[Message] = []

    def reset(self) -> None:
        """Forget all but the system's message."""
        self.turns = []

    def say(self, text: str) -> Iterator[str]:
        """The answer, piece by piece; what was given of it is remembered, also if it is stopped.

        ValueError when this message alone exceeds the context, or the tokenizer can't encode it.
        """
        turns, ids = self._fitting([*self.turns, {"role": "user", "content": text}])
        room = self.model.config.context_length - len(ids)
        answer = ""
        try:
            for piece in stream(
                self.model,
                torch.tensor([ids]),
                self.tokenizer,
                max_new_tokens=min(self.max_new_tokens, room),
                stop={*self.model.config.eos_ids, *self.chat.stop_ids},
                prefix_cache=self.prefixes,
                **self.options,
            ):
                answer += piece
                yield piece
        finally:
            self.turns = [*turns, {"role": "assistant", "content": answer}]

    def _fitting(self, turns: list[Message]) -> tuple[list[Message], list[int]]:
        """The last of these turns that leave room for an answer, and their ids."""
        context = self.model.config.context_length
        while True:
            ids = self.chat.encode([*self.system, *turns])
            if len(turns) == 1 or len(ids) + min(self.max_new_tokens, context // 2) <= context:
                break
            turns = turns[2:]
        if len(ids) >= context:
            raise ValueError(f"{len(ids)} tokens exceed the context of {context}")
        return turns, ids
