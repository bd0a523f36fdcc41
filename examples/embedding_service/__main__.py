"""A service of sentence embeddings, on CPU and offline:

    python examples/embedding_service --model ./all-MiniLM-L6-v2 --port 8000

    curl -d '{"texts": ["chest pain x 3 days"]}' -H 'content-type: application/json' localhost:8000/embed

Every option is an environment variable as well, for uvicorn or a container of your own:

    EMBEDDING_MODEL=./all-MiniLM-L6-v2 uvicorn --app-dir examples --factory embedding_service.app:create_app

One process serves: it computes with all its threads. `/health` and `/metrics` tell how it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import Problem, run

from embedding_service.settings import Settings, variable


def main() -> int:
    """Serve until a signal; returns the exit status."""
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="embedding_service", description=head.rstrip(":"), epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (%(default)s)")
    for field in dataclasses.fields(Settings):
        name = variable(field.name)
        needed = field.default is dataclasses.MISSING
        default = os.environ.get(name, None if needed else str(field.default))
        told = f"{field.metadata['help']} ({name}{'' if needed else '; %(default)s'})"
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", metavar="FOLDER" if needed else "X", default=default, help=told,
        )  # fmt: skip
    options = parser.parse_args()
    for field in dataclasses.fields(Settings):
        os.environ[variable(field.name)] = getattr(options, field.name) or ""
    settings = Settings.from_environment()
    try:
        import uvicorn
    except ImportError as missing:
        raise Problem("uvicorn is not installed; pip install clinfast[examples] brings it") from missing
    uvicorn.run(
        "embedding_service.app:create_app", factory=True, app_dir=sys.path[0], host=options.host, port=options.port,
        timeout_graceful_shutdown=settings.drain_seconds,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
