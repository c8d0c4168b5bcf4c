"""The byte-level BPE tokenizer that a GGUF's metadata spells out, as a transformers fast tokenizer.

Source: the GGUF specification; for each `tokenizer.ggml.pre`, the pre-tokenizer of that model's own
tokenizer.json; llama.cpp's llama-vocab.cpp for BOS and for what ends a generation.
"""

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
_KINDS = {
    "gpt-2": "gpt2",
    "default": "gpt2",
    "smollm": "digits",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
}
# Tokens that llama.cpp ends a generation at by their text, whatever the metadata says.
_END_TEXTS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>",
    "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>",
}  # fmt: skip
_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types
_ROLES = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "pad": "padding",
}  # transformers' word: GGUF's


class Metadata(Protocol):
    """Typed look-ups in a GGUF's key-value store; None where a key is absent."""

    def get(self, key: str, kind: type) -> Any: ...


def special_ids(meta: Metadata) -> dict[str, int | None]:
    """bos_token_id, eos_token_id and pad_token_id, as config.json would state them."""
    return {
        f"{role}_token_id": meta.get(f"tokenizer.ggml.{_ROLES[role]}_token_id", int)
        for role in ("bos", "eos", "pad")
    }


def end_of_generation(meta: Metadata) -> list[int]:
    """Every id that ends a generation: EOS, end of turn (EOT), end of message (EOM), and the tokens
    that llama.cpp knows by their text.
    """
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    ids = [meta.get(key, int) for key in keys]
    tokens = meta.get("tokenizer.ggml.tokens", list) or []
    ids += [index for index, token in enumerate(tokens) if token in _END_TEXTS]
    return list(dict.fromkeys(index for index in ids if index is not None))


def build_tokenizer(meta: Metadata, where: str, max_positions: int) -> Any:
    """A transformers fast tokenizer with special tokens and chat template.

    Its EOS, which closes a training completion, is the token that the chat template closes a turn
    with, where the file names that one as EOT.

    Raises: UserError for a tokenizer that is not byte-level BPE, an unknown pre-tokenizer, or ids
        out of range.
    """
    from transformers import PreTrainedTokenizerFast

    kind = meta.get("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise UserError(
            f"the tokenizer {kind!r} of {where!r} is not supported; only byte-level BPE ('gpt2') "
            f"is. Use the model's "
            "Hugging Face folder instead of the GGUF."
        )
    tokens, merges = (
        meta.get("tokenizer.ggml.tokens", list),
        meta.get("tokenizer.ggml.merges", list),
    )
    if not tokens or merges is None:
        raise UserError(
            f"{where!r} has no tokenizer.ggml.tokens or no tokenizer.ggml.merges; fetch it again."
        )
    if not all(isinstance(text, str) for text in (*tokens, *merges)):
        raise UserError(f"{where!r} has tokens or merges that are no texts; fetch it again.")
    if len(set(tokens)) < len(tokens):
        raise UserError(f"{where!r} has a token twice in tokenizer.ggml.tokens; fetch it again.")
    types = meta.get("tokenizer.ggml.token_type", list) or []
    if types and len(types) != len(tokens):
        raise UserError(
            f"{where!r} has {len(types)} entries in tokenizer.ggml.token_type for {len(tokens)} "
            "tokens; fetch it again."
        )
    pre = meta.get("tokenizer.ggml.pre", str) or "default"
    if pre not in _KINDS:
        raise unknown("GGUF pre-tokenizer", pre, _KINDS)
    try:
        tokenizer = _byte_level(_KINDS[pre], tokens, merges)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises bare Exception, or panics
        raise UserError(
            f"the merges of {where!r} do not fit its tokens ({shown(str(error))}); fetch it again."
        ) from error
    _add_tokens(tokenizer, tokens, types)
    roles = _role_tokens(meta, tokens, where)
    template = meta.get("tokenizer.chat_template", str)
    turn_end = _token(meta, "eot", tokens, where)
    if template and turn_end and turn_end in template:
        roles["eos_token"] = turn_end
    adds_bos = meta.get("tokenizer.ggml.add_bos_token", bool)
    if adds_bos is None:
        adds_bos = _KINDS[pre] == "llama3"
    if adds_bos and "bos_token" not in roles:
        raise UserError(
            f"{where!r} puts a BOS before every text (tokenizer.ggml.add_bos_token, or by default "
            f"with tokenizer.ggml.pre {pre!r}), but has no tokenizer.ggml.bos_token_id; convert it "
            "again."
        )
    if adds_bos:
        bos = roles["bos_token"]
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    f"{bos} $A", f"{bos} $A {bos} $B", [(bos, tokens.index(bos))]
                ),
            ]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
        **roles,
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
        first: Any = pre_tokenizers.Digits(individual_digits=True)
    else:
        first = pre_tokenizers.Split(
            Regex(_SPLIT % ("{1,3}" if kind == "llama3" else "")), "isolated"
        )
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "digits")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, bytes_])
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Control tokens become special; user-defined ones stay whole in text but are decoded as
    text.
    """
    for token, kind in zip(tokens, types, strict=False):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])


def _role_tokens(meta: Metadata, tokens: list[str], where: str) -> dict[str, str]:
    """{"eos_token": "<|im_end|>", ...} for the roles that the metadata fills."""
    found = {role: _token(meta, name, tokens, where) for role, name in _ROLES.items()}
    return {f"{role}_token": token for role, token in found.items() if token is not None}


def _token(meta: Metadata, name: str, tokens: list[str], where: str) -> str | None:
    """The token of a role; None where the metadata names none."""
    index = meta.get(f"tokenizer.ggml.{name}_token_id", int)
    if index is not None and not 0 <= index < len(tokens):
        raise UserError(
            f"{where!r}: tokenizer.ggml.{name}_token_id {index} is outside its {len(tokens)} "
            "tokens; fetch the GGUF again."
        )
    return None if index is None else tokens[index]
