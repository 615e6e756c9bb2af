from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest

from stagemesh.config.engine import EngineArgs, EngineConfig
from stagemesh.config.errors import ConfigError
from stagemesh.config.folders import find_model


def resolve(model: Path, **args: Any) -> EngineConfig:
    return EngineConfig.resolve(EngineArgs.parse({"model": str(model), "device": "cpu", **args}))


def test_defaults_follow_the_model(model_folder: Path) -> None:
    config = resolve(model_folder)
    assert config.model_path == str(model_folder)
    assert config.served_model_names == (str(model_folder),)
    assert (config.dtype, config.dtype_bytes) == ("bfloat16", 2)
    assert config.max_model_len == 512
    assert (config.device, config.transport) == ("cpu", "gloo")
    # All that the most sequences of the greatest length can fill: 1 KiB a token here.
    assert config.kv_cache_memory_bytes == 256 * 512 * 1024


def test_what_may_wait_follows_what_a_lane_computes_at_once(model_folder: Path) -> None:
    config = resolve(model_folder, max_num_seqs=8, max_num_batched_tokens=16)
    assert (config.max_queued_requests, config.max_queued_tokens) == (None, 64 * 16)
    config = resolve(model_folder, max_num_seqs=8, max_num_batched_tokens=100)
    assert config.max_queued_tokens == 6400
    config = resolve(model_folder, max_queued_requests=3, max_queued_tokens=7)
    assert (config.max_queued_requests, config.max_queued_tokens) == (3, 7)


def test_a_config_survives_the_way_to_another_process(model_folder: Path) -> None:
    config = resolve(model_folder, tensor_parallel_size=2, autoscaling_config={"max_replicas": 2})
    assert pickle.loads(pickle.dumps(config)) == config


def test_arguments_cannot_be_changed() -> None:
    args = EngineArgs(model="m")
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        args.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "num_bytes"),
    [("64MiB", 2**26), ("1.5 GB", 1_500_000_000), ("65536", 65536), ("2G", 2**31), ("2g", 2 * 10**9)],
)
def test_memory_may_be_given_with_a_unit(given: str, num_bytes: int) -> None:
    assert EngineArgs(model="m", kv_cache_memory_bytes=given).kv_cache_memory_bytes == num_bytes


@pytest.mark.parametrize(
    ("given", "tokens"),
    [("2k", 2000), ("2K", 2048), ("25.6k", 25_600), ("1m", 10**6), ("1M", 2**20), ("64", 64), ("auto", "auto")]
    + [("AUTO", "auto"), (-1, "auto"), ("-1", "auto")],
)
def test_a_length_may_be_given_as_vllm_takes_it(given: Any, tokens: Any) -> None:
    assert EngineArgs(model="m", max_model_len=given).max_model_len == tokens


def test_types_have_vllms_other_names() -> None:
    args = EngineArgs.parse({"model": "m", "dtype": "half", "kv_cache_dtype": "fp8_e4m3"})
    assert (args.dtype, args.kv_cache_dtype) == ("float16", "fp8")


@pytest.mark.parametrize("given", ["3,5,4", [3, 5, 4]])
def test_a_partition_may_be_a_list_or_text(given: Any) -> None:
    assert EngineArgs(model="m", pipeline_layer_partition=given).pipeline_layer_partition == (3, 5, 4)


def test_several_names_may_be_served(model_folder: Path) -> None:
    assert resolve(model_folder, served_model_name=["a", "b"]).served_model_names == ("a", "b")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"tensor_paralel_size": 2},
            "=2: unknown setting; did you mean 'tensor_parallel_size'?",
        ),
        ({"zzz": 2}, "zzz=2: unknown setting; known are activation_transport, "),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0: must be an integer, at least 1"),
        ({"tensor_parallel_size": "2"}, "tensor_parallel_size='2': must be an integer, at least 1"),
        ({"max_num_seqs": True}, "max_num_seqs=True: must be an integer, at least 1"),
        ({"max_model_len": 0}, "max_model_len=0: must be an integer, at least 1 or one of auto or null"),
        ({"dtype": "int8"}, "dtype='int8': must be one of auto, float32, bfloat16, float16"),
        ({"gpu_memory_utilization": 1.5}, "=1.5: must be a number, above 0 and at most 1"),
        ({"enable_prefix_caching": "yes"}, "='yes': must be true or false"),
        ({"kv_cache_memory_bytes": "1 lot"}, "='1 lot': must be a whole number, or a string with a unit: 2k"),
        ({"max_model_len": "long"}, "='long': must be a whole number, or a string with a unit: 2k (2,000), 2K"),
        ({"max_model_len": "1.5K"}, "a fraction goes with a decimal unit: did you mean 1.5k?"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype='fp8_e5m2': must be one of auto, fp8"),
        ({"pipeline_layer_partition": "3,x"}, "='3,x': must be a list of integers"),
        ({"served_model_name": 3}, "served_model_name=3: must be a string or a list of strings or null"),
        ({"autoscaling_config": []}, "autoscaling_config=[]: must be a mapping or null"),
    ],
)
def test_a_bad_argument_is_named_with_what_is_allowed(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        EngineArgs.parse({"model": "m", **args})
    assert message in str(error.value)


def test_all_that_is_wrong_is_listed_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        EngineArgs.parse({"max_num_seqs": 0, "dtype": "x", "modle": "m"})
    lines = str(error.value).splitlines()
    assert [line.partition("=")[0] for line in lines] == ["model", "dtype", "max_num_seqs", "modle"]


@pytest.mark.parametrize("args", [None, [], "x", {1: 2}])
def test_args_must_be_a_mapping(args: Any) -> None:
    with pytest.raises(ConfigError, match="expected a mapping"):
        EngineArgs.parse(args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"tensor_parallel_size": 3}, "does not divide num_attention_heads=8"),
        ({"max_model_len": 513}, "max_model_len=513: must be within 1 and .*max_position_embeddings=512"),
        ({"activation_transport": "nccl"}, "activation_transport='nccl': needs device=cuda"),
        ({"max_num_batched_tokens": 100}, "max_num_batched_tokens=100: must be at least max_num_seqs=256"),
        ({"kv_cache_memory_bytes": 100_000}, "holds 96 tokens of KV cache, fewer than max_model_len=512"),
        ({"autoscaling_config": {}, "data_parallel_size": 2}, "data_parallel_size=2: is a fixed number"),
        ({"autoscaling_config": {"min_replicas": 3, "max_replicas": 2}}, "0 <= min_replicas <= max_replicas"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    model_folder: Path, args: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(model_folder, **args)


def test_broken_weights_are_refused_before_anything_starts(model_folder: Path) -> None:
    with (model_folder / "model.safetensors").open("r+b") as file:
        file.truncate(20)
    with pytest.raises(ConfigError, match="truncated"):
        resolve(model_folder)


def test_an_unsupported_architecture_is_refused(
    write_model: Callable[..., Path],
) -> None:
    with pytest.raises(ConfigError, match="supported are LlamaForCausalLM, MistralForCausalLM, Qwen2"):
        resolve(write_model(architectures=["MambaForCausalLM"]))


def test_transport_follows_the_device(model_folder: Path) -> None:
    assert resolve(model_folder, device="cuda").transport == "nccl"
    assert resolve(model_folder, device="cuda").kv_cache_memory_bytes is None
    assert resolve(model_folder, device="cuda", activation_transport="gloo").transport == "gloo"


def test_a_relative_model_is_found_from_here_then_from_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model("config").name == "config"  # the package's own folder
    (tmp_path / "config").mkdir()
    assert find_model("config") == tmp_path / "config"
    with pytest.raises(ConfigError, match="model='no/such/model': is not a folder") as error:
        find_model("no/such/model")
    assert str(tmp_path / "no/such/model") in str(error.value)


def test_every_argument_is_documented() -> None:
    assert [name for name, field in EngineArgs.model_fields.items() if not field.description] == []


def test_a_tokenizer_and_a_template_of_their_own(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    config = resolve(model_folder, tokenizer=str(tmp_path), chat_template=str(tmp_path / "chat.jinja"))
    assert (config.local_tokenizer_path(), config.chat_template) == (tmp_path, "{{ messages }}")
    plain = resolve(model_folder, chat_template="{{ messages[0] }}")
    assert (plain.local_tokenizer_path(), plain.chat_template) == (model_folder, "{{ messages[0] }}")
    with pytest.raises(ConfigError, match="is neither a file nor a Jinja template"):
        resolve(model_folder, chat_template="nowhere.jinja")
