"""Memory for large outputs."""

from __future__ import annotations

import contextlib
import math
import mmap
import sys

import torch
from torch import Tensor

# Below this the allocator hands out memory that it has at hand, which is faster than asking the system.
LARGE = 32 << 20


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose memory, on the CPU, is taken only where something is written.

    The vocabulary logits of a padded batch are mostly rows that nobody writes: 32 notes of up to 512 tokens take 2 GB
    in fp32, of which a third is real.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LARGE or device.type != "cpu" or not sys.platform.startswith("linux"):
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
