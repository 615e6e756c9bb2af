"""The Serve config file around `args`: written by `stagemesh serve`, read by `stagemesh run`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stagemesh.config.api_keys import PREFIX, key_hashes
from stagemesh.config.errors import ConfigError

IMPORT_PATH = "stagemesh.deployments.app:build"
SERVE_ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # Seconds that a stopping router still answers: HAProxy needs one, the default of 30 suits remote balancers.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    # Seconds after which HAProxy cuts off a client that reads nothing; one that waits for its answer is not meant.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "30",
    # Milliseconds between Serve's own counts; ten times a second, its default, is half of what an idle replica costs.
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
    # Bytes of a gRPC message: 64 MiB, where Serve's own limit is 2 GiB.
    "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": "67108864",
    # Ray writes the value into HAProxy's `defaults` section. With splicing, HAProxy 2.8 does not notice a client that
    # leaves after a body of 40 KB or more: its answer is generated to the end while one of HAProxy's threads spins.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure\n    no option splice-request\n    no option splice-response",
}
GRPC_SERVICERS = [
    "stagemesh.deployments.proto.inference_pb2_grpc:add_InferenceServicer_to_server",
    "stagemesh.deployments.proto.grpc_predict_v2_pb2_grpc:add_GRPCInferenceServiceServicer_to_server",
    "grpc_health.v1.health_pb2_grpc:add_HealthServicer_to_server",
]


def render(args: Mapping[str, Any], *, host: str, port: int, grpc_port: int) -> str:
    """The YAML of one application with `args`. `config/demo.yaml` explains its lines."""
    if port == grpc_port:
        raise ConfigError("grpc_port", grpc_port, "must differ from port")
    content = {
        "proxy_location": "EveryNode",
        "controller_options": {"runtime_env": {"env_vars": SERVE_ENVIRONMENT}},
        "http_options": {"host": host, "port": port},
        "grpc_options": {"port": grpc_port, "grpc_servicer_functions": GRPC_SERVICERS},
        "applications": [{"name": "stagemesh", "route_prefix": "/", "import_path": IMPORT_PATH, "args": dict(args)}],
    }
    return yaml.safe_dump(content, sort_keys=False)


def with_keys_of_environment(path: Path) -> str | None:
    """The file with the API keys of this process's environment, as hashes; None where it has none.

    On a cluster that runs already, the application is built in a process that does not have the variable.
    """
    if not key_hashes(None, None):
        return None
    ServeFile.read(path)  # for its errors
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for application in content["applications"]:
        if application["import_path"] == IMPORT_PATH:
            args = application["args"] = dict(application.get("args") or {})
            args["api_key"] = [PREFIX + hash for hash in key_hashes(args.get("api_key"), None)]
    return yaml.safe_dump(content, sort_keys=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeFile:
    """What a launcher needs of a Serve config file."""

    host: str
    port: int
    grpc_port: int | None
    """None: no gRPC."""
    route_prefix: str
    args: dict[str, Any]
    """Of the stagemesh application."""

    @classmethod
    def read(cls, path: str | Path) -> ServeFile:
        """ConfigError when it cannot be read or has no stagemesh application."""
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError("config", str(path), f"cannot be read: {error}") from None
        try:
            application = next(app for app in content["applications"] if app["import_path"] == IMPORT_PATH)
            http, grpc = content.get("http_options") or {}, content.get("grpc_options") or {}
            return cls(
                host=http.get("host", "0.0.0.0"),  # Serve's own defaults
                port=http.get("port", 8000),
                grpc_port=grpc.get("port", 9000) if grpc.get("grpc_servicer_functions") else None,
                route_prefix=application.get("route_prefix") or "/",
                args=dict(application.get("args") or {}),
            )
        except (AttributeError, KeyError, StopIteration, TypeError, ValueError):
            reason = f"is not a Serve config file with an application of import_path {IMPORT_PATH}"
            raise ConfigError("config", str(path), reason) from None
