"""Notes from files: one a line (.txt), JSON lines with a `text` (.jsonl), or a folder of .txt files."""

from __future__ import annotations

import json
from pathlib import Path

from clinfast.model_folder import BadInput


def read_texts(path: Path) -> list[str]:
    """The notes in `path`, blank ones left out.

    Raises:
        BadInput: it is missing, unreadable, not UTF-8, not of a known kind, or holds no note.
    """
    if path.is_dir():
        try:
            files = sorted(file for file in path.iterdir() if file.suffix == ".txt" and file.is_file())
        except OSError as error:
            raise BadInput(f"{path} cannot be read: {error.strerror}") from error
        if not files:
            raise BadInput(f"there is no .txt file in the folder {path}")
        texts = [_content(file) for file in files]
    elif path.suffix == ".jsonl":
        texts = [_text_of(line, path, number) for number, line in _lines(path)]
    elif path.suffix == ".txt" or not path.exists():
        texts = [line for _, line in _lines(path)]
    else:
        raise BadInput(f"{path} is neither a .txt file (one text a line), nor .jsonl, nor a folder of .txt files")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise BadInput(f"there is no text in {path}")
    return texts


def _content(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadInput(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{file} is not UTF-8 text (byte {error.start})") from error


def _lines(file: Path) -> list[tuple[int, str]]:
    # Not splitlines(), which also splits at form feeds and other separators that notes do contain.
    lines = (line.removesuffix("\r") for line in _content(file).split("\n"))
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _text_of(line: str, file: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise BadInput(f"{file}, line {number}: each line must be a JSON object with a string 'text'")
    return text
