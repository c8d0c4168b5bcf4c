"""UltraChat 200k: a user's first request and the assistant's response."""

from spear_jax.core.types import Example
from spear_jax.tasks.files import listed
from spear_jax.tasks.loading import row_error
from spear_jax.tasks.ungraded import Ungraded, row_turns


class UltraChat(Ungraded):
    """UltraChat 200k, SFT splits.

    Source: SPIN (arXiv 2401.01335), its training data. Departures:
      1. Only the first user and the first assistant turn are used; a conversation in another order
         is an error.
    """

    name = "ultrachat"
    hub = ("HuggingFaceH4/ultrachat_200k", None)
    splits = {"train": "train_sft", "test": "test_sft"}
    columns = ("messages",)

    def example(self, row: dict, index: int) -> Example:
        turns = row_turns(row, "messages", index)
        if [role for role, _ in turns[:2]] != ["user", "assistant"]:
            roles = listed([role for role, _ in turns[:2]])
            raise row_error(
                index,
                f"column 'messages' opens with {roles}, but a user and then an assistant must "
                f"open it",
            )
        return self.ask(index, turns[0][1], turns[1][1])
