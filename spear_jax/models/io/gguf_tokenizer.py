"""The byte-level BPE tokenizer that a GGUF's metadata spells out, as a transformers fast tokenizer.

Sources: the GGUF specification; llama.cpp's src/llama-vocab.cpp for what is added, what ends a
generation and how "default" cuts text; for every other `tokenizer.ggml.pre`, the pre-tokenizer of that
model's own tokenizer.json.

Departures from llama.cpp:
  1. An id outside the vocabulary, a token that stands twice and a BOS that is asked for but not named
     are refused; llama.cpp takes another token instead.
  2. `tokenizer.ggml.add_eos_token` and the other keys that add something to a prompt are refused.
"""

import dataclasses
from typing import Any, Protocol

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from spear_jax.core.errors import UserError, shown, unknown

# How text is cut before merging. GPT-2's own pattern is built into ByteLevel; the others differ in
# digits and case.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's own pattern for files that name no pre-tokenizer: one cut after the other
_DEFAULT_CUTS = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
_KINDS = {
    "gpt-2": "gpt2",
    "default": "default",
    "smollm": "digits",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
}
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # GGUF token types
_ROLES = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "pad": "padding",
}  # transformers' word: GGUF's
# Besides EOS: the keys whose ids end a generation, and the texts that end one with or without a key
_END_KEYS = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_END_MARKS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<end_of_utterance>",
    "<|return|>",
    "<|call|>",
    "<|fim_pad|>",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
_NEVER = ("add_eos_token", "add_sep_token", "add_space_prefix")


class Metadata(Protocol):
    """Typed look-ups in a GGUF's key-value store."""

    def get(self, key: str, kind: Any) -> Any:
        """Returns None where a key is absent; raises UserError for another type than `kind`."""

    def wrong(self, key: str, rule: str) -> UserError:
        """Returns the error for a key's value."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a GGUF says of its tokens.

    Attributes:
        tokens: the text of each id, as byte-level BPE spells it.
        types: GGUF's token type of each id; empty where the file states none.
        roles: ids under transformers' words "bos", "eos", "unk" and "pad"; "eos" closes a reply.
        ends: every id that ends a generation, "eos" first; empty where the file names no EOS.
    """

    tokens: list[str]
    types: list[int]
    roles: dict[str, int]
    ends: tuple[int, ...]


def read_vocabulary(meta: Metadata, where: str) -> Vocabulary:
    """Reads the tokens and the ids of special ones.

    EOS, EOT, EOM and their like end a generation, by their keys and by their texts. The reply of a
    training example closes with EOS, unless the chat template writes another of them and not EOS:
    then with that one, as in the tokenizer_config.json of such models.

    Raises: UserError for a tokenizer that is not byte-level BPE, tokens that stand twice, types that
        do not fit, or ids out of range.
    """
    kind = meta.get("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise UserError(
            f"the tokenizer {kind!r} of {where!r} is not supported; only byte-level BPE ('gpt2') "
            f"is. Use the model's "
            "Hugging Face folder instead of the GGUF."
        )
    stated = meta.get("tokenizer.ggml.tokens", list[str])
    if not stated:
        raise UserError(f"{where!r} has no tokenizer.ggml.tokens; fetch it again.")
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(stated)]
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if ids[token] != index)
        raise UserError(
            f"{where!r}: tokenizer.ggml.tokens holds {shown(twice)} twice; convert or fetch the "
            f"GGUF again."
        )
    types = meta.get("tokenizer.ggml.token_type", list[int]) or []
    if types and len(types) != len(tokens):
        raise UserError(
            f"{where!r}: tokenizer.ggml.token_type has {len(types)} entries, but "
            f"tokenizer.ggml.tokens {len(tokens)}; convert or fetch the GGUF again."
        )
    roles = {
        role: index
        for role, name in _ROLES.items()
        if (index := _token_id(meta, name, role, len(tokens))) is not None
    }
    keyed = [_token_id(meta, name, name, len(tokens)) for name in _END_KEYS]
    marks = [ids.get(mark) for mark in _END_MARKS]
    ends = [index for index in (roles.get("eos"), *keyed, *marks) if index is not None]
    if "eos" not in roles:
        return Vocabulary(tokens, types, roles, ())
    roles["eos"] = _closing(meta.get("tokenizer.chat_template", str) or "", tokens, ends)
    return Vocabulary(tokens, types, roles, tuple(dict.fromkeys([roles["eos"], *ends])))


def _token_id(meta: Metadata, name: str, role: str, count: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    index = meta.get(key, int)
    if index is not None and index >= count:
        raise meta.wrong(
            key, f"{role} id {index} is outside its {count} tokens; fetch the GGUF again"
        )
    return index


def _closing(template: str, tokens: list[str], ends: list[int]) -> int:
    """The id that closes a reply: EOS (the first of `ends`), or the one that the template writes in
    its place.
    """
    if "eos_token" in template or tokens[ends[0]] in template:
        return ends[0]
    return next((index for index in ends if tokens[index] in template), ends[0])


def special_ids(vocabulary: Vocabulary) -> dict[str, int | list[int] | None]:
    """bos_token_id, eos_token_id (a list where several end a generation) and pad_token_id, as
    config.json would state them.
    """
    ends = list(vocabulary.ends)
    return {
        "bos_token_id": vocabulary.roles.get("bos"),
        "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None,
        "pad_token_id": vocabulary.roles.get("pad"),
    }


def build_tokenizer(vocabulary: Vocabulary, meta: Metadata, where: str, max_positions: int) -> Any:
    """A transformers fast tokenizer with special tokens and chat template.

    BOS is put first where `tokenizer.ggml.add_bos_token` says so; where it says nothing, for
    Llama 3's pre-tokenizers alone.

    Raises: UserError for an unknown pre-tokenizer, merges that do not fit the tokens, a BOS that is
        asked for but not named, or a key that adds something else to a prompt.
    """
    from transformers import PreTrainedTokenizerFast

    pre = meta.get("tokenizer.ggml.pre", str) or "default"
    if pre not in _KINDS:
        raise unknown("GGUF pre-tokenizer", pre, _KINDS)
    for name in _NEVER:
        if meta.get(f"tokenizer.ggml.{name}", bool):
            raise meta.wrong(
                f"tokenizer.ggml.{name}",
                "only false is supported; use the model's Hugging Face folder",
            )
    merges = meta.get("tokenizer.ggml.merges", list[str])
    if merges is None:
        raise UserError(f"{where!r} has no tokenizer.ggml.merges; fetch it again.")
    tokens = vocabulary.tokens
    try:
        tokenizer = _byte_level(_KINDS[pre], tokens, merges)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises bare Exception for a wrong merge, or panics
        raise UserError(
            f"tokenizer.ggml.merges of {where!r} do not fit its tokens "
            f"({shown(str(error), 200)}); fetch it again."
        ) from error
    _add_tokens(tokenizer, vocabulary)
    add_bos = meta.get("tokenizer.ggml.add_bos_token", bool)
    if _KINDS[pre] == "llama3" if add_bos is None else add_bos:
        _put_bos_first(tokenizer, vocabulary, where)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=meta.get("tokenizer.chat_template", str),
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": tokens[index] for role, index in vocabulary.roles.items()},
    )


def _put_bos_first(tokenizer: Tokenizer, vocabulary: Vocabulary, where: str) -> None:
    if "bos" not in vocabulary.roles:
        raise UserError(
            f"{where!r} puts a BOS before every text, but has no tokenizer.ggml.bos_token_id; "
            f"convert it again, or set tokenizer.ggml.add_bos_token to false."
        )
    index = vocabulary.roles["bos"]
    template = processors.TemplateProcessing(
        single=["bos", "$A"],
        pair=["bos", "$A", "$B"],
        special_tokens=[{"id": "bos", "ids": [index], "tokens": [vocabulary.tokens[index]]}],
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), template]
    )


def _byte_level(kind: str, tokens: list[str], merges: list[str]) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=kind == "llama3"))
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return tokenizer
    if kind == "digits":
        cuts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)]
    elif kind == "default":
        cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in _DEFAULT_CUTS]
    else:
        pattern = _SPLIT % ("{1,3}" if kind == "llama3" else "")
        cuts = [pre_tokenizers.Split(Regex(pattern), "isolated")]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "digits")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_])
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Control and unknown tokens become special, and so do end marks of whatever type; user-defined
    ones stay whole in text but are decoded as text.
    """
    types = vocabulary.types or [0] * len(vocabulary.tokens)
    for token, kind in zip(vocabulary.tokens, types, strict=True):
        if kind in (_UNKNOWN, _CONTROL) or token in _END_MARKS:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])
