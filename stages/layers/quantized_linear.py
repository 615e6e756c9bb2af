"""Linear methods of the quantized formats.

A cut inside a group, block or packed word reads what covers it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import pad

from stagemesh.config.errors import ConfigError
from stagemesh.config.quantization import W4A16, W8A8, Quantization
from stagemesh.kernels.quant_int4 import (
    AWQ_ORDER,
    PER_WORD,
    dequantize_int4,
    int4_linear,
    pack_rows,
    unpack_columns,
    unpack_rows,
)
from stagemesh.kernels.quant_w8a8 import FP8, dequantize, quantize_groups, w8a8_linear
from stagemesh.stages.layers.checkpoint import Checkpoint
from stagemesh.stages.layers.linear import (
    DenseMethod,
    LinearMethod,
    LinearMethodFactory,
    WeightShard,
    dense_method,
    read_bias,
    read_weight,
)

WEIGHT_SCALES = ("weight_scale", "weight_scale_inv")
"""Both multiply, whatever the second name says."""
INPUT_SCALES = ("input_scale", "activation_scale")
UNPACKED = 2**20
"""Weights converted at a time, each in up to 12 bytes."""


def linear_methods(quantization: Quantization | None) -> LinearMethodFactory:
    if quantization is None:
        return dense_method

    def make_method(name: str) -> LinearMethod:
        if not quantization.covers(name):
            return DenseMethod()
        if isinstance(quantization.format, W4A16):
            return W4A16Method(quantization.format)
        return W8A8Method(quantization.format)

    return make_method


@dataclass(frozen=True, slots=True)
class _W8A8Piece:
    """Parts that share an activation scale."""

    weight: Tensor
    scale: Tensor
    input_scale: Tensor | None


class W8A8Method:
    """FP8 or INT8 weights and activations."""

    def __init__(self, format: W8A8) -> None:
        self.format = format
        self.dtype = FP8 if format.kind == "fp8" else torch.int8
        self.pieces: list[_W8A8Piece] = []
        self.padding = (0, 0)
        """Zeros before and after the inputs that complete groups."""
        self.bias: Tensor | None = None

    def load(self, checkpoint: Checkpoint, parts: Sequence[WeightShard], with_bias: bool) -> None:
        if self.format.weights == "block":
            block, columns = self.format.block[1], parts[0].columns
            self.padding = (columns.start % block, -columns.stop % block)
        alike = groupby(parts, lambda part: self._read_input_scale(checkpoint, part))
        self.pieces = [self._read(checkpoint, list(group), input_scale) for input_scale, group in alike]
        self.bias = read_bias(checkpoint, parts) if with_bias else None

    def dequantize(self) -> Tensor:
        before, after = self.padding
        whole = torch.cat([dequantize(piece.weight, piece.scale) for piece in self.pieces])
        return whole[:, before : whole.shape[1] - after]

    def __call__(self, x: Tensor) -> Tensor:
        if any(self.padding):
            x = pad(x, self.padding)
        outputs = [w8a8_linear(x, p.weight, p.scale, p.input_scale) for p in self.pieces]
        return add_bias(outputs, self.bias)

    def _read(self, checkpoint: Checkpoint, parts: list[WeightShard], input_scale: float | None) -> _W8A8Piece:
        if self.format.online:
            return _W8A8Piece(*_read_quantized(checkpoint, parts, self.dtype), None)
        weight = read_weight(checkpoint, parts, self.dtype)
        if any(self.padding):
            # torch pads bytes, not fp8; the byte 0 is the number 0 in both types.
            weight = pad(weight.view(torch.uint8), self.padding).view(self.dtype)
        scale = torch.cat([self._read_scale(checkpoint, part) for part in parts])
        return _W8A8Piece(weight, scale, None if input_scale is None else scale.new_tensor(input_scale))

    def _read_scale(self, checkpoint: Checkpoint, part: WeightShard) -> Tensor:
        """float32 [rows, groups]."""
        name = _present(checkpoint, part.name, WEIGHT_SCALES)
        rows = part.rows.stop - part.rows.start
        if self.format.weights == "channel":
            return checkpoint.read(name, (part.out_features, 1), (part.rows,), torch.float32)
        if self.format.weights == "tensor":
            return _read_scalar(checkpoint, name).reshape(1, 1).repeat(rows, 1)
        size, block = self.format.block
        blocks = (-(-part.out_features // size), -(-part.in_features // block))
        covering = (_covering(part.rows, size), _covering(part.columns, block))
        scales = checkpoint.read(name, blocks, covering, torch.float32).repeat_interleave(size, 0)
        return scales[part.rows.start % size :][:rows].contiguous()

    def _read_input_scale(self, checkpoint: Checkpoint, part: WeightShard) -> float | None:
        if not self.format.static_activations:
            return None
        return _read_scalar(checkpoint, _present(checkpoint, part.name, INPUT_SCALES)).item()


@dataclass(frozen=True, slots=True)
class _W4A16Piece:
    """Parts whose inputs have the same groups."""

    weight: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor

    @staticmethod
    def join(pieces: list[_W4A16Piece]) -> _W4A16Piece:
        if len(pieces) == 1:
            return pieces[0]
        weights, scales, zeros = ([getattr(p, name) for p in pieces] for name in ("weight", "scales", "zeros"))
        return _W4A16Piece(torch.cat(weights, 1), torch.cat(scales, 1), torch.cat(zeros, 1), pieces[0].groups)


class W4A16Method:
    """AWQ and GPTQ, kept as GPTQ packs them."""

    def __init__(self, format: W4A16) -> None:
        self.format = format
        self.pieces: list[_W4A16Piece] = []
        self.bias: Tensor | None = None

    def load(self, checkpoint: Checkpoint, parts: Sequence[WeightShard], with_bias: bool) -> None:
        read = self._read_awq if self.format.layout == "awq" else self._read_gptq
        alike = groupby([read(checkpoint, part) for part in parts], lambda piece: piece.groups.tolist())
        self.pieces = [_W4A16Piece.join(list(group)) for _, group in alike]
        self.bias = read_bias(checkpoint, parts) if with_bias else None

    def dequantize(self) -> Tensor:
        return torch.cat([dequantize_int4(p.weight, p.scales, p.zeros, p.groups) for p in self.pieces], 1).T

    def __call__(self, x: Tensor) -> Tensor:
        outputs = [int4_linear(x, p.weight, p.scales, p.zeros, p.groups) for p in self.pieces]
        return add_bias(outputs, self.bias)

    def _read_awq(self, checkpoint: Checkpoint, part: WeightShard) -> _W4A16Piece:
        """qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]."""
        name = part.name
        _check_packed(name, "out_features", part.out_features)
        words, features = _covering(part.rows, PER_WORD), _inside(part.rows, PER_WORD)
        packed = part.out_features // PER_WORD
        num_groups, group_of = self._consecutive_groups(part)
        first, last, groups = _used(group_of)
        qzeros = checkpoint.read(f"{name}.qzeros", (num_groups, packed), (slice(first, last), words), torch.int32)
        scales = checkpoint.read(
            f"{name}.scales", (num_groups, part.out_features), (slice(first, last), part.rows), torch.float32
        )
        weight = qzeros.new_empty(-(-len(group_of) // PER_WORD), scales.shape[1])
        step = max(UNPACKED // scales.shape[1] // PER_WORD, 1)  # words
        for inputs, target in zip(_stretches(part.columns, step * PER_WORD), weight.split(step), strict=True):
            qweight = checkpoint.read(f"{name}.qweight", (part.in_features, packed), (inputs, words), torch.int32)
            target.copy_(_pack(unpack_columns(qweight, AWQ_ORDER)[:, features]))
        zeros = unpack_columns(qzeros, AWQ_ORDER)[:, features]
        return _W4A16Piece(weight, scales, zeros.contiguous(), groups.to(scales.device))

    def _read_gptq(self, checkpoint: Checkpoint, part: WeightShard) -> _W4A16Piece:
        """qweight [in / 8, out], qzeros [groups, out / 8], scales [groups, out], g_idx [in].

        With act-order inputs lie in any groups: those from first to last are read.
        """
        name = part.name
        _check_packed(name, "in_features", part.in_features)
        _check_packed(name, "out_features", part.out_features)
        num_groups, group_of = self._consecutive_groups(part)
        if checkpoint.shape(f"{name}.g_idx") is not None:
            group_of = checkpoint.read(f"{name}.g_idx", (part.in_features,), (part.columns,), torch.int32).long()
            if int(group_of.min()) < 0 or int(group_of.max()) >= num_groups:
                raise ConfigError("model", f"{name}.g_idx", f"names groups outside of 0..{num_groups - 1}")
        first, last, groups = _used(group_of)
        rows, features = _covering(part.columns, PER_WORD), _inside(part.columns, PER_WORD)
        words, outputs = _covering(part.rows, PER_WORD), _inside(part.rows, PER_WORD)
        qzeros = checkpoint.read(
            f"{name}.qzeros", (num_groups, part.out_features // PER_WORD), (slice(first, last), words), torch.int32
        )
        scales = checkpoint.read(
            f"{name}.scales", (num_groups, part.out_features), (slice(first, last), part.rows), torch.float32
        )
        tensor = (f"{name}.qweight", (part.in_features // PER_WORD, part.out_features))
        if features.start == 0:
            weight = checkpoint.read(*tensor, (rows, part.rows), torch.int32)
        else:
            weight = qzeros.new_empty(-(-len(group_of) // PER_WORD), scales.shape[1])
            step = max(UNPACKED // len(group_of), 1)
            for features_out, target in zip(_stretches(part.rows, step), weight.split(step, 1), strict=True):
                target.copy_(_pack(unpack_rows(checkpoint.read(*tensor, (rows, features_out), torch.int32))[features]))
        # The first version stores zeros less 1, and 0 as 15.
        zeros = (unpack_columns(qzeros)[:, outputs] + self.format.zero_offset) & 15
        return _W4A16Piece(weight, scales, zeros, groups.to(scales.device))

    def _consecutive_groups(self, part: WeightShard) -> tuple[int, Tensor]:
        """The number of groups and, without act-order, the group of each local input."""
        size = part.in_features if self.format.group_size == -1 else self.format.group_size
        return -(-part.in_features // size), torch.arange(part.columns.start, part.columns.stop) // size


def _read_quantized(checkpoint: Checkpoint, parts: Sequence[WeightShard], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights in `dtype` [rows of all parts, columns], and a scale per row."""
    heights = [part.rows.stop - part.rows.start for part in parts]
    width = parts[0].columns.stop - parts[0].columns.start
    weight = torch.empty(sum(heights), width, dtype=dtype, device=checkpoint.device)
    scale = torch.empty(sum(heights), 1, device=checkpoint.device)
    step = max(UNPACKED // width, 1)
    for part, part_weight, part_scale in zip(parts, weight.split(heights), scale.split(heights), strict=True):
        shape, targets = (part.out_features, part.in_features), (part_weight.split(step), part_scale.split(step))
        for rows, stored, row_scale in zip(_stretches(part.rows, step), *targets, strict=True):
            plain = checkpoint.read(f"{part.name}.weight", shape, (rows, part.columns))
            stored[:], row_scale[:] = quantize_groups(plain, 1, dtype)
    return weight, scale


def _stretches(part: slice, length: int) -> Iterator[slice]:
    """`part` in pieces of at most `length`."""
    return (slice(start, min(start + length, part.stop)) for start in range(part.start, part.stop, length))


def add_bias(outputs: list[Tensor], bias: Tensor | None) -> Tensor:
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    return y if bias is None else y + bias


def _pack(weight: Tensor) -> Tensor:
    """pack_rows of uint8 [in, out], the last word filled."""
    return pack_rows(pad(weight, (0, 0, 0, -weight.shape[0] % PER_WORD)))


def _used(group_of: Tensor) -> tuple[int, int, Tensor]:
    """The range of groups used, each input's group within it."""
    first, last = int(group_of.min()), int(group_of.max()) + 1
    return first, last, group_of - first


def _covering(part: slice, size: int) -> slice:
    """The blocks of `size` that hold `part`."""
    return slice(part.start // size, -(-part.stop // size))


def _inside(part: slice, size: int) -> slice:
    """`part` within its covering blocks."""
    start = part.start // size * size
    return slice(part.start - start, part.stop - start)


def _check_packed(name: str, what: str, features: int) -> None:
    if features % PER_WORD:
        raise ConfigError("model", name, f"{what}={features} must be a multiple of {PER_WORD} to be packed")


def _present(checkpoint: Checkpoint, layer: str, names: tuple[str, ...]) -> str:
    """The first of `names` that exists, else the first, for the error."""
    full = [f"{layer}.{name}" for name in names]
    return next((name for name in full if checkpoint.shape(name) is not None), full[0])


def _read_scalar(checkpoint: Checkpoint, name: str) -> Tensor:
    """A number of shape [], [1] or [1, 1]."""
    shape = checkpoint.shape(name)
    expected = shape if shape in ((), (1,), (1, 1)) else (1,)
    return checkpoint.read(name, expected, dtype=torch.float32).reshape(())
