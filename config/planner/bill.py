"""What travels in a lane, over which link: as the layers of stages/ send it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from stagemesh.config.parallel import MIN_DISPATCH_TOKENS, ParallelPlan
from stagemesh.config.planner.costs import Workload
from stagemesh.config.planner.hardware import Link


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """Alike messages of one step."""

    what: str
    link: Link
    count: float
    """Messages in the step."""
    message_bytes: float
    """Of one: the tensor, however it travels."""
    wire_bytes: float
    """That one message puts on the link: of one rank in a collective, of all ranks where they share the link."""
    ranks: int = 1
    """Of the collective; 1 = from one to one."""

    @property
    def total_bytes(self) -> float:
        return self.count * self.message_bytes

    @property
    def seconds(self) -> float:
        wire = self.count * self.wire_bytes
        if self.ranks > 1:
            return self.link.collective_s(wire, self.ranks, self.count)
        return self.link.send_s(wire, self.count)


def stage_transfers(
    work: Workload, plan: ParallelPlan, stage: int, link: Link, tokens: float, samples: float
) -> Iterator[Transfer]:
    """Collectives of a stage in a step of `tokens` tokens, `samples` of which get a successor."""
    ranks, model = plan.tp_size, work.model
    if ranks == 1:
        return
    start, end = plan.layer_ranges[stage]
    moe = model.moe
    num_mixtures = len(moe.layers & frozenset(range(start, end))) if moe else 0
    hidden = tokens * model.hidden_size * work.dtype_bytes
    others = (ranks - 1) / ranks
    # One behind attention, one behind the MLP or the experts; a shared expert's joins that of the experts.
    all_reduces = 2 * (end - start)
    if moe and plan.expert_parallel and num_mixtures and tokens >= MIN_DISPATCH_TOKENS:
        all_reduces -= 0 if moe.shared_intermediate_size else num_mixtures
        yield from _dispatch(link, ranks, num_mixtures, hidden, moe.top_k)
    reduce = Transfer(
        what="TP all-reduce",
        link=link,
        count=all_reduces,
        message_bytes=hidden,
        wire_bytes=2 * hidden * others,
        ranks=ranks,
    )
    yield reduce
    if stage == 0:
        yield replace(reduce, what="TP all-reduce of the embedding", count=1)
    if stage == plan.pp_size - 1:
        logits = samples * model.vocab_size * work.dtype_bytes
        yield Transfer(
            what="TP gather of the logits",
            link=link,
            count=1,
            message_bytes=logits,
            wire_bytes=logits * others,
            ranks=ranks,
        )


def _dispatch(link: Link, ranks: int, num_mixtures: int, hidden: float, top_k: int) -> Iterator[Transfer]:
    """hidden: bytes of the step's activations. Each rank has a share of the tokens, and experts of its own."""
    others = (ranks - 1) / ranks
    # A copy of a token for each of its experts, there and back; then the shares are joined.
    sent = hidden * top_k / ranks
    for what, count, message in (("EP all-to-all", 2, sent), ("EP all-gather", 1, hidden)):
        yield Transfer(
            what=what,
            link=link,
            count=count * num_mixtures,
            message_bytes=message,
            wire_bytes=message * others,
            ranks=ranks,
        )


def boundary_transfer(work: Workload, plan: ParallelPlan, link: Link, tokens: float, *, is_inter: bool) -> Transfer:
    """From a stage to the next: each rank sends all activations to its twin, over its own link inside a machine."""
    hidden = tokens * work.model.hidden_size * work.dtype_bytes
    copies = plan.tp_size if is_inter else 1
    return Transfer(what="PP activations", link=link, count=1, message_bytes=hidden, wire_bytes=copies * hidden)


def lane_bill(
    work: Workload,
    plan: ParallelPlan,
    link: Link,
    boundaries: Iterable[tuple[Link, bool]],
    tokens: float,
    samples: float,
) -> list[Transfer]:
    """All stages together, alike transfers joined. boundaries: link and is_inter, between stages."""
    transfers = [t for stage in range(plan.pp_size) for t in stage_transfers(work, plan, stage, link, tokens, samples)]
    transfers += [boundary_transfer(work, plan, over, tokens, is_inter=is_inter) for over, is_inter in boundaries]
    joined: dict[tuple[str, str], Transfer] = {}
    for transfer in transfers:
        key = (transfer.what, transfer.link.name)
        before = joined.get(key)
        joined[key] = replace(transfer, count=transfer.count + (before.count if before else 0))
    return list(joined.values())
