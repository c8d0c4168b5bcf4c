"""Preferences of your own: prompts with a chosen and a rejected response each, for DPO."""

from spear_jax.core.types import Example
from spear_jax.tasks.ungraded import Ungraded, row_prompt, row_reply


class Preferences(Ungraded):
    """Preference pairs from a local file; the chosen response is the gold one.

    A column holds texts, or lists of {role, content} messages. A prompt is one message of a user. A
    response is the last message of an assistant.

    Args: columns: the file's column for "prompt", "chosen" and "rejected".
    """

    name = "preferences"
    mapping = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}

    def example(self, row: dict, index: int) -> Example:
        prompt = row_prompt(row, self.mapping["prompt"], index)
        chosen = row_reply(row, self.mapping["chosen"], index)
        return self.ask(index, prompt, chosen, row_reply(row, self.mapping["rejected"], index))
