"""`Alerts`: says, early and with evidence, what is going wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from lightning_interp._options import check_choice, check_strings
from lightning_interp.callbacks._alert_outlets import Outlets
from lightning_interp.callbacks._alert_text import digest, log_lines, table
from lightning_interp.callbacks._alert_times import Timetable, falls_on, quiet
from lightning_interp.callbacks._evaluation_look import EvaluationLook
from lightning_interp.callbacks._family import Family
from lightning_interp.callbacks._lightning import LightningModule, Trainer, planned_steps
from lightning_interp.callbacks._measuring import bring_missing, callbacks_of
from lightning_interp.callbacks._notify import check_urls
from lightning_interp.callbacks._ranks import is_sharded
from lightning_interp.callbacks._run_state import adopt, ended_as_planned, fingerprint
from lightning_interp.callbacks._validation import keep_validation
from lightning_interp.callbacks.base import OnError
from lightning_interp.callbacks.schedule import BatchHooks
from lightning_interp.callbacks.session import Session
from lightning_interp.errors import AlertRaised
from lightning_interp.records import Record, Scalar, Text
from lightning_interp.rules import SEVERITIES, Alert, AlertBook, History, Rule, Severity, default_rules
from lightning_interp.rules.book import check_rules


class Alerts(Family):
    """Reads the measurements of the run and raises alerts: each once, with evidence, likely cause and advice.

    Looks after 20, 60 and 100 training steps, then every 50, at the end of each validation and training epoch, and at
    the end of the training. An alert goes to the log (logger `lightning_interp`), to TensorBoard
    (`interp/alerts_active`, and by severity `interp/alerts_info`, `_warning`, `_critical`; `interp.alerts/log`, a
    table of what is new; `interp.alerts/digest`, a table of the run), to `alerts.jsonl` in the run's folder, and to
    `trainer.callback_metrics` (the four numbers, from the start, so that EarlyStopping can use them).

    What the rules need and no callback of the Trainer measures is measured by callbacks of its own, which write to no
    logger; they are `children`.

    Under DDP rank zero judges, and all ranks stop or raise together; on the other ranks `active` is empty.

    Attributes:
        children: The measuring callbacks that it had to bring.
    """

    provides: ClassVar[tuple[str, ...]] = ("alerts",)

    def __init__(  # noqa: PLR0913 - options, by keyword
        self,
        *,
        rules: Sequence[Rule] | None = None,
        on_alert: Literal["log", "stop", "raise"] = "log",
        min_severity: Severity = "critical",
        mute: Sequence[str] | None = None,
        notify: Sequence[str] | None = None,
        patience: int = 1,
        name: str | None = None,
        on_error: OnError = "warn",
    ) -> None:
        """Checks the options.

        Args:
            rules: What to look for; None takes `lightning_interp.rules.default_rules()`.
            on_alert: What an alert does besides being written: nothing (`"log"`), end the training after the current
                batch (`"stop"`), or raise `AlertRaised` (`"raise"`).
            min_severity: For `"stop"` and `"raise"`: the least severity that does.
            mute: Rules to silence: `rule`, or `rule:glob` for some layers.
            notify: Apprise URLs, to which warnings and critical alerts are sent in the background (needs the package
                apprise). At the end of the training up to 5 seconds are allowed for what is still waiting.
            patience: Looks in a row on which a finding must hold before it is raised, or be gone before it is cleared.
            name: Tells two instances apart, in the tags and in the checkpoint.
            on_error: `"warn"` reports an error, or a rule that fails, once, and training goes on; `"raise"` raises it.

        Raises:
            ArgumentError: If an option is wrong, or `notify` is given and apprise is not installed.
        """
        super().__init__(name=name, on_error=on_error)
        check_choice("on_alert", on_alert, ("log", "stop", "raise"))
        check_choice("min_severity", min_severity, SEVERITIES)
        check_strings("mute", mute)
        check_strings("notify", notify)
        check_urls(list(notify or []))
        self.rules = check_rules(default_rules() if rules is None else rules)
        self.mute = list(mute or [])
        self.patience = patience
        self.on_alert = on_alert
        self.min_severity = min_severity
        self.notify = list(notify or [])
        self._book = AlertBook(self.rules, self.mute, patience)
        self._begin()

    def _begin(self) -> None:
        self._restored: dict[str, Any] | None = None
        self._resumed = False
        self._numbers_seen: History | None = None
        self._outlets: Outlets | None = None
        self._times = Timetable()
        self._evaluation = EvaluationLook()
        self._written_step = -1
        self._seen: object = None
        self._failed_rules: set[str] = set()

    @property
    def active(self) -> list[Alert]:
        """The alerts that are up, oldest first."""
        return self._book.active

    @property
    def history(self) -> list[Alert]:
        """All that was raised and cleared, oldest first; the last 1000."""
        return self._book.history

    # ------------------------------------------------------------------ life

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Brings the measurements that nobody else makes."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._book = AlertBook(self.rules, self.mute, self.patience)
        self._begin()
        self._numbers_seen = Session.of(trainer).history
        needs = {quantity for rule in self.rules for quantity in rule.needs}
        others = [callback for callback in callbacks_of(trainer) if callback is not self]
        brought, sharded = bring_missing(needs, others, on_error=self.on_error), is_sharded(trainer)
        self.children = [child for child in brought if not (sharded and child.works_alone)]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the restored history in place."""
        self._adopt_history(trainer)
        self.publish(trainer, self._numbers())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the file and the numbers."""
        self._adopt_history(trainer)
        session = Session.of(trainer)
        session.history.finished = False
        session.history.note("planned_steps", planned_steps(trainer))
        self.publish(trainer, self._numbers())
        if trainer.is_global_zero:
            self._written_step = self.step_of(trainer)
            going_on = self._written_step > 0 and not self._resumed
            self._outlets = Outlets(session.directory, self.history, self.notify, self.say_once, go_on=going_on)
            if self._written_step == 0:  # after a resume, the counts have been written
                self.write(trainer, self._counts())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks, if it is time."""
        self._look("on_train_batch_end", trainer)

    def own_batch_hooks(self, step: int) -> BatchHooks:
        """Those after which it looks."""
        return BatchHooks(self._batch_hooks) if falls_on(step) else BatchHooks((), more=quiet(step))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Looks, if the last validation loss was high, at the model as it is validated: averaged weights are in it."""
        if batch_idx == dataloader_idx == 0 and trainer.is_global_zero:
            self._evaluation.during(trainer, pl_module, self.notebook(trainer))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the numbers where the callbacks that monitor look for them."""
        self.publish(trainer, self._numbers())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps what the user logged of the validation, and looks."""
        # On all ranks: a metric that Lightning still has to reduce would wait for the others.
        step, notebook = self.step_of(trainer), self.notebook(trainer)
        keep_validation(notebook, trainer, step=step)
        if trainer.is_global_zero:
            self._evaluation.after(trainer, pl_module, notebook, step=step)
        self._look("on_validation_end", trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks."""
        self.publish(trainer, self._numbers())
        self._look("on_train_epoch_end", trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks a last time, knowing that the training is over."""
        Session.of(trainer).history.finished = ended_as_planned(trainer)
        self._look("on_train_end", trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sends what waits."""
        self.release()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets waiting messages go out."""
        self.release()
        super().on_exception(trainer, pl_module, exception)

    def release(self) -> None:
        """Lets waiting messages go out, and ends the thread that sends them."""
        outlets, self._outlets = self._outlets, None
        if outlets is not None:
            outlets.close()

    def while_resting(self, hook: str, trainer: Trainer) -> None:
        """Takes part in the decisions of the other ranks."""
        if self._times.due(hook, self.step_of(trainer)) is not None:
            self._act(trainer, self._agree(trainer, None), None)

    # ------------------------------------------------------------------ looking

    def _look(self, hook: str, trainer: Trainer) -> None:
        step = self._times.due(hook, self.step_of(trainer))
        if step is None:
            return
        worst = None
        try:
            if trainer.is_global_zero:
                worst = self._check(trainer, step, last=hook == "on_train_end")
                self.log_cost(trainer, step=step)
        finally:  # also after an error: the other ranks are waiting
            decision = self._agree(trainer, worst)
        self._act(trainer, decision, worst)

    def _check(self, trainer: Trainer, step: int, *, last: bool) -> Alert | None:
        """Asks the rules if something new was recorded; the worst new alert of `min_severity` or more."""
        history = Session.of(trainer).history
        history.step = max(history.step, step)
        if not last:
            history.epoch = trainer.current_epoch
        seen = fingerprint(history)
        changed = [] if seen == self._seen else self._book.update(history)
        self._seen = seen
        if changed or last:
            self._tell(trainer, changed, step)
        self.publish(trainer, self._numbers())
        self._report_errors()
        raised = [alert for alert in changed if alert.status == "raised"]
        worst = max(raised, key=_rank, default=None)
        return worst if worst is not None and _rank(worst) >= SEVERITIES.index(self.min_severity) else None

    def _report_errors(self) -> None:
        for rule, error in self._book.errors:
            if self.on_error == "raise":
                raise error
            if rule.name not in self._failed_rules:
                self._failed_rules.add(rule.name)
                self.say_once(f"Rule {rule.name!r} failed with {type(error).__name__}: {error}. The other rules go on.")
        if self._outlets is not None:
            self._outlets.check()

    def _agree(self, trainer: Trainer, worst: Alert | None) -> bool:
        """Whether to stop or raise: what rank zero says, on all ranks."""
        self._met = True
        decision = worst is not None and self.on_alert != "log"
        if self.on_alert == "log" or trainer.world_size == 1:
            return decision
        return bool(trainer.strategy.reduce_boolean_decision(decision, all=False))

    def _act(self, trainer: Trainer, decision: bool, worst: Alert | None) -> None:
        if decision and self.on_alert == "stop":
            trainer.should_stop = True
        elif decision:
            self.flush(trainer)  # raising would skip what still waits for the loggers
            raise AlertRaised("An alert was raised on rank zero." if worst is None else log_lines([worst])[0][1])

    # ------------------------------------------------------------------ output

    def _tell(self, trainer: Trainer, changed: list[Alert], step: int) -> None:
        # Several looks can fall on one step, and a tag takes one record a step: the later ones move on by one.
        self._written_step = step = max(step, self._written_step + 1)
        records = self._counts()
        if changed:
            group = f"interp.alerts{'.' + self.name if self.name else ''}"
            summary = digest(self.active, self.history)
            records.append(Text(tag=f"{group}/log", step=step, markdown=table(changed)))
            records.append(Text(tag=f"{group}/digest", step=step, markdown=summary))
            if self._outlets is not None:
                self._outlets.tell(changed)
        self.write(trainer, records)

    def _numbers(self) -> dict[str, float]:
        counts = Counter(alert.severity for alert in self.active)
        numbers = {self.tag(f"alerts_{severity}"): float(counts[severity]) for severity in SEVERITIES}
        return {self.tag("alerts_active"): float(sum(counts.values())), **numbers}

    def _counts(self) -> list[Record]:
        step = self._written_step
        return [Scalar(tag=tag, step=step, value=value, unit="alerts") for tag, value in self._numbers().items()]

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The book, the history that the rules read, and the state of the children."""
        history = self._numbers_seen
        return {
            "book": self._book.state_dict(),
            "children": super().state_dict(),
            "history": None if history is None else history.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing that was raised before is raised again."""
        try:
            self._book.load_state_dict(state_dict["book"])
            self._restored = state_dict["history"]
            self._resumed = True
            super().load_state_dict(state_dict["children"])
        except Exception as error:  # Lightning calls this outside the guarded hooks
            self._rest(error, "load_state_dict")

    def _adopt_history(self, trainer: Trainer) -> None:
        state, self._restored = self._restored, None
        if state is not None:
            adopt(Session.of(trainer).history, state)


def _rank(alert: Alert) -> int:
    return SEVERITIES.index(alert.severity)
