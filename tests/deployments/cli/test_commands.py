"""chat, complete, run-batch and status against a stand-in for a server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from stagemesh.config.errors import ConfigError
from stagemesh.deployments.cli import batch, status
from stagemesh.deployments.cli.client import Client, ServerError
from stagemesh.deployments.cli.main import cli

METRICS = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{lane="a",model_name="m"} 3.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{lane="a",model_name="m"} 0.25
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{lane="a",model_name="m"} 10.0
vllm:generation_tokens_total{lane="b",model_name="m"} 20.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_count{model_name="m"} 5.0
"""


class Server(ThreadingHTTPServer):
    """Answers the last word that it is told, backwards."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests: list[tuple[str, Any, str | None]] = []
        self.num_busy = 0
        self.is_ready = True


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._reply(200, {"data": [{"id": "first"}, {"id": "second"}]})
        elif self.path == "/metrics":
            self._send(200, METRICS.encode())
        else:
            self._reply(200 if self.server.is_ready else 503, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body, self.headers["Authorization"]))
        if self.server.num_busy:
            self.server.num_busy -= 1
            return self._reply(429, {"error": {"message": "full"}}, {"Retry-After": "0"})
        text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        if text == "bad":
            return self._reply(400, {"error": {"message": "prompt='bad': must not be"}})
        if not body.get("stream"):
            return self._reply(200, {"id": "x-1", "choices": [{"text": text[::-1]}]})
        pieces = [{"text": c} if "prompt" in body else {"delta": {"content": c}} for c in text[::-1]]
        events = [f"data: {json.dumps({'choices': [piece]})}\n\n" for piece in pieces]
        self._send(200, "".join([": still here\n\n", *events, "data: [DONE]\n\n"]).encode())

    def _reply(self, code: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self._send(code, json.dumps(body).encode(), headers)

    def _send(self, code: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(*words: str, input: str | None = None) -> Result:
    return CliRunner().invoke(cli, list(words), input=input, catch_exceptions=True)


def test_a_quick_question_is_answered_by_the_first_model(server: Server) -> None:
    words = ["--url", server.url + "/v1/", "--api-key", "k", "--max-tokens", "9", "--system-prompt", "Be kind."]
    assert run("chat", "-q", "hello", *words).stdout == "olleh\n"
    path, body, key = server.requests[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer k")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]
    assert body == {"model": "first", "max_tokens": 9, "messages": messages, "stream": True}


def test_a_conversation_goes_on_after_a_mistake(server: Server) -> None:
    done = run("chat", "--url", server.url, "--model", "second", input="one\nbad\n\ntwo\n")
    assert done.exit_code == 0 and "eno\n" in done.stdout and "owt\n" in done.stdout
    assert "error: 400: prompt='bad': must not be" in done.stderr
    _, body, _ = server.requests[-1]
    assert [message["content"] for message in body["messages"]] == ["one", "eno", "two"]


def test_a_text_is_continued(server: Server) -> None:
    assert run("complete", "-q", "abc", "--url", server.url, "--temperature", "0").stdout == "cba\n"
    assert server.requests[0][1] == {"model": "first", "temperature": 0.0, "prompt": "abc", "stream": True}


def test_what_a_server_says_is_passed_on(server: Server) -> None:
    done = run("complete", "-q", "bad", "--url", server.url)
    assert isinstance(done.exception, ServerError) and "must not be" in str(done.exception)
    with pytest.raises(ConfigError, match="no server answers there"):
        Client("http://127.0.0.1:1").get("/ready")
    with pytest.raises(ConfigError, match="must begin with http"):
        Client("localhost:8000")


def batch_line(custom_id: str, prompt: str, **changes: Any) -> str:
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt}}
    return json.dumps(line | changes) + "\n"


def read(path: Path) -> dict[str | None, Any]:
    return {line["custom_id"]: line for line in map(json.loads, path.read_text().splitlines())}


def test_a_batch_is_answered_with_errors_by_line(server: Server, tmp_path: Path) -> None:
    server.num_busy = 2  # asked again
    lines = [batch_line("1", "one"), batch_line("2", "bad"), "no json\n", batch_line("3", "x", body={"stream": True})]
    (tmp_path / "in").write_text("".join(lines))
    done = run("run-batch", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--url", server.url)
    assert done.exit_code == 1 and "3 failed" in done.stderr
    results = read(tmp_path / "out")
    assert results["1"]["error"] is None
    body = {"id": "x-1", "choices": [{"text": "eno"}]}
    assert results["1"]["response"] == {"status_code": 200, "request_id": "x-1", "body": body}
    assert results["2"]["response"]["status_code"] == 400 and "must not be" in results["2"]["error"]["message"]
    assert results[None]["error"]["message"].startswith("line 3: ")
    assert results["3"]["response"] is None and "not streamed" in results["3"]["error"]["message"]


def test_a_batch_goes_on_where_it_was_broken_off(server: Server, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("".join(batch_line(str(i), f"p{i}") for i in range(5)))
    words = ["run-batch", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--url", server.url]
    assert run(*words, "--concurrency", "2").exit_code == 0
    whole = (tmp_path / "out").read_text().splitlines(keepends=True)
    (tmp_path / "out").write_text("".join(whole[:2]) + whole[2][:20])
    server.requests.clear()
    assert run(*words).exit_code == 0
    assert len(server.requests) == 3
    assert {id: line["response"]["body"]["choices"][0]["text"] for id, line in read(tmp_path / "out").items()} == {
        str(i): f"{i}p" for i in range(5)
    }
    server.requests.clear()
    assert run(*words).exit_code == 0 and server.requests == []


def test_a_server_that_goes_leaves_what_was_answered(tmp_path: Path) -> None:
    (tmp_path / "in").write_text(batch_line("1", "one"))
    with pytest.raises(ConfigError, match="no server answers there"):
        batch.answer_all(Client("http://127.0.0.1:1"), batch.read_input(tmp_path / "in"), tmp_path / "out", 4)
    assert (tmp_path / "out").read_text() == ""


def test_files_that_cannot_be_a_batch_are_refused(tmp_path: Path) -> None:
    (tmp_path / "twice").write_text(2 * batch_line("1", "x"))
    with pytest.raises(ConfigError, match="custom_id '1' twice"):
        batch.read_input(tmp_path / "twice")
    with pytest.raises(ConfigError, match="cannot be read"):
        batch.read_input(tmp_path / "nowhere")
    (tmp_path / "letter").write_text("Dear Sir,\n")
    with pytest.raises(ConfigError, match="is not the output of a batch"):
        batch.read_output(tmp_path / "letter")
    assert "say either --url" in str(run("run-batch", "-i", "x", "-o", "y").exception)


def test_the_status_shows_lanes_and_deployments(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = tmp_path / "serve"
    deployments = {"stage-0": {"status": "HEALTHY", "replica_states": {"RUNNING": 2}, "message": ""}}
    report = json.dumps({"applications": {"stagemesh": {"deployments": deployments}}})
    serve.write_text(f"#!/bin/sh\necho '{report}'\n")
    serve.chmod(0o755)
    monkeypatch.setattr(status, "serve_command", lambda: str(serve))
    done = run("status", "--url", server.url, "--json")
    state = json.loads(done.stdout)
    assert (done.exit_code, state["ready"], state["serve_problem"]) == (0, True, None)
    assert state["lanes"] == {"a": {"running": 3, "kv": 0.25, "output tokens": 10}, "b": {"output tokens": 20}}
    shown = run("status", "--url", server.url).stdout
    for word in ("ready", "25.0%", "stage-0", "HEALTHY", "2 running"):
        assert word in shown
    server.is_ready = False
    done = run("status", "--url", server.url)
    assert done.exit_code == 1 and "no lane can generate" in done.stdout


def test_rates_need_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    def state(seconds: float, tokens: float) -> dict[str, Any]:
        lanes = {"a": {"output tokens": tokens}}
        return {"url": "u", "time": seconds, "ready": True, "lanes": lanes, "deployments": {}, "serve_problem": "none"}

    console = Console(width=120)
    with console.capture() as shown:
        console.print(status.render(state(12, 100), state(10, 20)))
    assert "40" in shown.get()
