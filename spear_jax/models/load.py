"""Models in and out: a Hugging Face folder, a Hub id or a .gguf file to a base tree, and a base tree to a folder.

Weights never pass through torch; host memory holds at most one stacked leaf beside the tree.

Source: the safetensors format (safetensors.safe_open) and Hugging Face's folder layout.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spear_jax.errors import UserError
from spear_jax.models.config import ModelConfig, parse_config, read_config
from spear_jax.models.gguf import load_gguf
from spear_jax.models.weights import check_dtype, emit, fill, to_numpy

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "merges.txt", "vocab.txt", "chat_template.jinja")
HUB_TIMEOUT = 10.0  # seconds to wait for the Hub's first answer before saying that it cannot be reached


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        config: static shape.
        base: decoder parameters, laid out as in decoder.py.
        raw_config: config.json as it was (made from metadata for a GGUF); kept for export.
        source: the local folder or .gguf file that the weights came from.
        tokenizer: a transformers fast tokenizer.
        eos_ids: every id that ends a generation; the first is the tokenizer's own, which closes a training completion.
        pad_id: an id for unused positions; it never reaches a loss.
        generation_config: generation_config.json, or None where there is none.
    """

    config: ModelConfig
    base: dict
    raw_config: dict[str, Any]
    source: pathlib.Path
    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    generation_config: dict[str, Any] | None


def load_model(source: str, dtype: str) -> LoadedModel:
    """Loads a model.

    Args:
        source: a Hugging Face model folder, a path ending in .gguf, or a Hub id such as "Qwen/Qwen2.5-1.5B-Instruct".
        dtype: "float32" or "bfloat16"; whatever precision the files hold is converted to it.
    Raises: UserError, before anything compiles, for every way in which the files cannot make this model.
    """
    check_dtype(dtype)
    if source.endswith(".gguf"):
        config, raw, generation, tokenizer, tensors = load_gguf(source)
        path = pathlib.Path(source)
    else:
        path = find_folder(source)
        config, raw = read_config(path)
        generation = read_generation_config(path)
        tensors = SafetensorsFolder(path)
        tokenizer = load_tokenizer(path)
    eos_ids, pad_id = end_ids(config, raw, generation, tokenizer, str(path))
    return LoadedModel(config, fill(config, tensors, dtype), raw, path, tokenizer, eos_ids, pad_id, generation)


def find_folder(source: str) -> pathlib.Path:
    """The local folder of `source`: itself, or a snapshot of the Hub model of that id. Raises UserError."""
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{source!r} is a file; give a model folder, a Hub id, or a file ending in .gguf.")
    if source.startswith(("/", ".", "~")) or source.count("/") != 1:
        raise UserError(
            f"no model folder {source!r}. Give a Hugging Face model folder, a Hub id (owner/name), or a .gguf file; "
            "`python -m spear_jax.fetch NAME --out=DIR` makes a folder."
        )
    return download(source)


def download(repo: str, out: pathlib.Path | None = None) -> pathlib.Path:
    """Takes a model's JSON, safetensors and tokenizer files from the Hub, or from its cache when it is offline.

    Args:
        out: folder to put them in; None keeps them in the Hub's cache.
    Raises: UserError where the Hub is out of reach or does not give the model out.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = snapshot_download(repo, local_dir=out, allow_patterns=list(HUB_FILES), etag_timeout=HUB_TIMEOUT)
    except GatedRepoError as error:
        raise UserError(f"{repo!r} is gated: accept its terms on the Hub and log in (`hf auth login`).") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"the Hub knows no model {repo!r} (or it is private); check the id.") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{repo!r} is no local folder, is not in the Hub's cache, and the Hub cannot be reached "
            f"({str(error).splitlines()[0]}). Give a model folder or a .gguf file, or make one with "
            "`python -m spear_jax.fetch smollm2-135m-instruct --out=DIR`."
        ) from error
    return pathlib.Path(folder)


class SafetensorsFolder:
    """The tensors of a folder: model.safetensors, or the shards that its index names."""

    def __init__(self, folder: pathlib.Path):
        self.where = str(folder)
        self._files: dict[str, Any] = {}  # tensor name -> the open file that holds it
        self._shapes: dict[str, tuple[int, ...]] = {}
        index = _shard_index(folder)
        for shard in sorted(set(index.values())) if index else [SINGLE]:
            self._open(folder / shard)
        for name, shard in (index or {}).items():
            if name not in self._files:
                raise UserError(f"{folder / shard} lacks tensor {name!r}, which {INDEX} says it holds; fetch it again.")

    def _open(self, file: pathlib.Path) -> None:
        if not file.is_file():
            raise UserError(f"weight file {str(file)!r} is missing; fetch the model again.")
        try:
            reader = safe_open(file, framework="numpy")
        except SafetensorError as error:
            raise UserError(f"{str(file)!r} is truncated or damaged ({error}); fetch this file again.") from error
        for name in reader.keys():  # noqa: SIM118 (safe_open is no dict)
            view = reader.get_slice(name)
            if view.get_dtype() not in ("F32", "F16", "BF16"):
                raise UserError(
                    f"{str(file)!r}: tensor {name!r} is stored as {view.get_dtype()}; only F32, F16 and BF16 are "
                    "supported. Use the unquantised model, or a .gguf file."
                )
            self._files[name], self._shapes[name] = reader, tuple(view.get_shape())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name)


def _shard_index(folder: pathlib.Path) -> dict[str, str] | None:
    """Tensor name -> shard file, or None for a single file; a single file wins, as in transformers."""
    if (folder / SINGLE).is_file():
        return None
    if not (folder / INDEX).is_file():
        other = [file.name for pattern in ("*.bin", "*.gguf", "*.safetensors") for file in sorted(folder.glob(pattern))]
        here = f" It holds {', '.join(other[:3])}." if other else ""
        raise UserError(
            f"no {SINGLE} and no {INDEX} in {str(folder)!r}.{here} Give a folder with safetensors weights, or the path "
            "of a .gguf file itself."
        )
    try:
        return dict(json.loads((folder / INDEX).read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / INDEX} is damaged ({error!r}); fetch the model again.") from error


def read_generation_config(folder: pathlib.Path) -> dict[str, Any] | None:
    """generation_config.json, or None; raises UserError where it is not JSON."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); fetch the model again, or delete this file.") from error


def load_tokenizer(folder: pathlib.Path) -> Any:
    """The folder's tokenizer through transformers; raises UserError where there is none or it cannot be read."""
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"no tokenizer.json in {str(folder)!r}; fetch the model with its tokenizer.")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), use_fast=True, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise UserError(f"the tokenizer in {str(folder)!r} cannot be read ({error}); fetch the model again.") from error


def end_ids(
    config: ModelConfig, raw: dict[str, Any], generation: dict[str, Any] | None, tokenizer: Any, where: str
) -> tuple[tuple[int, ...], int]:
    """(eos_ids, pad_id): the union of the tokenizer's, config.json's and generation_config.json's EOS ids, in that order.

    Raises: UserError where the tokenizer has no EOS, or has ids that the embedding lacks.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {where!r} has no EOS token, so no completion could end; set eos_token in its "
            "tokenizer_config.json."
        )
    ids = [tokenizer.eos_token_id]
    for stated in (raw.get("eos_token_id"), (generation or {}).get("eos_token_id")):
        ids += stated if isinstance(stated, list) else [] if stated is None else [stated]
    pad = raw.get("pad_token_id") if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    pad = ids[0] if pad is None or not 0 <= pad < config.vocab_size else pad
    top = max(len(tokenizer) - 1, *ids)
    if top >= config.vocab_size:
        raise UserError(
            f"the tokenizer of {where!r} makes ids up to {top}, but the embedding has {config.vocab_size} rows "
            "(config.json's vocab_size); use the tokenizer that belongs to the model."
        )
    return tuple(dict.fromkeys(ids)), pad


def save_model(
    folder: str | os.PathLike,
    base: dict,
    raw_config: dict[str, Any],
    tokenizer: Any,
    generation_config: dict[str, Any] | None = None,
    shard_bytes: int = 4 << 30,
) -> pathlib.Path:
    """Writes a Hugging Face model folder in the base's dtype; an adapter must be merged before.

    config.json is written last: a folder that has one is whole.

    Args:
        base, raw_config, tokenizer, generation_config: as in `LoadedModel`; of any source, GGUF included.
        shard_bytes: weight files hold about this much each; host memory holds one of them.
    Returns: the folder.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    for old in (*folder.glob("model*.safetensors"), folder / INDEX):
        old.unlink(missing_ok=True)
    _save_weights(folder, parse_config(raw_config), base, shard_bytes)
    tokenizer.save_pretrained(str(folder))
    if generation_config is not None:
        _write_json(folder / "generation_config.json", generation_config)
    kept = {key: value for key, value in raw_config.items() if key not in ("torch_dtype", "quantization_config")}
    _write_json(folder / "config.json", {**kept, "dtype": base["embed"].dtype.name})
    return folder


def _save_weights(folder: pathlib.Path, config: ModelConfig, base: dict, shard_bytes: int) -> None:
    width = base["embed"].dtype.itemsize
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
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: to_numpy(leaf, layer, shape) for key, shape, leaf, layer in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def _write_json(file: pathlib.Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
