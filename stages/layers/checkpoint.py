"""Reading a checkpoint: only safetensors, only the slices that this rank owns.

Ranks map the files and share the page cache of their machine. Loading takes memory for the rank's part of the model
and one tensor more; matrices multiplied as one (q, k, v; gate, up) count as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stagemesh.config.checkpoint import checkpoint_files
from stagemesh.config.errors import ConfigError

Read = tuple[str, tuple[int, ...], tuple[slice, ...]]
"""Name, shape and part, as Checkpoint.read takes them."""


class Checkpoint:
    """The tensors of a model folder, mapped until this context manager ends.

    ConfigError: a file is missing, truncated, or not safetensors.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self._folder = Path(folder)
        self.dtype = dtype
        self.device = device
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
        """Of tensor `name`; None where there is none."""
        if name not in self._file_of:
            return None
        return tuple(self._slice(name).get_shape())

    def read(
        self, name: str, shape: tuple[int, ...], part: tuple[slice, ...] = (), dtype: torch.dtype | None = None
    ) -> Tensor:
        """Tensor `name` of full shape `shape`, cut to `part` (slices of the leading dims), on this checkpoint's device.

        In `dtype`, by default the checkpoint's; only floats of two bytes and more are converted. ConfigError names a
        tensor that is missing, unreadable, or of another shape or type, and its file.
        """
        mapped = self.view(name, shape, part, dtype)
        return mapped.to(device=self.device, dtype=dtype or self.dtype, copy=True)

    def stack(self, reads: Sequence[Read], dtype: torch.dtype | None = None) -> Tensor:
        """`read` each, joined along the first dim; only the result takes memory."""
        mapped = [self.view(*read, dtype) for read in reads]
        lengths = [len(part) for part in mapped]
        out = torch.empty(sum(lengths), *mapped[0].shape[1:], dtype=dtype or self.dtype, device=self.device)
        for part, target in zip(mapped, out.split(lengths), strict=True):
            target.copy_(part)
        return out

    def view(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...], dtype: torch.dtype | None) -> Tensor:
        """`read` as a view of the file, in its dtype."""
        if name not in self._file_of:
            raise ConfigError("model", str(self._folder), f"the checkpoint has no tensor {name!r}")
        file = self._file_of[name]
        dtype = dtype or self.dtype
        try:
            source = self._slice(name)
            stored_shape = tuple(source.get_shape())
            if stored_shape != shape:
                reason = f"{name!r} in {file.name} has shape {list(stored_shape)}, config.json asks for {list(shape)}"
                raise ConfigError("model", str(self._folder), reason)
            tensor: Tensor = source[part] if part or not shape else source[:]
        except (SafetensorError, OSError) as error:
            raise ConfigError("model", str(self._folder), f"{name!r} in {file.name}: {error}") from error
        if tensor.dtype != dtype and not (_is_plain(tensor.dtype) and _is_plain(dtype)):
            reason = f"{name!r} in {file.name} holds {_short(tensor.dtype)}, config.json asks for {_short(dtype)}"
            raise ConfigError("model", str(self._folder), reason)
        self._read.add(name)
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def _slice(self, name: str) -> Any:
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = safe_open(str(file), framework="pt")
        return self._open[file].get_slice(name)

    def unread(self) -> set[str]:
        return self._file_of.keys() - self._read


def _is_plain(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize >= 2


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
