"""Prompts and responses of your own: a local file and a mapping of its column names."""

from spear_jax.core.types import Example
from spear_jax.tasks.ungraded import Ungraded, row_prompt, row_reply


class Pairs(Ungraded):
    """Prompts and gold responses from a local file.

    A column holds texts, or lists of {role, content} messages. A prompt is one message of a user. A
    response is the last message of an assistant.

    Args: columns: the file's column for "prompt" and "response".
    """

    name = "pairs"
    mapping = {"prompt": "prompt", "response": "response"}

    def example(self, row: dict, index: int) -> Example:
        prompt = row_prompt(row, self.mapping["prompt"], index)
        return self.ask(index, prompt, row_reply(row, self.mapping["response"], index))
