"""What a run records of the software that it runs on."""

import importlib.metadata
import pathlib
import platform
import subprocess

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "datasets",
    "numpy",
)


def versions() -> dict[str, str]:
    """Returns {"python", "spear-jax" and each of PACKAGES: version}; "?" where one is not known."""
    found = {"python": platform.python_version()}
    for name in ("spear-jax", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "?"
    return found


def commit() -> str | None:
    """Returns the git commit of the checkout that the package is run from, with "+" behind it where
    files differ; None without a checkout or without git.
    """
    root = pathlib.Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words],
            capture_output=True,
            encoding="utf-8",
            check=True,
            timeout=10,
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
