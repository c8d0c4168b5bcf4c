"""A block as text: the first thing to print when packed sequences look wrong.

    from spear_jax.packing.debug import describe
    print(describe(block))          # docs/packing.md reads such a text line by line

Everything is read from the block's arrays as the model and the loss read them. Nothing is known from
the builder, so that a fault of the builder shows.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from spear_jax.core.errors import UserError
from spear_jax.packing.arrays import Batch, Block, PackedSequences

WIDTH = 100  # of the text; a tree that fits is drawn with every pair of tokens that attend
INDENT = 4  # of a tree's lines
LABEL = 18  # width of the names before a table's columns
SHOWN = 12  # tokens of a longer prompt or completion that are written out; the tables have all


def describe(block: Block) -> str:
    """Writes down what stands in one block: prompts, completions, positions, who attends to whom.

    Prompt [5, 6, 7] with the completions [8, 9, 2] and [4, 2], of which 2 is the EOS:

        tree 0
          prompt    5 6 7
          branch 1  8 9 [2]    row 0
          branch 2  4 [2]      row 1

          place               0  1  2  3  4  5
          token               5  6  7  8  9  4
          position            0  1  2  3  4  3
          branch_id           0  0  0  1  1  2
          query_index         0  1  2  3  4  5
          5 attends to        x
          6 attends to        x  x
          7 attends to        x  x  x
          8 attends to        x  x  x  x
          9 attends to        x  x  x  x  x
          4 attends to        x  x  x  .  .  x

    A token in brackets is predicted and never read. A tree too wide for the page is cut into several
    tables, and has one line a branch in place of the crosses. A line that begins with `!!` names a
    completion that the pack does not hold as the loss scores it.

    Args:
        block: numpy or JAX arrays without leading axes. With several packs a completion stands in
            each, and its rows are named in each.
    Returns: lines of text.
    Raises: UserError for a block with leading axes.
    """
    if np.ndim(block.start) != 1:
        raise UserError(
            f"the block has leading axes {np.shape(block.start)[:-1]}; describe takes a single "
            f"block. Take one of them: jax.tree.map(lambda x: x[0, 0, 0], block) for [C, S, K]."
        )
    block = jax.tree.map(np.asarray, block)
    completions = _completions(block)
    used, scored = len(block.rows.label), len(block.target)
    rows = int(block.rows.completion_mask.any(-1).sum())
    lines = [
        f"block of micro-batch {int(block.micro)}: {rows} of {used} rows, "
        f"{sum(len(c.target) for c in completions)} of {scored} scored tokens"
    ]
    for number, (pack, source) in enumerate(zip(block.packs, block.source, strict=True)):
        lines += ["", *_describe_pack(number, pack, source, completions)]
    return "\n".join([*lines, "", "rows", *_describe_rows(block.rows)]) + "\n"


@dataclasses.dataclass(frozen=True, eq=False)
class _Completion:
    """Scored tokens, and the rows that use them.

    Attributes:
        start: where they begin in `Block.target`.
        target: the tokens themselves.
        rows: numbers of the rows.
    """

    start: int
    target: np.ndarray
    rows: tuple[int, ...]

    def places(self, source: np.ndarray) -> np.ndarray:
        """Flat places that predict its tokens: the prompt's last, then its own but for its last."""
        return source[self.start : self.start + len(self.target)]


def _completions(block: Block) -> list[_Completion]:
    """The distinct completions, in the order in which they are scored."""
    rows: dict[tuple[int, int], list[int]] = {}
    for row, length in enumerate(block.rows.completion_mask.sum(-1)):
        if length:
            rows.setdefault((int(block.start[row]), int(length)), []).append(row)
    return [
        _Completion(start, block.target[start : start + length], tuple(own))
        for (start, length), own in sorted(rows.items())
    ]


def _describe_pack(
    number: int, pack: PackedSequences, source: np.ndarray, completions: list[_Completion]
) -> list[str]:
    """A pack's shared prefix, its trees, and its padding."""
    trees = [row for row, ids in enumerate(pack.branch_ids) if (ids >= 0).any()]
    used = sorted({int(place) for row in trees for place in _places(pack, row)})
    size, queries = len(pack.tokens), sum(rows * width for rows, width in pack.tiles)
    tiles = ", ".join(f"{rows} x {width}" for rows, width in pack.tiles)
    lines = [
        f"pack {number}: {len(used)} of {size} tokens, {_share(size - len(used), size)} padding; "
        f"attention tiles {tiles}, {_share(queries - len(used), queries)} padding"
    ]
    shared, lost = _shared_places(pack, trees), completions
    if len(shared):
        lines += ["", f"  shared prefix, at places {_ranges(shared)}: in front of every tree"]
        lines += [" " * INDENT + line for line in _tables(pack, shared, np.zeros(len(shared), int))]
    for row in trees:
        own = [c for c in completions if c.places(source)[0] in _places(pack, row)[len(shared) :]]
        lost = [c for c in lost if c not in own]
        lines += ["", f"  tree {row}"]
        lines += [" " * INDENT + line for line in _describe_tree(pack, row, shared, source, own)]
    lines += [f"  !! {_numbers('row', c.rows)}: its prompt stands in no tree" for c in lost]
    padding = sorted(set(range(size)) - set(used))
    lines += ["", f"  padding at places {_ranges(padding)}"] if padding else []
    return [line.rstrip() for line in lines]


def _places(pack: PackedSequences, row: int) -> np.ndarray:
    """The flat places of a tree's tokens, those of the shared prefix the first."""
    return pack.token_index[row][pack.branch_ids[row] >= 0]


def _shared_places(pack: PackedSequences, trees: Sequence[int]) -> np.ndarray:
    """The places with which all trees begin; none where there is a single tree."""
    if len(trees) < 2:
        return np.zeros(0, int)
    together = np.stack([pack.token_index[row] for row in trees])
    alike = (together == together[0]).all(0) & (pack.branch_ids[trees] == 0).all(0)
    return together[0][: int(np.cumprod(alike).sum())]


def _describe_tree(
    pack: PackedSequences,
    row: int,
    shared: np.ndarray,
    source: np.ndarray,
    completions: list[_Completion],
) -> list[str]:
    """A tree's prompt and completions, its arrays, and who attends to whom."""
    places = _places(pack, row)[len(shared) :]
    branch = pack.branch_ids[row][pack.branch_ids[row] >= 0][len(shared) :]
    lines = [f"prompt    {_some(pack.tokens[places[branch == 0]])}"]
    named = []
    for completion in completions:
        read = completion.places(source)[1:]
        name = branch[places == read[0]] if len(read) else []
        named.append((int(name[0]) if len(name) else 0, completion, read))
    texts = [_some([*c.target[:-1], f"[{c.target[-1]}]"]) for _, c, _ in named]
    wide = max(map(len, texts), default=0)
    for (name, completion, read), text in sorted(
        zip(named, texts, strict=True), key=lambda pair: pair[0][0] or len(branch)
    ):
        title = f"branch {name}" if name else "no branch"
        lines.append(f"{title:<9} {text:<{wide}}    {_numbers('row', completion.rows)}")
        if pack.tokens[read].tolist() != completion.target[:-1].tolist():
            lines.append(f"!! the pack reads {_words(pack.tokens[read])} at {_ranges(read)}")
    lines += ["", *_tables(pack, places, branch), *_attention(pack, places, branch)]
    if len(shared):
        lines.append("and all of them to the shared prefix")
    return lines


def _tables(pack: PackedSequences, places: np.ndarray, branch: np.ndarray) -> list[str]:
    """Tokens, positions, branches and queries under their places, as many a line as fit."""
    arrays = {
        "place": places,
        "token": pack.tokens[places],
        "position": pack.positions[places],
        "branch_id": branch,
        "query_index": pack.query_index[places],
    }
    wide, fit = _columns(pack, places)
    lines: list[str] = []
    for first in range(0, len(places), fit):
        lines += [""] * bool(lines)
        for name, values in arrays.items():
            lines.append(_line(name, values[first : first + fit], wide))
    return lines


def _attention(pack: PackedSequences, places: np.ndarray, branch: np.ndarray) -> list[str]:
    """Who attends to whom: a cross for each pair of tokens, or a sentence for each branch."""
    wide, fit = _columns(pack, places)
    # models.attention.seen_in_tree: the prompt and its own branch, up to itself
    seen = np.tril((branch[None] == 0) | (branch[None] == branch[:, None]))
    if len(places) > fit:
        last = {int(name): at for at, name in enumerate(branch)}
        return ["", *(
            f"branch {name}: its last token, at place {places[at]}, attends to places "
            f"{_ranges(places[seen[at]])}"
            for name, at in last.items()
        )]  # fmt: skip
    return [
        _line(
            f"{pack.tokens[place]} attends to",
            ["x" if see else "." for see in seen[at, : at + 1]],
            wide,
        )
        for at, place in enumerate(places)
    ]


def _columns(pack: PackedSequences, places: np.ndarray) -> tuple[int, int]:
    """The width of a table's columns, and how many fit a line."""
    arrays = (places, pack.tokens[places], pack.query_index[places])
    wide = 2 + max(len(str(value)) for values in arrays for value in values)
    return wide, (WIDTH - INDENT - LABEL) // wide


def _describe_rows(rows: Batch) -> list[str]:
    """The rows as the loss sees them."""
    lines, padding = [], []
    for row, there in enumerate(rows.completion_mask):
        if not there.any():
            padding.append(row)
            continue
        length = int(there.sum())
        used = _ranges(np.flatnonzero(rows.loss_mask[row])) or "none"
        weights = sorted({f"{weight:g}" for weight in rows.weight[row, :length]})
        lines.append(
            f"  row {row}: label {rows.label[row]:+d}, weight {_words(weights)}, "
            f"advantage {rows.advantage[row]:g}, loss on completion tokens {used} of {length}"
        )
    return [*lines, f"  padding: {_numbers('row', padding)}"] if padding else lines


def _line(name: str, values: Iterable[object], wide: int) -> str:
    return f"{name:<{LABEL}}" + "".join(f"{value!s:>{wide}}" for value in values)


def _words(values: Iterable[object]) -> str:
    return " ".join(map(str, values))


def _some(values: Sequence[object]) -> str:
    """All of a few values, or the first and the last of many and their number."""
    if len(values) <= SHOWN:
        return _words(values)
    half = SHOWN // 2
    return f"{_words(values[:half])} ... {_words(values[-half:])} ({len(values)} tokens)"


def _numbers(noun: str, numbers: Sequence[int]) -> str:
    """ "row 3", or "rows 0-2 5"."""
    return f"{noun}{'s' * (len(numbers) > 1)} {_ranges(numbers)}"


def _share(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.1%}"


def _ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] as "0-2 5"."""
    runs: list[list[int]] = []
    for number in map(int, numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return _words(str(low) if low == high else f"{low}-{high}" for low, high in runs)
