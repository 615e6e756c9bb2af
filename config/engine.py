"""What a user asks for (`EngineArgs`), and what it means for one model (`EngineConfig`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from stagemesh.config import hub
from stagemesh.config.api_keys import key_hashes
from stagemesh.config.base import Settings
from stagemesh.config.capacity import DTYPE_BYTES
from stagemesh.config.checkpoint import checkpoint_files
from stagemesh.config.errors import ConfigError
from stagemesh.config.folders import find_model, local_folder, read_chat_template
from stagemesh.config.memory import CacheLayout, choose_kv_bytes, longest_that_fits
from stagemesh.config.model import DType, ModelConfig
from stagemesh.config.parallel import ParallelPlan
from stagemesh.config.quantization import Quantization, QuantizationName, resolve_quantization
from stagemesh.config.units import parse_number

LAYOUT_SIZES = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "pipeline_layer_partition",
    "enable_expert_parallel",
    "data_parallel_size",
)
"""The settings that `layout: auto` chooses."""
WITH_UNIT = ("max_model_len", "max_num_batched_tokens", "max_num_seqs", "max_queued_tokens", "kv_cache_memory_bytes")
"""Numbers that may be texts with a unit."""
_ALIASES = {"half": "float16", "float": "float32", "fp8_e4m3": "fp8"}
"""vLLM's other names of types."""


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
    tokenizer: str | None = None
    """Folder or hub id of another model whose tokenizer and chat template are used."""
    chat_template: str | None = None
    """A Jinja file or its text, in place of the model's own chat template."""
    hf_overrides: dict[str, Any] | None = None
    """Keys of the model's config.json with other values."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights, activations and KV cache; auto is the checkpoint's."""
    quantization: QuantizationName = "auto"
    """Format of the linear layers; auto is the checkpoint's, fp8 and int8 also quantize while loading."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Type of the KV cache; auto is dtype, fp8 (e4m3) holds 2 to 4 times the tokens."""
    seed: int | None = None
    """Fixes answers to requests without a seed, if a router gets them in the same order."""
    generation_config: str = "auto"
    """Default sampling: auto takes the model's generation_config.json, vllm ignores it, a folder names another."""
    override_generation_config: dict[str, Any] | None = None
    """Default sampling on top of that, e.g. {"temperature": 0.6}."""
    tool_call_parser: str | None = None
    """How the model writes tool calls; by default told from its chat template."""
    reasoning_parser: str | None = None
    """How the model marks its reasoning; by default it is part of the answer."""

    layout: Literal["auto"] | None = None
    """auto: the sizes below as `stagemesh plan --objective throughput` chooses them for the GPUs that Ray shows."""
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

    max_model_len: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Most tokens of prompt and answer together, e.g. 8192 or 8K; auto, and on a CPU the default, is as many of the
    model's max_position_embeddings as the KV cache holds."""
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
    """KV cache per rank, e.g. 2GiB; by default the rest of a GPU's share, or on a CPU a part of the free memory."""

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
    max_logprobs: int = Field(default=20, ge=-1)
    """Most log-probabilities per token that a request may ask for; -1: as many as the vocabulary has."""
    trust_request_chat_template: bool = False
    """Take `chat_template` from requests. It is a program: only where all clients are trusted."""
    strict_fields: bool = False
    """Refuse requests with unknown fields and with those that have no effect, instead of a warning in the log."""
    max_request_timeout_s: float = Field(default=3600.0, gt=0)
    """Seconds for a request, its time in queues included; a request's own `timeout` may be less."""
    api_key: str | list[str] | None = Field(default=None, repr=False)
    """Key or keys of the clients that are served, or sha256: and a key's hash; by default everyone is."""
    api_key_file: str | None = None
    """File with such keys, one per line."""
    allowed_origins: list[str] | None = None
    """Origins whose web pages may send requests (CORS), ["*"] for all; by default none."""
    allowed_methods: list[str] = ["*"]
    """Methods that those pages may use."""
    allowed_headers: list[str] = ["*"]
    """Headers that those pages may send."""
    allow_credentials: bool = False
    """Let those pages send cookies and credentials."""
    startup_timeout_s: float = Field(default=300.0, gt=0)
    """Seconds for each start-up phase of a lane (placement, rendezvous, weights, …)."""
    step_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds for a step; a slower rank counts as hung and is replaced."""
    drain_timeout_s: float = Field(default=60.0, ge=0)
    """Seconds that a stopping lane gives its running requests."""

    @field_validator(*WITH_UNIT, mode="before")
    @classmethod
    def _with_unit(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name == "max_model_len" and (value in (-1, "-1") or str(value).lower() == "auto"):
            return "auto"
        return parse_number(value) if isinstance(value, str) else value

    @field_validator("dtype", "kv_cache_dtype", mode="before")
    @classmethod
    def _other_name(cls, value: Any) -> Any:
        return _ALIASES.get(value, value) if isinstance(value, str) else value

    @field_validator("allowed_origins", "allowed_methods", "allowed_headers", mode="before")
    @classmethod
    def _from_json(cls, value: Any) -> Any:
        """vLLM's flags have a JSON list: --allowed-origins '["*"]'."""
        text = value[0] if isinstance(value, list) and len(value) == 1 else value
        if not isinstance(text, str):
            return value
        try:
            return json.loads(text) if text.startswith("[") else [text]
        except ValueError as error:
            raise ValueError(f"is not a JSON list: {error}") from None

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
    tokenizer: str | None
    """An absolute folder, or a hub id."""
    chat_template: str | None
    """Its text."""
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
    generation_config: str
    override_generation_config: dict[str, Any] | None
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
    max_logprobs: int
    trust_request_chat_template: bool
    strict_fields: bool
    max_request_timeout_s: float
    api_key_hashes: tuple[str, ...] = field(repr=False)
    """SHA-256 of each key, in hex; empty = everyone is served."""
    allowed_origins: list[str] | None
    allowed_methods: list[str]
    allowed_headers: list[str]
    allow_credentials: bool
    startup_timeout_s: float
    step_timeout_s: float
    drain_timeout_s: float

    def local_model_path(self) -> Path:
        """The model's folder on this machine, downloaded if need be."""
        if self.commit is None or Path(self.model_path).is_dir():
            return Path(self.model_path)
        return hub.fetch(self.model_name, self.commit, self.download_dir)

    def local_tokenizer_path(self) -> Path:
        """The folder of tokenizer and chat template on this machine, downloaded if need be."""
        if self.tokenizer is None:
            return self.local_model_path()
        return find_model(self.tokenizer, download_dir=self.download_dir)

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
        model = ModelConfig.from_folder(folder, args.hf_overrides)
        plan = ParallelPlan.resolve(
            model,
            args.tensor_parallel_size,
            args.pipeline_parallel_size,
            args.pipeline_layer_partition,
            expert_parallel=args.enable_expert_parallel,
        )
        device = pick_device(args)
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
            "api_key_hashes": key_hashes(args.api_key, args.api_key_file),
            "dtype": model.torch_dtype if args.dtype == "auto" else args.dtype,
            "quantization": resolve_quantization(args.quantization, model.quantization),
            "device": device,
            "transport": _transport(args, device),
            "tokenizer": args.tokenizer and str(local_folder(args.tokenizer) or args.tokenizer),
            "chat_template": args.chat_template and read_chat_template(args.chat_template),
            "max_model_len": model.max_position_embeddings
            if args.max_model_len in (None, "auto")
            else args.max_model_len,
            "max_queued_tokens": args.max_queued_tokens or 0,
        }
        config = cls(**values)
        _check_layout(args)
        _check_limits(config)
        _check_lanes(args)
        config = replace(config, **_sizes(config, args, checkpoint_files(folder)))
        if not config.max_queued_tokens:
            most = max(64 * config.max_num_batched_tokens, 2 * config.max_model_len)
            config = replace(config, max_queued_tokens=most)
        return config


def pick_device(args: EngineArgs) -> Literal["cpu", "cuda"]:
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


def _sizes(config: EngineConfig, args: EngineArgs, files: Mapping[str, Path]) -> dict[str, Any]:
    """max_model_len and kv_cache_memory_bytes, as far as they are known before start-up. Raises ConfigError."""
    scaling = args.autoscaling_config
    stored = sum(path.stat().st_size for path in set(files.values()))
    layout = CacheLayout(
        config.model,
        config.plan,
        config.kv_dtype_bytes,
        config.block_size,
        num_lanes=args.data_parallel_size if scaling is None else scaling.get("max_replicas", 1),
        num_routers=config.num_router_replicas,
        weight_bytes=stored * config.dtype_bytes // DTYPE_BYTES[config.model.torch_dtype],
    )
    if config.device == "cpu" and args.kv_cache_memory_bytes is None:
        given = args.max_model_len if isinstance(args.max_model_len, int) else None
        chosen, longest = choose_kv_bytes(layout, given, config.max_num_seqs)
        return {"kv_cache_memory_bytes": chosen, "max_model_len": longest}
    is_auto = args.max_model_len == "auto"
    return {"max_model_len": longest_that_fits(layout, args.kv_cache_memory_bytes, config.max_model_len, is_auto)}


def _check_layout(args: EngineArgs) -> None:
    given = [name for name in LAYOUT_SIZES if name in args.model_fields_set]
    if args.layout is not None and given:
        raise ConfigError("layout", args.layout, f"chooses {', '.join(given)}: say one or the other")


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
