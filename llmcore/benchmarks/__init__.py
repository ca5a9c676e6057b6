"""Speed of every op against what one has without llmcore: `llmcore bench`, or `pytest benchmarks/`.

An op's file is `bench_<op>.py`: its shapes, its peers, the bytes and operations it needs. It is
found by its name; nothing else is to be told of a new one. `timing.py` times, `contest.py` verifies
and lets contenders take turns, `roofline.py` measures what this machine can do at most, `report.py`
and `plot.py` show it, `command.py` is the command line.

Their source is the top-level folder `benchmarks/`. A wheel holds them in this folder; in a checkout
this package's path is extended to them.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2]
if (_checkout / "csrc" / "ops.h").is_file():
    __path__.append(str(_checkout / "benchmarks"))
