"""The calls of `LLM` that give vectors instead of text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from stagemesh.config.errors import ConfigError
from stagemesh.config.pooling import PoolingParams
from stagemesh.deployments.offline.outputs import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from stagemesh.deployments.offline.progress import ProgressBar
from stagemesh.deployments.offline.prompts import PromptType, as_list

_NO_HEAD = "needs a model with a head for it, and the families here end in tokens or in the hidden states of `embed`"


class Pooled(NamedTuple):
    request_id: str
    vector: npt.NDArray[np.float32]
    """[hidden_size]"""
    token_ids: list[int]
    num_cached_tokens: int


class PoolingCalls(ABC):
    @abstractmethod
    def _pool(self, prompts: Any, params: PoolingParams | None, use_tqdm: bool | ProgressBar) -> list[Pooled]:
        """The vector of each prompt."""

    def embed(
        self,
        prompts: PromptType | Sequence[PromptType],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: bool | ProgressBar = True,
    ) -> list[EmbeddingRequestOutput]:
        """One vector per prompt, by default of length 1."""
        return [
            EmbeddingRequestOutput(id, EmbeddingOutput(vector.tolist()), ids, num_cached_tokens=cached)
            for id, vector, ids, cached in self._pool(prompts, pooling_params, use_tqdm)
        ]

    def encode(
        self,
        prompts: PromptType | Sequence[PromptType],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: bool | ProgressBar = True,
        pooling_task: str = "embed",
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """The vectors of `embed` as torch tensors."""
        import torch

        if pooling_task != "embed":
            raise ConfigError("pooling_task", pooling_task, f"{_NO_HEAD}: must be 'embed'")
        return [
            PoolingRequestOutput(id, PoolingOutput(torch.from_numpy(vector)), ids, num_cached_tokens=cached)
            for id, vector, ids, cached in self._pool(prompts, pooling_params, use_tqdm)
        ]

    def score(
        self,
        data_1: PromptType | Sequence[PromptType],
        data_2: PromptType | Sequence[PromptType],
        /,
        *,
        use_tqdm: bool | ProgressBar = True,
        pooling_params: PoolingParams | None = None,
    ) -> list[ScoringRequestOutput]:
        """The cosine of the vectors of each pair, or of one text with each of several.

        A model is used as an embedder here: a cross-encoder's relevance is another thing.
        """
        first, second = as_list(data_1), as_list(data_2)
        if len(first) not in (1, len(second)) or not second:
            raise ConfigError("data_1", len(first), f"must be one text, or as many as data_2 has ({len(second)})")
        pooled = self._pool([*first, *second], pooling_params, use_tqdm)
        lefts, rights = pooled[: len(first)], pooled[len(first) :]
        return [
            ScoringRequestOutput(
                f"{left.request_id}_{right.request_id}",
                ScoringOutput(_cosine(left.vector, right.vector)),
                [*left.token_ids, *right.token_ids],
                num_cached_tokens=left.num_cached_tokens + right.num_cached_tokens,
            )
            for left, right in zip(lefts * (len(rights) // len(lefts)), rights, strict=True)
        ]

    def classify(self, prompts: Any, **_: Any) -> NoReturn:
        """Always raises ConfigError."""
        raise ConfigError("classify", prompts, _NO_HEAD)

    def reward(self, prompts: Any, **_: Any) -> NoReturn:
        """Always raises ConfigError."""
        raise ConfigError("reward", prompts, _NO_HEAD)


def _cosine(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> float:
    lengths = float(np.linalg.norm(left) * np.linalg.norm(right))
    return float(left @ right) / lengths if lengths else 0.0
