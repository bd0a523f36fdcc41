import contextlib
import faulthandler
import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))
faulthandler.enable()


@contextlib.contextmanager
def _threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """Small models are fastest on one thread, and two teams of threads on a busy machine wait for each other."""
    with _threads(1):
        yield


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def thread_count(request):
    with _threads(request.param):
        yield request.param
