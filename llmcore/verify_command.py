"""`llmcore verify`: every op, backend and dtype here against the definition in float64."""

import argparse
import os
import shutil
import subprocess
import sys

from llmcore import device
from llmcore.verify import verify

SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "synccheck")
"""They look for accesses outside of allocations, races in shared memory, misplaced barriers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of the shapes and values (default: 0)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the tensors are"
    )
    parser.add_argument(
        "--no-sanitizer",
        action="store_true",
        help=f"with --device cuda: not a second time under {SANITIZER}, where that is installed",
    )


def run(args: argparse.Namespace) -> int:
    """Prints each line as it comes, then what was skipped and the count; on a GPU then what
    compute-sanitizer finds.

    1 when anything failed, 2 where the device is not there.
    """
    if args.device == "cuda" and (why := device.cuda_reason()):
        print(f"skipped: {why}; nothing was verified")
        return 2
    report = verify(seed=args.seed, device=args.device, progress=True)
    reasons: dict[str, list[str]] = {}
    for line in report:
        if line.skipped:
            reasons.setdefault(line.skipped, []).append(f"{line.op}/{line.backend}/{line.dtype}")
    for reason, lines in reasons.items():
        print(f"skipped, {len(lines)} lines such as {lines[0]}: {reason}")
    print(str(report).splitlines()[-1])
    passed = report.passed
    if args.device == "cuda" and not args.no_sanitizer:
        passed &= sanitized(args.seed)
    return 0 if passed else 1


def sanitized(seed: int) -> bool:
    """Whether no tool of the sanitizer finds anything in the same run; says what each found."""
    if shutil.which(SANITIZER) is None:
        print(f"skipped: {SANITIZER} is not installed; memory and barriers were not checked")
        return True
    command = [sys.executable, "-m", "llmcore", "verify", "--device", "cuda", "--no-sanitizer"]
    # Each tensor is an allocation of its own, so that an access outside of one is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = True
    for tool in TOOLS:
        options = ["--tool", tool, "--error-exitcode", "9"]
        run = subprocess.run(
            [SANITIZER, *options, *command, "--seed", str(seed)],
            env=environment,
            capture_output=True,
            text=True,
        )
        if run.returncode == 0:
            print(f"{SANITIZER} {tool}: nothing found", flush=True)
            continue
        found = False
        print(f"{SANITIZER} {tool}: FAILED", *run.stdout.splitlines()[-40:], sep="\n", flush=True)
    return found
