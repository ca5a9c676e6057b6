"""One thread is the faster for models so small, by far where another process has a core."""

import pytest


@pytest.fixture(autouse=True)
def tiny(one_thread):
    pass
