"""The pieces of a model that may not be split over devices, with their bytes: embeddings, each layer, final norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.machine.anatomy import anatomy
from helpers.machine.memory import Workload, _layer_bytes, element_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PretrainedConfig


@dataclass(frozen=True)
class _Piece:
    """Modules that may not be split; bytes."""

    names: tuple[str, ...]
    weights: int
    cache: int = 0

    @property
    def size(self) -> int:
        return self.weights + self.cache


def _pieces(config: PretrainedConfig, precision: str, workload: Workload) -> list[_Piece]:
    """What may not be split, in the order of the forward pass: embeddings, layers, final norm; the head with either."""
    shape, size = anatomy(config), element_bytes(precision)
    layer = _layer_bytes(shape, precision, workload.double_quant)
    cache = workload.cache_bytes(config, precision) // shape.layers
    start, end = [shape.names.embeddings, shape.names.rotary], [shape.names.final_norm]
    with_head = start if shape.tied else end
    with_head.append(shape.names.head)
    pieces = [_Piece(tuple(start), shape.embeddings * size)]
    for number in range(shape.layers):
        pieces.append(_Piece((f"{shape.names.layers}.{number}",), layer, cache))
    pieces.append(_Piece(tuple(end), (shape.final_norm + shape.head) * size))
    return pieces


def _sizes(pieces: Sequence[_Piece]) -> list[int]:
    return [piece.size for piece in pieces]
