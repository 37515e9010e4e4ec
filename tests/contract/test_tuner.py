"""Lightning's searches for a rate and for a batch size find the same with the callbacks and without."""

from pathlib import Path

import pytest

from tests.contract.battery import differences
from tests.contract.factories import WHOLE
from tests.contract.hooks import assert_nothing_left
from tests.contract.nets import NAMESPACES, generators_digest, kit, loader, seed_all, sgd


def searched(namespace, folder, callbacks, search):
    """What a search found and how it left everything, and the fit that follows."""
    classes = kit(namespace)

    class Tuned(classes.Net):
        """Has a rate and a batch size to be tuned."""

        lr, batch_size = 0.05, 2

        def configure_optimizers(self):
            optimizer = sgd(self.parameters())
            optimizer.param_groups[0]["lr"] = self.lr
            return optimizer

        def train_dataloader(self):
            return loader(batch=self.batch_size)

        def val_dataloader(self):
            return loader(12, seed=1, shuffle=False)

    seed_all(3)
    model, capture = Tuned(), classes.Capture()
    own = [search(classes.pl.callbacks)] if isinstance(search, Finder) else []
    options = {"logger": capture, "default_root_dir": folder, "limit_train_batches": 8}
    trainer = classes.trainer(callbacks=[*own, *callbacks], **options)
    found = None if own else search(classes.pl.tuner.Tuner(trainer), model)
    after = generators_digest()
    trainer.fit(model)
    assert_nothing_left(model, trainer.optimizers)
    return {
        "found": found,
        "tuned": (model.lr, model.batch_size),
        "after the search": after,
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "optimizer": trainer.optimizers[0].state_dict(),
        "diary": model.diary,
        "generators": generators_digest(),
        "logged": capture.of_the_user(),
        "files": sorted(path.name for path in Path(folder).rglob("*") if path.name.startswith(".")),
    }


def rate(tuner, model):
    """By the tuner."""
    finder = tuner.lr_find(model, num_training=16, update_attr=True)
    return {**finder.results, "suggestion": finder.suggestion()}


def batch_size(tuner, model):
    """By the tuner."""
    return tuner.scale_batch_size(model, mode="power", steps_per_trial=2, init_val=2, max_trials=2)


class Finder:
    """By a callback of Lightning's, which trains inside `fit` while ours are in the list."""

    def __init__(self, name, **options):
        self.name, self.options = name, options

    def __call__(self, callbacks):
        return getattr(callbacks, self.name)(**self.options)

    @property
    def __name__(self):
        return self.name


SEARCHES = [
    rate,
    pytest.param(batch_size, marks=pytest.mark.slow),
    pytest.param(Finder("LearningRateFinder", num_training_steps=16), marks=pytest.mark.slow),
    Finder("BatchSizeFinder", steps_per_trial=2, init_val=2, max_trials=2),
]


@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: search.__name__)
@pytest.mark.parametrize(("namespace", "name"), [(NAMESPACES[0], "often"), (NAMESPACES[1], "Interp")])
def test_search_finds_the_same_with_and_without(namespace, name, search, tmp_path):
    """And leaves the same behind; the fit after it is the same too."""
    expected, found = (
        searched(namespace, tmp_path / str(len(callbacks)), callbacks, search) for callbacks in ([], WHOLE[name]())
    )
    assert expected["tuned"] != (0.05, 2)
    assert differences(expected, found) == []
