"""How every entry point starts and ends: one JSON line as the result, one message for a user's mistake."""

import json
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from spear_jax.errors import UserError


def run(main: Callable[[list[str]], dict[str, Any]], argv: list[str] | None = None) -> NoReturn:
    """Calls `main(argv)`, prints what it returns as the last stdout line (one JSON object), and exits.

    Exit codes: 0; 2 for a UserError, whose message goes to stderr alone; 1, with the traceback, for anything else.

    Args:
        main: takes the arguments after the program's name.
        argv: those arguments; None reads the command line.
    """
    try:
        result = main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(result), flush=True)
    sys.exit(0)
