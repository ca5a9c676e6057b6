"""`llmcore verify`: every op, backend and dtype here against the definition in float64."""

import argparse

from llmcore import device
from llmcore.verify import verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of the shapes and values (default: 0)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the tensors are"
    )


def run(args: argparse.Namespace) -> int:
    """Prints each line as it comes, then what was skipped and the count.

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
    return 0 if report.passed else 1
