"""Stacks of augmentation that `compare` tries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glem_augment.augment.policies import Adversarial, Mixup, Noise, Policy

BASE = "crop + flip"
MAGNITUDES = (0.2, 0.4, 0.8)  # of ColorJitter


@dataclass(frozen=True)
class Stack:
    """Operations on training images, beside crop and flip.

    Attributes:
        name: for people.
        kind: "plain", "ordinary", "jitter", "pixels", "autoencoder" or "flow": stacks compete within a kind.
        image: names of torchvision v2 transforms of single images; "RandAugment 5" has magnitude 5. "ColorJitter 0.4"
            changes brightness, contrast and saturation by up to 0.4, and hue by up to a quarter of it.
        batch: "MixUp", "CutMix" or "".
        policy: of `GLEMAugment`, which moves half of the images; None: none.
    """

    name: str
    kind: str
    image: tuple[str, ...] = ()
    batch: str = ""
    policy: Policy | None = None

    @property
    def adversarial(self) -> bool:
        """Whether moves raise the loss of the network in training. All other moves are made before the training."""
        return self.policy is not None and self.policy.wants_classifier


PLAIN = Stack(BASE, "plain")
ORDINARY = (
    Stack("TrivialAugment", "ordinary", ("TrivialAugmentWide",)),
    Stack("TrivialAugment, RandomErasing", "ordinary", ("TrivialAugmentWide", "RandomErasing")),
    Stack("RandAugment, RandomErasing, Mixup", "ordinary", ("RandAugment", "RandomErasing"), "MixUp"),
    Stack("CutMix", "ordinary", (), "CutMix"),
    Stack("TrivialAugment, CutMix", "ordinary", ("TrivialAugmentWide",), "CutMix"),
    Stack("TrivialAugment, RandomErasing, Mixup", "ordinary", ("TrivialAugmentWide", "RandomErasing"), "MixUp"),
)
# At least as many trials as moves have: the strongest single operation on small colour images.
JITTER = tuple(
    Stack(f"ColorJitter {size:g}{shown}", "jitter", (f"ColorJitter {size:g}",), batch)
    for size in sorted(MAGNITUDES, key=lambda size: abs(size - 0.4))  # the usual magnitude first
    for shown, batch in (("", ""), (", CutMix", "CutMix"), (", Mixup", "MixUp"))
)
USUAL = Noise(strength=0.5)  # the move to start with where no classifier is at hand
POLICIES: tuple[Policy, ...] = (USUAL, Noise(strength=1.0), Mixup())
ADVERSARIAL = Adversarial()


def moves(kind: str, shown: str, policies: Sequence[Policy] = POLICIES) -> tuple[Stack, ...]:
    """A stack of moves along the modes of a model for each policy."""
    stacks = []
    for policy in policies:
        words = f"{policy.name} {policy.strength:g}" if isinstance(policy, Noise) else policy.name
        stacks.append(Stack(f"{shown}: {words}", kind, policy=policy))
    return tuple(stacks)
