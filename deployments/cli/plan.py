"""`stagemesh plan`: which cut of a model fits which machines, and what it costs. The work is in config/planner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from stagemesh.config.errors import ConfigError
from stagemesh.config.folders import local_folder
from stagemesh.config.hub import cached_folder, is_repo_id
from stagemesh.config.model import ModelConfig, read_json
from stagemesh.config.planner.bill import Transfer
from stagemesh.config.planner.hardware import Cluster, make_cluster
from stagemesh.config.planner.layouts import Layout, Stage
from stagemesh.config.planner.report import ASSUMPTIONS, Plan, binary, gb, make_plan, make_workload
from stagemesh.config.serve_yaml import render
from stagemesh.deployments.cli.plot import save_plot

SHOWN_LAYOUTS = 8
SHOWN_STAGES = 8
PIPE_WIDTH = 140
"""Columns where no terminal says how many it has."""


ModelPath = Annotated[str, typer.Argument(help="Model folder, hub id in the cache, or a config.json alone.")]
Gpus = Annotated[
    str | None, typer.Option(help="All GPUs, e.g. 8xL40S-48GB or 4xA100-80GB,4xL40S-48GB; by default Ray's.")
]
Nodes = Annotated[int | None, typer.Option(help="Machines that they are in.", min=1)]
GpusPerNode = Annotated[int | None, typer.Option(help="GPUs in each machine.", min=1)]
Intra = Annotated[str | None, typer.Option(help="Link inside a machine: nvlink4, pcie5, …; by default the GPU's.")]
Inter = Annotated[str, typer.Option(help="Link between machines: 25GbE, 200GbE-RoCE, IB-NDR, …")]
GpuSpec = Annotated[
    list[str] | None, typer.Option(help="Another GPU: NAME=mem:GB,bw:GB/s,flops:TFLOP/s[,fp8:…][,int8:…][,link:…].")
]
NewLink = Annotated[list[str] | None, typer.Option(help="Another link: NAME=GB/s, each way.")]
Concurrency = Annotated[int, typer.Option(help="Requests that run at once.", min=1)]
Context = Annotated[
    int | None, typer.Option(help="Tokens of each, prompt and answer; by default 8192 or the model's most.", min=1)
]
Goal = Annotated[Literal["latency", "throughput"], typer.Option(help="Fast answers, or many with small lanes.")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="As in `serve`.")]
Format = Annotated[
    Literal["auto", "fp8", "int8", "awq", "gptq", "compressed-tensors"], typer.Option(help="As in `serve`.")
]
KvDtype = Annotated[Literal["auto", "fp8"], typer.Option(help="As in `serve`.")]
Utilization = Annotated[float, typer.Option(help="As in `serve`.", min=0.01, max=1)]
StepTokens = Annotated[int, typer.Option(help="As in `serve`.", min=1)]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]
AsYaml = Annotated[bool, typer.Option("--yaml", help="Print only the YAML that serves it.")]
Plot = Annotated[Path | None, typer.Option(help="Also draw memory and cost into a PNG.")]


def plan(
    model: ModelPath,
    gpus: Gpus = None,
    nodes: Nodes = None,
    gpus_per_node: GpusPerNode = None,
    intra: Intra = None,
    inter: Inter = "25GbE",
    gpu_spec: GpuSpec = None,
    link: NewLink = None,
    concurrency: Concurrency = 32,
    context: Context = None,
    objective: Goal = "latency",
    dtype: Dtype = "auto",
    quantization: Format = "auto",
    kv_cache_dtype: KvDtype = "auto",
    gpu_memory_utilization: Utilization = 0.92,
    max_num_batched_tokens: StepTokens = 2048,
    as_json: AsJson = False,
    as_yaml: AsYaml = False,
    plot: Plot = None,
) -> None:
    """Say how to cut MODEL over GPUs (TP x PP x DP x EP), why, and what it costs on each link."""
    config = read_model(model)
    if gpus is None:
        cluster = _live_cluster(intra, inter)
    else:
        shape = {"nodes": nodes, "gpus_per_node": gpus_per_node}
        cluster = make_cluster(gpus, **shape, intra=intra, inter=inter, gpu_specs=gpu_spec or (), links=link or ())
    work = make_workload(
        config,
        concurrency=concurrency,
        context=context or min(8192, config.max_position_embeddings),
        objective=objective,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        gpu_memory_utilization=gpu_memory_utilization,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    found = make_plan(work, cluster)
    if plot is not None:
        save_plot(found, plot)
    path = Path(model).expanduser()
    args = found.yaml_args(str(path.parent) if path.is_file() else model, quantization, kv_cache_dtype)
    _print(found, render(args, host="127.0.0.1", port=8000, grpc_port=9000), as_json=as_json, as_yaml=as_yaml)


def _print(found: Plan, content: str, *, as_json: bool, as_yaml: bool) -> None:
    """content: the YAML."""
    if as_json:
        print(json.dumps(found.as_dict() | {"yaml": content}, indent=2))
    elif as_yaml:
        print(content, end="")
    else:
        width = None if Console().is_terminal else PIPE_WIDTH
        show(found, Console(highlight=False, width=width), content)


def read_model(model: str) -> ModelConfig:
    """From a folder, a file like config.json, or the hub's cache: nothing is downloaded. Raises ConfigError."""
    path = Path(model).expanduser()
    if path.is_file():
        return ModelConfig.from_json(read_json(path))
    if (folder := local_folder(model)) is None and is_repo_id(model):
        folder = cached_folder(model)
    if folder is None:
        raise ConfigError("model", model, "is neither a folder, a config.json, nor a model in the hub's cache")
    return ModelConfig.from_folder(folder)


def _live_cluster(intra: str | None, inter: str) -> Cluster:
    from stagemesh.deployments.auto_layout import connected_cluster  # Ray: a second to import

    return connected_cluster(intra=intra, inter=inter)


def show(plan: Plan, console: Console, content: str) -> None:
    """For people."""
    best = plan.best
    console.print(f"\n[bold]{best.name}[/bold] on {plan.cluster.description}\n")
    for number, step in enumerate(plan.steps(), start=1):
        console.print(f"{number}. {step}")
    console.print(f"\n{plan.capacity_line(best)}")
    if best.dp_size > 1:
        console.print(f"All {best.dp_size} lanes together: {best.max_concurrency:.2f} such requests at once.")
    console.print()
    console.print(_memory(best))
    console.print(_bill(best, plan))
    console.print(_layouts(plan))
    for reason, names in plan.refusals().items():
        console.print(f"[dim]{', '.join(names)}: {reason}[/dim]")
    for warning in plan.warnings:
        console.print(f"[yellow]! {warning}[/yellow]")
    console.print(f"\n[dim]A roofline, not a measurement: {'; '.join(ASSUMPTIONS)}.[/dim]\n")
    console.print(content, markup=False, soft_wrap=True)


def _memory(layout: Layout) -> Table:
    table = Table(title="Memory of each GPU", title_justify="left", box=SIMPLE_HEAD)
    for name in ("stage", "GPUs of a lane", "layers", "weights", "KV cache", "step, driver", "left"):
        table.add_column(name, justify="right")
    stages = layout.stages
    shown = range(len(stages)) if len(stages) <= SHOWN_STAGES else [0, 1, len(stages) - 2, len(stages) - 1]
    for index in shown:
        stage = stages[index]
        cards = f"{layout.plan.tp_size}x{stage.gpu.name}"
        start, end = stage.layers
        sizes = (stage.weight_bytes, stage.kv_bytes, stage.other_bytes, _left(stage))
        table.add_row(str(index), cards, f"{start}-{end - 1}", *map(gb, sizes))
    return table


def _left(stage: Stage) -> int:
    return stage.gpu.memory_bytes - stage.weight_bytes - stage.kv_bytes - stage.other_bytes


def _bill(layout: Layout, plan: Plan) -> Table:
    work = plan.work
    per_lane = -(-work.concurrency // layout.dp_size)
    title = f"What a lane sends: a step of {per_lane} requests, and {per_lane} prefills of {work.context:,} tokens"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in ("what", "link", "messages", "of a step", "per token", "time of a step", "of prefills", "their time"):
        table.add_column(name, justify="left" if name in ("what", "link") else "right")
    decode = {(t.what, t.link.name): t for t in layout.decode_bill}
    prefill = {(t.what, t.link.name): t for t in layout.prefill_bill}
    for key in dict.fromkeys([*decode, *prefill]):
        step, whole = decode.get(key), prefill.get(key)
        link = (step or whole or layout.decode_bill[0]).link
        table.add_row(
            key[0],
            f"{link.name}, {link.rate / 1e9:g} GB/s",
            *(_step_cells(step, per_lane) if step else ("",) * 4),
            *((binary(whole.total_bytes), _seconds(whole.seconds)) if whole else ("", "")),
        )
    if not table.row_count:
        table.add_row("nothing", *[""] * 7)
    return table


def _step_cells(step: Transfer, per_lane: int) -> tuple[str, str, str, str]:
    return f"{step.count:g}", binary(step.total_bytes), binary(step.total_bytes / per_lane), _seconds(step.seconds)


def _layouts(plan: Plan) -> Table:
    table = Table(title=f"Layouts that fit, by {plan.work.objective}", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("layout")
    for name in ("requests", "first token", "next token", "tokens/s", "when full"):
        table.add_column(name, justify="right")
    table.add_column("against it")
    for layout in plan.layouts[:SHOWN_LAYOUTS]:
        speed = layout.speed
        table.add_row(
            layout.name,
            f"{layout.max_concurrency:.1f}",
            _seconds(speed.first_token_s),
            _seconds(speed.step_s),
            f"{speed.tokens_per_s:,.0f}",
            f"{speed.full_tokens_per_s:,.0f}",
            "recommended" if layout is plan.best else plan.against(layout),
        )
    return table


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"
