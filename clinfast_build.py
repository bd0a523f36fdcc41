"""setuptools' build backend; CUTLASS's headers are required too where the CUDA kernels are asked for by name."""

from __future__ import annotations

import os
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401 - the hooks that pip looks for
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)


def _cutlass() -> list[str]:
    asked = os.environ.get("CLINFAST_CUDA", "").lower()
    return [] if asked in ("", "0", "off", "no", "auto") else ["nvidia-cutlass>=4.2,<5"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_cutlass()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_cutlass()]
