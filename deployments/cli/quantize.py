"""`stagemesh quantize`: a checkpoint in a smaller format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from stagemesh.config.errors import ConfigError
from stagemesh.config.folders import find_model
from stagemesh.stages.text.tokenizer import Tokenizer


def quantize(
    model: Annotated[str, typer.Argument(help="Folder in Hugging Face layout, not quantized.")],
    to: Annotated[Literal["awq", "gptq", "fp8", "int8"], typer.Option(help="Format of the linear layers.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must be empty or not there.")],
    calibration: Annotated[
        Path | None, typer.Option(help="Text like what the model is used for, paragraphs apart; awq and gptq need it.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Most pieces of the text that are used.", min=1)] = 128,
    sample_tokens: Annotated[int, typer.Option(help="Tokens in a piece.", min=1)] = 512,
    group_size: Annotated[int, typer.Option(help="awq, gptq: inputs that share a scale.")] = 128,
    act_order: Annotated[bool, typer.Option(help="gptq: round the most important inputs first.")] = False,
    scheme: Annotated[
        Literal["channel", "tensor", "block"], typer.Option(help="fp8, int8: what shares a scale.")
    ] = "channel",
    static_activations: Annotated[
        bool, typer.Option(help="fp8, int8: one activation scale per layer, from the calibration text.")
    ] = False,
) -> None:
    """Quantize MODEL and write it to a folder, in a layout that other engines read too."""
    from stagemesh.stages.quantization.convert import Recipe, quantize_checkpoint  # torch: seconds to import

    recipe = Recipe(
        to=to, group_size=group_size, act_order=act_order, scheme=scheme, static_activations=static_activations
    )
    folder = find_model(model)
    texts = calibration_samples(folder, calibration, samples, sample_tokens) if calibration else []

    def report(done: int, total: int) -> None:
        typer.echo(f"layer {done} of {total}")

    quantize_checkpoint(str(folder), out, recipe, texts, report)
    typer.echo(f"{model} as {to}: {out}")


def calibration_samples(folder: Path, text: Path, count: int, length: int) -> list[list[int]]:
    """At most `count` samples of at most `length` token ids, from the paragraphs of `text`."""
    try:
        paragraphs = text.read_text(encoding="utf-8").split("\n\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("calibration", str(text), f"cannot be read: {error}") from None
    tokenizer = Tokenizer.from_folder(folder)
    token_ids: list[int] = []
    for paragraph in paragraphs:
        if paragraph.strip() and len(token_ids) < count * length:
            token_ids += tokenizer.encode(paragraph.strip())
    if not token_ids:
        raise ConfigError("calibration", str(text), "holds no text")
    return [token_ids[start : start + length] for start in range(0, min(len(token_ids), count * length), length)]
