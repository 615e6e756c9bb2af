"""Train the demo model on a CPU: a small Llama that writes English and answers checkable questions.

    python config/models/train.py --text shakespeare.txt --out config/models/demo --minutes 55

English comes from --text; the questions come from skills.py. A run given --steps instead of --minutes
is reproducible for a given seed, machine and number of threads.
"""

import argparse
import json
import math
import random
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import skills
import torch
import torch.nn.functional as F
from jinja2 import Template
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SPECIAL_TOKENS = [PAD, BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>"]
PAD_ID, BOS_ID, EOS_ID, ASSISTANT_ID = 0, 1, 2, 5
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_TEMPLATE = Template(CHAT_TEMPLATE)
SYSTEM_PROMPTS = ["You are a helpful assistant.", "You are a careful assistant.", "Answer briefly."]

THREADS = 2
KINDS = ("short", "lookup", "text")
SHORT_ROW = 80
# Look-up is learned on short rows and then stretched: (row length, share of the run after which to move
# on at the latest). A run moves on earlier once the look-up loss is below LEARNED.
CURRICULUM = [(128, 0.4), (384, 0.65), (1152, 1.0)]
LEARNED = 0.1
SKILL_WEIGHTS = {"add": 0.60, "subtract": 0.20, "copy": 0.12, "reverse": 0.08}


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
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048


# --- model: parameter names follow the Hugging Face Llama layout, so a checkpoint is the state dict ---


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(x.dtype)


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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the rotate-half convention."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


class SwiGLU(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: Config, ffn: type[nn.Module]) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = ffn(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: Config, ffn: type[nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, ffn) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        steps = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(), config.rope_theta**-steps)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class LanguageModel(nn.Module):
    """A decoder whose output layer is its embedding table. `ffn` chooses the feed-forward module."""

    def __init__(self, config: Config, ffn: type[nn.Module] = SwiGLU) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, ffn)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # Layers that write to the residual stream start small, so depth does not blow it up.
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = math.sqrt(2 * config.num_hidden_layers) if writes else 1.0
                nn.init.normal_(weight, std=0.02 if "embed" in name else 0.05 / scale)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight)


# --- tokenizer ---


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Byte-level BPE with one token per digit; look-up words are frequent enough to become one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    sentences = [skills.filler_sentence(rng) for _ in range(1000)]
    words = [f" {key}->{value}." for key, value in zip(skills.KEYS, skills.VALUES, strict=False)]
    asked = ["What is the value of", 'Repeat "', 'Reverse "', " Note:"] * 200
    tokenizer.train_from_iterator([text, *sentences, *asked, *(words * 150)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def render(messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    return _TEMPLATE.render(
        messages=messages, add_generation_prompt=add_generation_prompt, bos_token=BOS, eos_token=EOS
    )


# --- data ---


@dataclass
class Batch:
    """Token rows and, for each position, how much predicting the next token counts."""

    ids: Tensor
    weights: Tensor
    kinds: Tensor  # of each row, an index into KINDS


class Data:
    def __init__(self, tokenizer: Tokenizer, text: str, seed: int) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        split = int(len(text) * 0.97)
        self.lines = [line for line in text[:split].split("\n") if 20 < len(line) < 60]
        self.text_ids = tokenizer.encode(text[:split], add_special_tokens=False).ids
        self.validation_ids = tokenizer.encode(text[split:], add_special_tokens=False).ids
        self.newline = tokenizer.token_to_id("\u010a")
        self.arrow = tokenizer.token_to_id("->")

    def turns(self, examples: list[skills.Example]) -> list[dict[str, str]]:
        messages = []
        for example in examples:
            messages.append({"role": "user", "content": example.prompt})
            messages.append({"role": "assistant", "content": example.answer})
        return messages

    def system(self) -> list[dict[str, str]]:
        if self.rng.random() > 0.15:
            return []
        return [{"role": "system", "content": self.rng.choice(SYSTEM_PROMPTS)}]

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        return self.tokenizer.encode(render(messages), add_special_tokens=False).ids

    def short_row(self) -> list[int]:
        """One conversation of several short questions, cut at the last turn that fits."""
        names, shares = list(SKILL_WEIGHTS), list(SKILL_WEIGHTS.values())
        row = self.encode_chat(self.system())
        begin = len(row)
        while True:
            skill = self.rng.choices(names, shares)[0]
            # Special tokens separate the turns, so each can be encoded alone; only the first has a BOS.
            turn = self.encode_chat(self.turns([skills.training_example(skill, self.rng)]))[1:]
            if len(row) + len(turn) <= SHORT_ROW:
                row += turn
            elif len(row) > begin:
                return row

    def lookup_row(self, length: int) -> list[int]:
        """A look-up conversation that fits; some take their filler from the text."""
        filler = (lambda: self.rng.choice(self.lines)) if self.rng.random() < 0.2 else None
        tokens = length if self.rng.random() < 0.7 else self.rng.randint(length // 4, length)
        while True:
            turns = skills.lookup_conversation(self.rng, tokens, filler)
            row = self.encode_chat(self.system() + self.turns(turns))
            if len(row) <= length:
                return row
            tokens = int(tokens * 0.95)

    def text_row(self, length: int) -> list[int]:
        start = self.rng.randrange(len(self.text_ids) - length)
        while self.text_ids[start - 1] != self.newline and start:
            start -= 1
        return [BOS_ID, *self.text_ids[start : start + length - 1]]

    def short_batch(self, rows: int) -> Batch:
        return answers_batch([self.short_row() for _ in range(rows)], SHORT_ROW, "short")

    def long_batch(self, tokens: int, length: int, text_share: float) -> Batch:
        """Look-up rows above plain text rows; each kind's weights add up to its share of the loss."""
        rows = max(2, tokens // length)
        text_rows = max(1, round(rows * text_share))
        lookup = answers_batch([self.lookup_row(length) for _ in range(rows - text_rows)], length, "lookup", self.arrow)
        ids = torch.tensor([self.text_row(length) for _ in range(text_rows)])
        weights = torch.ones(ids.shape)
        weights[:, -1] = 0
        weights *= 0.5 / weights.sum()
        kinds = torch.cat([lookup.kinds, torch.full((text_rows,), KINDS.index("text"))])
        return Batch(torch.cat([lookup.ids, ids]), torch.cat([lookup.weights, weights]), kinds)


def answers_batch(rows: list[list[int]], length: int, kind: str, arrow: int = -1) -> Batch:
    """Padded rows in which the assistant's tokens, their end token and restated values count.

    `arrow` is the token between a key and its value.
    """
    ids = torch.full((len(rows), length), PAD_ID)
    weights = torch.zeros(len(rows), length)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        speaking = False
        stated = set()
        for j, token in enumerate(row):
            speaking = token == ASSISTANT_ID or (speaking and token != EOS_ID)
            known = token == arrow and row[j - 1] in stated
            if token == arrow:
                stated.add(row[j - 1])
            weights[i, j] = float(speaking or known)
    return Batch(ids, weights / weights.sum(), torch.full((len(rows),), KINDS.index(kind)))


# --- training ---


def weighted_loss(model: LanguageModel, body: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The batch's loss, and for the log the unweighted loss of every counted position."""
    counted = batch.weights > 0
    targets = batch.ids.roll(-1, 1)[counted]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.logits(body(batch.ids)[counted])
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return (losses * batch.weights[counted]).sum(), losses.detach()


def gradients(model: LanguageModel, body: nn.Module, batch: Batch) -> tuple[list[Tensor], dict[str, float]]:
    """One batch's gradients, returned rather than stored so that two threads can work side by side."""
    loss, losses = weighted_loss(model, body, batch)
    found = torch.autograd.grad(loss, list(model.parameters()))
    kinds = batch.kinds[(batch.weights > 0).nonzero()[:, 0]]
    means = {KINDS[k]: losses[kinds == k].mean().item() for k in kinds.unique().tolist()}
    return list(found), means


def make_optimizers(model: LanguageModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers (in as many parts as threads), AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muons = [
        torch.optim.Muon(matrices[i::THREADS], weight_decay=0.1, adjust_lr_fn="match_rms_adamw") for i in range(THREADS)
    ]
    return [*muons, torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)]


def progress_steps(args: argparse.Namespace) -> Iterator[tuple[int, float]]:
    """Yields the step number and the share of the run that is done, by steps or by the clock."""
    begin, step = time.monotonic(), 0
    while True:
        done = step / args.steps if args.steps else (time.monotonic() - begin) / (60 * args.minutes)
        if done >= 1:
            return
        yield step, done
        step += 1


def learning_rate(step: int, done: float, peak: float) -> float:
    return peak * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * done))


class RowLength:
    """Walks through CURRICULUM as the run goes on."""

    def __init__(self) -> None:
        self.stage = 0
        self.recent: deque[float] = deque(maxlen=20)

    def next(self, done: float, lookup_loss: float) -> int:
        self.recent.append(lookup_loss)
        learned = len(self.recent) == self.recent.maxlen and sum(self.recent) / len(self.recent) < LEARNED
        if self.stage + 1 < len(CURRICULUM) and (learned or done >= CURRICULUM[self.stage][1]):
            self.stage += 1
            self.recent.clear()
        return CURRICULUM[self.stage][0]


def train(args: argparse.Namespace, model: LanguageModel, data: Data) -> LanguageModel:
    body = torch.compile(model.model, dynamic=False) if args.compile else model.model
    optimizers = make_optimizers(model)
    begin = last_saved = last_logged = time.monotonic()
    tokens, length, lengths = 0, CURRICULUM[0][0], RowLength()
    log: dict[str, list[float]] = {kind: [] for kind in KINDS}
    # One single-threaded worker per core: on a shared machine this beats two threads per matrix product,
    # which wait for each other at every operation.
    with ThreadPoolExecutor(THREADS) as pool:
        for step, done in progress_steps(args):
            long = [data.long_batch(args.long_tokens, length, args.text_share) for _ in range(THREADS)]
            batches = [*long, *(data.short_batch(args.short_rows) for _ in range(THREADS))]
            results = list(pool.map(partial(gradients, model, body), batches))
            for parameter, *parts in zip(model.parameters(), *(found for found, _ in results), strict=True):
                parameter.grad = torch.stack(parts).sum(0) / THREADS
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            set_learning_rate(optimizers, learning_rate(step, done, args.lr))
            list(pool.map(lambda optimizer: optimizer.step(), optimizers))
            tokens += sum(batch.ids.numel() for batch in batches)
            for _, means in results:
                for kind, mean in means.items():
                    log[kind].append(mean)
            length = lengths.next(done, results[0][1]["lookup"])
            now = time.monotonic()
            if step % args.log_every == 0:
                losses = " ".join(f"{kind} {sum(v) / max(len(v), 1):.4f}" for kind, v in log.items())
                rate = tokens / (now - last_logged)
                at = f"{now - begin:.0f} s step {step} ({done:.1%}) length {length}"
                print(f"{at} {losses} {rate:.0f} tokens/s", flush=True)
                log, tokens, last_logged = {kind: [] for kind in KINDS}, 0, now
            if now - last_saved > 60 * args.save_minutes:
                save(args.out, model, data.tokenizer)
                report(model, data, 24)
                last_saved = time.monotonic()
    return model


def set_learning_rate(optimizers: list[torch.optim.Optimizer], value: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = value


# --- evaluation and saving ---


def rounded(model: LanguageModel) -> LanguageModel:
    """A copy with exactly the weights that are saved: bfloat16 values, computed on in float32."""
    copy = LanguageModel(model.config)
    copy.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})
    return copy.eval()


@torch.no_grad()
def answer_probabilities(model: LanguageModel, tokenizer: Tokenizer, example: skills.Example) -> tuple[bool, float]:
    """Whether greedy decoding gives exactly the answer, and the least sure token's probability.

    Greedy decoding gives the answer exactly when the most likely token is right at each of its
    positions, so one forward pass over prompt and answer is enough.
    """
    user = {"role": "user", "content": example.prompt}
    prompt = tokenizer.encode(render([user], add_generation_prompt=True), add_special_tokens=False).ids
    answer = [*tokenizer.encode(example.answer, add_special_tokens=False).ids, EOS_ID]
    hidden = model.model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
    probabilities = model.logits(hidden).softmax(-1)
    best, chosen = probabilities.max(-1)
    return chosen.tolist() == answer, best.min().item()


@torch.no_grad()
def text_loss(model: LanguageModel, data: Data) -> float:
    ids = torch.tensor(data.validation_ids)
    rows = ids[: len(ids) // 256 * 256].view(-1, 256)
    logits = model.logits(model.model(rows))[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


def report(model: LanguageModel, data: Data, count: int) -> None:
    """Accuracy on held-out questions for every skill, and how sure the model is of its answers."""
    model = rounded(model)
    for skill in skills.SKILLS:
        found = [answer_probabilities(model, data.tokenizer, e) for e in skills.held_out(skill, count, seed=1)]
        right = sum(ok for ok, _ in found) / count
        sure = sorted(p for _, p in found)
        low, median = sure[count // 100], sure[count // 2]
        print(f"held-out {skill}: {right:.1%}; weakest token p1 {low:.3f} median {median:.4f}", flush=True)
    print(f"held-out text: {text_loss(model, data):.3f} nats per token", flush=True)


def save(out: Path, model: LanguageModel, tokenizer: Tokenizer) -> None:
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.bfloat16().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    c = model.config
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "max_position_embeddings": c.max_position_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "torch_dtype": "bfloat16",
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": SPECIAL_TOKENS[3:],
        "clean_up_tokenization_spaces": False,
        "model_max_length": c.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID, "do_sample": False}
    write_json(out / "config.json", config)
    write_json(out / "tokenizer_config.json", tokenizer_config)
    write_json(out / "generation_config.json", generation)


def write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="plain English text to learn from")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo")
    parser.add_argument("--init", type=Path, help="folder of an earlier run to start from")
    parser.add_argument("--seed", type=int, default=1)
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=55.0, help="wall-clock budget of the training loop")
    budget.add_argument("--steps", type=int, help="budget in steps instead, for a reproducible run")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--short-rows", type=int, default=10)
    parser.add_argument("--long-tokens", type=int, default=4608)
    parser.add_argument("--text-share", type=float, default=0.1)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--save-minutes", type=float, default=6.0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the decoder (needs a C++ compiler)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    text = args.text.read_text()
    model = LanguageModel(Config())
    if args.init:
        tokenizer = Tokenizer.from_file(str(args.init / "tokenizer.json"))
        weights = load_file(args.init / "model.safetensors")
        model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    else:
        tokenizer = train_tokenizer(text, Config.vocab_size)
    data = Data(tokenizer, text, args.seed)
    model = train(args, model, data)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    save(args.out, model, tokenizer)
    report(model, data, 300)


if __name__ == "__main__":
    main()
