"""Reading a checkpoint: only safetensors, only the slices that this rank owns.

Layers pull what they need by name (`Checkpoint.read`) and state the full shape that they expect, so each
parameter is filled exactly once by construction, and a checkpoint that does not fit is refused by tensor and
file. Every rank maps the files and copies its own slices; ranks of one machine share the page cache.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stagemesh.config.checkpoint import checkpoint_files
from stagemesh.config.errors import ConfigError


class Checkpoint:
    """The tensors of a model folder by name. Use as a context manager: files stay mapped until its end.

    Raises ConfigError when a file is missing, truncated, or not safetensors.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self._folder = Path(folder)
        self._dtype = dtype
        self._device = device
        self._file_of = checkpoint_files(folder)
        self._open: dict[Path, Any] = {}
        self._read: set[str] = set()
        self.bytes_read = 0

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of tensor `name`; None where the checkpoint has no such tensor."""
        if name not in self._file_of:
            return None
        return tuple(self._slice(name).get_shape())

    def read(
        self, name: str, shape: tuple[int, ...], part: tuple[slice, ...] = (), dtype: torch.dtype | None = None
    ) -> Tensor:
        """Tensor `name`, which must be of `shape`, cut to `part` (a slice for each of the leading dims).

        The result has the device of this checkpoint and its dtype, or `dtype`. Floats of two bytes and more are
        converted to one another; quantized values are taken only as what they are. ConfigError names tensor and
        file when it is missing, of another shape or type, or unreadable.
        """
        if name not in self._file_of:
            raise ConfigError("model", str(self._folder), f"the checkpoint has no tensor {name!r}")
        file = self._file_of[name]
        dtype = dtype or self._dtype
        try:
            source = self._slice(name)
            found = tuple(source.get_shape())
            if found != shape:
                reason = f"{name!r} in {file.name} has shape {list(found)}, config.json asks for {list(shape)}"
                raise ConfigError("model", str(self._folder), reason)
            tensor: Tensor = source[part] if part or not shape else source[:]
        except (SafetensorError, OSError) as error:
            raise ConfigError("model", str(self._folder), f"{name!r} in {file.name}: {error}") from error
        if tensor.dtype != dtype and not (_is_plain(tensor.dtype) and _is_plain(dtype)):
            reason = f"{name!r} in {file.name} holds {_short(tensor.dtype)}, config.json asks for {_short(dtype)}"
            raise ConfigError("model", str(self._folder), reason)
        self._read.add(name)
        self.bytes_read += tensor.numel() * tensor.element_size()
        # Without the copy a slice may stay a view of the mapped file.
        return tensor.to(device=self._device, dtype=dtype, copy=True)

    def _slice(self, name: str) -> Any:
        """Its shape and, once indexed, its contents."""
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = safe_open(str(file), framework="pt")
        return self._open[file].get_slice(name)

    def names_left(self) -> set[str]:
        """Tensors of the checkpoint that nobody has read."""
        return self._file_of.keys() - self._read


def _is_plain(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize >= 2


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
