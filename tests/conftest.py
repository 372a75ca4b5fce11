"""What every test gets: a fixed seed, a fresh Dynamo, two threads, no network; and the fixtures tests ask for."""

import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import hypothesis
import pytest
import torch

# MOEC_HYPOTHESIS=dev|ci|deep. Compiling is slow and slows down at random, so no profile has a deadline.
_COMMON = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("dev", max_examples=20, **_COMMON)
hypothesis.settings.register_profile("ci", max_examples=50, derandomize=True, print_blob=True, **_COMMON)
hypothesis.settings.register_profile("deep", max_examples=1000, **_COMMON)
hypothesis.settings.load_profile(os.environ.get("MOEC_HYPOTHESIS", "ci" if os.environ.get("CI") else "dev"))


def pytest_configure() -> None:
    torch.set_num_threads(2)
    # Dynamo's trace for tlparse: thousands of empty lines in the report of every failure
    logging.getLogger("torch.__trace").propagate = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an accelerator; none on this machine")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many tiny operations: waking a second thread for each costs seconds on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poison() -> Iterator[None]:
    """Uninitialized memory is NaN, so that what reads rows nobody wrote shows at once."""
    fill, mode = torch.utils.deterministic.fill_uninitialized_memory, torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = fill
