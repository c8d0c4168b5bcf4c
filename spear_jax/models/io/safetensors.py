"""The tensors of a Hugging Face folder: one safetensors file, or the shards that an index names;
never through torch.

Source: the safetensors format (safetensors.safe_open) and Hugging Face's
`model.safetensors.index.json`.
"""

import os
import pathlib
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spear_jax.core.errors import UserError, shown
from spear_jax.core.files import read_json_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PIECE = 1 << 24  # numbers of a tensor that are compared at once


def write_safetensors(file: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes one file that transformers and PEFT accept, readable by everyone (safetensors' own are
    the owner's).
    """
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)


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
                raise UserError(
                    f"{folder / shard} lacks tensor {name!r}, which {INDEX} says it holds; fetch "
                    f"it again."
                )

    def _open(self, file: pathlib.Path) -> None:
        if not os.path.isfile(file):  # of a name that no disk takes, too
            raise UserError(
                f"weight file {shown(str(file), 300)} is missing; fetch the model again."
            )
        try:
            reader = safe_open(file, framework="numpy")
            names = list(reader.keys())
        except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as error:
            raise UserError(
                f"{str(file)!r} is truncated or damaged ({str(error)[:200]}); fetch this file again."
            ) from error
        for name in names:
            if name in self._files:
                raise UserError(
                    f"{self.where!r}: tensor {shown(name)} stands in {file.name!r} and in another "
                    "weight file, too; fetch the model again into an empty folder."
                )
            view = reader.get_slice(name)
            if view.get_dtype() not in ("F32", "F16", "BF16"):
                raise UserError(
                    f"{str(file)!r}: tensor {name!r} is stored as {view.get_dtype()}; only F32, "
                    f"F16 and BF16 are "
                    "supported. Use the unquantised model, or a .gguf file."
                )
            self._files[name], self._shapes[name] = reader, tuple(view.get_shape())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name)

    def same(self, left: str, right: str) -> bool:
        """Whether two tensors have one shape and the same numbers; reads some rows at a time."""
        shape = self._shapes[left]
        if shape != self._shapes[right] or not shape:
            return False
        views = [self._files[name].get_slice(name) for name in (left, right)]
        rows = max(1, _PIECE // max(1, int(np.prod(shape[1:]))))
        starts = range(0, shape[0], rows)
        return all(
            np.array_equal(*(view[start:stop].astype(np.float32) for view in views))
            for start, stop in zip(starts, [*starts[1:], shape[0]], strict=True)
        )


def _shard_index(folder: pathlib.Path) -> dict[str, str] | None:
    """Tensor name -> shard file, or None for a single file; a single file wins, as in
    transformers.
    """
    if (folder / SINGLE).is_file():
        return None
    if not (folder / INDEX).is_file():
        other = [
            file.name
            for pattern in ("*.bin", "*.gguf", "*.safetensors")
            for file in sorted(folder.glob(pattern))
        ]
        here = f" It holds {', '.join(other[:3])}." if other else ""
        raise UserError(
            f"no {SINGLE} and no {INDEX} in {str(folder)!r}.{here} Give a folder with "
            f"safetensors weights, or the path "
            "of a .gguf file itself."
        )
    index = read_json_object(folder / INDEX, "fetch the model again").get("weight_map")
    if not isinstance(index, dict) or not index:
        raise UserError(
            f"{folder / INDEX} is damaged (its 'weight_map' is {shown(index)}, not an object of "
            "tensor names and files); fetch the model again."
        )
    for name, shard in index.items():
        if not isinstance(shard, str) or not shard:
            raise UserError(
                f"{folder / INDEX} is damaged (it gives tensor {shown(name)} the file "
                f"{shown(shard)}); fetch the model again."
            )
    return index
