"""The picture of a plan. matplotlib is no dependency: it draws here alone."""

from __future__ import annotations

from pathlib import Path

from stagemesh.config.errors import ConfigError
from stagemesh.config.planner.report import Plan

SHOWN_LAYOUTS = 8


def save_plot(plan: Plan, path: Path) -> None:
    """A PNG: memory of each GPU of a lane, and the time of a token in each layout. Raises ConfigError."""
    try:
        import matplotlib

        matplotlib.use("agg")  # no display
        from matplotlib import pyplot
    except ImportError:
        raise ConfigError("plot", str(path), "needs matplotlib: pip install 'stagemesh[plot]'") from None
    figure, (memory, cost) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    best = plan.best
    names = [f"{i}: {stage.gpu.name}" for i, stage in enumerate(best.stages)]
    bottom = [0.0] * len(names)
    parts = {"weights": "weight_bytes", "KV cache": "kv_bytes", "step, driver": "other_bytes"}
    for what, field in parts.items():
        sizes = [getattr(stage, field) / 1e9 for stage in best.stages]
        memory.bar(names, sizes, bottom=bottom, label=what)
        bottom = [below + size for below, size in zip(bottom, sizes, strict=True)]
    memory.plot(names, [stage.gpu.memory_bytes / 1e9 for stage in best.stages], "k_", markersize=30, label="GPU")
    memory.set(title=f"{best.name}: memory of a GPU of each stage", ylabel="GB")
    memory.legend()
    memory.tick_params(axis="x", rotation=30)
    layouts = plan.layouts[:SHOWN_LAYOUTS]
    shown = [layout.name for layout in layouts]
    sending = [1e3 * sum(transfer.seconds for transfer in layout.decode_bill) for layout in layouts]
    cost.barh(shown, [1e3 * layout.speed.step_s for layout in layouts], label="time of a token")
    cost.barh(shown, sending, height=0.4, label="on links, sent as one batch")
    cost.invert_yaxis()
    cost.set(title=f"{plan.work.concurrency} requests of {plan.work.context:,} tokens", xlabel="ms per token")
    cost.legend()
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise ConfigError("plot", str(path), f"cannot be written: {error}") from None
    finally:
        pyplot.close(figure)
