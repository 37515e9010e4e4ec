"""Rule `unlearned_class`: not even the image that is made for a class convinces the network of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar

from lightning_interp._options import check_number
from lightning_interp.rules._evidence import LEARNED, guess_loss, recent_loss
from lightning_interp.rules.alert import Alert
from lightning_interp.rules.history import History
from lightning_interp.rules.rule import Key, Rule
from lightning_interp.rules.validation_mismatch import explains_validation

SOURCE = "Simonyan, Vedaldi and Zisserman 2013, section 2 (class images); threshold measured"
_RELEASE = 0.1  # so much above the threshold it must rise to clear the alert
_NAMED = 8


@dataclass(frozen=True)
class UnlearnedClassRule(Rule):
    """The image that maximises a class's score is not recognised as that class: only ever information.

    p = mean probability of the class for its own image, under small shifts, scalings and rotations. Fires for classes
    with p < `probability` in the last two measurements after the first step.

    If it is all of them, nothing has been learned yet, unless the loss is below 0.9 ln C; that is not said without a
    cross-entropy, since the outputs may be an embedding. Silent where `validation_mismatch` finds that the network is
    another one when it is evaluated.

    Does not depend on the number of classes: an optimised image of a class that was learned reaches 0.9 and more.

    Source: Simonyan et al. 2013; measured with small CNNs on digits: a class without training examples 0.01, one whose
    labels were scattered 0.18, one half of whose examples bear another class's label 0.58, learned ones 0.87 to 1.

    Attributes:
        probability: Below it, a class counts as not learned.
    """

    name: ClassVar[str] = "unlearned_class"
    needs: ClassVar[tuple[str, ...]] = (
        "class_image_augmented", "loss", "num_classes", "validation_metric", "statistics_lag", "weights_lag",
    )  # fmt: skip

    probability: float = 0.5

    def __post_init__(self) -> None:
        check_number("probability", self.probability, low=0, high=1)

    def check(self, history: History, active: Collection[Key]) -> Iterable[Alert]:
        """One alert for all classes concerned, or none."""
        if explains_validation(history):  # the network is another one when it is evaluated
            return
        classes = history.layers("class_image_augmented")
        limit = self.probability + (_RELEASE if (self.name, None) in active else 0.0)
        low: dict[str, float] = {}
        for name in classes:
            points = [p for p in history.finite("class_image_augmented", name) if p.step > 0][-2:]
            if len(points) == 2 and max(point.value for point in points) < limit:
                low[name] = points[-1].value
        if not low:
            return
        worst = sorted(low, key=lambda name: low[name])
        named = ", ".join(f"{name} ({low[name]:.2f})" for name in worst[:_NAMED])
        more = f" and {len(worst) - _NAMED} more" if len(worst) > _NAMED else ""
        everything = len(low) == len(classes) > 1
        loss, guess = recent_loss(history), guess_loss(history)
        if everything and guess is None:  # its outputs may be an embedding, and no scores at all
            return
        learned = loss is not None and guess is not None and loss < LEARNED * guess
        yield Alert(
            rule=self.name,
            severity="info",
            value=low[worst[0]],
            threshold=self.probability,
            cause="nothing has been learned yet" if everything and not learned else None,
            message=f"Images made for these classes do not convince the network of them: {named}{more}.",
            advice=_ADVICE[everything, everything and learned],
            evidence={f"probability_{name}": low[name] for name in worst[:_NAMED]},
            alternatives=["few examples", "wrong labels", "confused with another class", "too few steps"],
            source=SOURCE,
        )


_ADVICE = {  # by: no class convinces, and that although the loss has fallen
    (False, False): "Look at the examples of these classes: how many there are, and whether their labels are right.",
    (True, False): "Look at the loss first: no class has an image that convinces.",
    (True, True): (
        "The training loss says that classes are told apart, so look at what is otherwise when the network is "
        "evaluated (running statistics, dropout), and whether its outputs are scores or went through a softmax."
    ),
}
