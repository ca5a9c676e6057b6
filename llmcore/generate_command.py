"""`llmcore generate`: a file of prompts in, a file of answers out, a line for each.

An answer is written as soon as it is complete, so that whatever stops the run, what is done is
there; the next run with the same files goes on with the rest.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmcore.generation.answers import finished
from llmcore.generation.batch import Setup, Task
from llmcore.generation.sampling import Sampling, samplers_of
from llmcore.generation.stopping import Stopping
from llmcore.model_arguments import (
    add_model,
    add_sampling,
    add_weights,
    load_model,
    sampling_options,
)
from llmcore.models import Decoder
from llmcore.text import Tokenizer, chat_of

SECONDS_BETWEEN_REPORTS = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_weights(parser)
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="FILE",
        help='a prompt on each line; or .jsonl: a text or {"prompt": text} on each',
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON lines with index, prompt, text, tokens and finish_reason (stop, length, error); "
        "what it holds already is not done again",
    )
    parser.add_argument(
        "--chat", action="store_true", help="prompts are a user's messages, in the model's template"
    )
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="ends an answer; repeatable"
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="prompts at a time (default: 8)"
    )
    add_sampling(parser, max_new_tokens=256)


def run(args: argparse.Namespace) -> int:
    """Answers what is not answered yet; 1 when a file, an option or the model can't be used."""
    try:
        options = sampling_options(args)
        prompts = read_prompts(args.input)
        done = answered(args.output, prompts)
        model, tokenizer = load_model(args, args.weights)
        job = Job(model, tokenizer, args, Sampling(**options))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"llmcore generate: {error}", file=sys.stderr)
        return 1
    left = {index: text for index, text in enumerate(prompts) if index not in done}
    if done:
        print(f"{len(done)} of {len(prompts)} prompts are answered in {args.output} already")
    progress = Progress(len(left))
    try:
        with args.output.open("a", encoding="utf-8") as file:
            for line in job.lines(left):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                progress.add(line)
    finally:
        progress.close()
    return 0


def read_prompts(path: Path) -> list[str]:
    """The lines that aren't empty; of a .jsonl file their texts. ValueError names a wrong one."""
    lines = path.read_text(encoding="utf-8").split("\n")
    numbered = [(n, line.rstrip("\r")) for n, line in enumerate(lines, 1) if line.strip()]
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    prompts = []
    for number, line in numbered:
        found = _parsed(line)
        prompt = found.get("prompt") if isinstance(found, dict) else found
        if not isinstance(prompt, str):
            raise ValueError(f'{path}, line {number}: neither a text nor {{"prompt": text}}')
        prompts.append(prompt)
    return prompts


def answered(path: Path, prompts: list[str]) -> set[int]:
    """Which prompts an output file has answers to. A last line that was cut off is removed.

    ValueError when the file holds something else.
    """
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    done = set()
    for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], 1):
        found = _parsed(line)
        index = found.get("index") if isinstance(found, dict) else None
        if not isinstance(index, int) or prompts[index : index + 1] != [found.get("prompt")]:
            raise ValueError(f"{path}, line {number}: no answer to a prompt of this input")
        done.add(index)
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return done


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


class Job:
    """How prompts are to be answered."""

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, args: argparse.Namespace, sampling: Sampling
    ) -> None:
        """ValueError for options out of range, or a tokenizer without a way to chat."""
        if args.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.max_new_tokens, self.seed = args.max_new_tokens, args.seed
        self.setup = Setup(batch_size=args.batch_size)
        self.chat = chat_of(tokenizer) if args.chat else None
        self.ends = {*model.config.eos_ids, *(self.chat.stop_ids if self.chat else ())}
        self.stops = tuple(args.stop or ())
        Stopping(self.ends, self.stops, tokenizer)

    def lines(self, prompts: dict[int, str]) -> Iterator[dict[str, Any]]:
        """A line of the output for each of these prompts, by index, as they come."""
        ids: dict[int, list[int]] = {}
        for index, prompt in prompts.items():
            try:
                ids[index] = self._encoded(prompt)
            except ValueError as error:
                yield _line(index, prompt, "", 0, "error") | {"error": str(error)}
        indices = list(ids)
        task = Task(
            self.model,
            list(ids.values()),
            self.max_new_tokens,
            self.sampling,
            Stopping(self.ends, self.stops, self.tokenizer, len(ids)),
            samplers_of(list(ids.values()), self._seeds(indices)),
            self.setup,
        )
        for row, answer in finished(task):
            index = indices[row]
            yield _line(index, prompts[index], answer.text or "", len(answer.tokens), answer.finish)

    def _seeds(self, indices: list[int]) -> list[int] | None:
        """A prompt's own, whether or not others are done already."""
        return None if self.seed is None else [self.seed + index for index in indices]

    def _encoded(self, prompt: str) -> list[int]:
        if self.chat is None:
            ids = self.tokenizer.encode(prompt)
        else:
            ids = self.chat.encode([{"role": "user", "content": prompt}])
        context = self.model.config.context_length
        if len(ids) + self.max_new_tokens > context:
            raise ValueError(
                f"{len(ids)} tokens and {self.max_new_tokens} new ones exceed the context length "
                f"of {context}"
            )
        return ids


def _line(index: int, prompt: str, text: str, tokens: int, finish: str) -> dict[str, Any]:
    return {
        "index": index,
        "prompt": prompt,
        "text": text,
        "tokens": tokens,
        "finish_reason": finish,
    }


class Progress:
    """How many prompts are done, and at what speed: on a terminal while it goes on, else once."""

    def __init__(self, prompts: int) -> None:
        self.prompts = prompts
        self.done = self.tokens = 0
        self.start = self.shown = time.perf_counter()
        self.live = sys.stderr.isatty()

    def add(self, line: dict[str, Any]) -> None:
        """One more answer."""
        self.done += 1
        self.tokens += line["tokens"]
        now = time.perf_counter()
        if self.live and now - self.shown >= SECONDS_BETWEEN_REPORTS:
            self.shown = now
            print(f"\r{self}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """The last word."""
        print(f"\r{self}" if self.live else str(self), file=sys.stderr)

    def __str__(self) -> str:
        seconds = time.perf_counter() - self.start
        rate = self.tokens / max(seconds, 1e-9)
        return (
            f"{self.done} of {self.prompts} prompts, {self.tokens} tokens in {seconds:.1f} s, "
            f"{rate:.1f} tokens/s"
        )
