"""Scripts as vLLM's users write them run with only the import changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.harness import DEMO

BASIC = """
from stagemesh import LLM, SamplingParams

prompts = ["Hello, my name is", "The capital of France is", "What is 17+25?"]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95, seed=42)

def main():
    llm = LLM(model=MODEL)
    outputs = llm.generate(prompts, sampling_params)
    for output in outputs:
        print(f"Prompt: {output.prompt!r}\\nOutput: {output.outputs[0].text!r}")
        assert output.finished and output.request_id and len(output.prompt_token_ids) > 0
        assert output.outputs[0].finish_reason in ("stop", "length")

if __name__ == "__main__":
    main()
"""
CHAT = """
from stagemesh import LLM, EngineArgs

llm = LLM(**vars(EngineArgs(model=MODEL)))
sampling_params = llm.get_default_sampling_params()
sampling_params.max_tokens = 12
sampling_params.temperature = 0
conversation = [
    {"role": "user", "content": "What is 40+2?"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "What is 17+25?"},
]
outputs = llm.chat(conversation, sampling_params, use_tqdm=False)
print("answer:", outputs[0].outputs[0].text)
outputs = llm.chat([conversation for _ in range(10)], sampling_params, use_tqdm=True)
assert len(outputs) == 10
template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|eos|>{% endfor %}<|assistant|>"
outputs = llm.chat([conversation], sampling_params, use_tqdm=False, chat_template=template)
assert outputs[0].prompt.startswith("<|user|>What is 40+2?<|eos|>"), outputs[0].prompt
tokenizer = llm.get_tokenizer()
text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
again = llm.generate({"prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}, sampling_params)
print("again:", again[0].outputs[0].text)
"""
STRUCTURED = """
import json
from stagemesh import LLM, SamplingParams, StructuredOutputsParams

llm = LLM(model=MODEL, max_model_len=256)

def ask(prompt, form, **params):
    sampling_params = SamplingParams(structured_outputs=form, seed=1, **params)
    return llm.generate(prompts=prompt, sampling_params=sampling_params)[0].outputs[0].text

assert ask("Is it good?", StructuredOutputsParams(choice=["Positive", "Negative"])) in ("Positive", "Negative")
regex = StructuredOutputsParams(regex=r"[a-z]{1,8}@[a-z]{1,8}\\.com\\n")
assert ask("An address", regex, stop=["\\n"], max_tokens=50).endswith(".com")
schema = {"type": "object", "required": ["brand", "car"], "additionalProperties": False,
          "properties": {"brand": {"type": "string", "maxLength": 8}, "car": {"enum": ["SUV", "Truck"]}}}
car = json.loads(ask("A car", StructuredOutputsParams(json=schema), max_tokens=100))
assert car["car"] in ("SUV", "Truck")
grammar = 'root ::= "SELECT " column " from " table\\ncolumn ::= "col_1" | "col_2"\\ntable ::= "table_1" | "table_2"'
sql = ask("A query", StructuredOutputsParams(grammar=grammar), max_tokens=60)
assert sql.startswith("SELECT col_") and " from table_" in sql, sql
"""
EMBED = """
from stagemesh import LLM

llm = LLM(model=MODEL, runner="pooling", enforce_eager=True)
prompts = ["Hello, my name is", "The capital of France is"]
for prompt, output in zip(prompts, llm.embed(prompts)):
    print(f"Prompt: {prompt!r} | size: {len(output.outputs.embedding)}")
(output,) = llm.encode("Hello, my name is", pooling_task="embed")
assert output.outputs.data.shape == (len(llm.embed(prompts[0])[0].outputs.embedding),)
scores = [output.outputs.score for output in llm.score("The king said", ["The king said", "What is 17+25?"])]
assert abs(scores[0] - 1) < 1e-4 > scores[1] - scores[0], scores
"""
PREFIX = """
from stagemesh import LLM, SamplingParams

prefix = "The king said to the old man that he would go to the town and see the people of the land. "
prompts = [prefix + prompt for prompt in ["Hello", "The queen", "What is 17+25?"]]
sampling_params = SamplingParams(temperature=0.0, max_tokens=8)
regular = LLM(model=MODEL, enable_prefix_caching=False)
expected = [output.outputs[0].text for output in regular.generate(prompts, sampling_params)]
del regular
cached = LLM(model=MODEL, enable_prefix_caching=True)
cached.generate(prompts[0], sampling_params)
outputs = cached.generate(prompts, sampling_params)
assert [output.outputs[0].text for output in outputs] == expected
assert all(output.num_cached_tokens >= 16 for output in outputs), [output.num_cached_tokens for output in outputs]
assert cached.reset_prefix_cache()
assert cached.generate(prompts[0], sampling_params)[0].num_cached_tokens == 0
values = {metric.name: metric.value for metric in cached.get_metrics()}
assert values["vllm:prefix_cache_hits"] >= 16 and values["vllm:num_requests_running"] == 0
"""
DATA_PARALLEL = """
import os
from multiprocessing import get_context
from stagemesh import LLM, SamplingParams

def main(dp_size, rank):
    os.environ["VLLM_DP_RANK"], os.environ["VLLM_DP_SIZE"] = str(rank), str(dp_size)
    prompts = [f"What is 17+{i}?" for i in range(8)][rank::dp_size]
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=[16, 20][rank % 2])
    llm = LLM(model=MODEL, tensor_parallel_size=1, enforce_eager=True, trust_remote_code=False, max_num_seqs=64)
    for output in llm.generate(prompts, sampling_params):
        print(f"DP rank {rank}, Prompt: {output.prompt!r}, Generated text: {output.outputs[0].text!r}", flush=True)

if __name__ == "__main__":
    processes = [get_context("spawn").Process(target=main, args=(2, rank)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    raise SystemExit(sum(process.exitcode != 0 for process in processes))
"""
EXAMPLES = {
    "basic": (BASIC, ["Prompt: 'What is 17+25?'"], "est. speed input: "),
    "chat": (CHAT, ["answer: 42", "again: 42"], "10/10"),
    "structured outputs": (STRUCTURED, [], ""),
    "embeddings": (EMBED, ["| size: "], "Maximum concurrency"),
    "prefix caching": (PREFIX, [], ""),
    "data parallel": (DATA_PARALLEL, ["DP rank 0, Prompt: 'What is 17+6?'", "DP rank 1, Prompt: 'What is 17+7?'"], ""),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_with_only_the_import_changed(name: str, tmp_path: Path) -> None:
    script, printed, shown = EXAMPLES[name]
    path = tmp_path / "example.py"
    path.write_text(f"MODEL = {str(DEMO)!r}\n{script}")
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [text for text in printed if text not in done.stdout] == []
    assert shown in done.stderr
