"""Anyone's prompts and responses: a local file and a mapping from our two column names to the
file's.
"""

from spear_jax.core.types import Example
from spear_jax.tasks.ungraded import Ungraded, row_prompt, row_reply


class Pairs(Ungraded):
    """Prompts and gold responses from a local file.

    Args:
        columns: the file's column for "prompt" and "response"; a cell is a text, or a list of
            {role, content} messages: one of a user for a prompt, any that hold an assistant's for a
            response (the last is taken).
    """

    name = "pairs"
    mapping = {"prompt": "prompt", "response": "response"}

    def example(self, row: dict, index: int) -> Example:
        prompt = row_prompt(row, self.mapping["prompt"], index)
        return self.ask(index, prompt, row_reply(row, self.mapping["response"], index))
