"""One thread: the tensors here are tiny, and two threads that wait for each other on a busy machine take many times as long."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass
