"""Film strips."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_interp.render.strip import MAX_FRAMES, FilmStrip, step_label


def frame(step, size=(3, 4)):
    """A picture that tells its step."""
    return np.full((*size, 3), step % 251, dtype=np.uint8)


@pytest.mark.parametrize("stride", [1, 7, 100])
def test_strip_many_pushes_is_bounded_and_even_in_log_time(stride):
    """10,000 pictures: 16 are kept, the first and the last among them, none far from an even spacing."""
    strip = FilmStrip()
    last = 9_999 * stride
    for count, step in enumerate(range(0, last + 1, stride), start=1):
        strip.push(step, frame(step))
        assert len(strip.steps) == min(count, MAX_FRAMES)
        assert (strip.steps[0], strip.steps[-1]) == (0, step)
    times = np.log1p(strip.steps)
    gaps, even = np.diff(times), (times[-1] - times[0]) / (MAX_FRAMES - 1)
    # Between the first two pushed steps there is nothing to keep.
    first = np.log1p(stride)
    assert gaps.max() <= max(2.1 * even, first)
    assert gaps[1:].max() <= 2.1 * even
    assert np.sort(gaps)[1:].min() >= (times[-1] - first) / (MAX_FRAMES - 2) / 3  # the newest may just have come
    for step, picture in strip.frames():
        assert (picture == frame(step)).all()


@settings(max_examples=50, deadline=None)
@given(steps=st.lists(st.integers(0, 10**7), min_size=1, max_size=80, unique=True), limit=st.integers(3, 20))
def test_strip_any_ascending_steps_keeps_first_and_last(steps, limit):
    """And never drops one while there is room."""
    steps = sorted(steps)
    strip = FilmStrip(limit)
    for step in steps:
        strip.push(step, frame(step))
    assert len(strip.steps) == min(limit, len(steps))
    assert (strip.steps[0], strip.steps[-1]) == (steps[0], steps[-1])
    assert set(strip.steps) <= set(steps)
    assert strip.steps == sorted(strip.steps)


def test_strip_later_pictures_go_when_a_run_is_resumed_earlier():
    """What is drawn again takes their place."""
    strip = FilmStrip()
    for step in (0, 10, 20, 30):
        strip.push(step, frame(step))
    strip.push(20, frame(99))
    assert strip.steps == [0, 10, 20]
    assert (strip.frames()[-1][1] == 99).all()


def test_strip_keeps_a_copy():
    """The caller may draw into its array again."""
    strip, picture = FilmStrip(), frame(5)
    strip.push(0, picture)
    picture[:] = 0
    assert (strip.frames()[0][1] == 5).all()


@pytest.mark.parametrize("count", [0, 1, 16])
def test_strip_state_survives_a_checkpoint(count):
    """Through torch's safe loader."""
    strip, other = FilmStrip(), FilmStrip()
    for step in range(count):
        strip.push(step, frame(step))
    buffer = io.BytesIO()
    torch.save(strip.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.steps == strip.steps
    for (_, a), (_, b) in zip(strip.frames(), other.frames(), strict=True):
        assert (a == b).all()
    other.push(count, frame(count))
    assert other.steps[-1] == count


def test_strip_picture_holds_every_frame_with_its_label():
    """The frames are there pixel by pixel, under labels that differ."""
    strip = FilmStrip()
    for step in (0, 3, 12):
        strip.push(step, frame(100 + step, (30, 40)))
    picture = strip.picture()
    places = [np.argwhere((picture == 100 + step).all(axis=-1)) for step in (0, 3, 12)]
    labels = []
    for found in places:
        top, left = found.min(axis=0)
        assert (found.max(axis=0) - found.min(axis=0) + 1).tolist() == [30, 40]
        labels.append((picture[top - 6 : top - 1, left : left + 12].max(axis=-1) > 200).astype(int))
    assert labels[0][:, :3].tolist() == [[1, 1, 1], [1, 0, 1], [1, 0, 1], [1, 0, 1], [1, 1, 1]]
    assert labels[1][:, :3].tolist() == [[1, 1, 1], [0, 0, 1], [1, 1, 1], [0, 0, 1], [1, 1, 1]]
    assert labels[2][:, 4:7].tolist() == [[1, 1, 1], [0, 0, 1], [1, 1, 1], [1, 0, 0], [1, 1, 1]]


def test_strip_narrow_frames_are_widened_for_the_label():
    """A label is never cut."""
    strip = FilmStrip()
    strip.push(99_999, frame(1, (2, 2)))
    assert strip.picture().shape[1] >= 20


@pytest.mark.parametrize(
    ("step", "label"),
    [(0, "0"), (9_999, "9999"), (10_000, "10k"), (12_399, "12.3k"), (99_999, "99.9k"), (100_000, "100k"),
     (999_999, "999k"), (1_000_000, "1M"), (3_450_000, "3.4M"), (250_000_000, "250M")],
)  # fmt: skip
def test_step_label_is_short_and_never_says_more_than_was_done(step, label):
    """Cut, not rounded."""
    assert step_label(step) == label


def test_strip_wrong_arguments_are_refused():
    """Each says what was expected."""
    strip = FilmStrip()
    with pytest.raises(ValueError, match="at least 3, but got 2"):
        FilmStrip(2)
    with pytest.raises(ValueError, match="without pictures"):
        strip.picture()
    with pytest.raises(ValueError, match="`step` to be at least 0, but got -1"):
        strip.push(-1, frame(0))
    with pytest.raises(ValueError, match=r"shape \(H, W, 3\), but got \(3, 4\)"):
        strip.push(0, np.zeros((3, 4), np.uint8))


def test_strip_picture_of_another_size_begins_anew():
    """The network has got another shape since, or the run was resumed with other options; also from a checkpoint."""
    strip, other = FilmStrip(), FilmStrip()
    for step in (0, 10):
        strip.push(step, frame(step))
    other.load_state_dict(strip.state_dict())
    for each in (strip, other):
        each.push(20, frame(20, (5, 4)))
        each.push(30, frame(30, (5, 4)))
        assert each.steps == [20, 30]
