from __future__ import annotations

import pytest

from stagemesh.deployments.doctor.network import gloo_transport, has_token_auth, nccl_transport

KNOWN = {"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth0": "10.0.0.1", "ib0": "10.1.0.1"}


@pytest.mark.parametrize(
    "asked, interface",
    [
        ("", "ib0"),
        ("eth", "eth0"),
        ("=eth", ""),
        ("=eth0", "eth0"),
        ("^ib,lo,docker", "eth0"),
        ("^=ib0,lo,docker0", "eth0"),
        ("docker", "docker0"),
    ],
)
def test_nccl_takes_what_its_variable_says(asked: str, interface: str) -> None:
    assert nccl_transport(KNOWN, asked).interface == interface


def test_nccl_takes_dockers_bridge_where_there_is_nothing_better() -> None:
    assert nccl_transport({"lo": "127.0.0.1", "docker0": "172.17.0.1"}, "").interface == "docker0"


@pytest.mark.parametrize("asked, address", [("eth0", "10.0.0.1"), ("eth0,ib0", "10.0.0.1"), ("eth9", "")])
def test_gloo_takes_what_its_variable_says(asked: str, address: str) -> None:
    assert gloo_transport(KNOWN, asked).address == address


def test_gloo_falls_back_to_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "no-such-host.invalid")
    found = gloo_transport(KNOWN, "")
    assert (found.interface, found.address) == ("lo", "127.0.0.1")
    assert "does not resolve" in found.why


@pytest.mark.parametrize(
    "is_cluster, environment, expected",
    [
        (True, {}, False),
        (True, {"RAY_AUTH_MODE": "token"}, True),
        (False, {}, True),
        (False, {"RAY_AUTH_MODE": "disabled"}, False),
    ],
)
def test_token_authentication_follows_the_environment(
    is_cluster: bool, environment: dict[str, str], expected: bool
) -> None:
    assert has_token_auth(is_cluster, environment) is expected
