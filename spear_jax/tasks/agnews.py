"""AG News: which of four topics is a news item about? It is answered by a letter.

It is multiple choice with the same four options in every question, and a hint of one sentence a
topic.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from spear_jax.core.errors import shown
from spear_jax.core.types import Example
from spear_jax.tasks.letters import letter_labels
from spear_jax.tasks.loading import cell_number, row_error, row_text
from spear_jax.tasks.mcqa import Mcqa

HUB_COLUMNS = ("text", "label")
LONGEST = 320  # characters of an item
# topic -> what feedback may say of it; in the order of the Hub's labels
TOPICS = {
    "World politics": "Think of governments, wars and diplomacy.",
    "Sports": "Think of teams, athletes and matches.",
    "Business": "Think of companies, markets and money.",
    "Science and technology": "Think of computers, research and gadgets.",
}


def item_text(text: str) -> str:
    """Returns a news item as it is asked about: at most 320 characters, and " ..." if it was cut.

    The corpus writes a backslash for a line break; it becomes a space, and two spaces become one.
    A longer item is cut behind its last whole word.
    """
    text = text.replace("\\", " ").replace("  ", " ")
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rpartition(' ')[0]} ..."


class AgNews(Mcqa):
    """AG News, from the Hub's rows (text, label) or from a file in the columns of `mcqa`.

        row       {"text": "Boats race home. Ten crews ...", "label": 1}
        question  "What is this news item about?\\nBoats race home. Ten crews ..."
        options   World politics, Sports, Business, Science and technology; gold 1
        hint      "Think of teams, athletes and matches."

    A file needs the columns question, options, answer (an index from 0) and hint, which
    `data.columns` may rename.

    Source: AG's corpus as Zhang, Zhao and LeCun use it (arXiv 1509.01626); options, hints and
    wording are ours. Departures:
      1. An item is cut after 320 characters.
      2. Nothing parts the Hub's headlines from the text behind them; they stay so.
    """

    name = "agnews"
    hub = ("fancyzhx/ag_news", None)
    mapping: Mapping[str, str] = {**Mcqa.mapping, "hint": "hint"}

    def __init__(self, columns: Mapping[str, str] | None = None, *wording: Any):
        given = {key: column for key, column in (columns or {}).items() if column}
        super().__init__({"answer_base": "0", **given}, *wording)

    def needed(self, columns: Sequence[str]) -> tuple[str, ...]:
        return HUB_COLUMNS if set(HUB_COLUMNS) <= set(columns) else self.columns

    def _example(self, row: dict, index: int, base: int) -> Example:
        if set(HUB_COLUMNS) <= row.keys():
            return _hub_example(row, index)
        return super()._example(row, index, base)


def _hub_example(row: dict, index: int) -> Example:
    label = cell_number(row["label"])
    if label is None or not 0 <= label < len(TOPICS):
        raise row_error(
            index, f"label {shown(row['label'])} is no index of the {len(TOPICS)} topics"
        )
    return Example(
        id=str(index),
        question=f"What is this news item about?\n{item_text(row_text(row, 'text', index))}",
        options=tuple(TOPICS),
        labels=letter_labels(len(TOPICS)),
        gold=label,
        support=(list(TOPICS.values())[label],),
    )
