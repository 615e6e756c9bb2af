"""guidellm: a benchmark of a few seconds completes its requests."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

GUIDELLM = str(Path(sys.executable).with_name("guidellm"))
with tempfile.TemporaryDirectory() as folder:
    report = Path(folder, "report.json")
    subprocess.run(
        [
            GUIDELLM, "run",
            "--backend", f"kind=openai_http,target={os.environ['URL']}",
            "--profile", "kind=concurrent,streams=4",
            "--constraint", "kind=max_requests,count=12",
            "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16",
            "--tokenizer", f"kind=hf_auto,model={os.environ['MODEL_FOLDER']}",
            "--output", f"kind=json,path={report}",
            "--disable-console-interactive",
        ],
        check=True,
        timeout=200,
    )  # fmt: skip
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
requests = benchmark["requests"]
assert len(requests["successful"]) >= 12 and not requests["errored"], requests
