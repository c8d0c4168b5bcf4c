"""Text to prompt ids and back: the chat template where the model has one, the header, and the
length limit.

The tokens of a gold completion are those of prompt and completion encoded as one text, behind the
prompt's own. A tokenizer that puts a space before a text that is encoded alone does not put it there.

Source: multiple choice as lm-evaluation-harness scores it. Departure: where the tokens of the whole do
not begin with the prompt's (a merge across the boundary), the prompt keeps its own, as in generation,
and the completion is encoded behind a line's end.
"""

import datetime
import functools
import os.path
import re
import sys
from collections.abc import Mapping
from typing import Any

from spear_jax.core.errors import UserError, shown
from spear_jax.core.surroundings import say
from spear_jax.core.types import Example
from spear_jax.tasks.base import Task

_OPEN_TAG = re.compile(r"<((?:think|thought|reason)\w*)>\s*\Z")
_TODAY = re.compile(r"""strftime_now\s*\(\s*(['"])(.*?)\1\s*\)""")
CHAT_MODES = ("auto", "always", "never")
MIN_SHARED_PREFIX = 16  # the shortest opening in tokens that is worth a pass of its own


@functools.cache  # a run has several renderers of one template
def _note(text: str) -> None:
    say(f"note: {text}", sys.stderr)


class PromptRenderer:
    """Turns a task's text into prompt ids.

    With a chat template the question is the user's message and the header opens the assistant's
    turn; without one the header is the prompt's last line. Either way a completion continues the
    header.

    What a template writes between its generation prompt and a reply, such as an empty block of
    thought, stands before the header and before a gold completion.

    Args:
        tokenizer: a transformers tokenizer.
        chat: "auto" uses the template when there is one, "always" insists on it, "never" ignores
            it.
        limit: the longest prompt, in tokens.
        arguments: further arguments of the template, such as {"enable_thinking": False}.
        date: what a template is told that asks for today's date.
    Raises: UserError for an unknown mode, "always" with a tokenizer that has no template, and a
        template that fails or leaves the question out.
    """

    def __init__(
        self,
        tokenizer,
        chat: str,
        limit: int,
        arguments: Mapping[str, Any] | None = None,
        date: datetime.date = datetime.date(2024, 7, 26),
    ):
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
        self.arguments, self.date = dict(arguments or {}), date
        self.piece = functools.cache(
            lambda id: tokenizer.decode([id], clean_up_tokenization_spaces=False)
        )
        self.opening = self._find_opening() if self.chat else ""

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
        return self._completion(task, task.response(example), example, limit)

    def rejected(self, task: Task, example: Example, limit: int) -> tuple[list[int], bool]:
        """As `response`, for the dispreferred completion; raises UserError where the example has
        none.
        """
        if not example.rejected:
            raise UserError(
                f"example {example.id!r} of task {task.name!r} has no rejected response; only "
                f"task 'preferences' has them."
            )
        return self._completion(task, example.rejected, example, limit)

    def _completion(
        self, task: Task, text: str, example: Example, limit: int
    ) -> tuple[list[int], bool]:
        eos, header = self.tokenizer.eos_token_id, task.templates.header
        prompt = self._text(task.question(example), header)
        ids = self._behind(prompt, text if header else self.opening + text)
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

    def continuation(self, label: str, header: str = "") -> list[int]:
        """Token ids of a label as it follows the header."""
        return self._behind(header or "\n", f" {label}")

    def token_span(self, ids: list[int], start: int, end: int) -> range:
        """The positions of `ids` whose text overlaps the characters start..end of the decoded
        completion.
        """
        ends = [len(self.decode(ids[: i + 1])) for i in range(len(ids))]
        begins = [0, *ends[:-1]]
        inside = [i for i in range(len(ids)) if begins[i] < end and ends[i] > start]
        return range(inside[0], inside[-1] + 1) if inside else range(0)

    def _encode(self, text: str, header: str) -> list[int]:
        return self._ids(self._text(text, header))

    def _text(self, text: str, header: str) -> str:
        """The whole prompt as text."""
        if not self.chat:
            return f"{text}\n{header}"
        prompt = self._rendered([{"role": "user", "content": text}], add_generation_prompt=True)
        if text.strip() not in prompt:
            raise UserError(
                f"the chat template leaves the question out: of {shown(text)} it makes "
                f"{shown(prompt)}. Set --config.data.chat_template=never, or use a tokenizer whose "
                "template takes plain text."
            )
        return f"{prompt}{self.opening}{header}" if header else prompt

    def _ids(self, whole: str) -> list[int]:
        ids = self.tokenizer.encode(whole, add_special_tokens=not self.chat)
        # Some tokenizers close every text with EOS; a prompt is to be continued.
        ends = not self.chat and ids and ids[-1] == self.tokenizer.eos_token_id
        return ids[:-1] if ends else ids

    def _behind(self, prompt: str, text: str) -> list[int]:
        """Token ids of a text as it follows a prompt."""
        encode = functools.partial(self.tokenizer.encode, add_special_tokens=False)
        for before in (prompt, "\n"):
            whole, own = encode(before + text), encode(before)
            if whole[: len(own)] == own:
                return whole[len(own) :]
        return encode(text)

    def _rendered(self, messages: list[dict[str, str]], **switches: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                chat_template=self._template,
                **switches,
                **self.arguments,
            )
        except UserError:
            raise
        except Exception as error:  # a template may raise anything
            raise UserError(
                f"the tokenizer's chat template fails: {shown(str(error), 300)}. Set "
                "--config.data.chat_template=never, give it what it asks for in "
                "--config.data.chat_template_kwargs, or mend the template."
            ) from error

    @functools.cached_property
    def _template(self) -> str:
        """The chat template, with the date in place of its calls for today's."""
        dated = lambda call: repr(self.date.strftime(call[2]))
        template = _TODAY.sub(dated, self.tokenizer.get_chat_template())
        if re.search(r"strftime_now(?!\s+is\b)", template):  # is it defined? may be asked
            raise UserError(
                "the chat template asks for today's date in a form that cannot be fixed, and "
                "prompts would differ from day to day. Set --config.data.chat_template=never, or "
                "write strftime_now('%d %b %Y') in the template."
            )
        return template

    def _find_opening(self) -> str:
        """What the template writes between its generation prompt and a reply.

        A note says so where a block of thought is open then, in which the header and gold
        completions will stand.
        """
        question, reply = "What is it?", "It is this."
        asked = [{"role": "user", "content": question}]
        prompt = self._rendered(asked, add_generation_prompt=True)
        opening = self._between(prompt, asked, reply)
        if tag := _OPEN_TAG.search(prompt + opening):
            _note(
                f"the chat template opens <{tag[1]}> before a reply, and closes it in none: the "
                "header, answers and gold responses stand inside. To keep them out, set "
                "--config.data.chat_template=never, or what closes it in "
                "--config.data.chat_template_kwargs"
            )
        return opening

    def _between(self, prompt: str, asked: list[dict[str, str]], reply: str) -> str:
        try:
            whole = self._rendered([*asked, {"role": "assistant", "content": reply}])
        except UserError:
            return ""  # a template of questions alone
        if not whole.startswith(prompt) or reply not in whole[len(prompt) :]:
            return ""
        return whole[len(prompt) : whole.index(reply, len(prompt))]
