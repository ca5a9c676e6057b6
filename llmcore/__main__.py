"""`python -m llmcore` is the command `llmcore`."""

import sys

from llmcore.cli import main

if __name__ == "__main__":
    sys.exit(main())
