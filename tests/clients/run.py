"""Runs the scripts of this folder against the demo, each through a proxy that keeps one request of every kind.

python tests/clients/run.py --python .clients/bin/python [NAME …]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[0] = str(HERE.parent)

import httpx  # noqa: E402
import uvicorn  # noqa: E402
from starlette.applications import Starlette  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.responses import Response, StreamingResponse  # noqa: E402
from starlette.routing import Route  # noqa: E402
from support.harness import DEMO, free_port, running_cluster  # noqa: E402

TIMEOUT_S = 300
DROPPED_HEADERS = {"content-length", "transfer-encoding", "connection", "host", "accept-encoding", "content-encoding"}


class Recorder:
    """Passes requests on, and keeps the first with each set of fields."""

    def __init__(self, url: str) -> None:
        self._client = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S)
        self.kept: dict[str, dict[str, Any]] = {}

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        headers = {name: value for name, value in request.headers.items() if name not in DROPPED_HEADERS}
        sent = self._client.build_request(request.method, request.url.path, content=body, headers=headers)
        answer = await self._client.send(sent, stream=True)
        if answer.status_code == 200:
            self._keep(request.method, request.url.path, headers, body)

        async def parts() -> AsyncIterator[bytes]:
            async for part in answer.aiter_raw():
                yield part
            await answer.aclose()

        kept = {name: value for name, value in answer.headers.items() if name not in DROPPED_HEADERS}
        return StreamingResponse(parts(), answer.status_code, kept)

    def _keep(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        fields = json.loads(body) if body else None
        kind = f"{method} {path} {json.dumps(_shape(fields), sort_keys=True)}"
        version = {name: value for name, value in headers.items() if name in ("content-type", "anthropic-version")}
        self.kept.setdefault(kind, {"method": method, "path": path, "headers": version, "body": fields})


def _shape(value: Any) -> Any:
    """The names of fields, the kinds of other things."""
    if isinstance(value, dict):
        return {name: _shape(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_shape(entry) for entry in value[:1]]
    return value if isinstance(value, bool) else type(value).__name__


@contextmanager
def recording(url: str) -> Iterator[tuple[str, Recorder]]:
    recorder, port = Recorder(url), free_port()
    app = Starlette(routes=[Route("/{path:path}", recorder.__call__, methods=["GET", "POST"])])
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}", recorder
    finally:
        server.should_exit = True
        thread.join(10)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scripts = sorted(path.stem.removeprefix("client_") for path in HERE.glob("client_*.py"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all by default; of {', '.join(scripts)}")
    parser.add_argument("--python", required=True, help="of the environment that has the clients")
    options = parser.parse_args()
    failed = []
    (HERE / "recorded").mkdir(exist_ok=True)
    with running_cluster() as cluster:
        cluster.deploy(max_model_len=2048)
        for name in options.names or scripts:
            with recording(cluster.url) as (url, recorder):
                environment = {
                    **os.environ,
                    "URL": url,
                    "MODEL_FOLDER": str(DEMO),
                    "HF_HUB_OFFLINE": "1",
                    "OPENAI_API_KEY": "none",
                }
                environment.pop("PYTHONPATH", None)
                script = [options.python, str(HERE / f"client_{name}.py")]
                status = subprocess.run(script, env=environment, timeout=TIMEOUT_S).returncode
            print(f"{name}: {'failed' if status else 'passed'}, {len(recorder.kept)} kinds of requests", flush=True)
            if status:
                failed.append(name)
            else:
                recorded = json.dumps(list(recorder.kept.values()), indent=1, ensure_ascii=False)
                (HERE / "recorded" / f"{name}.json").write_text(recorded + "\n")
    print("failed: " + ", ".join(failed) if failed else "all passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
