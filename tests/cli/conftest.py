import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import tiny


@pytest.fixture
def folder(tmp_path):
    return tiny.save(tmp_path / "deid")


@pytest.fixture
def notes(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("\n".join(tiny.texts()) + "\n")
    return file
