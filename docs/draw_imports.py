"""Draws the parts of spear_jax and their imports, from the ground up: `python docs/draw_imports.py`
writes docs/architecture.png.

A part is a folder of spear_jax. It stands one floor above the highest part that it imports. A dark
arrow leads to a part that is imported; a pale one to a part that a chain of dark arrows reaches, too.
An import that points up is red, and tests/test_layers.py refuses it.
"""

import ast
import pathlib

import matplotlib.figure

DOCS = pathlib.Path(__file__).resolve().parent
PACKAGE = DOCS.parent / "spear_jax"
PICTURE = DOCS / "architecture.png"
# The parts from the ground: each imports from those before it alone.
ORDER = (
    "core", "packing", "models", "tasks", "analysis", "feedback", "service", "rollout", "algorithms",
    "federated", "experiment",
)  # fmt: skip
WIDTH, HEIGHT = 1.7, 0.46  # of a box; a floor is 1 high


def packages() -> set[str]:
    """The folders of the package that hold code and are no commands."""
    return {
        folder.name
        for folder in PACKAGE.iterdir()
        if (folder / "__init__.py").exists() and not (folder / "__main__.py").exists()
    }


def imported(file: pathlib.Path) -> set[str]:
    """The names right behind `spear_jax.` in a file's imports, wherever they stand."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "spear_jax":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spear_jax."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            paths = (alias.name.split(".") for alias in node.names)
            names |= {path[1] for path in paths if path[0] == "spear_jax" and len(path) > 1}
    return names


def read_imports() -> dict[str, list[str]]:
    """{part: the other parts that it imports}, both in the order of the floors."""
    found = {
        part: set().union(*map(imported, (PACKAGE / part).rglob("*.py"))) - {part} for part in ORDER
    }
    return {part: [name for name in ORDER if name in found[part]] for part in ORDER}


def floors(imports: dict[str, list[str]]) -> dict[str, int]:
    """{part: its floor}; 0 is the ground. Imports that point up do not count."""
    floor: dict[str, int] = {}
    for part in ORDER:
        floor[part] = 1 + max((floor[used] for used in imports[part] if used in floor), default=-1)
    return floor


def direct(imports: dict[str, list[str]]) -> dict[str, list[str]]:
    """The imports that no chain of other imports leads to, too."""
    below = lambda one, other: ORDER.index(one) < ORDER.index(other)
    reached: dict[str, set[str]] = {}
    for part in ORDER:
        own = {used for used in imports[part] if below(used, part)}
        reached[part] = own.union(*(reached[used] for used in own))
    return {
        part: [
            used
            for used in imports[part]
            if not any(used in reached[other] for other in imports[part] if below(other, part))
        ]
        for part in ORDER
    }


def places(floor: dict[str, int]) -> dict[str, tuple[float, float]]:
    """(x, y) of each part's box; the parts of a floor stand side by side about the middle."""
    at = {}
    for number in set(floor.values()):
        own = [part for part in ORDER if floor[part] == number]
        for index, part in enumerate(own):
            at[part] = (2.4 * (index - (len(own) - 1) / 2), float(number))
    return at


def describe(imports: dict[str, list[str]]) -> str:
    """The arrows as text, which the picture carries: "packing -> core; models -> core packing"."""
    return "; ".join(f"{part} -> {' '.join(used)}" for part, used in imports.items())


def draw(imports: dict[str, list[str]], file: pathlib.Path) -> None:
    """Writes the picture."""
    at, short = places(floors(imports)), direct(imports)
    top = max(y for _, y in at.values()) + 1
    figure = matplotlib.figure.Figure(figsize=(8, 7.2), layout="constrained")
    axes = figure.add_subplot()
    for part, used in imports.items():
        for other in used:
            up = at[other][1] > at[part][1]
            dark = other in short[part]
            axes.annotate(
                "",
                xy=(at[other][0], at[other][1] + HEIGHT / 2),
                xytext=(at[part][0], at[part][1] - HEIGHT / 2),
                arrowprops={
                    "arrowstyle": "-|>",
                    "connectionstyle": f"arc3,rad={0.6 if up else 0}",
                    "color": "#c0392b" if up else "#34495e" if dark else "#d5dbe1",
                    "linewidth": 1.6 if dark or up else 0.9,
                    "shrinkA": 0,
                    "shrinkB": 0,
                },
                zorder=2 if dark or up else 1,
            )
    for part, (x, y) in {**at, "commands": (0.0, top)}.items():
        ground = "#f4f1e8" if part == "commands" else "#e8f0f7"
        axes.text(
            x, y, part, ha="center", va="center", fontsize=12, zorder=3,
            bbox={"boxstyle": "round,pad=0.5", "facecolor": ground, "edgecolor": "#34495e"},
        )  # fmt: skip
    axes.annotate(
        "",
        xy=(0, top - 1 + HEIGHT / 2),
        xytext=(0, top - HEIGHT / 2),
        arrowprops={"arrowstyle": "-|>", "color": "#34495e", "linewidth": 1.6},
    )
    axes.set(xlim=(-4.2, 4.2), ylim=(-0.5, top + 0.5))
    axes.axis("off")
    figure.savefig(file, dpi=120, metadata={"Description": describe(imports)})


if __name__ == "__main__":
    draw(read_imports(), PICTURE)
