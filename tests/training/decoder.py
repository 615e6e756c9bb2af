"""The demo models as they are trained: a small Llama, and a Mixtral whose feed-forward has experts.

Parameter names follow the Hugging Face layout, so a checkpoint is the state dict (`checkpoint_tensors`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 640
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    """Large, so that over half of a head's dimensions turn slowly enough to compare tokens 1000 apart."""
    max_position_embeddings: int = 2048
    num_experts: int = 0
    """0: one feed-forward network. Otherwise each expert has `intermediate_size`."""
    num_experts_per_tok: int = 2


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the rotate-half convention."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        query = config.num_attention_heads * config.head_dim
        key = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key, bias=False)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q = rotate(self.q_proj(x).view(rows, length, -1, self.head_dim).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(rows, length, -1, self.head_dim).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(rows, length, -1, self.head_dim).transpose(1, 2)
        k, v = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))


class SwiGLU(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), x.new_zeros(())


class Experts(nn.Module):
    """Every expert computed for every token, as one wide SwiGLU whose inner values are weighted.

    The weight is 0 for the experts that a token did not choose, so this is Mixtral's layer exactly. At
    these sizes one wide product costs less than sorting the tokens by expert.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_experts, self.chosen = config.num_experts, config.num_experts_per_tok
        inner = config.num_experts * config.intermediate_size
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.w1 = nn.Linear(config.hidden_size, inner, bias=False)
        self.w3 = nn.Linear(config.hidden_size, inner, bias=False)
        self.w2 = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and how unevenly tokens chose: 1 when all experts get the same share (Switch, eq. 4)."""
        shares = F.linear(x.float(), self.gate.weight.float()).softmax(-1)
        kept, experts = shares.topk(self.chosen, dim=-1)
        kept = kept / kept.sum(-1, keepdim=True)
        weights = torch.zeros_like(shares).scatter(-1, experts, kept)
        inner = F.silu(self.w1(x)) * self.w3(x)
        inner = inner.unflatten(-1, (self.num_experts, -1)) * weights.unsqueeze(-1).to(x.dtype)
        tokens = (weights > 0).float().flatten(0, 1).mean(0) / self.chosen
        unevenness = self.num_experts * (tokens * shares.flatten(0, 1).mean(0)).sum()
        return self.w2(inner.flatten(-2)), unevenness


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Experts(config) if config.num_experts else SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out, unevenness = self.mlp(self.post_attention_layernorm(x))
        return x + out, unevenness


class Decoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequencies(config))
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [rows, length, hidden] of token ids [rows, length], and the layers' mean unevenness."""
        x = self.embed_tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        total = x.new_zeros(())
        for layer in self.layers:
            x, unevenness = layer(x, cos, sin)
            total = total + unevenness
        return self.norm(x), total / len(self.layers)


def frequencies(config: Config) -> Tensor:
    """Radians per position of each of a head's rotary pairs, fastest first."""
    return config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)


class LanguageModel(nn.Module):
    """A decoder whose output layer is its embedding table."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # What writes to the residual stream starts at zero: the token's own embedding, which
                # look-up compares, is then not drowned by the noise of layers that know nothing yet.
                writes = name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight"))
                nn.init.zeros_(weight) if writes else nn.init.normal_(weight, std=0.05)
        start_with_lookup(self.model, config)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight)


@torch.no_grad()
def start_with_lookup(model: Decoder, config: Config) -> None:
    """Give the first three layers induction heads to start from.

    A model that has to discover look-up by itself spends most of an hour on a plateau (Olsson et al. 2022,
    "In-context Learning and Induction Heads": the two layers of the circuit are useless without each
    other). Layer 0 starts with four heads that see the token 1, 2, 3 and 4 places back; layers 1 and 2
    with heads that find a place whose earlier token equals the one they are asked about, and copy the
    token there. Training is free to change all of it.
    """
    dim, half, hidden = config.head_dim, config.head_dim // 2, config.hidden_size
    per_group = config.num_attention_heads // config.num_key_value_heads
    frequency = frequencies(config)
    table = model.embed_tokens.weight
    # One embedding dimension is the same for all tokens: what the position heads multiply. It adds the
    # same to all logits, so it changes no probability.
    table[:, 0] = 10 * table.std()
    scale = table.pow(2).mean().sqrt()
    constant = table[0, 0] / scale

    q, k, v, o = projections(model.layers[0].self_attn, dim)
    fast = frequency > 0.05
    strength = 8.0 / constant
    read = orthonormal(dim, hidden)
    read[:, 0] = 0
    write = orthonormal(4 * dim, hidden - 1).unflatten(0, (4, dim))
    for head, back in enumerate((1, 2, 3, 4)):
        q[head] *= 0.2
        k[head // per_group] *= 0.2
        # The angle between query and key is (distance - back) * frequency: the score peaks at `back`.
        q[head, :half, 0] = torch.where(fast, strength * torch.cos(frequency * back), 0)
        q[head, half:, 0] = torch.where(fast, -strength * torch.sin(frequency * back), 0)
        k[head // per_group, :half, 0] = torch.where(fast, strength, 0)
        k[head // per_group, half:, 0] = 0
        v[head // per_group] = read
        o[1:, head] = scale * write[head].T

    # Only the dimensions that hardly turn over a thousand positions take part in the comparison.
    slow = (frequency < 4e-3).repeat(2)
    # Of each group: how far before its value a fact has its key, and how far back a query's two heads look.
    # "key -> value" has 2 and 1; at the start of an answer the key asked about is 3 back; 1 and 0 is
    # plain induction.
    for layer in (1, 2):
        q, k, v, o = projections(model.layers[layer].self_attn, dim)
        for group, (key_back, queries_back) in enumerate([(2, (3, 1)), (2, (3, 1)), (1, (0, 0))]):
            compare = orthonormal(int(slow.sum()), dim)
            seen = {back: F.pad(compare @ write[back - 1], (1, 0)) for back in (1, 2, 3, 4)}
            seen[0] = compare @ read
            k[group] *= 0.2
            k[group, slow] = 3.5 * seen[key_back]
            copied = orthonormal(dim, hidden)
            copied[:, 0] = 0
            v[group] = copied
            for head, back in enumerate(queries_back, start=group * per_group):
                q[head] *= 0.2
                q[head, slow] = 3.5 * seen[back]
                o[:, head] = scale * copied.T


def projections(attention: Attention, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views by head: q, k, v [heads, head_dim, hidden] and o [hidden, heads, head_dim]."""
    q, k, v = (p.weight.unflatten(0, (-1, dim)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    return q, k, v, attention.o_proj.weight.unflatten(1, (-1, dim))


def orthonormal(rows: int, columns: int) -> Tensor:
    """A random matrix whose rows are orthonormal."""
    return torch.linalg.qr(torch.randn(columns, rows))[0].T.contiguous()


def checkpoint_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """The weights under their Hugging Face names, bfloat16."""
    config, tensors = model.config, {}
    for name, weight in model.state_dict().items():
        weight = weight.bfloat16()
        if not config.num_experts or ".mlp." not in name:
            tensors[name] = weight.contiguous()
            continue
        layer, part = name.removesuffix(".weight").split(".mlp.")
        moe = f"{layer}.block_sparse_moe"
        if part == "gate":
            tensors[f"{moe}.gate.weight"] = weight
        else:
            for i, expert in enumerate(weight.chunk(config.num_experts, dim=1 if part == "w2" else 0)):
                tensors[f"{moe}.experts.{i}.{part}.weight"] = expert.contiguous()
    return tensors


def checkpoint_config(config: Config) -> dict[str, object]:
    """What config.json says beyond the token ids."""
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    if config.num_experts:
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            **common,
            "num_local_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "sliding_window": None,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **common,
        "attention_bias": False,
        "mlp_bias": False,
    }


def moe_config() -> Config:
    """Eight experts of which each token uses two: 8.4 M parameters, of which a token uses 3.7 M."""
    return Config(intermediate_size=128, num_experts=8)
