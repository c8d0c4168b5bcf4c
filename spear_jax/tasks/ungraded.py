"""Tasks without a right answer: a gold response to each prompt.

Their columns may hold lists of messages.
"""

from typing import Any

from spear_jax.core.errors import shown
from spear_jax.core.types import Example
from spear_jax.tasks.base import REVISION, Answer, Task, Templates
from spear_jax.tasks.files import listed
from spear_jax.tasks.loading import cell_text, row_error, row_text


class Ungraded(Task):
    """A prompt and its gold response, for SFT, DPO and self-play.

    There is nothing to extract, so nothing is graded. The header is empty: with a chat template the
    response is the whole assistant's turn, as it will be in use. For a model without one, set
    data.templates.header to a mark such as "Response:".
    """

    templates = Templates(
        question="{question}",
        revision=REVISION,
        header="",
        format="Reply to the request and add nothing else.",
    )
    scoring = "likelihood"
    answer_only = False

    def extract(self, text: str, example: Example) -> Answer | None:
        return None

    def hint(self, example: Example, words: int) -> str:
        return "Read the request once more and reply to all of it."

    def leaks(self, feedback: str, example: Example) -> bool:
        """Returns whether a feedback text holds the whole gold response."""
        return " ".join(example.response.split()) in " ".join(feedback.split())

    def ask(self, index: int, prompt: str, response: str, rejected: str | None = None) -> Example:
        """Returns the example of a row's texts; raises UserError for an empty one."""
        for name, text in (
            ("prompt", prompt),
            ("response", response),
            ("rejected response", rejected),
        ):
            if text == "":
                raise row_error(index, f"the {name} is empty, but a text is needed there")
        response, rejected = self.follow(response), self.follow(rejected) if rejected else ""
        return Example(str(index), prompt, (), (), 0, response=response, rejected=rejected)


def row_prompt(row: dict, column: str, index: int) -> str:
    """Returns the prompt of a row: its text, or the only message of a user.

    Raises: UserError where there is none.
    """
    if not isinstance(row[column], (list, tuple, dict)):
        return row_text(row, column, index)
    turns = row_turns(row, column, index)
    if [role for role, _ in turns] != ["user"]:
        raise row_error(
            index,
            f"column {column!r} holds messages of {listed([role for role, _ in turns])}, but a "
            f"prompt is a text or one "
            "message of a user (write a longer conversation as one text)",
        )
    return turns[0][1]


def row_reply(row: dict, column: str, index: int) -> str:
    """Returns the response of a row: its text, or the last message of an assistant.

    Raises: UserError where there is none.
    """
    if not isinstance(row[column], (list, tuple, dict)):
        return row_text(row, column, index)
    replies = [text for role, text in row_turns(row, column, index) if role == "assistant"]
    if not replies:
        raise row_error(index, f"column {column!r} has no message of an assistant")
    return replies[-1]


def row_turns(row: dict, column: str, index: int) -> list[tuple[str, str]]:
    """Returns the messages of a row as (role, stripped text) pairs.

    Raises: UserError unless the column holds a list of messages.
    """
    turns: Any = row[column]
    if not isinstance(turns, (list, tuple)) or not turns:
        raise row_error(
            index, f"column {column!r} holds {shown(turns)}, but a list of messages is needed there"
        )
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not all(
            isinstance(turn.get(key), str) for key in ("role", "content")
        ):
            raise row_error(
                index,
                f"message {number} in column {column!r} lacks 'role' or 'content', or has no "
                f"text there",
            )
    return [(turn["role"], cell_text(turn["content"], column, index)) for turn in turns]
