"""Writes inference_pb2.py, inference_pb2.pyi and inference_pb2_grpc.py from inference.proto (`make proto`).

protoc derives Python imports from the path it is given; the mapped include makes that the path of the
installed package, whatever the checkout is called.
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
