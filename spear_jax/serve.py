"""Serves the requests of a run to people: an API, and a page for the browser.

Prints a link for each person, which holds their token. Started again on the same folder it keeps
what was said, and the tokens. One process serves; put a proxy before it for TLS.
"""

import argparse
import contextlib
import fcntl
import math
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

from spear_jax.core.errors import UserError, shown
from spear_jax.core.files import expanded, writing
from spear_jax.experiment import command_line

EXAMPLES = """
    python -m spear_jax.serve --folder=runs/live/service --people=3
    python -m spear_jax.serve --folder=runs/live/service --people=8 --clients=4 --voices=2
    python -m spear_jax.serve --folder=runs/team --database=postgresql+psycopg://team@db/feedback --host=0.0.0.0
"""


def main(argv: list[str]) -> dict[str, Any]:
    """Parses the command line and serves until it is told to end; returns the result that is
    printed.
    """
    parser = command_line.parser("serve", __doc__ or "", EXAMPLES)
    parser.add_argument(
        "--folder", required=True, metavar="DIR", help="holds tokens.json and the database"
    )
    parser.add_argument(
        "--database",
        metavar="URL",
        help="of SQLAlchemy; default: SQLite, feedback.db in the folder",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8765, help="0 takes any that is free (8765)")
    parser.add_argument("--people", type=int, default=1, help="how many people get a token (1)")
    parser.add_argument(
        "--clients", type=int, help="person i is the client i %% CLIENTS; default: of every client"
    )
    parser.add_argument(
        "--voices", type=int, default=1, help="how many people each request is put to (1)"
    )
    parser.add_argument(
        "--lease",
        type=float,
        default=120.0,
        help="seconds for which a person holds a request (120)",
    )
    parser.add_argument(
        "--undo",
        type=float,
        default=3.0,
        help="seconds for which an answer waits before the trainer gets it, so that it can be taken "
        "back (3)",
    )
    parser.add_argument("--quiet", action="store_true", help="no links; they are in tokens.json")
    return serve(parser.parse_args(argv))


def serve(args: argparse.Namespace) -> dict[str, Any]:
    """Serves until SIGTERM or Ctrl-C.

    Returns: {"folder", "url", "requests", "answers", "seconds"}: what the database holds at the
        end.
    Raises: UserError for values out of range, a folder in use, a port that cannot be had, a
        database that cannot be opened, or missing packages.
    """
    _check(args)
    try:
        import uvicorn

        from spear_jax.service.app import Settings, make_app
    except ImportError as error:
        raise UserError(
            f'serve needs the package {error.name}; install its extra: pip install "spear-jax[live]".'
        ) from error
    start, folder = time.monotonic(), expanded(args.folder)
    with _alone(folder), _listening(args.host, args.port) as listener:
        host = socket.gethostname() if args.host in ("0.0.0.0", "::") else args.host
        host = f"[{host}]" if ":" in host else host
        url = f"http://{host}:{listener.getsockname()[1]}"
        settings = Settings(
            folder=folder,
            database=args.database,
            address=url,
            people=args.people,
            clients=args.clients,
            voices=args.voices,
            lease=args.lease,
            undo=args.undo,
        )
        app = make_app(settings)
        service = app.state.service
        for name, link in [] if args.quiet else service.links:
            print(f"{name:<12}{link}", flush=True)

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: Any) -> None:
                service.end()  # or it would wait for long polls
                super().handle_exit(sig, frame)

        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=10,
            timeout_keep_alive=75,
            ws="none",
            limit_concurrency=5_000,
            h11_max_incomplete_event_size=64 << 10,
        )
        with contextlib.suppress(KeyboardInterrupt):
            Server(config).run([listener])
        counts = service.counts
    return (
        {"folder": str(folder), "url": url}
        | counts
        | {"seconds": round(time.monotonic() - start, 1)}
    )


def _check(args: argparse.Namespace) -> None:
    for name, least, most in (
        ("port", 0, 65_535),
        ("people", 0, 10_000),
        ("clients", 1, 1_000_000),
        ("voices", 1, 1_000),
        ("lease", 1, 86_400),
        ("undo", 0, 3_600),
    ):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and least <= value <= most):
            raise UserError(
                f"--{name}={value:g} is out of range; give a number from {least} to {most:,}."
            )
    if args.people and args.voices > args.people:
        raise UserError(
            f"--voices={args.voices} asks more people than --people={args.people}, so no request "
            "would ever be answered; raise --people or lower --voices."
        )


@contextlib.contextmanager
def _alone(folder: Any) -> Iterator[None]:
    """Holds the folder for this process."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--folder={folder} is a file; give a folder.")
    with writing(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"--folder={folder} is served by another process; end it, or give another folder."
            ) from None
        yield
    finally:
        os.close(file)


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"--host={shown(host)} --port={port} cannot be listened at ({why}); give a port that is "
            "free, or --port=0 for any."
        ) from error


if __name__ == "__main__":
    command_line.run(main)
