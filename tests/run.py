"""`make test`: the tests that start Ray, most of whose time is waiting, beside all others, in two processes.

Arguments are pytest's and go to both. Prints the output of the first as it comes and that of the other behind it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

NO_TESTS = 5
"""pytest's exit status where the arguments leave nothing to run."""


def command(markers: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-m", f"{markers} and not full", *sys.argv[1:]]


def main() -> int:
    with tempfile.TemporaryFile() as output:
        # One thread: the other core is Ray's.
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        without_ray = subprocess.Popen(command("not ray"), stdout=output, stderr=subprocess.STDOUT, env=alone)
        try:
            statuses = {subprocess.run(command("ray")).returncode, without_ray.wait()}
        finally:
            without_ray.terminate()
            output.seek(0)
            sys.stdout.buffer.write(output.read())
    return max(statuses - {NO_TESTS}, default=NO_TESTS)


if __name__ == "__main__":
    sys.exit(main())
