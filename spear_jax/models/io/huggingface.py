"""Loads a model from a Hugging Face folder, a Hub id or a .gguf file, and saves one as a folder.

Weights never pass through torch. Host memory holds at most one stacked leaf beside the parameters.

Source: Hugging Face's folder layout.
"""

import dataclasses
import json
import os
import pathlib
import sys
from typing import Any

import numpy as np

from spear_jax.core.errors import UserError, shown
from spear_jax.core.files import disk_error, expanded, read_json_object
from spear_jax.core.surroundings import say
from spear_jax.models.config import ModelConfig, parse_config, read_config
from spear_jax.models.io.gguf import load_gguf
from spear_jax.models.io.safetensors import INDEX, SINGLE, SafetensorsFolder, write_safetensors
from spear_jax.models.io.tensor_map import (
    Placer,
    TensorSource,
    check_dtype,
    check_tensors,
    emit,
    fill,
    on_default_device,
    to_numpy,
)
from spear_jax.models.params import DecoderParams

HUB_FILES = (
    "*.json",
    "*.safetensors",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
)
HUB_TIMEOUT = 5.0  # seconds to wait for the Hub's first answer


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        config: static shape.
        base: decoder parameters, layers stacked.
        raw_config: config.json as it was (made from metadata for a GGUF); kept for export.
        source: the local folder or .gguf file that the weights came from.
        tokenizer: a transformers fast tokenizer.
        eos_ids: every id that ends a generation; the first is the tokenizer's own, which closes a
            training completion.
        pad_id: an id for unused positions; it never reaches a loss.
        generation_config: generation_config.json, or None where there is none.
    """

    config: ModelConfig
    base: DecoderParams
    raw_config: dict[str, Any]
    source: pathlib.Path
    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    generation_config: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model on disk with checked names, shapes and ids; fields as in LoadedModel, the tensors
    still unread.
    """

    config: ModelConfig
    tensors: TensorSource
    raw_config: dict[str, Any]
    source: pathlib.Path
    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    generation_config: dict[str, Any] | None


def load_model(
    source: str | os.PathLike, dtype: str, place: Placer = on_default_device
) -> LoadedModel:
    """Loads a model.

    Args:
        source: a Hugging Face model folder, a path ending in .gguf, or a Hub id such as
            "Qwen/Qwen2.5-1.5B-Instruct".
        dtype: "float32" or "bfloat16"; whatever precision the files hold is converted to it.
        place: puts a leaf of the base on its devices; as for `fill`.
    Raises: UserError, before anything compiles, where the files do not make a supported model.
    """
    check_dtype(dtype)
    files = open_model(source)
    base = fill(files.config, files.tensors, dtype, place)
    rest = {
        field.name: getattr(files, field.name)
        for field in dataclasses.fields(files)
        if field.name != "tensors"
    }
    return LoadedModel(base=base, **rest)


def open_model(source: str | os.PathLike) -> ModelFiles:
    """Opens and checks a model's files without reading a weight; arguments and errors as for
    `load_model`.
    """
    source = os.fspath(source)
    if source.endswith(".gguf"):
        path = expanded(source)
        config, raw, generation, tokenizer, tensors = load_gguf(path)
    else:
        path = find_folder(source)
        config, raw = read_config(path)
        generation = read_generation_config(path)
        tensors = SafetensorsFolder(path)
        config, raw = _untied(config, raw, tensors)
        check_tensors(config, tensors)
        _stated_ids(config, raw, generation, str(path))  # the tokenizer reads config.json, too
        tokenizer = load_tokenizer(path)
    check_tensors(config, tensors)
    eos_ids, pad_id = end_ids(config, raw, generation, tokenizer, str(path))
    return ModelFiles(config, tensors, raw, path, tokenizer, eos_ids, pad_id, generation)


def _untied(
    config: ModelConfig, raw: dict[str, Any], tensors: SafetensorsFolder
) -> tuple[ModelConfig, dict[str, Any]]:
    """The config of a folder that says it is tied, with the head that its file may hold.

    As transformers 5: a head unlike the embedding is used, and said; a copy of it is left unread.
    """
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    shapes = tensors.shapes()
    if not config.tied or embed not in shapes or head not in shapes or tensors.same(embed, head):
        return config, raw
    say(
        f"note: config.json of {tensors.where!r} says tie_word_embeddings=true, but its {head} is "
        "unlike the embedding; the head of the file is used (tie_word_embeddings=false).",
        sys.stderr,
    )
    return dataclasses.replace(config, tied=False), {**raw, "tie_word_embeddings": False}


def find_folder(source: str) -> pathlib.Path:
    """Returns the local folder of `source`: itself, or a snapshot of the Hub model of that id.

    Raises: UserError where there is neither.
    """
    path = expanded(source)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(
            f"{source!r} is a file; give a model folder, a Hub id, or a file ending in .gguf."
        )
    if source.startswith(("/", ".", "~")) or source.count("/") != 1:
        raise UserError(
            f"no model folder {source!r}. Give a Hugging Face model folder, a Hub id "
            f"(owner/name), or a .gguf file; "
            "`python -m spear_jax.fetch NAME --out=DIR` makes a folder."
        )
    return download(source)


def download(repo: str) -> pathlib.Path:
    """Downloads a model's JSON, safetensors and tokenizer files into the Hub's cache, where they
    are not there yet.

    Returns: the snapshot's folder.
    Raises: UserError where the Hub is out of reach or does not give the model out.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        folder = snapshot_download(repo, allow_patterns=list(HUB_FILES), etag_timeout=HUB_TIMEOUT)
    except GatedRepoError as error:
        raise UserError(
            f"{repo!r} is gated: accept its terms on the Hub and log in (`hf auth login`)."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"the Hub knows no model {repo!r} (or it is private); check the id."
        ) from error
    except Exception as error:  # the network's, the Hub's and the disk's have no common type
        told = disk_error(error)
        why = f"the cache takes no files: {told}" if told else ""
        why = why or f"the Hub cannot be reached ({(str(error).splitlines() or [''])[0]})"
        if constants.HF_HUB_OFFLINE:
            why = f"asking the Hub is off (--offline or HF_HUB_OFFLINE; the cache is {constants.HF_HUB_CACHE})"
        raise UserError(
            f"{repo!r} is no local folder, is not in the Hub's cache, and {why}. Give a model "
            f"folder or a "
            ".gguf file, or make one with `python -m spear_jax.fetch smollm2-135m-instruct "
            "--out=DIR`."
        ) from error
    return pathlib.Path(folder)


def read_generation_config(folder: pathlib.Path) -> dict[str, Any] | None:
    """Reads generation_config.json; None without one, UserError where it is no JSON object."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    return read_json_object(file, "fetch the model again, or delete this file")


def load_tokenizer(folder: pathlib.Path) -> Any:
    """Reads the folder's tokenizer with transformers; UserError where it is missing or damaged."""
    if (
        not (folder / "tokenizer.json").is_file()
        and not (folder / "tokenizer_config.json").is_file()
    ):
        raise UserError(
            f"no tokenizer.json in {str(folder)!r}; fetch the model with its tokenizer."
        )
    from transformers import AutoTokenizer

    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            read_json_object(folder / name, "fetch the model with its tokenizer again")
    try:
        return AutoTokenizer.from_pretrained(str(folder), use_fast=True, local_files_only=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises bare Exception, and panics beside it
        raise UserError(
            f"the tokenizer in {str(folder)!r} cannot be read ({' '.join(str(error).split())[:300]});"
            " fetch the model again."
        ) from error


def end_ids(
    config: ModelConfig,
    raw: dict[str, Any],
    generation: dict[str, Any] | None,
    tokenizer: Any,
    where: str,
) -> tuple[tuple[int, ...], int]:
    """Collects the ids that end a generation, and the padding id.

    Returns: (eos_ids, pad_id); eos_ids are those of the tokenizer, config.json and
        generation_config.json, in that order, once each.
    Raises: UserError where the tokenizer has no EOS, or has ids that the embedding lacks, and for
        an eos_token_id or pad_token_id that is no id; a pad_token_id out of range is left out.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {where!r} has no EOS token, so no completion could end; set "
            f"eos_token in its "
            "tokenizer_config.json."
        )
    ids = [tokenizer.eos_token_id]
    stated, pad = _stated_ids(config, raw, generation, where)
    ids += stated
    pad = pad if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    pad = ids[0] if pad is None or not 0 <= pad < config.vocab_size else pad
    top = max(len(tokenizer) - 1, *ids)
    if top >= config.vocab_size:
        raise UserError(
            f"the tokenizer of {where!r} makes ids up to {top}, but the embedding has "
            f"{config.vocab_size} rows "
            "(config.json's vocab_size); use the tokenizer that belongs to the model."
        )
    return tuple(dict.fromkeys(ids)), pad


def _stated_ids(
    config: ModelConfig, raw: dict[str, Any], generation: dict[str, Any] | None, where: str
) -> tuple[list[int], int | None]:
    """The EOS ids of config.json and generation_config.json, and config.json's pad_token_id."""
    eos = []
    for file, stated in (("config.json", raw), ("generation_config.json", generation or {})):
        eos += _stated_eos(stated.get("eos_token_id"), f"{file} of {where!r}", config.vocab_size)
    pad = raw.get("pad_token_id")
    if pad is not None and not _whole(pad):
        raise UserError(
            f"config.json of {where!r}: pad_token_id is {shown(pad)}, not a token id; set it to the "
            "tokenizer's, or to null."
        )
    return eos, pad


def _stated_eos(stated: Any, where: str, vocab_size: int) -> list[int]:
    """A file's eos_token_id as a list; raises UserError for what is no id of the embedding."""
    if stated is None:
        return []
    ids = stated if isinstance(stated, list) else [stated]
    for token in ids:
        if not _whole(token) or not 0 <= token < vocab_size:
            raise UserError(
                f"{where}: eos_token_id has {shown(token)}, not an id from 0 to {vocab_size - 1} "
                "(vocab_size - 1); set it to the id of the tokenizer's EOS."
            )
    if not ids:
        raise UserError(
            f"{where}: eos_token_id is [], so nothing ends a completion; set it to the id of the "
            "tokenizer's EOS, or remove the key."
        )
    return ids


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def save_model(
    folder: str | os.PathLike,
    base: DecoderParams,
    raw_config: dict[str, Any],
    tokenizer: Any,
    generation_config: dict[str, Any] | None = None,
    shard_bytes: int = 4 << 30,
) -> pathlib.Path:
    """Writes a Hugging Face model folder in the base's dtype; an adapter must be merged before.

    config.json is written last: a folder that has one is whole.

    Args:
        base, raw_config, tokenizer, generation_config: as in `LoadedModel`, of any source.
        shard_bytes: size of one weight file, about; host memory holds one of them.
    Returns: the folder.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    for old in (*folder.glob("model*.safetensors"), folder / INDEX):
        old.unlink(missing_ok=True)
    _save_weights(folder, parse_config(raw_config), base, shard_bytes)
    _save_tokenizer(folder, tokenizer)
    if generation_config is not None:
        _write_json(folder / "generation_config.json", generation_config)
    kept = {
        key: value
        for key, value in raw_config.items()
        if key not in ("torch_dtype", "quantization_config")
    }
    _write_json(folder / "config.json", {**kept, "dtype": base.embed.dtype.name})
    return folder


def _save_tokenizer(folder: pathlib.Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(str(folder))
    file = folder / "tokenizer_config.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    # transformers 5's name, which transformers 4 does not know
    if raw.get("tokenizer_class") == "TokenizersBackend":
        _write_json(file, {**raw, "tokenizer_class": "PreTrainedTokenizerFast"})


def _save_weights(
    folder: pathlib.Path, config: ModelConfig, base: DecoderParams, shard_bytes: int
) -> None:
    width = base.embed.dtype.itemsize
    shards: list[list] = [[]]
    filled = 0
    for entry in emit(config, base):
        size = int(np.prod(entry[1])) * width
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    index, total = {}, 0
    for number, shard in enumerate(shards, 1):
        name = (
            SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        tensors = {key: to_numpy(leaf, layer, shape) for key, shape, leaf, layer in shard}
        write_safetensors(folder / name, tensors)
        index |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def _write_json(file: pathlib.Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
