"""Writes inference_pb2*.py and .pyi from inference.proto (`make proto`).

protoc derives Python imports from the path: the mapped include makes it that of the installed package.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
PACKAGE = "stagemesh/deployments/proto"


def main() -> int:
    include = Path(protoc.__file__).parent / "_proto"  # google/protobuf/*.proto
    with tempfile.TemporaryDirectory() as out:
        outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
        failed = protoc.main(["protoc", f"-I{PACKAGE}={HERE}", f"-I{include}", *outputs, f"{PACKAGE}/inference.proto"])
        if not failed:
            for path in (Path(out) / PACKAGE).iterdir():
                shutil.copyfile(path, HERE / path.name)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
