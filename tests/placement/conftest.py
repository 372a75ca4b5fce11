"""One thread: the tensors are small, and threads that wait for each other on a busy machine take longer than the work."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass
