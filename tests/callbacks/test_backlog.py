"""Measured values on their way to the host."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.callbacks._backlog import Backlog


@given(st.lists(st.sampled_from(["add", "send", "take_sent", "take", "resolve", "save"])))
def test_every_item_is_taken_once_in_order_with_its_values(moves):
    """Whatever was sent, fetched or saved in between."""
    backlog, added, taken, sent = Backlog(), 0, [], 0
    for move in [*moves, "take"]:
        if move == "add":
            backlog.add(
                "loss", added, {"loss": torch.tensor(float(added)), "two": torch.tensor([1.0, added])}, note=added
            )
            added += 1
        elif move == "send":
            backlog.send()
            sent = added
            assert backlog.sent
        elif move == "resolve":
            backlog.resolve()
            sent = len(taken)
        elif move == "save":
            again = Backlog()
            again.load_state_dict(backlog.state_dict())
            assert len(again) == len(backlog) == added - len(taken)
            backlog, sent = again, len(taken)
        else:
            taken += backlog.take_sent() if move == "take_sent" else backlog.take()
            assert len(taken) == (sent if move == "take_sent" else added)
            sent = len(taken)
            assert not backlog.sent
    assert [(item.step, item.values, item.notes) for item in taken] == [
        (i, {"loss": [float(i)], "two": [1.0, float(i)]}, {"note": i}) for i in range(added)
    ]
