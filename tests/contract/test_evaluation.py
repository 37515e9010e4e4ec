"""`trainer.validate`, `test` and `predict` give the same with the callbacks and without, after a fit and alone."""

import pytest
import torch

from tests.contract.battery import differences
from tests.contract.factories import WHOLE
from tests.contract.hooks import assert_nothing_left
from tests.contract.nets import NAMESPACES, generators_digest, kit, loader, seed_all


def evaluated(classes, callbacks, *, fitted):
    """All that the three give, and how they leave the model and the generators."""
    seed_all(5)
    model, capture = classes.Net(), classes.Capture()
    trainer = classes.trainer(callbacks=callbacks, logger=capture)
    if fitted:
        trainer.fit(model, loader(), loader(12, seed=1, shuffle=False))
    found = {
        "validate": trainer.validate(model, loader(12, seed=1, shuffle=False), verbose=False),
        "test": trainer.test(model, loader(12, seed=2, shuffle=False), verbose=False),
        "predict": trainer.predict(model, loader(12, seed=3, shuffle=False)),
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "diary": model.diary,
        "generators": generators_digest(),
        "modes": [module.training for module in model.modules()],
        "metrics": {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("interp")},
        "logged": capture.of_the_user(),
    }
    for metrics in (*found["validate"], *found["test"]):
        assert not any(name.startswith("interp") for name in metrics)
    assert_nothing_left(model, trainer.optimizers)
    return found


@pytest.mark.parametrize("fitted", [False, True], ids=["alone", "after_fit"])
@pytest.mark.parametrize(("namespace", "name"), [(NAMESPACES[0], "often"), (NAMESPACES[1], "Interp")])
def test_evaluation_is_the_same_with_and_without(namespace, name, fitted):
    """Results, predictions, logs, generators and the model itself."""
    classes = kit(namespace)
    expected, found = (evaluated(classes, callbacks, fitted=fitted) for callbacks in ([], WHOLE[name]()))
    assert len(expected["predict"]) == 2
    assert torch.isfinite(expected["predict"][0]).all()
    assert differences(expected, found) == []
