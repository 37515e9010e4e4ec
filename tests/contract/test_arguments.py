"""Every wrong argument is refused at once; the error names it, says what was expected and what came."""

import inspect

import pytest

from lightning_interp import (
    ActivationSparsity,
    Alerts,
    ArgumentError,
    DeadFilters,
    DeadFiltersRule,
    EmbeddingProjection,
    FilterGrid,
    Influence,
    Interp,
    TrainingDynamics,
    standard_callbacks,
)
from tests.contract.factories import CLASSES
from tests.contract.nets import Net, loader, quiet_trainer

NOT_POSITIVE = [0, -1, 1.5, "2", True]
NOT_STRINGS = ["conv1", 3, [1, 2], ["conv1", None]]
NOT_BOOL = [0, 1, "yes", None]
COMMON = {
    "max_layers": [*NOT_POSITIVE, None],
    "layers": NOT_STRINGS,
    "name": ["", "a/b", 3, ["a"]],
    "on_error": ["ignore", "Raise", None, True],
}
SCHEDULED = {"every_n_epochs": NOT_POSITIVE, "every_n_train_steps": NOT_POSITIVE}
NORMALISED = {"mean": ["0.5", 0.5, ["a"], [None]], "std": ["0.5", 0.5, ["a"], [0.0], [-1.0]]}
FAMILY = {"name": COMMON["name"], "on_error": COMMON["on_error"]}
ALERTING = {
    "on_alert": ["email", "Log", None, True],
    "min_severity": ["fatal", "Warning", None, 1],
    "mute": NOT_STRINGS,
}
WRONG = {
    DeadFilters: {
        **COMMON,
        "split": ["test", "validation", None, 1],
        "window_steps": [*NOT_POSITIVE, None],
        "dormant_threshold": [-0.1, 1.5, "0.1", None, True, float("nan")],
    },
    ActivationSparsity: {
        **COMMON, **SCHEDULED, **NORMALISED, "maps": NOT_BOOL, "num_samples": [*NOT_POSITIVE, None],
    },
    FilterGrid: {**COMMON, **SCHEDULED, "max_filters": [*NOT_POSITIVE, None]},
    TrainingDynamics: {
        **COMMON, "every_n_train_steps": NOT_POSITIVE, "dense_steps": [-1, 1.5, "2", None, True],
    },
    EmbeddingProjection: {
        **FAMILY,
        **SCHEDULED,
        **NORMALISED,
        "classes": NOT_STRINGS,
        "layer": ["", 3, ["fc"]],
        "max_points": [*NOT_POSITIVE, None],
        "method": ["umpa", "PCA", None, 1],
        "perplexity": [0, 0.5, "30", None, True, [], [30, "5"], float("nan"), float("inf")],
        "projector": NOT_BOOL,
        "samples": ["points.csv", 3, [-1], [0.5], []],
    },
    Influence: {
        **FAMILY,
        **SCHEDULED,
        **NORMALISED,
        "classes": NOT_STRINGS,
        "layer": ["", 3, ["fc"]],
        "neighbors": [*NOT_POSITIVE, None],
        "num_test": [*NOT_POSITIVE, None],
        "num_train": [*NOT_POSITIVE, None],
        "samples": ["points.csv", 3, [-1], [0.5], []],
        "top_k": [*NOT_POSITIVE, None],
        "weight_decay": [0, -1.0, "0.1", None, True, float("nan"), float("inf")],
    },
    Alerts: {
        **FAMILY,
        **ALERTING,
        "notify": NOT_STRINGS,
        "patience": [*NOT_POSITIVE, None],
        "rules": ["dead_filters", 3, ["dead_filters"], [DeadFiltersRule], [DeadFiltersRule(), DeadFiltersRule()]],
    },
    Interp: {
        **COMMON,
        **NORMALISED,
        **ALERTING,
        "budget": [0, -0.02, 1.5, 2, "0.02", True, [0.02], float("nan")],
        "classes": NOT_STRINGS,
        "level": ["high", "Full", None, 1],
    },
    standard_callbacks: {
        **COMMON, **NORMALISED, **ALERTING, "classes": NOT_STRINGS, "level": ["high", "Full", None, 1],
    },
}  # fmt: skip
CASES = [
    (make, option, value) for make, options in WRONG.items() for option, values in options.items() for value in values
]


@pytest.mark.parametrize(("make", "option", "value"), CASES, ids=lambda value: getattr(value, "__name__", repr(value)))
def test_wrong_argument_is_named_with_what_was_expected_and_what_came(make, option, value):
    """In `__init__`, before anything is trained."""
    with pytest.raises(ArgumentError) as caught:
        make(**{option: value})
    message = str(caught.value)
    assert f"`{option}`" in message
    assert "xpected" in message
    shown = value[0] if option == "rules" and isinstance(value, list) else value
    assert repr(shown) in message or type(shown).__name__ in message or getattr(shown, "name", "?") in message
    assert message.endswith((".", "?"))


@pytest.mark.parametrize("make", WRONG, ids=lambda make: make.__name__)
def test_table_has_every_option(make):
    """An option that is added must be tried too."""
    assert set(inspect.signature(make).parameters) == set(WRONG[make])


@pytest.mark.parametrize("make", WRONG, ids=lambda make: make.__name__)
def test_unknown_argument_is_refused(make):
    """No `**kwargs` that swallow a typing error."""
    with pytest.raises(TypeError, match="evry_n_epochs"):
        make(evry_n_epochs=2)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_options_are_keyword_only_typed_and_documented(cls):
    """As LightningCLI needs them; `level` of `Interp` may stand first."""
    for name, parameter in inspect.signature(cls).parameters.items():
        assert parameter.kind is parameter.KEYWORD_ONLY or name == "level"
        assert parameter.annotation is not parameter.empty
        assert parameter.default is not parameter.empty
        assert f"{name}: " in (cls.__init__.__doc__ or ""), name


@pytest.mark.parametrize("cls", [ActivationSparsity, FilterGrid])
def test_two_schedules_exclude_each_other(cls):
    """As in ModelCheckpoint."""
    with pytest.raises(ArgumentError, match=r"`every_n_epochs` and `every_n_train_steps` exclude each other.*2 and 10"):
        cls(every_n_epochs=2, every_n_train_steps=10)


def test_wrong_choice_gets_a_suggestion():
    """Of what was probably meant."""
    with pytest.raises(ArgumentError, match="Did you mean 'critical'"):
        Alerts(min_severity="critcal")
    with pytest.raises(ArgumentError, match="Did you mean 'standard'"):
        Interp("standart")


@pytest.mark.parametrize("cls", [DeadFilters, ActivationSparsity, FilterGrid, TrainingDynamics, Interp])
@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_layer_that_does_not_exist_is_refused_before_training(cls, on_error):
    """In `setup`, whatever `on_error` says: it is the user's mistake, with a suggestion."""
    trainer, model = quiet_trainer(callbacks=[cls(layers=["net.o"], on_error=on_error)]), Net()
    with pytest.raises(ArgumentError, match=r"No layer matches 'net.o' in argument `layers`.*'net.0'.*Did you mean"):
        trainer.fit(model, loader())
    assert trainer.global_step == 0
    assert model.diary == []


def test_arguments_at_their_limits_are_accepted():
    """Nothing is refused that makes sense."""
    DeadFilters(dormant_threshold=0, window_steps=1, max_layers=1, layers=[])
    DeadFilters(dormant_threshold=1.0, layers=("*",), name="a.b")
    ActivationSparsity(mean=(0.5,), std=(0.1, 0.2, 0.3), every_n_epochs=1)
    FilterGrid(max_filters=1, every_n_train_steps=1)
    TrainingDynamics(dense_steps=0, every_n_train_steps=None)
    Alerts(rules=[], mute=[], notify=[], patience=1)
    Interp("light", mute=("dead_filters:net.*",), min_severity="info")
    Interp(budget=1)
