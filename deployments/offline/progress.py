"""What a script sees while it waits: log lines of the start-up, and progress bars."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

from tqdm import tqdm

from stagemesh.config.capacity import capacity_line
from stagemesh.config.engine import EngineConfig

logger = logging.getLogger(__name__)

ProgressBar = Callable[..., Any]
"""Made like a tqdm."""


def show_log() -> None:
    """Write the package's messages to stderr, unless the script has set up a logging of its own."""
    package = logging.getLogger("stagemesh")
    if not package.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(message)s", "%m-%d %H:%M:%S"))
        package.addHandler(handler)
        package.setLevel(logging.INFO)


def log_summary(config: EngineConfig, num_blocks: int) -> None:
    """What was started. num_blocks: of each lane."""
    plan, lanes = config.plan, config.data_parallel_size
    logger.info(
        "%s: %d %s of %d stage(s) x %d rank(s) on %s, %s, max_model_len %d",
        config.model_name,
        lanes,
        "lane" if lanes == 1 else "lanes",
        plan.pp_size,
        plan.tp_size,
        config.device,
        config.quantization.method if config.quantization is not None else config.dtype,
        config.max_model_len,
    )
    line = capacity_line(config.device, num_blocks * config.block_size, config.max_model_len)
    logger.info("%s%s", "" if lanes == 1 else "each lane: ", line)


@contextmanager
def loading(use_tqdm: bool, num_lanes: int) -> Iterator[Callable[[str], None]]:
    """A bar for the start-up of lanes, to be called with the name of each phase as it begins: each lane has two."""
    with tqdm(total=2 * num_lanes, desc="Loading model", dynamic_ncols=True, disable=not use_tqdm) as bar:
        num_begun = 0

        def begin(phase: str) -> None:
            nonlocal num_begun
            num_begun += 1
            bar.n = num_begun - 1
            bar.set_postfix_str(phase)

        yield begin
        bar.n = bar.total
        bar.set_postfix_str("")


class Answering:
    """A bar of prompts, with the speed in tokens."""

    def __init__(self, use_tqdm: bool | ProgressBar, num_prompts: int) -> None:
        make = use_tqdm if callable(use_tqdm) else tqdm
        self._bar = make(
            total=num_prompts,
            desc="Processed prompts",
            dynamic_ncols=True,
            disable=not use_tqdm,
            postfix=_speeds(0.0, 0.0),
        )
        self._started_at = monotonic()
        self._num_prompt_tokens = self._num_output_tokens = 0

    def finished(self, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """One more prompt has all its answers."""
        self._num_prompt_tokens += num_prompt_tokens
        self._num_output_tokens += num_output_tokens
        seconds = max(monotonic() - self._started_at, 1e-9)
        self._bar.postfix = _speeds(self._num_prompt_tokens / seconds, self._num_output_tokens / seconds)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()


def _speeds(prompt_tokens: float, output_tokens: float) -> str:
    """In tokens per second, in vLLM's words."""
    return f"est. speed input: {prompt_tokens:.2f} toks/s, output: {output_tokens:.2f} toks/s"
