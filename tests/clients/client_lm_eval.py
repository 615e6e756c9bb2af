"""lm_eval: log-likelihoods and generated texts."""

import json
import os
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

SUMS = [(3, 4), (17, 25), (20, 21), (9, 30)]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICES = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}]
"""
GENERATED = """
output_type: generate_until
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""

with tempfile.TemporaryDirectory() as folder:
    rows = Path(folder, "rows.json")
    rows.write_text(
        "\n".join(
            json.dumps({"question": f"What is {a}+{b}?", "choices": [f" {a + b}", f" {a + b + 7}"], "gold": 0})
            for a, b in SUMS
        )
    )
    for name, form in (("sums", CHOICES), ("sums_generated", GENERATED)):
        Path(folder, f"{name}.yaml").write_text(TASK.format(name=name, rows=rows) + form)
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "demo",
            "base_url": os.environ["URL"] + "/v1/completions",
            "tokenizer": os.environ["MODEL_FOLDER"],
            "num_concurrent": 2,
            "max_retries": 1,
        },
        tasks=["sums", "sums_generated"],
        task_manager=TaskManager(include_path=folder),
        bootstrap_iters=0,
    )
assert results["results"]["sums"]["acc,none"] >= 0.5, results["results"]
assert "exact_match,none" in results["results"]["sums_generated"], results["results"]
