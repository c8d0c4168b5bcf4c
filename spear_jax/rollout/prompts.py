"""Text to prompt ids and back: the chat template where the model has one, the header, and the
length limit.
"""

import functools
import os.path

from spear_jax.core.errors import UserError
from spear_jax.core.types import Example
from spear_jax.tasks.base import Task

CHAT_MODES = ("auto", "always", "never")
MIN_SHARED_PREFIX = 16  # the shortest opening in tokens that is worth a pass of its own


class PromptRenderer:
    """Turns a task's text into prompt ids.

    With a chat template the question is the user's message and the header opens the assistant's
    turn; without one the header is the prompt's last line. Either way a completion continues the
    header.

    Args:
        tokenizer: a transformers tokenizer.
        chat: "auto" uses the template when there is one, "always" insists on it, "never" ignores
            it.
        limit: the longest prompt, in tokens.
    Raises: UserError for an unknown mode, or "always" with a tokenizer that has no template.
    """

    def __init__(self, tokenizer, chat: str, limit: int):
        if chat not in CHAT_MODES:
            raise UserError(
                f"data.chat_template is {chat!r}; it must be one of {', '.join(CHAT_MODES)}."
            )
        if chat == "always" and not tokenizer.chat_template:
            raise UserError(
                "data.chat_template is 'always', but the tokenizer has no chat template; set "
                "'auto' or 'never'."
            )
        self.tokenizer, self.limit = tokenizer, limit
        self.chat = chat != "never" and bool(tokenizer.chat_template)
        self.piece = functools.cache(
            lambda id: tokenizer.decode([id], clean_up_tokenization_spaces=False)
        )

    def prompt(self, task: Task, example: Example) -> list[int]:
        """Token ids of the question; raises UserError naming the example when it exceeds the
        limit.
        """
        ids = self._encode(task.question(example), task.templates.header)
        if len(ids) > self.limit:
            raise UserError(
                f"example {example.id!r} has a prompt of {len(ids)} tokens, over the limit of "
                f"{self.limit} (data.max_prompt_tokens, or what completions leave of the model's "
                "positions). Raise data.max_prompt_tokens or lower max_new_tokens, or shorten "
                "data.templates or the example."
            )
        return ids

    def revision(
        self,
        task: Task,
        example: Example,
        answer: str,
        feedback: str,
        limit: int | None = None,
    ) -> list[int]:
        """Returns the token ids of the revision prompt. The previous answer is cut at its end where
        the prompt would be longer than `limit` tokens (None: than any prompt may be).
        """
        answer, limit = answer.strip(), self.limit if limit is None else limit
        while True:
            ids = self._encode(task.revision(example, answer, feedback), task.templates.header)
            if len(ids) <= limit or not answer:
                return ids[-limit:]
            keep = max(0, len(answer) - 4 * (len(ids) - limit))
            answer = answer[:keep]

    def shared_prefixes(self, task: Task, examples: list[Example]) -> list[list[int]]:
        """The token ids with which prompts open, whatever the example: those of questions, and
        those of revision prompts. Fewer than OPENING do not count.
        """
        few = examples[:64]
        asked = [self.prompt(task, example) for example in few]
        revised = [self.revision(task, example, str(i), str(i)) for i, example in enumerate(few)]
        found = []
        for prompts in (asked, revised):
            shared = os.path.commonprefix(prompts) if len({*map(tuple, prompts)}) > 1 else []
            shared = shared[
                : len(shared) // 8 * 8
            ]  # what a few examples share by chance is seldom as long
            if len(shared) >= MIN_SHARED_PREFIX:
                found.append(shared)
        return found

    def privileged(self, task: Task, example: Example) -> list[int]:
        """Token ids of the teacher's privileged prompt. Its start, before the question, is cut
        where it would be too long.

        Raises: UserError where even the rest exceeds the limit.
        """
        text, question = task.privileged(example), task.question(example)
        spare = text.rindex(question)  # characters before the question
        while True:
            ids = self._encode(text, task.templates.header)
            excess = len(ids) - self.limit
            if excess <= 0:
                return ids
            if not spare:
                raise UserError(
                    f"example {example.id!r} has a privileged prompt of {len(ids)} tokens, over "
                    f"the limit of {self.limit}, "
                    "and nothing before its question to cut. Raise data.max_prompt_tokens, or "
                    "shorten data.templates."
                )
            cut = min(spare, excess * max(1, len(text) // len(ids)))
            text, spare = text[cut:], spare - cut

    def response(self, task: Task, example: Example, limit: int) -> tuple[list[int], bool]:
        """Token ids of the gold response as it follows the header, and one EOS.

        Args: limit: the longest completion in tokens, EOS included.
        Returns: the ids; and whether they were cut to `limit`, which leaves no EOS.
        Raises: UserError for a response with EOS inside.
        """
        return self._completion(task.response(example), example, limit)

    def rejected(self, task: Task, example: Example, limit: int) -> tuple[list[int], bool]:
        """As `response`, for the dispreferred completion; raises UserError where the example has
        none.
        """
        if not example.rejected:
            raise UserError(
                f"example {example.id!r} of task {task.name!r} has no rejected response; only "
                f"task 'preferences' has them."
            )
        return self._completion(example.rejected, example, limit)

    def _completion(self, text: str, example: Example, limit: int) -> tuple[list[int], bool]:
        eos = self.tokenizer.eos_token_id
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        while ids and ids[-1] == eos:  # written out in the data; exactly one is added here
            ids.pop()
        if eos in ids:
            raise UserError(
                f"example {example.id!r} has the end mark {self.tokenizer.eos_token!r} inside a "
                f"response, where no "
                "generation would go on; delete it from the data."
            )
        ids.append(eos)
        return ids[:limit], len(ids) > limit

    def decode(self, ids: list[int]) -> str:
        """The text of a completion, special tokens left out, otherwise exactly as generated."""
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def pieces(self, ids: list[int]) -> list[str]:
        """Each token's own text, special tokens included; where it holds a part of a character, a
        replacement character.
        """
        return [self.piece(id) for id in ids]

    def continuation(self, label: str) -> list[int]:
        """Token ids of a label as it follows the header."""
        return self.tokenizer.encode(f" {label}", add_special_tokens=False)

    def token_span(self, ids: list[int], start: int, end: int) -> range:
        """The positions of `ids` whose text overlaps the characters start..end of the decoded
        completion.
        """
        ends = [len(self.decode(ids[: i + 1])) for i in range(len(ids))]
        begins = [0, *ends[:-1]]
        inside = [i for i in range(len(ids)) if begins[i] < end and ends[i] > start]
        return range(inside[0], inside[-1] + 1) if inside else range(0)

    def _encode(self, text: str, header: str) -> list[int]:
        if self.chat:
            message = [{"role": "user", "content": text}]
            whole = (
                self.tokenizer.apply_chat_template(
                    message, add_generation_prompt=True, tokenize=False
                )
                + header
            )
            return self.tokenizer.encode(whole, add_special_tokens=False)
        ids = self.tokenizer.encode(f"{text}\n{header}")
        # Some tokenizers close every text with EOS; a prompt is to be continued.
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids
