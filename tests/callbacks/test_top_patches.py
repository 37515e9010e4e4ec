"""The callback that shows what excites filters."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from lightning_interp.callbacks._excited import Excited, turnover_of
from lightning_interp.callbacks.top_patches import TopPatches
from lightning_interp.errors import ArgumentError
from lightning_interp.functional.patches import project_patches, rank_patches
from tests.callbacks.two_ranks import run_two_ranks
from tests.contract.battery import assert_undisturbed, fit_quietly
from tests.contract.conftest import _without_chatter  # noqa: F401 - a fixture
from tests.contract.hooks import assert_nothing_left
from tests.contract.nets import Images, Net, Stream, loader, pl, quiet_trainer
from tests.contract.recipes import Recipe, TwoOptimizers
from tests.reading import read

LAYERS = ["00_net.0", "01_net.3", "02_net.8"]


class Plain(Net):
    """Validates on the images as they are, so that what was seen can be seen again."""

    def __init__(self, rate=0.05):
        super().__init__(make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate))

    def loss(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


class Exact(TopPatches):
    """Remembers the rankings and the images that were shown."""

    def _show(self, trainer, pl_module, rankings, excited, *, step):
        self.kept = (rankings, {name: value.clone() for name, value in pl_module.state_dict().items()})
        self.fetched = {}
        super()._show(trainer, pl_module, rankings, excited, step=step)

    def _fetch(self, *args):
        found = super()._fetch(*args)
        self.fetched.update(found)
        return found


def fit(callbacks, folder, model=None, validation=None, *, ckpt_path=None, **options):
    torch.manual_seed(0)
    model = model or Plain()
    board = pl.loggers.TensorBoardLogger(folder)
    trainer = quiet_trainer(callbacks=callbacks, logger=board, **options)
    validation = loader(14, seed=1, shuffle=False, noise=0.0, batch=5) if validation is None else validation
    said = fit_quietly(trainer, model, loader(noise=0.0), validation, ckpt_path=ckpt_path)
    board.finalize("success")
    return trainer, model, said


def test_logs_what_it_says_and_nothing_else(tmp_path):
    """A picture, a strip and a number a layer."""
    trainer, model, said = fit([TopPatches(on_error="raise")], tmp_path, max_epochs=3)
    log = read(tmp_path, "slow")
    assert said == []
    assert set(log.images) == {f"interp.top_patches{kind}/{layer}" for kind in ("", "_strip") for layer in LAYERS}
    ours = {tag for tag in log.scalars if tag.startswith("interp") and "cost" not in tag}
    assert ours == {f"interp.top_patches_turnover/{layer}" for layer in LAYERS}
    for tag in ours:
        assert len(log.values(tag)) == 2  # there is nothing to compare the first time with
        assert all(0 <= value <= 1 for value in log.values(tag))
    for pictures in log.images.values():
        assert len(pictures) == 3
        for _, pixels in pictures:
            assert pixels.shape[1] <= 320
            assert 0.5 <= pixels.shape[0] / pixels.shape[1] <= 2
    assert_nothing_left(model, trainer.optimizers)


@pytest.mark.parametrize("kept", [False, True], ids=["by index", "as delivered"])
def test_ranking_equals_the_pure_function_and_feeding_an_image_again_gives_its_value(kept, tmp_path):
    """Without a number (a sampler of the user's) the delivered images are kept: then the same ones are shown."""
    callback = Exact(k=3, filters_per_layer=4, on_error="raise")
    data = Images(14, seed=1, noise=0.0)
    batches = BatchSampler(SequentialSampler(data), 5, drop_last=False)
    validation = DataLoader(data, batch_sampler=batches) if kept else DataLoader(data, batch_size=5)
    _, model, _ = fit([callback], tmp_path, validation=validation)
    rankings, weights = callback.kept
    model.load_state_dict(weights)
    for layer, ranking in rankings.items():
        expected = rank_patches(model, layer, data.images.split(5), k=3)
        assert torch.equal(ranking.indices, expected.indices[:4])
        assert torch.equal(ranking.positions, expected.positions[:4])
        assert torch.allclose(ranking.values.double(), expected.values[:4].double(), atol=1e-6)
        for row, filter_index in enumerate(ranking.indices):
            for place, index in enumerate(filter_index.tolist()):
                if float(ranking.values[row, place]) <= 0:  # silent: not shown
                    continue
                image, position = callback.fetched[index][None], ranking.positions[row, place][None]
                _, value = project_patches(model, image, layer, torch.tensor([row]), position)
                assert value.item() == pytest.approx(ranking.values[row, place].item(), abs=1e-6)
                assert torch.equal(image[0], data.images[index])


def test_stream_shows_the_images_that_were_delivered(tmp_path):
    """No index, no second reading; what is kept is bounded."""
    callback = Exact(k=2, filters_per_layer=3, on_error="raise")
    _, _, said = fit([callback], tmp_path, validation=DataLoader(Stream(40), batch_size=4), max_epochs=1)
    assert said == []
    assert 0 < len(callback.fetched) <= 2 * 3 * 3
    for index, image in callback.fetched.items():
        assert torch.equal(image, Images(40, noise=0.0).images[index])
    assert len(read(tmp_path, "slow").images) == 6


def test_memory_of_kept_images_is_bounded_while_the_set_is_read():
    """At most k images a filter, however many there are."""
    from lightning_interp.functional.layout import Layout
    from lightning_interp.functional.tracing import End

    excited = Excited(2, 3, None)
    for _ in range(30):
        images = torch.randn(8, 1, 4, 4)
        excited.begin_batch(8)
        excited.read(End("conv", "relu", images.repeat(1, 5, 1, 1), Layout(1, 0, 5, 5)))
        excited.end_batch(images, ["conv"])
        assert len(excited.images) <= 6
    assert excited.count == 240
    named = {int(i) for i in excited.rankings()["conv"].indices.flatten()}
    assert set(excited.images) == named


RECIPES = [
    Recipe("sgd"),
    Recipe("two_optimizers", TwoOptimizers),
    Recipe("bf16_mixed", trainer={"precision": "bf16-mixed"}),
    Recipe("validate_twice", trainer={"val_check_interval": 0.5}),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_training_is_the_same_bit_for_bit(recipe):
    """Dropout, batch normalisation, generators of all kinds, logs of the user's."""
    assert_undisturbed(lambda: [TopPatches(k=2, maximize=True, steps=3, on_error="raise")], recipe)


def test_without_validation_the_first_images_are_passed_through_eagerly(tmp_path, caplog):
    """And that stands in the log."""
    caplog.set_level("INFO", logger="lightning_interp")
    callback = TopPatches(on_error="raise")
    trainer = quiet_trainer(callbacks=[callback], logger=pl.loggers.TensorBoardLogger(tmp_path))
    said = fit_quietly(trainer, Plain(), loader(noise=0.0))
    assert said == []
    (message,) = [m for m in caplog.messages if "There is no validation" in m]
    assert "first 24 images" in message
    assert set(callback.top) == {"net.0", "net.3", "net.8"}


class WithLengths(Plain):
    """Can't be called with images alone."""

    def forward(self, x, lengths):
        return self.net(x) / lengths

    def loss(self, batch):
        return nn.functional.cross_entropy(self(batch[0], 1), batch[1])


def test_model_that_cannot_be_called_with_images_is_told_so(tmp_path):
    """Where there is no validation to watch; where there is, nothing needs to be called for the patches themselves."""
    callback = TopPatches()
    trainer = quiet_trainer(callbacks=[callback], logger=pl.loggers.TensorBoardLogger(tmp_path / "without"))
    (said,) = fit_quietly(trainer, WithLengths(), loader(noise=0.0))
    assert "nothing to show: calling the model with images raised TypeError" in said
    callback = TopPatches()
    fit([callback], tmp_path / "with", WithLengths())
    assert set(callback.top) == {"net.0", "net.3", "net.8"}


class Bytes(Plain):
    """Normalises within itself."""

    def forward(self, x):
        return self.net(x.float() / 128 - 1)


def test_images_of_bytes_have_projections_too(tmp_path):
    """They have no gradient as they are."""

    def bytes_of(seed):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=generator)
        return DataLoader([(image, n % 3) for n, image in enumerate(images)], batch_size=6)

    trainer = quiet_trainer(callbacks=[TopPatches(on_error="raise")], logger=pl.loggers.TensorBoardLogger(tmp_path))
    assert fit_quietly(trainer, Bytes(), bytes_of(0), bytes_of(1)) == []


def test_compiled_model_is_watched_in_an_eager_pass(tmp_path):
    """Hooks on it would never be called; the result is that of the pure function."""
    torch.manual_seed(0)
    model = Plain(rate=0.0)
    model.net = torch.compile(model.net, backend="eager")
    callback = TopPatches(k=3, on_error="raise")
    _, _, said = fit([callback], tmp_path, model, max_epochs=1)
    assert ["The model is compiled" in message for message in said] == [True]
    assert callback.top


def test_resume_goes_on_with_strips_and_turnover(tmp_path):
    """One and one epoch show what two in a run show."""
    whole, first, second = (TopPatches(k=3, on_error="raise") for _ in range(3))
    fit([whole], tmp_path / "whole", Plain(rate=0.0))
    trainer, _, _ = fit([first], tmp_path / "first", Plain(rate=0.0), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    fit([second], tmp_path / "second", Plain(rate=0.0), ckpt_path=tmp_path / "one.ckpt")
    old, new = read(tmp_path / "whole", "slow"), read(tmp_path / "second", "slow")
    for layer in LAYERS:
        strip = f"interp.top_patches_strip/{layer}"
        assert np.array_equal(old.images[strip][-1][1].shape, new.images[strip][-1][1].shape)
        turnover = f"interp.top_patches_turnover/{layer}"
        assert new.steps(turnover) == old.steps(turnover)
    assert second._strips["net.0"].steps == whole._strips["net.0"].steps


def test_without_logger_nothing_is_read():
    """There is nobody to see it."""
    callback = TopPatches(on_error="raise")
    trainer = quiet_trainer(callbacks=[callback])
    assert fit_quietly(trainer, Plain(), loader(), loader(6, shuffle=False)) == []
    assert callback.top == {}


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
def test_shuffled_validation_shows_what_was_delivered(tmp_path):
    """The numbers are those of the delivery."""
    data = Images(14, seed=1, noise=0.0)
    callback = Exact(k=2, on_error="raise")
    shuffled = DataLoader(data, batch_size=5, sampler=RandomSampler(data, generator=torch.Generator().manual_seed(0)))
    fit([callback], tmp_path, validation=shuffled, max_epochs=1)
    assert callback.fetched
    known = {image.numpy().tobytes() for image in data.images}
    assert all(image.numpy().tobytes() in known for image in callback.fetched.values())


def test_dead_filter_has_no_patches(tmp_path):
    """Its zeros would rank the first images of the set, for no reason."""
    model = Plain(rate=0.0)
    with torch.no_grad():
        model.net[3].weight[1].zero_()
        model.net[3].bias[1] = -1.0
    callback = TopPatches(on_error="raise")
    fit([callback], tmp_path, model, max_epochs=1)
    assert callback.top["net.3"][1] == []
    assert callback.top["net.3"][0]


def test_layers_and_limits(tmp_path):
    """Globs choose, `max_layers` spreads, unknown names are refused, names without filters are said."""
    callback = TopPatches(layers=["net.3", "net.8"], max_layers=1, k=1, filters_per_layer=2, on_error="raise")
    fit([callback], tmp_path / "a", max_epochs=1)
    assert list(callback.top) == ["net.3"]
    assert [len(row) for row in callback.top["net.3"]] == [1, 1]
    _, _, said = fit([TopPatches(layers=["net.5"])], tmp_path / "b", max_epochs=1)
    assert ["nothing to show" in message for message in said] == [True]
    with pytest.raises(ArgumentError, match=r"net\.33"):
        fit([TopPatches(layers=["net.33"])], tmp_path / "c")


@pytest.mark.parametrize("option", ["k", "filters_per_layer", "steps"])
def test_wrong_arguments_are_refused(option):
    """At once."""
    with pytest.raises(ArgumentError, match=option):
        TopPatches(**{option: 0})
    with pytest.raises(ArgumentError, match="maximize"):
        TopPatches(maximize="yes")


def test_turnover_is_the_mean_share_of_new_images():
    """Filters that do not fire now do not count."""
    assert turnover_of([[1, 2], [3, 4], [5]], [[2, 1], [3, 9], []]) == 0.25
    assert turnover_of([[1]], [[]]) is None
    assert turnover_of([[]], [[4, 5]]) == 1.0


def test_two_calls_in_a_batch_count_the_first_and_other_sizes_are_left():
    """Test-time augmentation, or a forward of something else."""
    from lightning_interp.functional.layout import Layout
    from lightning_interp.functional.tracing import End

    excited = Excited(1, 1, lambda n: n)
    excited.begin_batch(2)
    for maps in (torch.ones(5, 1, 2, 2), torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1), torch.full((2, 1, 1, 1), 9.0)):
        excited.read(End("conv", "relu", maps, Layout(1, 0, 1, 1)))
    assert excited.rankings()["conv"].values.tolist() == [[2.0]]


@pytest.mark.slow
def test_two_ranks_find_what_one_would(tmp_path):
    """Nine images on two ranks: one is seen twice, and counts once."""
    zero, one = run_two_ranks("ddp_top_patches.py", tmp_path)
    assert (zero["resting"], one["resting"], one["top"]) == (False, False, {})
    for filter_index, row in enumerate(zero["top"]["net.0"]):
        values = [image[filter_index] for image in zero["maps"]]
        order = sorted(range(9), key=lambda i: (-values[i], i))
        assert row == [i for i in order if values[i] > 0][:3]


@pytest.mark.slow
def test_two_ranks_leave_the_loop_together(tmp_path):
    """Who stayed in it would wait for the other one at the end of the next validation, for ever."""
    zero, one = run_two_ranks("ddp_top_patches_lost.py", tmp_path, timeout=120)
    assert zero == one == {"by_loop": [True, True, False, False, False]}
