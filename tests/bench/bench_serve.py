"""Output tokens/s, TTFT, TPOT and the time a step spends outside the model, over HTTP.

    python tests/bench/bench_serve.py                 the table of the README
    python tests/bench/bench_serve.py --quick         a short look

For every model and layout: closed loops at concurrency 1, 8 and 32; prompts of random tokens, no prefix shared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from load import closed_loop  # noqa: E402
from models import make_llama  # noqa: E402
from support.harness import DEMO, Cluster, running_cluster  # noqa: E402

# Of the 135 M model's 9 heads no two ranks can take halves, so it is cut into stages only.
LAYOUTS = {"demo": [(1, 1), (2, 2)], "135m": [(1, 1), (1, 2)]}
CONCURRENCY = [1, 8, 32]


def machine() -> str:
    name = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def outside_ms(before: dict[str, float], after: dict[str, float]) -> float:
    """Milliseconds per step spent outside the model, between two readings of /metrics."""

    def grown(name: str) -> float:
        return after[name] - before[name]

    return 1000 * grown("stagemesh:engine_outside_seconds_total") / grown("stagemesh:engine_steps_total")


def measure(cluster: Cluster, model: str, quick: bool) -> list[dict[str, float]]:
    rows = []
    size = {"prompt_tokens": 64, "max_tokens": 32 if quick else 64}
    asyncio.run(closed_loop(cluster.url, model, concurrency=4, num_requests=4, seed=99, **size))  # warm-up
    for concurrency in CONCURRENCY:
        num_requests = max(3, concurrency) if quick else max(12, 3 * concurrency)
        before = cluster.settled_metrics()
        measured = asyncio.run(
            closed_loop(
                cluster.url,
                model,
                concurrency=concurrency,
                num_requests=num_requests,
                seed=concurrency,
                **size,
            )
        )
        if measured.errors:
            raise RuntimeError(f"{measured.errors} of {num_requests} requests failed")
        row = measured.row()
        row["outside_ms"] = outside_ms(before, cluster.settled_metrics())
        rows.append({"concurrency": concurrency, **row})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", choices=list(LAYOUTS), action="append")
    parser.add_argument("--layout", action="append", help="TPxPP, e.g. 2x2")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    asked = [tuple(map(int, text.split("x"))) for text in options.layout or []]
    folders = {
        "demo": (DEMO, "float32"),
        "135m": (Path(tempfile.gettempdir()) / "stagemesh-bench" / "llama-135m", "bfloat16"),
    }
    results = []
    print(f"Machine: {machine()}. Prompts of 64 random tokens, 64 output tokens, closed loop over HTTP.\n")
    print("| model | TP×PP | clients | out tok/s | TTFT p50/p99 ms | TPOT p50/p99 ms | step overhead ms |")
    print("|---|---|---|---|---|---|---|")
    with running_cluster() as cluster:
        for model in options.model or list(folders):
            folder, dtype = folders[model]
            if model == "135m":
                make_llama(folder)
            for tp, pp in asked or LAYOUTS[model]:
                cluster.deploy(
                    model=str(folder),
                    dtype=dtype,
                    served_model_name=model,
                    tensor_parallel_size=tp,
                    pipeline_parallel_size=pp,
                )
                for row in measure(cluster, model, options.quick):
                    results.append({"model": model, "tp": tp, "pp": pp, **row})
                    print(
                        f"| {model} ({dtype}) | {tp}×{pp} | {row['concurrency']:.0f} | {row['tok_s']:.0f} "
                        f"| {row['ttft_p50_ms']:.0f} / {row['ttft_p99_ms']:.0f} "
                        f"| {row['tpot_p50_ms']:.1f} / {row['tpot_p99_ms']:.1f} | {row['outside_ms']:.2f} |",
                        flush=True,
                    )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
