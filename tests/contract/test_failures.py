"""Nothing kills a run but what the user asked for, and nothing stays behind when something else does."""

import os
import pickle
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch

from lightning_interp import (
    AlertRaised,
    Alerts,
    DeadFilters,
    EmbeddingProjection,
    Influence,
    Interp,
    InterpWarning,
    LearningRateTooHighRule,
    NonFiniteRule,
)
from lightning_interp.callbacks._family import Family
from lightning_interp.callbacks._guarding import HOOKS
from tests.contract.battery import fit_quietly
from tests.contract.factories import CLASSES, WHOLE, often
from tests.contract.hooks import assert_nothing_left, hooks_on
from tests.contract.nets import Capture, Net, loader, pl, quiet_trainer
from tests.reading import event_files, summaries


class OurError(RuntimeError):
    """Stands for any error inside a callback of ours."""


class TheirError(RuntimeError):
    """Stands for any error in the user's code."""


@pytest.fixture
def _signals_kept():
    """Lightning ignores Ctrl-C for good once it has seen one."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def failing(cls, hook, when, **options):
    """A callback whose hook raises, `before` or `after` it has done its own work, each time it is called."""

    def broken(self, trainer, *args, **kwargs):
        if when == "after":
            getattr(super(made, self), hook)(trainer, *args, **kwargs)
        raise OurError(f"in {hook}")

    broken.__name__ = hook
    made = type(f"Broken{cls.__name__}", (cls,), {hook: broken})
    return made(**options)


def hooks_of(cls):
    """The hooks that a class or the base of all callbacks defines; `Family` only passes on, two stand for all."""
    bases = [base for base in cls.__mro__ if base.__module__.startswith("lightning_interp") and base is not Family]
    own = {hook for hook in HOOKS if any(hook in vars(base) for base in bases)}
    return sorted(own | {"on_train_batch_start", "on_validation_batch_end"})


class Watching(pl.Callback):
    """Listed last: counts the batches, and what is on the model between them."""

    def __init__(self):
        self.batches = 0
        self.found = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1
        self.found.append(hooks_on(pl_module))


def train(callbacks, tmp_path, model=None, **options):
    """One run of two epochs; the model, the InterpWarnings and the user's own callback."""
    torch.manual_seed(0)
    model, watching = model or Net(), Watching()
    board = pl.loggers.TensorBoardLogger(tmp_path)
    trainer = quiet_trainer(callbacks=[*callbacks, watching], logger=board, **options)
    said = fit_quietly(trainer, model, loader(), loader(12, seed=1, shuffle=False))
    return model, trainer, said, watching


# ---------------------------------------------------------------------- errors of ours


CASES = [(cls, hook, when) for cls in CLASSES for hook in hooks_of(cls) for when in ("before", "after")]


@pytest.mark.parametrize(("cls", "hook", "when"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_error_in_a_hook_is_reported_once_and_training_goes_on(cls, hook, when, tmp_path):
    """Each hook of each callback in turn, with a healthy neighbour on either side."""
    callback = failing(cls, hook, when)
    healthy = [other for other in often() if not isinstance(callback, type(other))][:1]
    model, trainer, said, watching = train([callback, *healthy], tmp_path, max_epochs=1, limit_train_batches=3)
    reached = hook not in {"on_exception", "on_load_checkpoint", "on_save_checkpoint"}
    assert said == ([_message(type(callback), hook)] if reached else [])
    assert watching.batches == trainer.global_step == 3
    assert watching.found == [{}] * 3  # a callback that rests listens no more
    assert not healthy[0].resting
    assert_nothing_left(model, trainer.optimizers)
    pickle.dumps(model)
    assert summaries(tmp_path)


def _message(cls, hook):
    return (
        f"{cls.__name__} failed in {hook} with OurError: in {hook}. Training goes on without it. "
        'Set on_error="raise" to see where it comes from.'
    )


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_error_with_on_error_raise_is_raised_and_nothing_is_left(cls, tmp_path):
    """For those who want to see it."""
    model = Net()
    with pytest.raises(OurError, match="in on_train_batch_end"):
        train([failing(cls, "on_train_batch_end", "after", on_error="raise"), *often()], tmp_path, model)
    assert_nothing_left(model)
    pickle.dumps(model)


def test_callback_that_failed_works_again_in_the_next_fit(tmp_path):
    """A new fit is a new chance."""
    callback = failing(CLASSES[0], "on_train_start", "before")
    assert len(train([callback], tmp_path / "a")[2]) == 1
    assert callback.resting
    del type(callback).on_train_start
    assert train([callback], tmp_path / "b")[2] == []
    assert not callback.resting
    assert callback.dead


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_error_while_reading_activations_is_reported_once(cls, tmp_path, monkeypatch):
    """An error inside the user's forward must not become the user's."""
    from lightning_interp.functional.tracing import ActivationTracer

    def broken(self, name, module, output):
        raise OurError("odd layer")

    monkeypatch.setattr(ActivationTracer, "_begin", broken)
    model, trainer, said, watching = train([cls()], tmp_path)
    assert len(said) == len(set(said)) <= 2  # `Interp` holds two callbacks that read
    assert all("OurError: odd layer" in message for message in said)
    assert watching.batches == 8
    assert_nothing_left(model, trainer.optimizers)


# ---------------------------------------------------------------------- errors of others


class Failing(Net):
    """Raises in mid-forward of one batch."""

    def __init__(self, error, where):
        super().__init__()
        self.error, self.where = error, where
        self.net[4].register_forward_hook(self._maybe)

    def _maybe(self, *args):
        in_batch = self.diary and self.diary[-1][0] == self.where
        if in_batch and sum(entry[0] == self.where for entry in self.diary) == 3:
            raise self.error


ERRORS = [TheirError("their bug"), KeyboardInterrupt(), SystemExit(3)]


@pytest.mark.usefixtures("_signals_kept")
@pytest.mark.parametrize("callbacks", WHOLE.values(), ids=list(WHOLE))
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["train", "val"])
def test_error_in_a_step_of_the_user_leaves_nothing_behind(callbacks, error, where, tmp_path):
    """In the middle of a forward, while everything listens."""
    model = Failing(error, where)
    expected = hooks_on(model)
    with pytest.raises((TheirError, SystemExit)):  # Lightning turns Ctrl-C into SystemExit
        train(callbacks(), tmp_path, model, num_sanity_val_steps=0)
    assert_nothing_left(model, expected=expected)
    assert pickle.loads(pickle.dumps(model.net[0])).weight.equal(model.net[0].weight)
    assert "interp/learning_rate" in {value.tag for event in summaries(tmp_path) for value in event.summary.value}
    with torch.no_grad():
        assert model.net[:4](torch.zeros(1, 1, 8, 8)).shape == (1, 6, 6, 6)


class Rude(pl.Callback):
    """A callback of the user's that raises."""

    def __init__(self, hook, error):
        setattr(self, hook, self._raise)
        self.error = error

    def _raise(self, *args, **kwargs):
        raise self.error


@pytest.mark.usefixtures("_signals_kept")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "hook",
    [
        "setup", "on_fit_start", "on_train_start", "on_train_batch_start", "on_before_backward", "on_after_backward",
        "on_before_optimizer_step", "on_train_batch_end", "on_validation_batch_start", "on_train_epoch_end",
    ],
)  # fmt: skip
def test_error_in_a_callback_of_the_user_leaves_nothing_behind(hook, first, tmp_path):
    """Listed before ours and after."""
    rude, model = Rude(hook, TheirError(hook)), Net()
    with pytest.raises(TheirError, match=hook):
        train([rude, *often()] if first else [*often(), rude], tmp_path, model, num_sanity_val_steps=0)
    assert_nothing_left(model)
    pickle.dumps(model)


def test_trainer_works_again_after_an_exception(tmp_path):
    """The same callbacks in a new fit."""
    callbacks = often()
    with pytest.raises(TheirError):
        train(callbacks, tmp_path / "a", Failing(TheirError(), "train"))
    model, _, said, watching = train(callbacks, tmp_path / "b")
    assert said == []
    assert watching.batches == 8
    assert_nothing_left(model)


def test_alert_with_on_alert_raise_is_raised_and_nothing_is_left(tmp_path):
    """The user asked for it."""

    class Diverges(Net):
        def loss(self, batch):
            return super().loss(batch) * float("nan")

    model = Diverges()
    with pytest.raises(AlertRaised, match="non_finite"):
        train([Alerts(on_alert="raise")], tmp_path, model, max_epochs=10)
    assert_nothing_left(model)


# ---------------------------------------------------------------------- loggers and disks


class FullDisk(Capture):
    """A logger that can't write any more after a while; it keeps what is the user's."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def log_metrics(self, metrics, step=None):
        if any(key.startswith("interp") for key in metrics):
            self.after -= 1
            if self.after < 0:
                raise OSError(28, "No space left on device")
        super().log_metrics(metrics, step)


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("name", WHOLE)
def test_full_disk_is_said_once_per_callback_and_training_goes_on(name, after, tmp_path):
    """Every callback that wanted to write rests; the user's own metrics are not touched."""
    model, watching, logger = Net(), Watching(), FullDisk(after)
    callbacks = WHOLE[name]()
    for callback in callbacks:
        for each in [callback, *getattr(callback, "children", [])]:
            each.on_error = "warn"
    trainer = quiet_trainer(callbacks=[*callbacks, watching], logger=logger)
    said = fit_quietly(trainer, model, loader(), loader(12, seed=1, shuffle=False))
    assert watching.batches == 8
    assert said
    assert len(said) == len(set(said))
    assert all("No space left on device" in message and "Training goes on" in message for message in said)
    assert len(logger.of_the_user()) == 12
    assert_nothing_left(model, trainer.optimizers)


class InFolder(Capture):
    """A logger with a folder, which is needed for each picture."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    @property
    def save_dir(self):
        return str(self.folder)

    def log_image(self, key, images, step=None):
        (self.folder / "picture").write_bytes(images[0].tobytes())


def test_log_folder_deleted_in_mid_training_does_not_kill_the_run(tmp_path):
    """Somebody tidies up: what needs the folder is reported, and the numbers go on."""

    class Tidy(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                shutil.rmtree(trainer.log_dir)

    (tmp_path / "run").mkdir()
    model, logger, watching = Net(), InFolder(tmp_path / "run"), Watching()
    trainer = quiet_trainer(callbacks=[Tidy(), Interp(), watching], logger=logger)
    said = fit_quietly(trainer, model, loader(), loader(12, seed=1, shuffle=False))
    assert watching.batches == 8
    assert len(said) == len(set(said))
    assert any("picture" in message for message in said)
    assert max(step for step, _ in logger.of_interp()["interp/dead_filters"]) == 7
    assert_nothing_left(model)


def test_log_folder_that_is_a_file_is_said_and_training_goes_on(tmp_path, monkeypatch):
    """`alerts.jsonl` and the step-0 weights can't be written; what the loggers take still goes there."""
    from lightning_interp.callbacks import session

    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    monkeypatch.setattr(session, "log_directory", lambda trainer: str(blocked / "run"))
    model, _, said, watching = train([Interp()], tmp_path / "log")
    assert watching.batches == 8
    assert len(said) == len(set(said))
    assert said
    assert all("blocked" in message for message in said)
    assert event_files(tmp_path / "log")
    assert_nothing_left(model)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["alerts.jsonl", "suspect_labels.csv.part", "projector/snapshots.pb.tmp"])
def test_file_that_fills_the_disk_in_mid_run_is_said_once(name, tmp_path):
    """Each of our own files in turn lies on a full device; what the loggers take still goes there."""
    folder = tmp_path / "lightning_logs" / "version_0"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).symlink_to("/dev/full")
    loud = Alerts(rules=[LearningRateTooHighRule(), NonFiniteRule()])
    board = pl.loggers.TensorBoardLogger(tmp_path, version=0)

    class Diverges(Net):
        def loss(self, batch):
            return super().loss(batch) * (float("nan") if self.global_step > 3 else 1.0)

    watching = Watching()
    embedding, labels = EmbeddingProjection(max_points=9), Influence(num_test=2, num_train=12)
    trainer = quiet_trainer(callbacks=[DeadFilters(), embedding, labels, loud, watching], logger=board)
    said = fit_quietly(trainer, Diverges(), loader(), loader(12, seed=1, shuffle=False))
    assert watching.batches == 8
    about_disk = [message for message in said if "No space left on device" in message]
    assert len(about_disk) == 1
    assert name.split(".")[0].split("/")[0] in about_disk[0]
    assert {alert.rule for alert in loud.history} >= {"non_finite"}
    assert "interp/dead_filters" in {value.tag for event in summaries(tmp_path) for value in event.summary.value}


class Mute(Net):
    """Logs nothing itself, so that all that TensorBoard has to write is ours."""

    def log(self, *args, **kwargs):
        """Leaves the logger alone."""


class Breaks(pl.Callback):
    """Takes the events' place away after the first epoch: their folder, or room on the disk; gives it back for a while.

    Args:
        fault: `deleted` or `full`.
        again: Epoch from which on events can be written as before.
    """

    def __init__(self, fault, again=99):
        self.fault, self.again = fault, again

    def on_train_epoch_start(self, trainer, pl_module):
        for file in event_files(Path(trainer.log_dir).parent):
            kept = Path(trainer.log_dir).parent / f"kept.{file.name}"
            if trainer.current_epoch == 1:
                shutil.move(file, kept)
                if self.fault == "full":
                    file.symlink_to("/dev/full")
            elif trainer.current_epoch == self.again:
                file.unlink()
        while trainer.current_epoch == 1 and self.fault == "deleted" and Path(trainer.log_dir).exists():
            shutil.rmtree(trainer.log_dir, ignore_errors=True)  # TensorBoard's thread may write meanwhile


def fit_on_a_broken_disk(model, callbacks, board):
    """What the fit raised, or None; what was said; how many batches were trained."""
    watching, error = Watching(), None
    trainer = quiet_trainer(max_epochs=4, callbacks=[*callbacks, watching], logger=board, num_sanity_val_steps=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InterpWarning)
        try:
            trainer.fit(model, loader(), loader(12, seed=1, shuffle=False))
        except OSError as problem:
            error = problem
    assert_nothing_left(model, trainer.optimizers)
    return error, [str(w.message) for w in caught if issubclass(w.category, InterpWarning)], watching.batches


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
@pytest.mark.parametrize("fault", ["deleted", "full"])
def test_events_that_cannot_be_written_do_not_end_the_run(fault, tmp_path):
    """With TensorBoard's own writer, whose thread they end: Lightning's last flush must find a live one."""
    board = pl.loggers.TensorBoardLogger(tmp_path)
    error, said, batches = fit_on_a_broken_disk(Mute(), [Breaks(fault), Interp()], board)
    assert error is None
    assert batches == 16
    assert said
    assert len(said) == len(set(said))
    assert all("No such file" in message or "No space left" in message for message in said)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fault", ["deleted", "full"])
def test_events_of_the_user_that_cannot_be_written_end_the_run_as_without_us(fault, tmp_path):
    """Theirs are tried on their own, so that nothing of theirs is lost in silence."""
    without, *_ = fit_on_a_broken_disk(Net(), [Breaks(fault)], pl.loggers.TensorBoardLogger(tmp_path / "without"))
    with_us, *_ = fit_on_a_broken_disk(
        Net(), [Breaks(fault), Interp()], pl.loggers.TensorBoardLogger(tmp_path / "with")
    )
    assert isinstance(without, OSError)
    assert type(with_us) is type(without)
    assert with_us.errno == without.errno


class Late(Mute):
    """Logs one number, in the last epoch."""

    def on_train_epoch_start(self):
        if self.current_epoch == 3:
            self.trainer.logger.log_metrics({"late": 1.0}, step=self.global_step)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_events_of_the_user_are_written_once_there_is_room_again(tmp_path):
    """Ours, that failed in between, do not stand in their way."""
    board = pl.loggers.TensorBoardLogger(tmp_path)
    error, said, _ = fit_on_a_broken_disk(Late(), [Breaks("full", again=2), Interp()], board)
    assert error is None
    assert said
    tags = [value.tag for event in summaries(Path(board.log_dir)) for value in event.summary.value]
    assert "late" in tags


def with_tensorboard_x(folder):
    """A logger of the user's own that writes through tensorboardX."""
    writers = pytest.importorskip("tensorboardX")

    class Board(pl.loggers.TensorBoardLogger):
        @property
        def experiment(self):
            if self._experiment is None:
                self._experiment = writers.SummaryWriter(self.log_dir)
            return self._experiment

    return Board(folder)


class Fills(pl.Callback):
    """Puts a full device in the place of the open event file after the first epoch, and takes it away in the last."""

    def on_train_epoch_start(self, trainer, pl_module):
        events = trainer.logger.experiment.file_writer.event_writer._ev_writer
        number = events._py_recordio_writer._writer.fileno()
        if trainer.current_epoch == 0:
            self.room, self.full = os.dup(number), os.open("/dev/full", os.O_WRONLY)
        elif trainer.current_epoch in {1, 3}:
            os.dup2(self.full if trainer.current_epoch == 1 else self.room, number)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_events_that_tensorboard_x_cannot_write_do_not_end_the_run_nor_hang_it(tmp_path):
    """Its thread dies of a full disk, and whoever has more than ten events for it waits for ever."""
    error, said, batches = fit_on_a_broken_disk(Late(), [Fills(), Interp()], with_tensorboard_x(tmp_path))
    assert error is None
    assert batches == 16
    assert said
    assert len(said) == len(set(said))
    assert all("No space left" in message for message in said)
    values = [(value.tag, event.step) for event in summaries(tmp_path) for value in event.summary.value]
    assert ("late", 12) in values
    assert len(values) == len(set(values))
    assert "interp.dead_filters/00_net.0" in {tag for tag, _ in values}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody can write to")
def test_log_folder_that_is_read_only_is_said_and_training_goes_on():
    """Even for root: a folder of the kernel's."""
    model, logger, watching = Net(), InFolder(Path("/proc/self")), Watching()
    trainer = quiet_trainer(callbacks=[Interp(), watching], logger=logger)
    said = fit_quietly(trainer, model, loader(), loader(12, seed=1, shuffle=False))
    assert watching.batches == 8
    assert len(said) == len(set(said))
    assert any("alerts.jsonl can't be written" in message for message in said)
    assert max(step for step, _ in logger.of_interp()["interp/learning_rate"]) == 7
    assert_nothing_left(model)


def test_warnings_as_errors_are_seen_by_the_user():
    """The class of our warnings is public, so that it can be filtered."""
    assert issubclass(InterpWarning, UserWarning)
