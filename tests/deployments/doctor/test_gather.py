"""Faults planted in the machine itself, and what the gatherer and the command make of them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.doctor_facts import good_node
from support.harness import DEMO, free_port

from stagemesh.deployments.doctor.diagnosis import diagnose
from stagemesh.deployments.doctor.facts import Facts
from stagemesh.deployments.doctor.gather import Places, find_model, gather

HAPROXY = "print(flush=True); import time; time.sleep(600)"
DOCTOR = [sys.executable, "-m", "stagemesh.deployments.cli", "doctor"]
TIMEOUT_S = 100
SMALL_DISKS = """
mount -t tmpfs -o size=16m planted /dev/shm && mkdir -p "$1" && mount -t tmpfs -o size=2m planted "$1" || exit 77
head -c 2000000 /dev/zero > "$1/full"
shift; exec "$@"
"""


def doctor(*words: str, within: tuple[str, ...] = (), **environment: str) -> dict[str, Any]:
    """Its report; `within` is the command that runs it. Its exit status must follow from the findings."""
    command = [*within, *DOCTOR, "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, **environment})
    if done.returncode == 77:
        pytest.skip("may not mount here")
    report: dict[str, Any] = json.loads(done.stdout)
    has_errors = any(finding["level"] == "error" for finding in report["findings"])
    assert done.returncode == report["exit_status"] == int(has_errors), done.stderr
    return report


def findings(report: dict[str, Any], check: str) -> list[dict[str, Any]]:
    return [finding for finding in report["findings"] if finding["check"] == check]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def stale_haproxy() -> Iterator[int]:
    """Its pid: a process that looks like Ray Serve's, without Ray above it."""
    words = ["/opt/haproxy", "-c", HAPROXY, "-f", "/tmp/haproxy-serve/haproxy.cfg"]
    with subprocess.Popen(words, executable=sys.executable, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


def test_a_taken_port_is_found_with_its_holder(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        found = [finding["what"] for finding in findings(doctor("--port", str(port)), "ports")]
    assert any(f"port {port} (HTTP) is taken by process {os.getpid()}" in what for what in found)


def test_a_free_port_is_no_finding(port: int) -> None:
    found = findings(doctor("--port", str(port), "--grpc-port", str(free_port())), "ports")
    # Ray's own may be taken by a Ray that runs here.
    assert [finding["what"] for finding in found if finding["level"] == "error"] == []


def test_a_haproxy_that_was_left_behind_is_found(stale_haproxy: int) -> None:
    found = [finding["what"] for finding in findings(doctor(), "leftovers")]
    assert f"HAProxy was left behind by an earlier run: process {stale_haproxy}" in found


def test_a_low_limit_of_open_files_is_found() -> None:
    (finding,) = findings(doctor(within=("sh", "-c", 'ulimit -n 256; exec "$@"', "sh")), "files")
    assert "256 files" in finding["what"] and finding["level"] == "error"


@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="mounts, so it needs root")
def test_small_shared_memory_and_a_full_disk_are_found(tmp_path: Path) -> None:
    temp = tmp_path / "ray"
    within = ("unshare", "-m", "sh", "-c", SMALL_DISKS, "sh", str(temp))
    report = doctor(within=within, RAY_TMPDIR=str(temp))
    assert [finding["level"] for finding in findings(report, "shm")] == ["error"]
    assert [finding["level"] for finding in findings(report, "disk") if str(temp) in finding["what"]] == ["error"]


def test_a_model_that_is_missing_or_other_on_a_node_is_found(tmp_path: Path) -> None:
    model, other = tmp_path / "one", tmp_path / "two"
    shutil.copytree(DEMO, model)
    shutil.copytree(DEMO, other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    here, there, nowhere = (find_model(str(folder), tmp_path) for folder in (model, other, tmp_path / "three"))
    for second, says in ((there, "differs between nodes"), (nowhere, "is not on 10.0.0.2")):
        nodes = (good_node(1, model=here), good_node(2, model=second))
        (finding,) = diagnose(Facts(nodes=nodes, model=str(model)))
        assert says in finding.what and finding.level == "error"


def test_a_model_in_the_hubs_cache_is_found_without_the_hub(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    shutil.copytree(DEMO, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    found = find_model("org/name", tmp_path)
    assert (found.error, found.digest) == ("", find_model(str(DEMO), tmp_path).digest)


def test_a_checkpoint_without_weights_is_an_error(tmp_path: Path) -> None:
    assert "neither" in find_model(str(tmp_path), tmp_path).error


def test_the_loopback_and_a_missing_token_on_a_public_address_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    node = gather(Places(address="8.8.4.4"))
    found = {finding.check: finding for finding in diagnose(Facts(nodes=(node, good_node(2)), is_cluster=True))}
    assert "gloo takes lo 127.0.0.1 (GLOO_SOCKET_IFNAME=lo)" in found["interfaces"].what
    assert "public 8.8.4.4" in found["auth"].what


def test_this_machine_tells_everything_about_itself() -> None:
    node = gather(Places(model=str(DEMO)))
    assert node.failures == ()
    assert node.memory.available_bytes > 0 and node.num_cpus > 0 and len(node.disks) == 2
    assert node.model is not None and node.model.digest
    assert {transport.name for transport in node.transports} >= {"zeromq", "gloo"}
    assert "missing" not in (node.versions["ray"], node.versions["torch"])


def test_a_machine_is_checked_without_ray_and_torch() -> None:
    program = (
        "import sys\nfrom stagemesh.deployments.cli.main import cli\n"
        "try:\n    cli(['doctor'])\nexcept SystemExit:\n    print(sorted({'ray', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT_S)
    lines = done.stdout.strip().splitlines()
    assert lines[-1] == "[]", done.stderr
    assert any("versions" in line for line in lines)


def test_a_cluster_that_does_not_answer_is_named(port: int) -> None:
    done = subprocess.run(
        [*DOCTOR, "--address", f"127.0.0.1:{port}"], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 2
    assert f"address='127.0.0.1:{port}': no Ray cluster to check" in done.stderr
