"""One thread: the programs here are hundreds of tiny operations."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass
