"""The command line. The flags of `serve` are the fields of EngineArgs."""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from stagemesh.config.base import did_you_mean
from stagemesh.config.engine import EngineArgs, find_model, local_folder
from stagemesh.config.errors import ConfigError
from stagemesh.config.hub import is_repo_id
from stagemesh.config.serve_yaml import render
from stagemesh.deployments.cli.doctor import doctor
from stagemesh.deployments.cli.launch import launch
from stagemesh.deployments.cli.quantize import quantize

SHORT_FLAGS = {"tensor_parallel_size": ("-tp",), "pipeline_parallel_size": ("-pp",), "data_parallel_size": ("-dp",)}
"""As in vLLM."""
MANY_VALUED = {"served_model_name"}
"""Flags that may repeat."""
WITH_UNIT = {"kv_cache_memory_bytes"}
"""Numbers that may have a unit."""

cli = typer.Typer(add_completion=False, no_args_is_help=True, help="Large language models, served on Ray.")


def main() -> None:
    """A ConfigError is shown as its message, with exit status 2."""
    try:
        cli()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@cli.command()
def run(config: Annotated[Path, typer.Argument(help="A Serve config file, e.g. config/demo.yaml.")]) -> None:
    """Run a Serve config file as `serve run` does; say when it is ready, and leave nothing behind."""
    raise typer.Exit(launch(config))


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder in Hugging Face layout, or a hub id.")],
    host: Annotated[str, typer.Option(help="Address that HTTP listens on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the HTTP API.", min=1, max=65535)] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Port of the gRPC API.", min=1, max=65535)] = 9000,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the YAML and stop.")] = False,
    **flags: Any,
) -> None:
    """Serve MODEL: write a Serve config file and run it."""
    _refuse_unknown(context, [model, *context.args])
    set_flags = {name: value for name, value in flags.items() if value is not None}
    content = render(engine_args(model, set_flags), host=host, port=port, grpc_port=grpc_port)
    if print_config:
        print(content, end="")
        return
    with tempfile.NamedTemporaryFile("w", prefix="stagemesh-", suffix=".yaml") as file:
        file.write(content)
        file.flush()
        raise typer.Exit(launch(Path(file.name)))


def engine_args(model: str, flags: dict[str, Any]) -> dict[str, Any]:
    """The `args` of the YAML. Raises ConfigError."""
    args = {"model": model} | flags
    if "autoscaling_config" in args:
        try:
            args["autoscaling_config"] = json.loads(args["autoscaling_config"])
        except ValueError as error:
            raise ConfigError("autoscaling_config", args["autoscaling_config"], f"is not JSON: {error}") from None
    EngineArgs.parse(args)
    # Replicas run in another working directory; clients know the model by the name used here.
    args.setdefault("served_model_name", model)
    if (folder := local_folder(model)) is not None or not is_repo_id(model):
        args["model"] = str(folder or find_model(model))
    return args


def _option(name: str) -> inspect.Parameter:
    """A field of EngineArgs as an option; None = not set."""
    field = EngineArgs.model_fields[name]
    flag = "--" + name.replace("_", "-")
    kinds: set[Any] = set(get_args(field.annotation)) or {field.annotation}
    if name in MANY_VALUED:
        kind: Any = list[str]
    elif name in WITH_UNIT:
        kind = str
    else:
        kind = next((kind for kind in (bool, int, float) if kind in kinds), str)
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
        *SHORT_FLAGS.get(name, ()),
        help=" ".join((field.description or "").split()),
        show_default=False if field.default is None else str(field.default),
        metavar="|".join(get_args(field.annotation)) if get_origin(field.annotation) is Literal else None,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _refuse_unknown(context: typer.Context, words: list[str]) -> None:
    """Raises ConfigError for an unknown flag: typer leaves it among the positional words."""
    flags = [flag for option in context.command.params for flag in option.opts]
    for word in words:
        if word.startswith("-"):
            flag = word.partition("=")[0]
            raise ConfigError("", None, f"unknown flag {flag}" + did_you_mean(flag, flags))
    if len(words) > 1:
        raise ConfigError("", None, f"one MODEL is served, got also {' '.join(words[1:])}")


def _with_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace **flags by the fields of EngineArgs, in the signature that typer reads."""
    fixed = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "flags"]
    options = [_option(name) for name in EngineArgs.model_fields if name != "model"]
    signature = inspect.Signature([*fixed, *options])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return command


cli.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(_with_engine_options(serve))
cli.command()(quantize)
cli.command()(doctor)
