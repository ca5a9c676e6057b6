"""The `llmcore` command: `llmcore COMMAND --help` tells each command's options.

A command is a module with `add_arguments(parser)` and `run(args) -> exit status`; its line in
COMMANDS is all that adding one takes. A command of two words is found before one of its first word.
Only the command that is called is imported.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

# name: (module, what it does)
COMMANDS = {
    "demo": ("llmcore.demo", "ask a small real model, check its logits, measure its speed"),
    "demo history": (
        "llmcore.history_demo",
        "n-grams, recurrent networks and a transformer side by side, and the vanishing gradient",
    ),
    "demo translate": (
        "llmcore.translate_demo",
        "an encoder-decoder learns English to French, in about five minutes",
    ),
    "demo similarity": (
        "llmcore.similarity_demo",
        "sentences ranked by meaning, with a small real encoder",
    ),
    "chat": ("llmcore.chat_command", "talk with a model"),
    "generate": ("llmcore.generate_command", "answer a file of prompts, resuming where it stopped"),
    "serve": ("llmcore.serve_command", "an OpenAI-compatible server, transformers', on llmcore"),
    "evaluate": ("llmcore.evaluate_command", "perplexity of text, and what packed weights change"),
    "data inspect": (
        "llmcore.data_inspect_command",
        "counts, lengths, copies and examples of text",
    ),
    "pretrain": (
        "llmcore.pretrain_command",
        "train a model from nothing, on your text or a corpus",
    ),
    "backends": (
        "llmcore.backends_command",
        "each op's candidates on this machine: what runs, and why the others don't",
    ),
    "bench": (
        "llmcore.benchmarks.command",
        "time every op against torch, as a share of this machine's limits",
    ),
    "verify": (
        "llmcore.verify_command",
        "hold every op on this machine to its definition in float64",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status, 2 for wrong usage."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    listing = "\n".join(f"  {name:<16}{about}" for name, (_, about) in COMMANDS.items())
    top = argparse.ArgumentParser(
        prog="llmcore",
        description="Fused transformer kernels, verified, and a thin transformer on top.",
        epilog=f"commands:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    chosen = top.parse_args([" ".join(arguments[:words])] if arguments else []).command
    module, about = COMMANDS[chosen]
    command = importlib.import_module(module)
    parser = argparse.ArgumentParser(prog=f"llmcore {chosen}", description=about)
    command.add_arguments(parser)
    try:
        return command.run(parser.parse_args(arguments[words:]))
    except KeyboardInterrupt:
        return 130
