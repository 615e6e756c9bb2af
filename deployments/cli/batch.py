"""`stagemesh run-batch`: the requests of an OpenAI batch file, resumable."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from stagemesh.config.errors import ConfigError
from stagemesh.deployments.cli.client import Client, ServerError

BUSY = (429, 502, 503, 504)
"""Answers of a server that may take the same request later."""
PATIENCE_S = 600.0
"""A request that the server has been too busy for all that time has failed."""
MAX_PAUSE_S = 30.0
NO_MORE: Iterator[Any] = iter(())
START_TIMEOUT_S = 1800.0
STOP_TIMEOUT_S = 150.0


def run_batch(
    context: typer.Context,
    input_file: Annotated[Path, typer.Option("--input-file", "-i", help="Lines of custom_id, method, url, body.")],
    output_file: Annotated[Path, typer.Option("--output-file", "-o", help="Gets a line for each; may exist.")],
    url: Annotated[str | None, typer.Option(help="A running server.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Serve this for the time of the batch; more flags as serve's.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="By default OPENAI_API_KEY.")] = None,
    concurrency: Annotated[int, typer.Option(help="Most requests at once.", min=1)] = 64,
) -> None:
    """Answer the requests of INPUT_FILE. Those with an answer in OUTPUT_FILE are not asked again."""
    if (url is None) == (model is None):
        raise ConfigError("url", url, "say either --url of a running server or --model to serve one meanwhile")
    if url is not None and context.args:
        raise ConfigError("", None, f"unknown with --url: {' '.join(context.args)}")
    lines = read_input(input_file)
    done = read_output(output_file)
    left = [line for line in lines if line.key not in done]
    print(f"{len(lines)} requests, {len(lines) - len(left)} of them answered before.", file=sys.stderr)
    if not left:
        return
    if url is not None:
        num_failed = answer_all(Client(url, api_key), left, output_file, concurrency)
    else:
        with served(str(model), context.args) as own_url:
            num_failed = answer_all(Client(own_url, api_key), left, output_file, concurrency)
    num_left = len(left) - len(read_output(output_file) - done)
    interrupted = f", {num_left} left for another run" if num_left else ""
    print(f"{num_failed} failed{interrupted}: {output_file}", file=sys.stderr)
    raise typer.Exit(1 if num_failed or num_left else 0)


class Line:
    """One line of the input, or what is wrong with it."""

    def __init__(self, number: int, text: str) -> None:
        self.custom_id: str | None = None
        self.error = ""
        self.path = ""
        self.body: Any = None
        try:
            content = json.loads(text)
            custom_id = content.get("custom_id")
            if not isinstance(custom_id, str):
                raise ValueError("custom_id must be a string")
            self.custom_id = custom_id
            self.path, self.body = content.get("url"), content.get("body")
            if content.get("method", "POST") != "POST":
                raise ValueError("method must be POST")
            if not isinstance(self.path, str) or not self.path.startswith("/"):
                raise ValueError("url must be a path such as /v1/chat/completions")
            if not isinstance(self.body, dict) or self.body.get("stream"):
                raise ValueError("body must be an object, and not streamed")
        except (ValueError, AttributeError) as error:
            self.error = f"line {number}: {error}"
        self.key = self.custom_id or self.error


def read_input(path: Path) -> list[Line]:
    """Raises ConfigError for a file that cannot be read, or that has a custom_id twice."""
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("input_file", str(path), f"cannot be read: {error}") from None
    lines = [Line(number, text) for number, text in enumerate(texts, start=1) if text.strip()]
    seen = set()
    for line in lines:
        if line.key in seen:
            raise ConfigError("input_file", str(path), f"has custom_id {line.key!r} twice")
        seen.add(line.key)
    return lines


def read_output(path: Path) -> set[str]:
    """The keys of the lines that were answered. A last line that was broken off is cut away."""
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    keys = set()
    for text in whole.splitlines():
        try:
            line = json.loads(text)
            keys.add(line["custom_id"] or line["error"]["message"])
        except (ValueError, KeyError, TypeError):
            raise ConfigError("output_file", str(path), "exists and is not the output of a batch") from None
    if len(whole) < len(content):
        path.write_bytes(whole)
    return keys


def answer_all(client: Client, lines: list[Line], output: Path, concurrency: int) -> int:
    """Append a line for each as it is answered; returns how many failed.

    ConfigError when the server no longer answers: what is written stays, and another run goes on from there.
    """
    num_failed = 0
    waiting: Iterator[Line] = iter(lines)
    with (
        ThreadPoolExecutor(concurrency) as pool,
        output.open("a", encoding="utf-8") as file,
        tqdm(total=len(lines), unit="req", dynamic_ncols=True) as bar,
    ):
        running: set[Future[dict[str, Any]]] = set()
        try:
            while True:
                while len(running) < concurrency and (line := next(waiting, None)) is not None:
                    running.add(pool.submit(_answer, client, line))
                if not running:
                    return num_failed
                try:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                except KeyboardInterrupt:
                    if waiting is NO_MORE:  # the second one
                        raise
                    bar.write(f"Waiting for the {len(running)} requests that run; once more to stop at once.")
                    waiting = NO_MORE
                    continue
                for future in done:
                    result = future.result()
                    file.write(json.dumps(result, ensure_ascii=False) + "\n")
                    file.flush()
                    num_failed += result["error"] is not None
                    bar.set_postfix(failed=num_failed, refresh=False)
                    bar.update()
        finally:
            for future in running:
                future.cancel()


def _answer(client: Client, line: Line) -> dict[str, Any]:
    """The output line. Raises ConfigError if no server answers."""
    result: dict[str, Any] = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id, "response": None}
    if line.error:
        return result | {"error": {"code": "invalid_request", "message": line.error}}
    try:
        status, body, error = 200, _patiently(client, line), None
    except ServerError as refused:
        status, body, error = refused.status, refused.body, {"code": str(refused.status), "message": str(refused)}
    request_id = body.get("id", "") if isinstance(body, Mapping) else ""
    return result | {"response": {"status_code": status, "request_id": request_id, "body": body}, "error": error}


def _patiently(client: Client, line: Line) -> Any:
    """Ask again for as long as the server is only busy."""
    deadline, pause_s = time.monotonic() + PATIENCE_S, 0.5
    while True:
        try:
            return client.post(line.path, line.body)
        except ServerError as error:
            if error.status not in BUSY or time.monotonic() > deadline:
                raise
            time.sleep(min(error.retry_after_s or pause_s, MAX_PAUSE_S))
            pause_s = min(2 * pause_s, MAX_PAUSE_S)


@contextmanager
def served(model: str, flags: list[str]) -> Iterator[str]:
    """`stagemesh serve` in a child process; the URL once it is ready. Raises ConfigError if it ends before."""
    port, grpc_port = _free_port(), _free_port()
    command = [sys.executable, "-m", "stagemesh.deployments.cli", "serve", model, *flags]
    server = subprocess.Popen(
        [*command, f"--port={port}", f"--grpc-port={grpc_port}"], stdout=sys.stderr, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    client, deadline = Client(url), time.monotonic() + START_TIMEOUT_S
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then too
    try:
        while not _is_ready(client):
            if server.poll() is not None or time.monotonic() > deadline:
                raise ConfigError("model", model, "could not be served; the reason is above")
            time.sleep(0.5)
        yield url
    finally:
        signal.signal(signal.SIGTERM, previous)
        server.send_signal(signal.SIGINT)
        try:
            server.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            server.send_signal(signal.SIGINT)  # the second one stops it at once
            server.wait()


def _is_ready(client: Client) -> bool:
    try:
        client.get("/ready")
        return True
    except (ServerError, ConfigError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
