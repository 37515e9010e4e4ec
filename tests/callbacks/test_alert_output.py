"""How alerts are written: text, file, notifications, timetable."""

import json
import logging
import queue
import sys
import threading
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown import markdown

from lightning_interp.alert_log import read_alerts
from lightning_interp.callbacks._alert_file import AlertFile
from lightning_interp.callbacks._alert_outlets import Outlets
from lightning_interp.callbacks._alert_text import digest, log_lines, table
from lightning_interp.callbacks._alert_times import Timetable
from lightning_interp.callbacks._notify import WAITING, Notifier, check_urls
from lightning_interp.errors import ArgumentError
from lightning_interp.rules import Alert


def alert(layer="conv1", severity="warning", status="raised", rule="dead_filters", step=7, **more):
    return Alert(rule=rule, severity=severity, layer=layer, status=status, step=step, message="Half are dead.", **more)


def test_a_line_names_all_that_matters():
    line = log_lines([alert(cause="learning rate", advice="Divide it by 10.")])
    assert line == [
        (
            logging.WARNING,
            "Alert dead_filters (warning, conv1, step 7): Half are dead. Likely cause: learning rate. Divide it by 10.",
        )
    ]


def test_information_and_what_is_cleared_is_not_a_warning():
    lines = log_lines([alert(severity="info"), alert(status="cleared"), alert(layer=None, status="cleared", rule="x")])
    assert [level for level, _ in lines] == [logging.INFO] * 3
    assert [line for _, line in lines[1:]] == [
        "Alert dead_filters cleared (conv1, step 7).",
        "Alert x cleared (step 7).",
    ]


def test_many_of_a_kind_share_a_line():
    (level, line), *rest = log_lines([alert(layer=f"conv{i}") for i in range(20)] + [alert(rule="other")])
    assert level == logging.WARNING
    assert "20 layers" in line
    assert "conv7 and 12 more" in line
    assert len(rest) == 1


def cells(text):
    """The table as TensorBoard's Markdown renders it."""
    html = markdown(text, extensions=["tables"])
    return [row.count("<td>") for row in html.split("<tr>")[2:]], html


def test_the_table_keeps_its_columns_whatever_a_layer_is_called():
    columns, html = cells(table([alert(layer="a|b`c\n*d* [x](y)"), alert()]))
    assert columns == [3, 3]
    assert "a|b`c *d* [x](y)" in html


@given(st.text(min_size=1).filter(str.strip))
def test_no_name_breaks_the_table(name):
    columns, _ = cells("Before." + "\n" + table([alert(layer=name)]))
    assert columns == [3]


def test_the_digest_has_the_active_ones_first_and_is_bounded():
    old = [alert(layer=f"old{i}", status="cleared", step=i) for i in range(100)]
    active = [alert(layer="up1", step=3), alert(layer="up2", step=90)]
    rows = digest(active, [*old[:50], *active, *old[50:]]).splitlines()[3:]
    assert len(rows) == 50
    expected = ["up2, step 90, active", "up1, step 3, active", "old99, step 99, cleared"]
    assert [words in row for words, row in zip(expected, rows, strict=False)] == [True] * 3


def test_the_file_is_strict_json_and_begins_with_what_is_known(tmp_path):
    file = AlertFile(str(tmp_path / "run"), [alert(step=1)])
    file.append([alert(step=2), alert(step=3)])
    lines = (tmp_path / "run" / "alerts.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["step"] for line in lines] == [1, 2, 3]
    (log,) = read_alerts(tmp_path)
    assert ([a.step for a in log.alerts], log.unreadable) == ([1, 2, 3], 0)
    AlertFile(str(tmp_path / "run"))
    assert (tmp_path / "run" / "alerts.jsonl").read_text(encoding="utf-8") == ""


def test_a_file_that_cannot_be_written_is_reported_and_the_log_goes_on(tmp_path, caplog):
    (tmp_path / "run").write_text("a file in the way")
    reports = []
    outlets = Outlets(str(tmp_path / "run"), [], [], reports.append)
    with caplog.at_level(logging.INFO, logger="lightning_interp"):
        outlets.tell([alert()])
    assert len(reports) == 1
    assert "alerts.jsonl can't be written" in reports[0]
    assert "dead_filters" in caplog.text


def test_a_file_that_vanishes_is_reported_once(tmp_path):
    reports = []
    outlets = Outlets(str(tmp_path), [], [], reports.append)
    (tmp_path / "alerts.jsonl").unlink()
    (tmp_path / "alerts.jsonl").mkdir()
    outlets.tell([alert()])
    outlets.tell([alert()])
    assert len(reports) == 1


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Outlets(None, [], [], pytest.fail).tell([alert()])
    assert list(tmp_path.iterdir()) == []


class Service:
    """Stands in for the package apprise: keeps what it is told, or fails as it is told."""

    sent: queue.Queue
    answer = True

    def __init__(self):
        self.urls = []

    @staticmethod
    def instantiate(url, suppress_exceptions):
        return url if url.startswith("json://") else None

    def add(self, url):
        self.urls.append(url)

    def notify(self, title, body):
        if isinstance(self.answer, Exception):
            raise self.answer
        if isinstance(self.answer, threading.Event):
            self.answer.wait(10)
        self.sent.put((title, body))
        return self.answer


@pytest.fixture
def service(monkeypatch):
    kind = type("Own", (Service,), {"sent": queue.Queue()})  # a thread of an earlier test may still be sending
    monkeypatch.setitem(sys.modules, "apprise", types.SimpleNamespace(Apprise=kind))
    return kind


def test_messages_are_sent_in_order(service):
    notifier = Notifier(["json://a"])
    notifier.send("one", "1")
    notifier.send("two", "2")
    notifier.close()
    assert [service.sent.get_nowait() for _ in range(2)] == [("one", "1"), ("two", "2")]
    assert notifier.failures() == []


@pytest.mark.parametrize(("answer", "words"), [(False, "refused"), (OSError("no network"), "OSError")])
def test_a_service_that_fails_is_reported(service, monkeypatch, answer, words):
    monkeypatch.setattr(service, "answer", answer)
    reports = []
    outlets = Outlets(None, [], ["json://a"], reports.append)
    outlets.tell([alert(), alert(layer="conv2", severity="info")])
    outlets.close()
    assert len(reports) == 1
    assert words in reports[0]


def test_a_service_that_hangs_keeps_nobody_waiting(service, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(service, "answer", release)
    notifier = Notifier(["json://a"])
    for i in range(WAITING + 5):
        notifier.send(str(i), "")
    notifier.close(timeout=0.1)
    assert any("dropped" in failure for failure in notifier.failures())
    release.set()
    sent = [service.sent.get(timeout=10)[0] for _ in range(WAITING)]
    assert sent == [str(i) for i in range(WAITING)]


def test_only_what_is_urgent_is_sent(service):
    outlets = Outlets(None, [], ["json://a"], pytest.fail)
    outlets.tell([alert(severity="info"), alert(status="cleared")])
    outlets.tell([alert(severity="critical"), alert(layer="conv2")])
    outlets.close()
    title, body = service.sent.get(timeout=10)
    assert "dead_filters and 1 more at step 7" in title
    assert len(body.splitlines()) == 2
    assert service.sent.empty()


def test_urls_are_checked_at_once_and_not_repeated_in_full(service):
    check_urls(["json://a"])
    with pytest.raises(ArgumentError, match="`notify`") as caught:
        check_urls(["nonsense://user:secret@host"])
    assert "secret" not in str(caught.value)


def test_without_apprise_urls_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "apprise", None)
    check_urls([])
    with pytest.raises(ArgumentError, match=r"lightning-interp\[notify\]"):
        check_urls(["json://a"])


def test_the_timetable_counts_steps_and_not_batches():
    times = Timetable()
    looks = [times.due("on_train_batch_end", batch // 4) for batch in range(4 * 160)]  # four batches a step
    assert [step for step in looks if step is not None] == [20, 60, 100, 150]


def test_the_ends_of_epochs_and_validations_are_always_due():
    times = Timetable()
    assert [times.due(hook, 7) for hook in ("on_validation_end", "on_train_epoch_end", "on_train_end")] == [7, 6, 6]
    assert times.due("on_train_end", 0) == 0
    assert times.due("on_train_batch_start", 20) is None
