"""`Influence` on real digits of which a tenth has a wrong label: what it shows, against sums made another way."""

from __future__ import annotations

import csv
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from lightning_interp import ArgumentError, InterpWarning
from lightning_interp.callbacks import _influential
from lightning_interp.callbacks.session import Session
from lightning_interp.functional import embed
from lightning_interp.functional.influence import HeadInfluence, perturbation_direction
from lightning_interp.functional.mislabeled import label_votes
from lightning_interp.functional.wrong_labels import wrong_label_share
from lightning_interp.render.color import denormalise
from lightning_interp.render.influence import Influenced, LeftOut, influence_sheet
from lightning_interp.render.perturbation import Perturbed, perturbation_sheet
from lightning_interp.render.suspects import SuspectRow, suspects_sheet
from tests.callbacks.influence_kit import CLASSES, Digits, Net, Recorded, fit, head_losses, loaders, refit
from tests.callbacks.losses_kit import CHATTER
from tests.callbacks.two_ranks import run_two_ranks
from tests.contract.nets import pl

pytestmark = [pytest.mark.filterwarnings(message) for message in CHATTER]
DECAY = 0.01


class Watch(pl.Callback):
    """The votes of the neighbours at each look, by a loop, from `functional.embed`."""

    def __init__(self, dataset, neighbors):
        self.dataset, self.neighbors, self.margins = dataset, neighbors, []

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch in (0, 3, 7):
            rows = F.normalize(embed(pl_module, self.dataset.images).double(), dim=1)
            cosines = rows @ rows.T
            cosines.fill_diagonal_(-2)
            self.margins.append(
                [self.margin(row, int(own)) for row, own in zip(cosines, self.dataset.labels, strict=True)]
            )

    def margin(self, cosines, own):
        votes = torch.bincount(self.dataset.labels[cosines.topk(self.neighbors).indices], minlength=CLASSES)
        others = votes.clone()
        others[own] = 0
        return float(others.max() - votes[own]) / self.neighbors


def rows_of(path):
    """What the csv module reads."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Eight epochs, shuffled, read by two workers; the callback looked at epochs 0, 3 and 7."""
    folder, data = tmp_path_factory.mktemp("run"), Digits()
    train, val = loaders(data, num_workers=2, persistent_workers=True)
    model, callback, watch = Net(), Recorded(num_test=3, every_n_epochs=4, weight_decay=DECAY), Watch(data, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = fit(model, train, val, callback, watch, max_epochs=8, default_root_dir=folder)
    rows = rows_of(Path(trainer.log_dir) / "suspect_labels.csv")
    test = val.dataset
    return SimpleNamespace(
        model=model,
        callback=callback,
        watch=watch,
        data=data,
        rows=rows,
        train=embed(model, data.images),
        test=embed(model, test.images[:3]),
        images=test.images[:3],
        labels=test.labels[:3],
    )


# ---------------------------------------------------------------------- the list of suspects


def test_planted_wrong_labels_come_first_under_their_index(run):
    """By index into the data set, although it was shuffled and read by workers."""
    flips = set(run.data.flips)
    order = [int(row["index"]) for row in run.rows]
    assert sorted(order) == list(range(400))
    assert len(flips & set(order[:16])) >= 14
    assert len(flips & set(order[:40])) >= 31


def test_the_file_holds_the_given_labels_and_mostly_the_true_ones(run):
    """Given: as in the data set, for all. Suggested: what was there before the flip."""
    assert [int(row["given_label"]) for row in run.rows] == [
        int(run.data.labels[int(row["index"])]) for row in run.rows
    ]
    found = [row for row in run.rows[:40] if int(row["index"]) in run.data.flips]
    right = [int(row["suggested_label"]) == int(run.data.true[int(row["index"])]) for row in found]
    assert sum(right) >= 0.85 * len(right)


def test_the_losses_and_the_scores_are_those_of_a_loop(run):
    """Mean loss over the epochs times 1.05 + mean vote margin of three looks, for each sample."""
    losses = [sum(run.model.seen[index]) / 8 for index in range(400)]
    assert [len(run.model.seen[index]) for index in range(400)] == [8] * 400
    means = run.callback._watch.losses.means()
    torch.testing.assert_close(means.losses, torch.tensor(losses, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert len(run.watch.margins) == 3
    margins = [sum(each) / 3 for each in zip(*run.watch.margins, strict=True)]
    expected = {index: losses[index] * (1.05 + margins[index]) for index in range(400)}
    scores = [float(row["score"]) for row in run.rows]
    assert scores == sorted(scores, reverse=True)
    # Neighbours at nearly the same angle may change places between float32 and float64: one vote of one look.
    off = [abs(float(row["score"]) - expected[int(row["index"])]) > 1e-4 for row in run.rows]
    assert sum(off) <= 8


def test_the_table_and_the_picture_show_what_the_file_holds(run):
    """The first fifty, and the first sixteen."""
    lines = run.callback.newest("interp.suspect_labels/table").markdown.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:52]]
    assert [cell[:4] for cell in cells] == [
        [str(rank + 1), row["index"], row["given_label"], row["suggested_label"]]
        for rank, row in enumerate(run.rows[:50])
    ]
    assert lines[-1] == "The first 50 of 400."
    rows = [
        SuspectRow(int(r["index"]), r["given_label"], r["suggested_label"], float(r["score"])) for r in run.rows[:16]
    ]
    seen = denormalise(run.data.images[[row.index for row in rows]].numpy(), None, None)
    picture = run.callback.newest("interp.suspect_labels/images")
    assert (picture.pixels == suspects_sheet(list(seen), rows)).all()


def test_the_share_of_wrong_labels_is_estimated(run):
    """A tenth is wrong; noted for the rule, at the steps of the looks."""
    found = dict(run.callback.numbers("suspect_label_share"))
    assert list(found) == [24, 99, 199]
    votes = label_votes(run.train, run.data.labels, neighbors=20)
    assert found[199] == pytest.approx(wrong_label_share(votes).share, abs=1e-3)
    assert 0.05 < found[199] < 0.2
    assert dict(run.callback.numbers("label_recognition"))[199] > 0.6


# ---------------------------------------------------------------------- influence


@pytest.fixture(scope="module")
def head(run):
    """The weight (C, d + 1) of a head that was fitted another way, and its loss."""
    return refit(run.train, run.data.labels, DECAY)


def influence_rows(run):
    """(test, train, word, label, predicted, actual) as the table has them."""
    rows, test = [], None
    for line in run.callback.newest("interp.influence/table").markdown.splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        test = int(cells[0].split(":")[0]) if cells[0] else test
        index, word = re.fullmatch(r"(\d+) \((\w+)\)", cells[1]).groups()
        rows.append((test, int(index), word, cells[2], float(cells[3]), float(cells[4])))
    assert [row[0] for row in rows] == [0] * 6 + [1] * 6 + [2] * 6
    return rows


def changes_by_hand(run, head):
    """(3, 400): g_test^T H^-1 g_i / n with autograd's Hessian."""
    weight, loss = head

    def gradients(rows, labels):
        points = torch.cat([rows.double(), torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
        residual = torch.softmax(points @ weight.T, dim=1) - F.one_hot(labels, CLASSES)
        return torch.einsum("nc,nd->ncd", residual, points).flatten(1)

    hessian = torch.autograd.functional.hessian(loss, weight.flatten())
    solved = torch.linalg.solve(hessian, gradients(run.test, run.labels).T).T
    return solved @ gradients(run.train, run.data.labels).T / 400


def test_what_is_shown_as_influence_is_that_of_an_independent_head(run, head):
    """On `functional.embed` of the trained model."""
    changes = changes_by_hand(run, head)
    shown = influence_rows(run)
    for test in range(3):
        order = changes[test].argsort(descending=True)
        helpful = [row[1] for row in shown if row[0] == test and row[2] == "helpful"]
        harmful = [row[1] for row in shown if row[0] == test and row[2] == "harmful"]
        assert helpful == order[:3].tolist()
        assert harmful == order[-3:].flip(0).tolist()
    for test, index, _, label, predicted, _ in shown:
        assert predicted == pytest.approx(float(changes[test, index]), rel=6e-3)
        own = int(run.data.labels[index])
        assert label == (str(own) if own == int(run.labels[test]) else f"**{own}**")
    assert run.callback.numbers("influence_gradient_norm")[-1][1] < 1e-8
    scores = run.train.double() @ head[0][:, :-1].T + head[0][:, -1]
    agreed = (run.model.eval()(run.data.images).argmax(1) == scores.argmax(1)).double().mean()
    assert run.callback.numbers("influence_agreement")[-1][1] == pytest.approx(float(agreed))


def test_the_actual_changes_are_those_of_heads_that_were_refitted(run, head):
    """Weight zero for the one that is left out, and a fit from scratch."""
    before = head_losses(head[0], run.test, run.labels)
    for test, index, _, _, _, actual in influence_rows(run)[::4]:
        weights = torch.full((400,), 1 / 400, dtype=torch.float64)
        weights[index] = 0
        after = head_losses(refit(run.train, run.data.labels, DECAY, weights)[0], run.test, run.labels)
        assert actual == pytest.approx(float(after[test] - before[test]), rel=1e-2)


def test_the_pictures_show_these_numbers_and_these_images(run, head):
    """Drawn again from the table, the data set and a gradient through the trained model."""
    rows = influence_rows(run)
    seen = dict(enumerate(denormalise(run.data.images[[row[1] for row in rows]].numpy(), None, None)))
    asked = denormalise(run.images.numpy(), None, None)
    influence = HeadInfluence(run.train, run.data.labels, weight_decay=DECAY, num_classes=CLASSES)
    predicted, losses = influence.on(run.test, run.labels), influence.head.losses(run.test, run.labels)
    actual = influence.leave_one_out(run.test, run.labels, torch.tensor([row[1] for row in rows]))
    classes = influence.head.scores(run.test).argmax(dim=1).tolist()

    def left_out(test, word):
        return [
            LeftOut(
                seen[at],
                row[1],
                str(int(run.data.labels[row[1]])),
                float(predicted[test, row[1]]),
                float(actual[test, at]),
            )
            for at, row in enumerate(rows)
            if row[0] == test and row[2] == word
        ]

    # The sheet stretches all pictures of one kind alike, and so must this.
    tests = [
        Influenced(
            asked[t],
            t,
            str(int(run.labels[t])),
            str(classes[t]),
            float(losses[t]),
            left_out(t, "helpful"),
            left_out(t, "harmful"),
        )
        for t in range(3)
    ]
    assert (run.callback.newest("interp.influence/images").pixels == influence_sheet(tests, 3)).all()
    pairs = []
    for test in range(3):
        index = rows[6 * test][1]
        label, image = int(run.data.labels[index]), run.data.images[index]
        direction = perturbation_direction(
            run.model.eval().net[:8], image, label, influence, run.test[test], int(run.labels[test])
        )
        arrays = [each.numpy() for each in (image, direction, run.images[test])]
        pairs.append(Perturbed(*arrays, index, str(label), test, str(int(run.labels[test]))))
    assert (run.callback.newest("interp.influence/perturbation").pixels == perturbation_sheet(pairs)).all()


class Cut(nn.Module):
    """A stem that no gradient goes through."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.stem = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        if self.kind == "quantised":
            return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8).dequantize()
        with torch.no_grad():
            return self.stem(x)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:torch.ao.quantization is")
@pytest.mark.parametrize("kind", ["no_grad", "quantised", "backbone"])
def test_where_no_gradient_reaches_the_pixels_only_that_picture_is_left_out(kind, tmp_path):
    """Also where the whole network below the head runs under `torch.no_grad()`: its embedding has no gradient."""
    model, callback = Net(), Recorded(num_train=100, every_n_epochs=1)
    model.net = nn.Sequential(Cut(kind), *model.net)
    if kind == "backbone":
        body, head = model.net[:-1], model.net[-1]
        model.forward = lambda images: head(torch.no_grad()(body)(images))
    train, val = loaders(Digits(100))
    with pytest.warns(InterpWarning, match="goes on without `interp.influence/perturbation`") as said:
        fit(model, train, val, callback, max_epochs=2, default_root_dir=tmp_path)
    assert len([each for each in said if issubclass(each.category, InterpWarning)]) == 1
    whole = {"interp.influence/images", "interp.influence/table", "interp.suspect_labels/table"}
    assert whole <= callback.tags()
    assert "interp.influence/perturbation" not in callback.tags()
    assert [step for step, _ in callback.numbers("influence_agreement")] == [6, 13]


# ---------------------------------------------------------------------- heads that are too large


def embedded(rows, labels):
    """Points of a model without scores."""
    nothing = torch.full((len(rows),), -1)
    return _influential.Embedded(rows, labels, nothing, torch.full((len(rows),), torch.nan), None)


def test_fewer_points_than_axes_lose_nothing(monkeypatch):
    """The optimum lies in the span of the training points: the axes of twenty points hold all of fifty features."""
    monkeypatch.setattr(_influential, "MOST_WEIGHTS", 3 * 41)
    torch.manual_seed(0)
    train, labels = torch.randn(20, 50, dtype=torch.float64), torch.arange(20) % 3
    test, asked = torch.randn(4, 50, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    found = _influential.Influential(embedded(train, labels), embedded(test, asked), top_k=4, weight_decay=0.1)
    expected = HeadInfluence(train, labels, weight_decay=0.1)
    assert "20 principal axes of 50 features (100.00% " in found.limit
    shown = [[(e.row, e.predicted, e.actual) for e in each.helpful] for each in found.tests]
    values, order = expected.on(test, asked).sort(dim=1, descending=True)
    actual = expected.leave_one_out(test, asked, torch.arange(20))
    for test_row, effects in enumerate(shown):
        assert [row for row, _, _ in effects] == order[test_row, :4].tolist()
        assert [p for _, p, _ in effects] == pytest.approx(values[test_row, :4].tolist(), rel=1e-6)
        assert [a for _, _, a in effects] == pytest.approx(actual[test_row, order[test_row, :4]].tolist(), rel=1e-6)


@pytest.mark.parametrize("count", [30, 200], ids=["wide", "tall"])
def test_a_large_head_is_fitted_on_the_axes_with_the_largest_squares(monkeypatch, count):
    """Those of a singular value decomposition."""
    monkeypatch.setattr(_influential, "MOST_WEIGHTS", 4 * 11)
    monkeypatch.setattr(_influential, "_LEAST_AXES", 4)
    torch.manual_seed(1)
    train = (torch.randn(count, 40) * torch.arange(1, 41).float().pow(-1)).relu()
    labels = torch.arange(count) % 4
    test, asked = torch.rand(2, 40), torch.tensor([3, 1])
    found = _influential.Influential(embedded(train, labels), embedded(test, asked), top_k=2, weight_decay=0.01)
    _, values, right = torch.linalg.svd(train.double(), full_matrices=False)
    axes = right[:10].T
    expected = HeadInfluence(train.double() @ axes, labels, weight_decay=0.01).on(test.double() @ axes, asked)
    assert found.kept == pytest.approx(float(values[:10].square().sum() / values.square().sum()))
    for test_row, each in enumerate(found.tests):
        assert [effect.predicted for effect in each.helpful] == pytest.approx(
            expected[test_row].sort(descending=True).values[:2].tolist(), rel=1e-6
        )


def test_of_too_many_classes_the_nearest_ones_stay():
    """A thousand classes: those of the test points, and those that lie around them; time and memory stay bounded."""
    torch.manual_seed(2)
    labels = torch.arange(2000) % 1000
    centers = torch.randn(1000, 200)
    centers[7] = centers[3] + 0.1
    train, test = centers[labels] + 0.5 * torch.randn(2000, 200), centers[[3, 999]]
    found = _influential.Influential(
        embedded(train, labels), embedded(test, torch.tensor([3, 999])), top_k=2, weight_decay=0.01
    )
    kept = set(labels[found.train_rows].tolist())
    assert {3, 7, 999} <= kept
    assert (len(kept), found.dropped, found.influence.loss.size) == (75, 925, 75 * 33)
    assert found.limit.startswith("The head was fitted on the 75 classes nearest to the test images of 1000 and on 32 ")
    assert found.tests[1].predicted == 999
    assert {int(labels[effect.row]) for effect in found.tests[1].helpful} == {999}


def test_labels_that_are_no_numbers_from_zero_on_make_no_large_head():
    """Only classes that occur are weights of the head."""
    rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.8]])
    labels = torch.tensor([5_000_000, 5_000_000, 12, 12])
    found = _influential.Influential(embedded(rows, labels), embedded(rows[:1], labels[:1]), top_k=1, weight_decay=0.1)
    expected = HeadInfluence(rows, torch.tensor([1, 1, 0, 0]), weight_decay=0.1).on(rows[:1], torch.tensor([1]))
    assert found.tests[0].predicted == 5_000_000
    assert found.tests[0].helpful[0].predicted == pytest.approx(float(expected.max()))


# ---------------------------------------------------------------------- what can't be shown is said


def said(model, train, val=None, callback=None, **options):
    """The warnings of ours."""
    callback = callback or Recorded(num_train=60, num_test=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, train, val, callback, **({"max_epochs": 1} | options))
    return callback, [str(w.message) for w in caught if issubclass(w.category, InterpWarning)]


class Other(Net):
    """Trains on whatever labels there are."""

    def training_step(self, batch, batch_idx):
        return self(batch if isinstance(batch, torch.Tensor) else batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        pass


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(image, label) for image, label, _ in Digits(40)])


def pairs(labels):
    """A loader of digits with these labels."""
    return DataLoader(TensorDataset(Digits(40).images, labels), batch_size=8, shuffle=True)


def without_threes(samples):
    return default_collate([sample for sample in samples if int(sample[1]) != 3])


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (DataLoader(Stream(), batch_size=8), "those of a stream can't be told apart"),
        (DataLoader(Digits(40).images, batch_size=8), "Influence needs labels, but the batches hold none"),
        (pairs(torch.rand(40)), "needs classes, but got labels like 0."),
        (pairs((torch.rand(40, 10) > 0.5).float()), "several labels an image"),
        (pairs(torch.zeros(40, dtype=torch.int64)), "the training images are all of class 0"),
        (pairs(torch.full((40,), -1)), "the training images: no image has a label that is a class"),
        (pairs(torch.arange(40) + 10), "not among the classes that the model has scores for"),
        (DataLoader(Digits(40), batch_size=8, collate_fn=without_threes), "neither drops nor adds samples"),
    ],
    ids=["stream", "no labels", "regression", "multi-label", "one class", "-1", "beyond", "dropped"],
)
def test_what_can_not_be_read_is_said_once(tmp_path, train, message):
    """Training goes on, and nothing is shown."""
    callback, messages = said(
        Other(), train, callback=Recorded(on_error="warn", every_n_epochs=1), max_epochs=2, default_root_dir=tmp_path
    )
    assert len([each for each in messages if message in each]) == 1
    assert callback.tags() == set()


class Diverges(Net):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            with torch.no_grad():
                self.net[6].weight.fill_(torch.nan)


def test_a_network_that_diverged_is_said_once_and_the_old_list_stays(tmp_path):
    """One warning in three epochs."""
    callback, messages = said(
        Diverges(),
        *loaders(Digits(60)),
        callback=Recorded(every_n_epochs=1, neighbors=2),
        max_epochs=4,
        default_root_dir=tmp_path,
    )
    assert [each for each in messages if "the network has diverged" in each] == messages
    assert len(messages) == 1
    assert len(callback.numbers("suspect_label_share")) == 1


class Compiled(Net):
    def __init__(self):
        super().__init__()
        self.net.compile(backend="eager")


class Halves(Net):
    """Two forwards of the head in a step."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]) + self(-batch[0]), batch[1])


@pytest.mark.parametrize(("model", "reason"), [(Compiled, "is compiled"), (Halves, "more than once")])
def test_without_losses_of_single_samples_the_list_covers_the_points(tmp_path, model, reason):
    """By the losses at the looks, and their own indices."""
    data = Digits(90)
    _, messages = said(
        model(), *loaders(data), callback=Recorded(num_train=30), max_epochs=6, default_root_dir=tmp_path
    )
    assert [reason in each and "covers 30 training images only" in each for each in messages] == [True]
    rows = rows_of(next(tmp_path.rglob("suspect_labels.csv")))
    assert sorted(int(row["index"]) for row in rows) == list(range(0, 90, 3))
    assert all(int(row["given_label"]) == int(data.labels[int(row["index"])]) for row in rows)


def test_a_file_that_can_not_be_written_is_said_and_the_rest_goes_on(tmp_path):
    """A folder stands in its way."""
    (tmp_path / "lightning_logs" / "version_0" / "suspect_labels.csv" / "x").mkdir(parents=True)
    logger = pl.loggers.TensorBoardLogger(tmp_path, version=0)
    callback, messages = said(Net(), *loaders(Digits(60)), logger=logger)
    assert len(messages) == 1
    assert "suspect_labels.csv can't be written" in messages[0]
    assert "interp.influence/images" in callback.tags()


def test_test_images_without_labels_are_said(tmp_path):
    """The list of suspects is there all the same."""
    torch.save(Digits(5).images, tmp_path / "images.pt")
    callback = Recorded(samples=str(tmp_path / "images.pt"), num_train=60)
    _, messages = said(Net(), *loaders(Digits(60)), callback=callback, default_root_dir=tmp_path)
    assert messages == ["Influence has nothing to show of the test images: no image has a label that is a class."]
    assert {tag for tag in callback.tags() if "images" in tag} == {"interp.suspect_labels/images"}


def test_a_wrong_layer_is_refused_in_setup():
    """With what there is."""
    with pytest.raises(ArgumentError, match=r"No layer matches 'net\.88'.*'net\.8'"):
        fit(Net(), *loaders(), Recorded(layer="net.88"), logger=False)


# ---------------------------------------------------------------------- batches, sets and options of all kinds


class AsDict(Digits):
    def __getitem__(self, index):
        image, label, _ = super().__getitem__(index)
        return {"note": str(index), "label": label, "image": image}


class Swapped(Digits):
    def __getitem__(self, index):
        image, label, _ = super().__getitem__(index)
        return label, image


class Grown(Digits):
    """Images of three sizes."""

    def __getitem__(self, index):
        image, label, _ = super().__getitem__(index)
        return F.pad(image, (0, index % 3, 0, index % 2)), label


def padded(samples):
    """All as large as the largest of the batch."""
    high, wide = (max(image.shape[axis] for image, _ in samples) for axis in (1, 2))
    images = [F.pad(image, (0, wide - image.shape[2], 0, high - image.shape[1])) for image, _ in samples]
    return torch.stack(images), torch.stack([label for _, label in samples])


class Reads(Other):
    """With the reader of its own."""

    def __init__(self):
        super().__init__()
        self.net[5] = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())

    def training_step(self, batch, batch_idx):
        images, labels = self.interp_batch(batch)
        return F.cross_entropy(self(images), labels)

    def interp_batch(self, batch):
        if isinstance(batch, dict):
            return batch["image"], batch["label"]
        return (batch[1], batch[0]) if batch[0].ndim == 1 else (batch[0], batch[1])


@pytest.mark.parametrize(
    ("kind", "collate"), [(AsDict, None), (Swapped, None), (Grown, padded)], ids=["dict", "own", "sizes"]
)
def test_batches_of_every_form_are_read(tmp_path, kind, collate):
    """Indices and labels are those of the data set."""
    data, test = kind(50), kind(20, start=500, flipped=False)
    train = DataLoader(data, batch_size=7, shuffle=True, collate_fn=collate)
    val = DataLoader(test, batch_size=4, collate_fn=collate)
    callback, messages = said(Reads(), train, val, callback=Recorded(), default_root_dir=tmp_path)
    assert messages == []
    assert {"interp.influence/perturbation", "interp.suspect_labels/images"} <= callback.tags()
    rows = rows_of(next(tmp_path.rglob("suspect_labels.csv")))
    assert sorted(int(row["index"]) for row in rows) == list(range(50))
    assert all(int(row["given_label"]) == int(data.labels[int(row["index"])]) for row in rows)


class Rebuilds(Net):
    """An autoencoder: the labels lie beside, and are right or wrong for all it knows."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 1, 3, padding=1))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[0])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.mse_loss(self(batch[0]), batch[0]))


@pytest.mark.parametrize(("model", "judged"), [(Rebuilds, False), (Net, True)])
def test_rules_judge_labels_only_of_a_model_with_scores(tmp_path, model, judged):
    """The numbers and the list are there in any case."""
    train, val = loaders(Digits(200))
    callback = Recorded()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InterpWarning)  # the losses of an autoencoder can't be followed
        trainer = fit(model(), train, val, callback, max_epochs=1, default_root_dir=tmp_path)
    assert callback.numbers("label_recognition")
    assert next(tmp_path.rglob("suspect_labels.csv")).exists()
    assert bool(Session.find(trainer).history.finite("label_recognition")) == judged


@pytest.mark.parametrize("count", [2, 5])
def test_tiny_training_sets_give_a_result(tmp_path, count):
    """More test images and neighbours asked for than there are."""
    callback, messages = said(
        Net(), *loaders(Digits(count)), callback=Recorded(num_test=99, top_k=9), default_root_dir=tmp_path
    )
    assert messages == []
    table = callback.newest("interp.influence/table").markdown
    assert "59: label" in table
    assert len(table.splitlines()) <= 2 + 60 * count
    assert "interp.suspect_labels/table" in callback.tags()


def test_two_instances_keep_apart(tmp_path):
    """Tags, files, and one history."""
    first, second = Recorded(num_train=40, name="few"), Recorded()
    fit(Net(), *loaders(Digits(60)), first, second, max_epochs=1, default_root_dir=tmp_path)
    assert {path.name for path in tmp_path.rglob("*.csv")} == {"suspect_labels.csv", "suspect_labels.few.csv"}
    assert "interp.influence.few/images" in first.tags()
    assert "interp.influence/images" in second.tags()
    assert not first.tags() & second.tags()


class Peek(pl.Callback):
    """What the history of the run holds at the end."""

    def on_train_end(self, trainer, pl_module):
        history = Session.of(trainer).history
        self.points = {name: history.get(name) for name in ("suspect_label_share", "label_recognition")}
        self.facts = {name: history.fact(name, -1) for name in ("train_samples", "label_anchors")}


def test_a_quiet_one_only_notes_what_the_rule_reads(tmp_path):
    """Two numbers and two facts, in the history and nowhere else."""
    callback, peek = Recorded(neighbors=5), Peek()
    callback.quiet = True
    fit(Net(), *loaders(Digits(100)), callback, peek, max_epochs=1, default_root_dir=tmp_path)
    assert [len(series.points) for series in peek.points.values()] == [1, 1]
    assert peek.facts["train_samples"] == 100
    assert peek.facts["label_anchors"] >= 50
    assert not list(tmp_path.rglob("*.csv"))


def test_two_fits_in_a_row_begin_anew(tmp_path):
    """The second with other data."""
    callback = Recorded()
    fit(Net(), *loaders(Digits(100)), callback, max_epochs=1, default_root_dir=tmp_path)
    fit(Net(), *loaders(Digits(60)), callback, max_epochs=2, default_root_dir=tmp_path)
    assert callback._watch.losses.means().counts.tolist() == [2] * 60


class Repeats(Net):
    """An optimizer that calls the step several times for each batch."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.05, max_iter=3)


def test_a_step_that_is_repeated_counts_once(tmp_path):
    """The first forward of each batch, and no complaint."""
    data, model = Digits(60), Repeats()
    callback, messages = said(model, *loaders(data), callback=Recorded(), max_epochs=2, default_root_dir=tmp_path)
    assert messages == []
    means = callback._watch.losses.means()
    assert means.counts.tolist() == [2] * 60
    assert all(len(losses) > 2 for losses in model.seen.values())


class Stops(pl.Callback):
    def __init__(self, error):
        self.error = error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_a_run_that_is_cut_short_leaves_nothing_behind(tmp_path, error):
    """On the model, on the sampler, on the strategy."""
    model, (train, val) = Net(), loaders(Digits(100))
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, callbacks=[Recorded(), Stops(error)], default_root_dir=tmp_path, max_epochs=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises((RuntimeError, SystemExit)):
        trainer.fit(model, train, val)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert type(train.batch_sampler) is torch.utils.data.BatchSampler
    assert "process_dataloader" not in vars(trainer.strategy)


# ---------------------------------------------------------------------- resume and ranks


class Keeps(pl.Callback):
    """Saves at a moment of an epoch, before or after what the callback before it did then."""

    def __init__(self, path, hook, epoch):
        self.path, self.epoch = path, epoch
        setattr(self, hook, self._save)

    def _save(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_end"])
def test_a_resume_at_the_end_of_an_epoch_gives_the_numbers_of_the_uninterrupted_run(tmp_path, hook):
    """Tables, file and numbers; nothing is counted twice."""
    path, options = tmp_path / "a.ckpt", {"max_epochs": 4}
    first = Recorded(every_n_epochs=2, neighbors=5)
    train, val = loaders(Digits(100), shuffle=False)
    fit(Net(), train, val, first, Keeps(path, hook, 1), default_root_dir=tmp_path / "first", **options)
    second = Recorded(every_n_epochs=2, neighbors=5)
    fit(Net(), train, val, second, ckpt_path=path, default_root_dir=tmp_path / "second", **options)
    for tag in ("interp.suspect_labels/table", "interp.influence/table"):
        assert first.newest(tag).markdown == second.newest(tag).markdown
        assert first.newest(tag).step == second.newest(tag).step == 27
    assert second._watch.losses.means().counts.tolist() == [4] * 100
    assert second._watch._sums[2].max() == 3
    # Weights that were loaded lie elsewhere in memory, where a processor may round its sums in another order.
    torch.testing.assert_close(second._watch._sums, first._watch._sums, rtol=1e-6, atol=1e-6)
    files = [next((tmp_path / name).rglob("*.csv")).read_text(encoding="utf-8") for name in ("first", "second")]
    assert files[0] == files[1]
    for quantity in ("suspect_label_share", "label_recognition", "influence_agreement"):
        assert first.numbers(quantity)[-1] == second.numbers(quantity)[-1]
    torch.load(path, weights_only=True)


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    """The network stands still, so that one process sees the same; an odd number of images, and fewer than ranks."""
    two, other = run_two_ranks("ddp_influence.py", tmp_path)
    for name, count in (("many", 61), ("two", 2)):
        alone = Recorded(num_train=40, num_test=1)
        train, _ = loaders(Digits(count), batch_size=8)
        fit(Net(lr=0.0), train, loaders()[1], alone, max_epochs=2, default_root_dir=tmp_path / name)
        assert two[name]["influence"] == alone.newest("interp.influence/table").markdown
        assert two[name]["suspects"] == alone.newest("interp.suspect_labels/table").markdown
        assert two[name]["shares"] == [value for _, value in alone.numbers("suspect_label_share")]
        assert sum(two[name]["counts"]) == 2 * (count + count % 2)
        assert other[name]["counts"] == two[name]["counts"]
        assert (other[name]["tags"], other[name]["resting"], two[name]["resting"]) == ([], False, False)
    assert two["seldom"] == other["seldom"] == [20, 40, 60]
    for found in (two["fails"], other["fails"]):
        assert found == {"resting": True, "epochs": 3}
