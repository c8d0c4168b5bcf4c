"""Anyone's preferences: a local file of prompts with a chosen and a rejected response each, as DPO
needs them.
"""

from spear_jax.core.types import Example
from spear_jax.tasks.ungraded import Ungraded, row_prompt, row_reply


class Preferences(Ungraded):
    """Preference pairs from a local file; the chosen response is the gold one.

    Args:
        columns: the file's column for "prompt", "chosen" and "rejected"; a cell is a text, or a
            list of {role, content} messages: one of a user for a prompt, any that hold an
            assistant's for a response (the last is taken).
    """

    name = "preferences"
    mapping = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}

    def example(self, row: dict, index: int) -> Example:
        prompt = row_prompt(row, self.mapping["prompt"], index)
        chosen = row_reply(row, self.mapping["chosen"], index)
        return self.ask(index, prompt, chosen, row_reply(row, self.mapping["rejected"], index))
