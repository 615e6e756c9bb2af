"""vLLM's flags that are no fields of EngineArgs: `stagemesh serve` and `LLM(...)` share these tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stagemesh.config.errors import ConfigError

_GROUPS = {
    "kernels are chosen by device, and nothing is compiled or captured": (
        "enforce_eager compilation_config= optimization_level= cudagraph_capture_sizes= max_cudagraph_capture_size= "
        "max_seq_len_to_capture= disable_custom_all_reduce attention_backend= attention_config= disable_cascade_attn "
        "all2all_backend= moe_backend= kernel_config="
    ),
    "steps always overlap, and prefill is always chunked and mixed with decode": (
        "async_scheduling enable_chunked_prefill max_num_partial_prefills= max_long_partial_prefills= "
        "long_prefill_token_threshold= scheduling_policy= stream_interval= disable_chunked_mm_input"
    ),
    "ranks keep weights and cache in the memory of their device": (
        "swap_space= cpu_offload_gb= prefix_caching_hash_algo="
    ),
    "Ray starts, places and watches all processes": (
        "distributed_executor_backend= data_parallel_backend= max_parallel_loading_workers= ray_workers_use_nsight "
        "api_server_count= disable_frontend_multiprocessing numa_bind"
    ),
    "Ray Serve's proxy and routers take connections": (
        "uvicorn_log_level= h11_max_incomplete_event_size= h11_max_header_count= enable_ssl_refresh "
        "disable_fastapi_docs disable_uvicorn_access_log enable_server_load_tracking"
    ),
    "routes are served as they come; a proxy in front takes its own prefix off": "root_path=",
    "logs and metrics are as they are: see /metrics and Ray's logs": (
        "disable_log_stats enable_log_requests disable_log_requests max_log_len= enable_log_outputs "
        "enable_log_deltas aggregate_engine_logging collect_detailed_traces= kv_cache_metrics "
        "show_hidden_metrics_for_version= enable_prompt_tokens_details"
    ),
    "code that comes with a model is never run": "trust_remote_code code_revision=",
    "every model runs in one way here": (
        "runner= task= convert= model_impl= config_format= load_format= tokenizer_mode= use_tqdm_on_load "
        "pt_load_map_location= safetensors_load_strategy= model_loader_extra_config= ignore_patterns= "
        "disable_hybrid_kv_cache_manager allow_deprecated_quantization renderer_num_workers="
    ),
    "tool calls are parsed whenever a request brings tools": "enable_auto_tool_choice",
    "llguidance makes every grammar": "structured_outputs_config= guided_decoding_backend=",
    "models take text": (
        "limit_mm_per_prompt= mm_processor_kwargs= mm_processor_cache_gb= mm_encoder_tp_mode= media_io_kwargs= "
        "interleave_mm_strings skip_mm_profiling allowed_local_media_path= allowed_media_domains= "
        "chat_template_content_format="
    ),
}
INERT = {flag.rstrip("="): why for why, flags in _GROUPS.items() for flag in flags.split()}
"""Name → why it has no effect here. Each is accepted, and warned of once."""
INERT_WITH_VALUE = {flag.rstrip("=") for flags in _GROUPS.values() for flag in flags.split() if flag.endswith("=")}

_TLS = "Ray Serve's proxy speaks plain HTTP; let a proxy in front (nginx, a load balancer) end TLS"
UNSUPPORTED = {
    **dict.fromkeys(("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers"), _TLS),
    **dict.fromkeys(("enable_lora", "lora_modules", "max_loras", "max_lora_rank"), "LoRA adapters are not supported"),
    **dict.fromkeys(("speculative_config", "spec_model"), "speculative decoding is not supported"),
    **dict.fromkeys(("kv_transfer_config", "kv_events_config"), "KV caches stay within their lane"),
    **dict.fromkeys(
        ("nnodes", "node_rank", "master_addr", "master_port", "headless", "data_parallel_size_local"),
        "start Ray on every machine (`ray start`), then `stagemesh serve` on one of them",
    ),
    "num_gpu_blocks_override": "say kv_cache_memory_bytes",
    "enable_sleep_mode": "scale to zero with autoscaling_config instead",
    "hf_token": "set HF_TOKEN in the environment, where no list of processes shows it",
    "calculate_kv_scales": "an fp8 cache has no scales",
    "uds": "the API listens on host and port",
    "middleware": "code from outside cannot be added to the routers",
}
"""Name → why not. Without it the answer would be another, so these are refused."""


def split_inert(flags: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """(the flags that mean something here, why each of the others does not). Raises ConfigError for UNSUPPORTED."""
    for name, value in flags.items():
        if name in UNSUPPORTED and value not in (None, False):
            raise ConfigError(name, value, f"is not supported: {UNSUPPORTED[name]}")
    meant = {name: value for name, value in flags.items() if name not in INERT and name not in UNSUPPORTED}
    return meant, {name: INERT[name] for name in flags if name in INERT}


def inert_warning(without_effect: Mapping[str, str]) -> str:
    """One line for all of them."""
    return "without effect here: " + "; ".join(f"{name} ({why})" for name, why in without_effect.items())
