"""An answer as a list of items, each text or a tool call, one after the other: what Responses and Messages stream."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import msgspec

from stagemesh.deployments.ingress.errors import ErrorReport
from stagemesh.deployments.ingress.service import GenerationStream
from stagemesh.stages.text.output import OutputProcessor, TextDelta

Events = list[dict[str, Any]]


class Item(msgspec.Struct):
    """Text, or a call of the function `name`."""

    index: int
    text: str = ""
    """Of a call: its arguments, JSON."""
    call_id: str = ""
    name: str | None = None
    is_cut: bool = False
    """Ended by the limit of tokens, or by an error."""


class ItemEvents:
    """Turns TextDeltas into events and keeps the items. Subclasses write the events of one API."""

    def __init__(self, stream: GenerationStream) -> None:
        self.stream = stream
        self.items: list[Item] = []
        self._is_started = False
        self._open: Item | None = None

    @property
    def choice(self) -> OutputProcessor:
        return self.stream.choices[0]

    async def collect(self) -> None:
        """The whole answer into `items`. Cancelling this aborts it."""
        async with aclosing(self.stream.deltas()) as deltas:
            async for delta in deltas:
                self._process(delta)
        self._finish()

    def delta(self, delta: TextDelta) -> bytes:
        return _written(self._process(delta))

    def end(self) -> bytes:
        return _written(self._finish() + self._last())

    def error(self, report: ErrorReport) -> bytes:
        if self._open is not None:
            self._open.is_cut = True
        return _written(self._start() + self._failed(report))

    def _process(self, delta: TextDelta) -> Events:
        events = self._start()
        if delta.text:
            if self._open is None or self._open.name is not None:
                events += self._begin(Item(len(self.items)))
            events += self._add(delta.text)
        for call in delta.tool_calls:
            if call.name is not None:
                events += self._begin(Item(len(self.items), call_id=call.id or "", name=call.name))
            if call.arguments:
                events += self._add(call.arguments)
        return events

    def _start(self) -> Events:
        if self._is_started:
            return []
        self._is_started = True
        return self._first()

    def _finish(self) -> Events:
        """An answer without a word has one empty text."""
        events = self._start()
        if not self.items:
            events += self._begin(Item(0))
        if self._open is not None:
            self._open.is_cut = self.choice.finish_reason == "length"
        return events + self._end_item()

    def _begin(self, item: Item) -> Events:
        events = self._end_item()
        self.items.append(item)
        self._open = item
        return events + self._opened(item)

    def _add(self, text: str) -> Events:
        assert self._open is not None
        self._open.text += text
        return self._added(self._open, text)

    def _end_item(self) -> Events:
        item, self._open = self._open, None
        return [] if item is None else self._closed(item)

    def _first(self) -> Events:
        raise NotImplementedError

    def _opened(self, item: Item) -> Events:
        raise NotImplementedError

    def _added(self, item: Item, text: str) -> Events:
        raise NotImplementedError

    def _closed(self, item: Item) -> Events:
        raise NotImplementedError

    def _last(self) -> Events:
        raise NotImplementedError

    def _failed(self, report: ErrorReport) -> Events:
        raise NotImplementedError


def _written(events: Events) -> bytes:
    return b"".join(
        b"event: %s\ndata: %s\n\n" % (event["type"].encode(), msgspec.json.encode(event)) for event in events
    )
