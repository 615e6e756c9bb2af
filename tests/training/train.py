"""Train the demo models on a CPU: small models that write English and answer checkable questions.

    python tests/training/train.py --text shakespeare.txt --out config/models/demo
    python tests/training/train.py --text shakespeare.txt --out config/models/demo-moe --moe

English comes from --text; the questions come from skills.py; the model is decoder.py's. A run is
reproducible for a given seed, machine and version of torch; on two cores it takes under an hour.
"""

import argparse
import json
import math
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import skills
import torch
import torch.nn.functional as F
from decoder import Config, LanguageModel, checkpoint_config, checkpoint_tensors, moe_config
from jinja2 import Template
from safetensors.torch import save_file
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
"""Each computes the gradients of its own batches; the sum does not depend on which is done first."""
STEPS = 1500
PEAK_LEARNING_RATE = 4e-3
SHORT_ROWS, SHORT_LENGTH = 16, 80
TEXT_LENGTH = 256
LOOKUP_TOKENS = 1152
# Look-up is learned on short rows and then stretched: (row length, share of the run after which to move on).
CURRICULUM = [(256, 0.4), (576, 0.6), (1152, 1.0)]
TEXT_WEIGHT, BALANCE_WEIGHT = 0.5, 0.02
REPORT_EVERY = 200
SKILL_WEIGHTS = {"add": 0.60, "subtract": 0.20, "copy": 0.12, "reverse": 0.08}


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
    """Token rows [rows, length] and, for each position, how much predicting the next token counts."""

    kind: str
    ids: Tensor
    weights: Tensor


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
            if len(row) + len(turn) <= SHORT_LENGTH:
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

    def batches(self, length: int) -> list[Batch]:
        """What one thread learns from in one step; `length` is that of the look-up rows."""
        text = torch.tensor([self.text_row(TEXT_LENGTH)])
        weights = torch.full(text.shape, TEXT_WEIGHT / (TEXT_LENGTH - 1))
        weights[:, -1] = 0
        lookup = [self.lookup_row(length) for _ in range(LOOKUP_TOKENS // length)]
        return [
            answers_batch("lookup", lookup, length, self.arrow),
            answers_batch("short", [self.short_row() for _ in range(SHORT_ROWS)], SHORT_LENGTH),
            Batch("text", text, weights),
        ]


def answers_batch(kind: str, rows: list[list[int]], length: int, arrow: int = -1) -> Batch:
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
    return Batch(kind, ids, weights / weights.sum())


# --- training ---


def gradients(model: LanguageModel, body: nn.Module, batches: list[Batch]) -> tuple[list[Tensor], dict[str, float]]:
    """The batches' summed gradients, returned rather than stored so that two threads can work side by side.

    Also, for the log, each kind's mean loss over the positions that count.
    """
    total: list[Tensor] = []
    means = {}
    for batch in batches:
        counted = batch.weights > 0
        targets = batch.ids.roll(-1, 1)[counted]
        with torch.autocast("cpu", torch.bfloat16):
            hidden, unevenness = body(batch.ids)
            logits = model.logits(hidden[counted])
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        loss = (losses * batch.weights[counted]).sum() + BALANCE_WEIGHT * unevenness
        found = torch.autograd.grad(loss, list(model.parameters()))
        total = [a + b for a, b in zip(total, found, strict=True)] if total else list(found)
        means[batch.kind] = losses.detach().mean().item()
        if model.config.num_experts:
            means["unevenness"] = unevenness.item()
    return total, means


def make_optimizers(model: LanguageModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers (in as many parts as threads), AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muons = [
        torch.optim.Muon(matrices[i::THREADS], weight_decay=0.1, adjust_lr_fn="match_rms_adamw") for i in range(THREADS)
    ]
    return [*muons, torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)]


def learning_rate(step: int, steps: int) -> float:
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / steps))


def row_length(step: int, steps: int) -> int:
    return next((length for length, until in CURRICULUM if step < until * steps), CURRICULUM[-1][0])


def train(model: LanguageModel, data: Data, steps: int, compiled: bool) -> None:
    body = torch.compile(model.model, dynamic=False) if compiled else model.model
    optimizers = make_optimizers(model)
    begin = time.monotonic()
    log: dict[str, list[float]] = {}
    tokens = 0

    def make_work(step: int) -> list[list[Batch]]:
        return [data.batches(row_length(step, steps)) for _ in range(THREADS)]

    # One single-threaded worker per core: on a shared machine this beats two threads per matrix product,
    # which wait for each other at every operation. Another one makes the next step's questions meanwhile.
    with ThreadPoolExecutor(THREADS) as pool, ThreadPoolExecutor(1) as ahead:
        upcoming = ahead.submit(make_work, 0)
        for step in range(steps):
            work = upcoming.result()
            upcoming = ahead.submit(make_work, step + 1)
            results = list(pool.map(partial(gradients, model, body), work))
            for parameter, *parts in zip(model.parameters(), *(found for found, _ in results), strict=True):
                parameter.grad = torch.stack(parts).sum(0) / THREADS
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            set_learning_rate(optimizers, learning_rate(step, steps))
            list(pool.map(lambda optimizer: optimizer.step(), optimizers))
            tokens += sum(batch.ids.numel() for batches in work for batch in batches)
            for _, means in results:
                for name, mean in means.items():
                    log.setdefault(name, []).append(mean)
            if (step + 1) % 20 == 0:
                losses = " ".join(f"{name} {sum(v) / len(v):.4f}" for name, v in log.items())
                at = f"{time.monotonic() - begin:.0f} s step {step + 1} of {steps} length {row_length(step, steps)}"
                print(f"{at} {losses}, {tokens / 1e6:.2f} M tokens so far", flush=True)
                log.clear()
            if (step + 1) % REPORT_EVERY == 0:
                report(model, data, 40)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], value: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = value


# --- evaluation and saving ---


def rounded(model: LanguageModel) -> LanguageModel:
    """A copy with exactly the weights that are saved: bfloat16 values, computed on in float32."""
    copy = LanguageModel(model.config)
    copy.load_state_dict({name: value.bfloat16().float() for name, value in model.state_dict().items()})
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
    hidden, _ = model.model(torch.tensor([prompt + answer]))
    hidden = hidden[0, len(prompt) - 1 : -1]
    probabilities = model.logits(hidden).softmax(-1)
    best, chosen = probabilities.max(-1)
    return chosen.tolist() == answer, best.min().item()


@torch.no_grad()
def text_loss(model: LanguageModel, data: Data) -> float:
    ids = torch.tensor(data.validation_ids)
    rows = ids[: len(ids) // 256 * 256].view(-1, 256)
    hidden, _ = model.model(rows)
    logits = model.logits(hidden)[:, :-1]
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
    save_file(checkpoint_tensors(model), out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    special = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    write_json(out / "config.json", {**checkpoint_config(model.config), **special})
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": SPECIAL_TOKENS[3:],
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(out / "tokenizer_config.json", tokenizer_config)
    write_json(out / "generation_config.json", {**special, "do_sample": False, "temperature": 0.0})


def write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="plain English text to learn from")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--moe", action="store_true", help="a mixture of experts instead of a dense model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--compile", action="store_true", help="torch.compile the decoder (needs a C++ compiler)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    text = args.text.read_text()
    model = LanguageModel(moe_config() if args.moe else Config())
    data = Data(train_tokenizer(text, model.config.vocab_size), text, args.seed)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    train(model, data, args.steps, args.compile)
    save(args.out, model, data.tokenizer)
    report(model, data, 300)


if __name__ == "__main__":
    main()
