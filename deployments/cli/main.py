"""The command line. The flags of `serve` are the fields of EngineArgs."""

from __future__ import annotations

import inspect
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from stagemesh import __version__
from stagemesh.config.api_keys import PREFIX, key_hashes
from stagemesh.config.engine import LAYOUT_SIZES, WITH_UNIT, EngineArgs, EngineConfig
from stagemesh.config.errors import ConfigError
from stagemesh.config.folders import find_model, local_folder, read_chat_template
from stagemesh.config.hub import is_repo_id
from stagemesh.config.serve_yaml import render, with_keys_of_environment
from stagemesh.deployments.cli.batch import run_batch
from stagemesh.deployments.cli.client import ServerError
from stagemesh.deployments.cli.doctor import doctor
from stagemesh.deployments.cli.flags import ServeCommand
from stagemesh.deployments.cli.launch import launch
from stagemesh.deployments.cli.plan import plan
from stagemesh.deployments.cli.quantize import quantize
from stagemesh.deployments.cli.status import status
from stagemesh.deployments.cli.talk import chat, complete

SHORT_FLAGS = {
    "tensor_parallel_size": ("-tp",),
    "pipeline_parallel_size": ("-pp",),
    "data_parallel_size": ("-dp",),
    "enable_expert_parallel": ("-ep",),
    "quantization": ("-q",),
}
"""As in vLLM."""
FOLDERS = {"tokenizer", "generation_config"}
"""May name a folder."""
MAPPINGS = {name for name, field in EngineArgs.model_fields.items() if dict[str, Any] in get_args(field.annotation)}
"""JSON on the command line."""

cli = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    invoke_without_command=True,
    help="Large language models, served on Ray.",
)


def main() -> None:
    """A ConfigError is shown as its message, with exit status 2; what a server says, with 1."""
    try:
        cli()
    except (ConfigError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


@cli.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", "-v", help="Print the version and stop.", is_eager=True)
    ] = False,
) -> None:
    if version:
        print(f"stagemesh {__version__}")
        raise typer.Exit


@cli.command()
def run(config: Annotated[Path, typer.Argument(help="A Serve config file, e.g. config/demo.yaml.")]) -> None:
    """Run a Serve config file as `serve run` does; say when it is ready, and leave nothing behind."""
    content = with_keys_of_environment(config)
    raise typer.Exit(launch(config) if content is None else _launch_written(content))


def serve(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Folder in Hugging Face layout, or a hub id.")] = None,
    model_flag: Annotated[str | None, typer.Option("--model", help="MODEL as a flag.")] = None,
    config: Annotated[str | None, typer.Option("--config", help="YAML file of flags; the command line wins.")] = None,
    host: Annotated[str, typer.Option(help="Address that HTTP listens on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the HTTP API.", min=1, max=65535)] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Port of the gRPC API.", min=1, max=65535)] = 9000,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the YAML and stop.")] = False,
    **flags: Any,
) -> None:
    """Serve MODEL: write a Serve config file and run it. vLLM's flags are understood."""
    assert config is None, "ServeCommand puts the file's flags in its place"
    if (model := model or model_flag) is None:
        raise ConfigError("model", None, "is required: stagemesh serve MODEL")
    if context.args:
        raise ConfigError("", None, f"one MODEL is served, got also {' '.join(context.args)}")
    set_flags = {name: value for name, value in flags.items() if value is not None}
    args = engine_args(model, set_flags)
    content = render(args, host=host, port=port, grpc_port=grpc_port)
    if print_config:
        print(content, end="")
        return
    content = render(args | chosen_sizes(args), host=host, port=port, grpc_port=grpc_port)
    raise typer.Exit(_launch_written(content))


def _launch_written(content: str) -> int:
    with tempfile.NamedTemporaryFile("w", prefix="stagemesh-", suffix=".yaml") as file:
        file.write(content)
        file.flush()
        return launch(Path(file.name))


def engine_args(model: str, flags: dict[str, Any]) -> dict[str, Any]:
    """The `args` of the YAML. Raises ConfigError."""
    # Other texts may have a unit, which EngineArgs reads.
    is_number = {name for name in WITH_UNIT if str(flags.get(name)).isdecimal()}
    args = {"model": model} | flags | {name: int(flags[name]) for name in is_number}
    for name in MAPPINGS & args.keys():
        try:
            args[name] = json.loads(args[name])
        except ValueError as error:
            raise ConfigError(name, args[name], f"is not JSON: {error}") from None
    if hashes := key_hashes(args.pop("api_key", None), args.pop("api_key_file", None)):
        args["api_key"] = [PREFIX + hash for hash in hashes]  # the file that is written has no key
    EngineArgs.parse(args)
    if not set(LAYOUT_SIZES) & args.keys():
        args["layout"] = "auto"
    # Replicas run in another working directory; clients know the model by the name used here.
    args.setdefault("served_model_name", model)
    if (folder := local_folder(model)) is not None or not is_repo_id(model):
        args["model"] = str(folder or find_model(model))
    for name in FOLDERS & args.keys():
        args[name] = str(local_folder(args[name]) or args[name])
    if "chat_template" in args:
        args["chat_template"] = read_chat_template(args["chat_template"])
    return args


def chosen_sizes(args: dict[str, Any]) -> dict[str, int]:
    """What is chosen from the free memory of this machine, as long as nothing has been started on it yet.

    Resolved again in the running application it would differ, and a second deployment would find less.
    """
    if "RAY_ADDRESS" in os.environ:  # the ranks run elsewhere
        return {}
    config = EngineConfig.resolve(EngineArgs.parse(args))
    if config.device == "cuda" or config.kv_cache_memory_bytes is None:
        return {}
    return {"max_model_len": config.max_model_len, "kv_cache_memory_bytes": config.kv_cache_memory_bytes}


def _option(name: str) -> inspect.Parameter:
    """A field of EngineArgs as an option; None = not set."""
    field = EngineArgs.model_fields[name]
    flag = "--" + name.replace("_", "-")
    kinds: set[Any] = set(get_args(field.annotation)) or {field.annotation}
    if list[str] in kinds:
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


def _with_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace **flags by the fields of EngineArgs, in the signature that typer reads."""
    fixed = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "flags"]
    options = [_option(name) for name in EngineArgs.model_fields if name != "model"]
    signature = inspect.Signature([*fixed, *options])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return command


cli.command(cls=ServeCommand, context_settings={"allow_extra_args": True})(_with_engine_options(serve))
cli.command()(quantize)
cli.command()(plan)
cli.command()(chat)
cli.command()(complete)
cli.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(run_batch)
cli.command()(status)
cli.command()(doctor)
