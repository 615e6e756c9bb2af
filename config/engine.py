"""What a user asks for (`EngineArgs`), and what it means for one model (`EngineConfig`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from stagemesh.config import hub
from stagemesh.config.base import Settings
from stagemesh.config.capacity import DTYPE_BYTES, kv_tokens
from stagemesh.config.checkpoint import checkpoint_files
from stagemesh.config.errors import ConfigError
from stagemesh.config.model import DType, ModelConfig
from stagemesh.config.parallel import ParallelPlan
from stagemesh.config.quantization import Quantization, QuantizationName, resolve_quantization

PACKAGE_ROOT = Path(__file__).parents[1]
CPU_KV_CACHE_BYTES = 256 * 2**20
"""Per rank; small, for other programs need memory too."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


class EngineArgs(Settings):
    """The `args` of a Serve YAML and the flags of `stagemesh serve`, under vLLM's names."""

    model: str
    """Folder in Hugging Face layout, relative to here or the package, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit on the hub; by default main."""
    download_dir: str | None = None
    """Folder for models from the hub; by default its library's cache."""
    served_model_name: str | list[str] | None = None
    """Name or names that clients use; by default `model`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights, activations and KV cache; auto is the checkpoint's."""
    quantization: QuantizationName = "auto"
    """Format of the linear layers; auto is the checkpoint's, fp8 and int8 also quantize while loading."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Type of the KV cache; auto is dtype, fp8 (e4m3) holds 2 to 4 times the tokens."""
    seed: int | None = None
    """Fixes answers to requests without a seed, if a router gets them in the same order."""
    generation_config: Literal["auto", "vllm"] = "auto"
    """Default sampling: auto takes the model's generation_config.json, vllm ignores it."""
    tool_call_parser: str | None = None
    """How the model writes tool calls; by default told from its chat template."""
    reasoning_parser: str | None = None
    """How the model marks its reasoning; by default it is part of the answer."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each layer; must divide the attention heads."""
    pipeline_parallel_size: int = Field(default=1, ge=1)
    """Stages that the layers are spread over."""
    pipeline_layer_partition: tuple[int, ...] | None = None
    """Layers of each stage, e.g. 3,5,4; by default even."""
    enable_expert_parallel: bool = False
    """Give each rank of a stage whole experts instead of a slice of every one."""
    data_parallel_size: int = Field(default=1, ge=1)
    """Fixed number of lanes, copies of the model; not with autoscaling_config."""
    autoscaling_config: dict[str, Any] | None = None
    """Ray Serve's autoscaling_config for the lanes (min_replicas, max_replicas, …)."""

    max_model_len: int | None = Field(default=None, ge=1)
    """Most tokens of prompt and answer together; by default the model's max_position_embeddings."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Most sequences that a lane runs at once."""
    max_num_batched_tokens: int = Field(default=2048, ge=1)
    """Most tokens in one step; longer prompts are computed in chunks."""
    block_size: int = Field(default=16, ge=1, le=1024)
    """Tokens in a block of the KV cache."""
    enable_prefix_caching: bool = True
    """Reuse the KV of prompts that begin alike."""
    gpu_memory_utilization: float = Field(default=0.92, gt=0, le=1)
    """Share of a GPU's memory for weights, activations and KV cache."""
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1)
    """KV cache per rank, e.g. 2GiB; by default the rest of a GPU's share, or 256MiB on a CPU."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What ranks compute on; auto is cuda if the starting machine has an NVIDIA GPU."""
    activation_transport: Literal["auto", "nccl", "gloo", "object_store"] = "auto"
    """How activations travel between stages; auto is nccl on cuda and gloo on cpu."""
    num_cpus_per_worker: float = Field(default=0.1, ge=0)
    """CPUs that Ray reserves for each process of a lane and each router: a count, not a limit."""
    num_router_replicas: int = Field(default=1, ge=1)
    """Processes that take requests, tokenize and choose lanes."""

    max_queued_requests: int | None = Field(default=None, ge=1)
    """Most sequences per lane that wait while max_num_seqs run; more are refused (429). By default as many as will find
    a place at once because others end. Set it for batches: who is queued may wait for as long as an answer takes."""
    max_queued_tokens: int | None = Field(default=None, ge=1)
    """Most prompt tokens per lane that wait; by default 64 steps' worth, and at least two of the longest prompts."""
    max_request_timeout_s: float = Field(default=3600.0, gt=0)
    """Seconds for a request, its time in queues included; a request's own `timeout` may be less."""
    startup_timeout_s: float = Field(default=300.0, gt=0)
    """Seconds for each start-up phase of a lane (placement, rendezvous, weights, …)."""
    step_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds for a step; a slower rank counts as hung and is replaced."""
    drain_timeout_s: float = Field(default=60.0, ge=0)
    """Seconds that a stopping lane gives its running requests."""

    @field_validator("kv_cache_memory_bytes", mode="before")
    @classmethod
    def _with_unit(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", value.strip().upper())
        if match is None:
            raise ValueError("must be bytes, or a string with a unit: '64MiB', '2GiB', '1.5GB'")
        return int(float(match[1]) * _UNITS[match[2] or ""])

    @field_validator("pipeline_layer_partition", mode="before")
    @classmethod
    def _from_list_or_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                return tuple(int(part) for part in value.split(","))
            except ValueError:
                raise ValueError("must be a list of integers, e.g. [3, 5, 4] or '3,5,4'") from None
        return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """EngineArgs resolved for one model, once for all processes. Fields without a text are as there."""

    model: ModelConfig
    model_name: str
    """`EngineArgs.model`."""
    model_path: str
    """Absolute, on the machine that resolved the config."""
    commit: str | None = None
    """Of a model from the hub: every machine uses the same."""
    served_model_names: tuple[str, ...]
    """At least one; responses carry the first."""
    plan: ParallelPlan
    dtype: DType
    quantization: Quantization | None
    """None = dtype."""
    device: Literal["cpu", "cuda"]
    transport: Literal["nccl", "gloo", "object_store"]
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_memory_bytes: int | None
    """Per rank; None = measured on the GPU, from gpu_memory_utilization."""
    download_dir: str | None
    kv_cache_dtype: Literal["auto", "fp8"]
    seed: int | None
    generation_config: Literal["auto", "vllm"]
    tool_call_parser: str | None
    reasoning_parser: str | None
    data_parallel_size: int
    autoscaling_config: dict[str, Any] | None
    block_size: int
    enable_prefix_caching: bool
    gpu_memory_utilization: float
    num_cpus_per_worker: float
    num_router_replicas: int
    max_queued_requests: int | None
    max_queued_tokens: int
    max_request_timeout_s: float
    startup_timeout_s: float
    step_timeout_s: float
    drain_timeout_s: float

    def local_model_path(self) -> Path:
        """The model's folder on this machine, downloaded if need be."""
        if self.commit is None or Path(self.model_path).is_dir():
            return Path(self.model_path)
        return hub.fetch(self.model_name, self.commit, self.download_dir)

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def kv_dtype_bytes(self) -> int:
        return 1 if self.kv_cache_dtype == "fp8" else self.dtype_bytes

    @property
    def peer_timeout_s(self) -> float:
        """Seconds that a rank waits for another: above two steps, so that the leader reports the stuck rank first."""
        return 2 * self.step_timeout_s + 5

    @classmethod
    def resolve(cls, args: EngineArgs) -> EngineConfig:
        """Read the model's folder and check what is known before start-up. Raises ConfigError."""
        folder = find_model(args.model, args.revision, args.download_dir)
        model = ModelConfig.from_folder(folder)
        plan = ParallelPlan.resolve(
            model,
            args.tensor_parallel_size,
            args.pipeline_parallel_size,
            args.pipeline_layer_partition,
            expert_parallel=args.enable_expert_parallel,
        )
        device = _device(args)
        names = args.served_model_name or args.model
        # Fields of both classes, unless replaced below.
        values: dict[str, Any] = {name: getattr(args, name) for name in EngineArgs.model_fields.keys() & cls.__slots__}
        values |= {
            "model": model,
            "model_name": args.model,
            "model_path": str(folder),
            "commit": folder.name if local_folder(args.model) is None else None,
            "served_model_names": (names,) if isinstance(names, str) else tuple(names),
            "plan": plan,
            "dtype": model.torch_dtype if args.dtype == "auto" else args.dtype,
            "quantization": resolve_quantization(args.quantization, model.quantization),
            "device": device,
            "transport": _transport(args, device),
            "max_model_len": (max_model_len := args.max_model_len or model.max_position_embeddings),
            "max_queued_tokens": args.max_queued_tokens or max(64 * args.max_num_batched_tokens, 2 * max_model_len),
        }
        if args.kv_cache_memory_bytes is None and device == "cpu":
            values["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
        config = cls(**values)
        _check_limits(config)
        _check_lanes(args)
        checkpoint_files(folder)
        return config


def find_model(model: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The absolute folder of `model`, downloaded if need be. Raises ConfigError."""
    folder = local_folder(model)
    if folder is None and hub.is_repo_id(model):
        return hub.fetch(model, revision, download_dir)
    if folder is None:
        places = " and ".join(map(str, _places(model)))
        raise ConfigError("model", model, f"is not a folder (looked for {places}) nor a hub id such as org/name")
    if revision is not None:
        raise ConfigError("revision", revision, f"only a model of the hub has revisions; {folder} is a folder")
    return folder


def local_folder(model: str) -> Path | None:
    """The absolute folder `model`, if there is one."""
    return next((place.resolve() for place in _places(model) if place.is_dir()), None)


def _places(model: str) -> list[Path]:
    # The second makes config/models/demo work from any directory, a worker's too.
    return list(dict.fromkeys((Path.cwd() / Path(model).expanduser(), PACKAGE_ROOT / model)))


def _device(args: EngineArgs) -> Literal["cpu", "cuda"]:
    """auto is cuda where a GPU has a device file and torch is no CPU build."""
    if args.device != "auto":
        return args.device
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    return "cuda" if has_gpu and not metadata.version("torch").endswith("+cpu") else "cpu"


def _transport(args: EngineArgs, device: str) -> Literal["nccl", "gloo", "object_store"]:
    if args.activation_transport == "auto":
        return "nccl" if device == "cuda" else "gloo"
    if args.activation_transport == "nccl" and device == "cpu":
        raise ConfigError("activation_transport", "nccl", "needs device=cuda; on cpu use gloo or object_store")
    return args.activation_transport


def _check_limits(config: EngineConfig) -> None:
    longest = config.model.longest_context
    if config.max_model_len > longest:
        what = "max_position_embeddings" if longest == config.model.max_position_embeddings else "longest context"
        reason = f"must be within 1 and the model's {what}={longest}"
        raise ConfigError("max_model_len", config.max_model_len, reason)
    if config.max_num_batched_tokens < config.max_num_seqs:
        # Every running sequence needs one token of each step's budget, or it would starve.
        reason = f"must be at least max_num_seqs={config.max_num_seqs}"
        raise ConfigError("max_num_batched_tokens", config.max_num_batched_tokens, reason)
    if (memory := config.kv_cache_memory_bytes) is not None:
        fits = kv_tokens(config.model, config.plan, config.kv_dtype_bytes, memory, config.block_size)
        if fits < config.max_model_len:
            reason = (
                f"holds {fits:,} tokens of KV cache, fewer than max_model_len={config.max_model_len}, so the "
                "longest request would never finish; raise it, lower max_model_len, or cut the model further"
            )
            raise ConfigError("kv_cache_memory_bytes", memory, reason)


def _check_lanes(args: EngineArgs) -> None:
    scaling = args.autoscaling_config
    if scaling is None:
        return
    if "data_parallel_size" in args.model_fields_set:
        reason = "is a fixed number; with autoscaling_config, say min_replicas and max_replicas there"
        raise ConfigError("data_parallel_size", args.data_parallel_size, reason)
    least, most = scaling.get("min_replicas", 1), scaling.get("max_replicas", 1)
    if type(least) is not int or type(most) is not int or not 0 <= least <= most or most < 1:
        reason = "needs whole numbers with 0 <= min_replicas <= max_replicas and max_replicas >= 1"
        raise ConfigError("autoscaling_config", scaling, reason)
