"""`llmcore backends`: each op's candidates on this machine, what runs, and why the others don't."""

import argparse

from llmcore import device, dispatch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ops", nargs="*", metavar="OP", help="which ops (default: all)")


def run(args: argparse.Namespace) -> int:
    """Prints the table and what takes a call; 2 for an unknown op."""
    table = dispatch.backends()
    unknown = [name for name in args.ops if name not in table]
    if unknown:
        print(f"ops: got {unknown[0]!r}, expected one of {', '.join(table)}")
        return 2
    ops = args.ops or list(table)
    print(dispatch.Backends({op: table[op] for op in ops}))
    if dispatch.forced is not None:
        print(f"{dispatch.forced} is forced on every call")
        return 0
    gpu = device.cuda_reason()
    kinds = {"cpu": "CPU tensors"} | ({} if gpu else {"cuda": "CUDA tensors"})
    for kind, title in kinds.items():
        print(f"{title} go to the first of these that does not refuse the call:")
        orders: dict[str, list[str]] = {}
        for op in ops:
            orders.setdefault(", ".join(dispatch.order(op, kind)), []).append(op)
        for order, those in orders.items():
            print(f"    {order}: {', '.join(those)}")
    if gpu:
        print(f"no CUDA tensors: {gpu}")
    return 0
