from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from stagemesh.deployments.lane.mailbox import Mailbox

HIDDEN = np.arange(4, dtype=np.uint8)


@pytest.fixture
def mailbox() -> Mailbox:
    mailbox = Mailbox()
    mailbox.open(1)
    return mailbox


def test_activations_are_taken_by_step_in_whatever_order_they_come(mailbox: Mailbox) -> None:
    mailbox.put(1, 2, HIDDEN + 2)
    threading.Timer(0.05, mailbox.put, (1, 1, HIDDEN + 1)).start()
    assert mailbox.take(1, 1, timeout_s=5)[0] == 1
    assert mailbox.take(1, 2, timeout_s=5)[0] == 2


def test_what_comes_from_an_older_epoch_is_dropped(mailbox: Mailbox) -> None:
    mailbox.put(1, 1, HIDDEN)
    mailbox.open(2)
    mailbox.put(1, 1, HIDDEN)
    with pytest.raises(TimeoutError, match="no activations for step 1"):
        mailbox.take(2, 1, timeout_s=0.05)


def test_a_reader_of_an_older_epoch_never_gets_what_a_later_one_brought(mailbox: Mailbox) -> None:
    mailbox.open(2)
    mailbox.put(2, 1, HIDDEN)
    with pytest.raises(RuntimeError, match="epoch 1 is over"):
        mailbox.take(1, 1, timeout_s=0.05)


def test_the_end_of_an_epoch_wakes_its_reader_at_once(mailbox: Mailbox) -> None:
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(mailbox.take, 1, 1, 10.0)
        time.sleep(0.05)
        started = time.monotonic()
        mailbox.end(1)
        with pytest.raises(RuntimeError, match="epoch 1 is over"):
            reading.result()
    assert time.monotonic() - started < 5


def test_a_late_end_of_an_older_epoch_changes_nothing(mailbox: Mailbox) -> None:
    mailbox.open(2)
    mailbox.put(2, 1, HIDDEN)
    mailbox.end(1)
    assert mailbox.take(2, 1, timeout_s=5) is not None
