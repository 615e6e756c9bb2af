"""The offline classes: in-process with one rank, over Ray actors with more, and a script written for vLLM's."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.harness import DEMO, eventually
from support.model_harness import make_checkpoint, some_token_ids

from stagemesh import LLM, SamplingParams
from stagemesh.config.errors import ConfigError
from stagemesh.deployments.offline.llm import LaneFailed
from stagemesh.stages.layers.moe import MIN_DISPATCH_TOKENS

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
QUESTIONS = ["What is 17+25?", "What is 40+2?", "Hello", "The king said"]


def load(**args: Any) -> LLM:
    return LLM(
        **{"model": str(DEMO), "dtype": "float32", "device": "cpu", "max_model_len": 256, "max_num_seqs": 32, **args}
    )


def ask(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()} & {"engine", "worker", "lane"}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with load() as llm:
        yield llm


def test_a_script_for_vllms_offline_classes_runs_with_only_the_import_line_changed(tmp_path: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from stagemesh import LLM, SamplingParams\n"
        'prompts = ["Hello, my name is", "The capital of France is", "What is 17+25?"]\n'
        "sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=256, seed=42)\n"
        f"llm = LLM(model={str(DEMO)!r}, tensor_parallel_size=1, pipeline_parallel_size=1,\n"
        "          gpu_memory_utilization=0.9, dtype='float', enforce_eager=True, trust_remote_code=False)\n"
        "outputs = llm.generate(prompts, sampling_params)\n"
        "for output in outputs:\n"
        "    prompt = output.prompt\n"
        "    generated_text = output.outputs[0].text\n"
        '    print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")\n'
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("Prompt: ")]
    assert len(lines) == 3 and lines[2].startswith("Prompt: 'What is 17+25?'")
    assert "Processed prompts" in done.stderr, "a progress bar on the terminal"


def test_importing_stagemesh_imports_neither_torch_nor_ray_nor_numpy() -> None:
    program = (
        "import sys, stagemesh; assert not {'torch', 'ray', 'numpy'} & sys.modules.keys()\n"
        "stagemesh.SamplingParams, stagemesh.LLM; assert not {'torch', 'ray'} & sys.modules.keys()\n"
        "assert not hasattr(stagemesh, 'LMM')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_answers_come_in_the_order_of_the_prompts_with_all_that_belongs_to_them(llm: LLM) -> None:
    outputs = llm.generate(QUESTIONS, SamplingParams(temperature=0.8, seed=7, max_tokens=20), use_tqdm=False)
    assert [output.prompt for output in outputs] == QUESTIONS
    tokenizer = llm.get_tokenizer()
    for output in outputs:
        answer = output.outputs[0]
        assert output.finished and answer.finished() and output.metrics is not None
        assert output.prompt_token_ids == tokenizer.encode(output.prompt or "")
        assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        assert answer.finish_reason == ("length" if len(answer.token_ids) == 20 else "stop")
        assert (answer.index, answer.cumulative_logprob, answer.stop_reason) == (0, None, None)


def test_a_chat_is_answered_by_the_models_template(llm: LLM) -> None:
    one = llm.chat(ask("What is 17+25?"), GREEDY, use_tqdm=False)
    assert [output.outputs[0].text for output in one] == ["42"]
    several = llm.chat([ask("What is 17+25?"), ask("What is 40+2?")], GREEDY, use_tqdm=False)
    assert [output.outputs[0].text for output in several] == ["42", "42"]
    assert several[0].num_cached_tokens == 0 or several[0].num_cached_tokens % 16 == 0


def test_a_prompt_may_be_text_or_token_ids_alone_in_a_list_or_in_a_dict(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("Hello")
    asked: list[Any] = ["Hello", ids, [ids], {"prompt": "Hello"}, {"prompt_token_ids": ids}, [{"prompt": "Hello"}]]
    answers = [llm.generate(prompt, GREEDY, use_tqdm=False) for prompt in asked]
    assert all(len(answer) == 1 for answer in answers)
    assert len({answer[0].outputs[0].text for answer in answers}) == 1
    assert answers[1][0].prompt is None


def test_each_prompt_may_have_parameters_of_its_own(llm: LLM) -> None:
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (1, 5, 9)]
    outputs = llm.generate(["Hello"] * 3, params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 5, 9]
    with pytest.raises(ConfigError, match="sampling_params"):
        llm.generate(["Hello"] * 2, params, use_tqdm=False)


def test_without_max_tokens_an_answer_goes_on_to_the_end_of_the_model(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)  # type: ignore[arg-type]
    output = llm.generate("Hello", params, use_tqdm=False)[0]
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == llm.config.max_model_len


def test_a_seeded_answer_is_the_same_alone_and_among_others(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=24)
    together = [output.outputs[0].token_ids for output in llm.generate(QUESTIONS * 4, params, use_tqdm=False)]
    alone = [llm.generate(question, params, use_tqdm=False)[0].outputs[0].token_ids for question in QUESTIONS]
    assert together == alone * 4


def test_the_seed_of_the_model_fixes_the_answers_of_requests_without_one() -> None:
    params = SamplingParams(temperature=1.0, max_tokens=16)
    answers = []
    for seed in (5, 5, 6):
        with load(seed=seed) as llm:
            answers.append([output.outputs[0].token_ids for output in llm.generate(["Hello"] * 2, params)])
    assert answers[0] == answers[1] != answers[2]
    assert answers[0][0] != answers[0][1], "two requests, two draws"


def test_a_stop_string_ends_the_answer_before_it_and_the_request_in_the_engine(llm: LLM) -> None:
    whole = llm.generate("The king said", SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True))[0].outputs[0]
    stop = whole.text[10:13]
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, stop=(stop,))
    cut = llm.generate("The king said", params)[0].outputs[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert list(cut.token_ids) == list(whole.token_ids[: len(cut.token_ids)]) and len(cut.token_ids) < 60
    assert cut.stop_reason == stop
    stats = llm._lane.engine.stats().result(5)
    assert (stats.num_running, stats.num_waiting) == (0, 0)


def test_a_stop_token_is_the_reason_that_is_given(llm: LLM) -> None:
    free = llm.generate("Hello", SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))[0].outputs[0]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, stop_token_ids=(free.token_ids[3],))
    answer = llm.generate("Hello", params)[0].outputs[0]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", free.token_ids[3])
    assert answer.token_ids[-1] == free.token_ids[3]


def test_n_answers_differ_and_each_is_what_its_own_seed_gives(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=12, n=3)
    output = llm.generate("Hello", params, use_tqdm=False)[0]
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    alone = [
        llm.generate("Hello", SamplingParams(temperature=1.0, seed=11 + i, max_tokens=12), use_tqdm=False)[0].outputs[0]
        for i in range(3)
    ]
    assert [answer.token_ids for answer in output.outputs] == [answer.token_ids for answer in alone]
    assert len({tuple(answer.token_ids) for answer in alone}) == 3


def test_an_answer_without_a_seed_reports_the_one_that_gives_it_again(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=12, n=2)
    for answer in llm.generate("Hello", params, use_tqdm=False)[0].outputs:
        again = llm.generate("Hello", SamplingParams(temperature=1.0, max_tokens=12, seed=answer.seed), use_tqdm=False)
        assert again[0].outputs[0].token_ids == answer.token_ids and again[0].outputs[0].seed == answer.seed


def test_priorities_are_one_per_prompt(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4)
    plain = llm.generate(["Hello", "Hi"], params, use_tqdm=False)
    ranked = llm.generate(["Hello", "Hi"], params, use_tqdm=False, priority=[5, -5])
    assert [output.outputs[0].token_ids for output in ranked] == [output.outputs[0].token_ids for output in plain]
    with pytest.raises(ConfigError, match=r"priority=1: must be as many as there are prompts \(2\)"):
        llm.generate(["Hello", "Hi"], params, use_tqdm=False, priority=[5])
    with pytest.raises(ConfigError, match=r"priority=101: must be within"):
        llm.generate("Hello", params, use_tqdm=False, priority=[101])


def test_logprobs_come_by_token_with_rank_and_text(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=1)
    output = llm.generate("The king said", params, use_tqdm=False)[0]
    answer = output.outputs[0]
    assert answer.logprobs is not None and len(answer.logprobs) == 6
    for token_id, found in zip(answer.token_ids, answer.logprobs, strict=True):
        assert (found[token_id].rank, len(found)) == (1, 3), "the greedy token is the likeliest"
        assert found[token_id].decoded_token == llm.get_tokenizer().decode([token_id])
    chosen = [found[token_id].logprob for token_id, found in zip(answer.token_ids, answer.logprobs, strict=True)]
    assert answer.cumulative_logprob == pytest.approx(sum(chosen)) and max(chosen) <= 0
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for token_id, given in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert given is not None and given[token_id].logprob <= 0


@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        (["Hello", []], r"prompts\[1\]"),
        ([[5, 2048]], r"prompts\[0\]=2048"),
        ([[5] * 256], "maximum context length is 256 tokens"),
        ([{"text": "Hello"}], "prompt_token_ids"),
    ],
)
def test_a_prompt_that_cannot_run_is_named_before_any_runs(llm: LLM, prompts: Any, named: str) -> None:
    steps = llm._lane.engine.stats().result(5).num_steps
    with pytest.raises(ConfigError, match=named):
        llm.generate(prompts, GREEDY, use_tqdm=False)
    assert llm._lane.engine.stats().result(5).num_steps == steps


@pytest.mark.parametrize(
    "params", [{"logit_bias": {2048: 1.0}}, {"allowed_token_ids": [5, 2048]}, {"stop_token_ids": [2048]}]
)
def test_a_token_id_that_the_model_does_not_have_is_refused_and_the_lane_lives(llm: LLM, params: Any) -> None:
    with pytest.raises(ConfigError, match="=2048: is out of vocabulary"):
        llm.generate("Hello", SamplingParams(max_tokens=4, **params), use_tqdm=False)
    assert llm.generate("Hello", GREEDY, use_tqdm=False)[0].finished


def test_without_parameters_a_call_has_the_defaults_of_the_model(tmp_path: Path) -> None:
    model = str(make_checkpoint(tmp_path, eos_token_id=127))
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.0, "max_new_tokens": 3}')
    with load(model=model, tokenizer=str(DEMO)) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, max_tokens=3)
        assert len(llm.generate([[5, 6]], use_tqdm=False)[0].outputs[0].token_ids) == 3
    with load(model=model, tokenizer=str(DEMO), generation_config="vllm") as llm:
        assert llm.get_default_sampling_params() == SamplingParams()


def test_use_tqdm_says_which_progress_bar_or_none(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate("Hello", GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""
    totals = []

    class Bar:
        def __init__(self, total: int, **_: Any) -> None:
            totals.append(total)

        def update(self, n: int = 1) -> None:
            totals[-1] -= n

        def close(self) -> None:
            totals.append(-1)

    llm.generate(QUESTIONS, GREEDY, use_tqdm=Bar)
    assert totals == [0, -1]


def test_arguments_are_checked_by_name() -> None:
    with pytest.raises(ConfigError, match="tensor_paralel_size.*did you mean 'tensor_parallel_size'"):
        load(tensor_paralel_size=2)
    with pytest.raises(ConfigError, match="tensor_parallel_size"):
        load(tensor_parallel_size=3)


def test_a_failure_in_the_model_surfaces_once_with_rank_and_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    with load() as llm:

        def broken(*_: object) -> None:
            raise ArithmeticError("the flux is out of range")

        monkeypatch.setattr("stagemesh.stages.worker.model_runner.ModelRunner.execute", broken)
        with pytest.raises(LaneFailed, match="^stage 0 rank 0: ArithmeticError: the flux is out of range$"):
            llm.generate(QUESTIONS, GREEDY, use_tqdm=False)
        with pytest.raises(LaneFailed, match="the flux"):
            llm.generate("Hello", GREEDY, use_tqdm=False)


def test_closing_ends_the_threads_and_so_does_letting_go() -> None:
    before = threads()
    llm = load()
    llm.generate("Hello", GREEDY, use_tqdm=False)
    llm.close()
    llm.close()
    with pytest.raises(LaneFailed, match="closed"):
        llm.generate("Hello", GREEDY, use_tqdm=False)
    other = load()
    engine, worker = other._lane.engine._thread, other._lane._thread  # type: ignore[attr-defined]
    assert engine.is_alive() and worker.is_alive()
    del other
    gc.collect()
    assert not engine.is_alive() and not worker.is_alive()
    assert threads() == before


def test_an_interrupted_call_leaves_nothing_running(llm: LLM) -> None:
    class Bar:
        def __init__(self, **_: Any) -> None: ...

        def update(self) -> None:
            raise KeyboardInterrupt

        def close(self) -> None: ...

    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (1, 200, 200)]
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["Hello"] * 3, params, use_tqdm=Bar)
    stats = llm._lane.engine.stats().result(5)
    assert (stats.num_running, stats.num_free_blocks) == (0, stats.num_blocks)
    assert llm.chat(ask("What is 17+25?"), GREEDY, use_tqdm=False)[0].outputs[0].text == "42"


@pytest.fixture(scope="module")
def own_ray() -> Iterator[None]:
    """An instance for the tests of this file: whatever else runs on this machine is left alone."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def ranks(llm: LLM) -> dict[tuple[int, int], Any]:
    """The actors by (stage, tp_rank)."""
    workers: dict[tuple[int, int], Any] = llm._lane._workers  # type: ignore[attr-defined]
    return workers


@pytest.mark.own_ray
@pytest.mark.slow
def test_a_lane_of_actors_answers_as_one_process_does_and_names_the_rank_that_died(llm: LLM, own_ray: None) -> None:
    import ray

    params = [GREEDY, SamplingParams(temperature=0.8, top_p=0.95, max_tokens=24, seed=42)] * 2
    expected = [output.outputs[0].token_ids for output in llm.generate(QUESTIONS, params, use_tqdm=False)]
    with load(tensor_parallel_size=2, pipeline_parallel_size=2, startup_timeout_s=120.0) as cut:
        outputs = cut.generate(QUESTIONS, params, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        os.kill(ray.get(ranks(cut)[1, 1].pid.remote()), signal.SIGKILL)
        with pytest.raises(LaneFailed, match=r"^stage 1 rank 1: \w*Actor\w*Error") as failure:
            cut.generate(QUESTIONS * 8, GREEDY, use_tqdm=False)
        assert "stage 0" not in str(failure.value), "the cause, not its effects"
    resources = ray.cluster_resources()["CPU"]
    eventually(lambda: ray.available_resources().get("CPU") == resources, 20, "the placement groups are given back")


@pytest.mark.own_ray
@pytest.mark.slow
def test_data_parallel_lanes_share_the_prompts_and_answer_as_one_does(llm: LLM, own_ray: None) -> None:
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=24, seed=42)
    expected = [output.outputs[0].token_ids for output in llm.generate(QUESTIONS * 2, params, use_tqdm=False)]
    with load(data_parallel_size=2, startup_timeout_s=120.0) as several:
        outputs = several.generate(QUESTIONS * 2, params, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        metrics: list[Any] = several.get_metrics()
        generated = {m.labels["engine"]: m.value for m in metrics if m.name == "vllm:generation_tokens"}
        assert generated.keys() == {"0", "1"} and min(generated.values()) > 0
        assert sum(generated.values()) >= sum(map(len, expected))
        assert several.reset_prefix_cache()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    return make_checkpoint(tmp_path_factory.mktemp("mixture"), "Qwen3Moe", eos_token_id=127, **sizes)


@pytest.mark.own_ray
@pytest.mark.slow
@pytest.mark.parametrize("expert_parallel", [True, False])
def test_a_mixture_of_experts_cut_both_ways_answers_as_one_process_does(
    mixture: Path, own_ray: None, expert_parallel: bool
) -> None:
    import ray

    args: dict[str, Any] = {"tokenizer": str(DEMO), "dtype": "float32", "device": "cpu"}
    prompts: list[Any] = [some_token_ids(count, seed=i) for i, count in enumerate([5, 37, 200] * 12)]
    assert sum(map(len, prompts)) > 2 * MIN_DISPATCH_TOKENS, "enough for tokens to travel to the experts"
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with LLM(str(mixture), **args) as whole:
        expected = [output.outputs[0].token_ids for output in whole.generate(prompts, params, use_tqdm=False)]
    cut = LLM(
        str(mixture),
        tensor_parallel_size=2,
        pipeline_parallel_size=2,
        enable_expert_parallel=expert_parallel,
        startup_timeout_s=120.0,
        **args,
    )
    with cut:
        outputs = cut.generate(prompts, params, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == expected

        def num_experts(shard: Any) -> int:
            return len(shard._worker._runner._model.layers[0].feed_forward.experts.local_experts)

        held = {rank: ray.get(actor.__ray_call__.remote(num_experts)) for rank, actor in ranks(cut).items()}
        assert held[1, 0] + held[1, 1] == (5 if expert_parallel else 10)

        def break_model(shard: Any) -> None:
            def execute(*_: object) -> None:
                raise ArithmeticError("the flux is out of range")

            shard._worker._runner.execute = execute

        ray.get(ranks(cut)[0, 1].__ray_call__.remote(break_model))
        for _ in range(2):
            with pytest.raises(LaneFailed, match=r"^stage 0 rank 1: ArithmeticError: the flux is out of range$"):
                cut.generate(prompts, params, use_tqdm=False)


def test_the_cause_is_told_apart_from_its_effects() -> None:
    from stagemesh.deployments.offline.ray_lane import root_cause
    from stagemesh.stages.layers.tensor_parallel import PeerLost

    lost = PeerLost("Connection closed by peer [127.0.0.1]:4711")
    assert root_cause({(0, 0): lost, (1, 0): ValueError("bad row")}) == "stage 1 rank 0: ValueError: bad row"
    assert root_cause({(0, 0): lost, (0, 1): lost}).count("Connection closed") == 2
