"""What config.json says of a private model: the promise, every release, and what it spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from glem_augment import __version__
from glem_augment.checks import check_number
from glem_augment.errors import GLEMError
from glem_augment.privacy.mechanism import Privacy

_MECHANISM = "Gaussian noise on counts, sums and scatter of clipped latents in public coordinates"
_OF_FIT = ("epsilon", "delta", "mu", "images_per_person", "images", "unit", "rounds", "mechanism", "version")
KEYS = (*_OF_FIT, "expect", "sha256")  # of the record in a file


def describe(privacy: Privacy, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The entry `privacy` of config.json for all releases of a fit. GLEMError: they do not add up to the promise."""
    facts = {
        "epsilon": privacy.epsilon,
        "delta": privacy.delta,
        "mu": privacy.mu,
        "images_per_person": privacy.images_per_person,
        "images": privacy.images,
        "unit": privacy.unit,
        "rounds": list(rounds),
        "mechanism": _MECHANISM,
        "version": __version__,
    }
    promised(facts)
    return facts


def promised(facts: dict[str, Any]) -> Privacy:
    """The promise of a model's entry `privacy`. GLEMError: it does not follow from the noise of the entry's rounds."""
    try:
        privacy = Privacy(*(facts[name] for name in ("epsilon", "delta", "images_per_person", "images")))
        noise = [check_number("noise", each["noise"], 0, math.inf, open_low=True) for each in facts["rounds"]]
        spent = privacy.images_per_person * math.hypot(*(1 / sd for sd in noise))
        good = all(math.isclose(mu, privacy.mu, rel_tol=1e-9) for mu in (facts["mu"], spent))
        if unknown := set(facts) - set(KEYS):
            raise GLEMError(
                f"the record of its privacy has unknown entries: {', '.join(sorted(map(str, unknown)))[:80]}"
            )
        if good and facts["unit"] == privacy.unit:
            return privacy
    except (KeyError, TypeError, ValueError) as error:
        raise GLEMError(f"the record of its privacy is not valid: {error}") from None
    raise GLEMError(f"the releases spend mu={spent:.6g}, and epsilon={privacy.epsilon:g} stands for {privacy.mu:.6g}")


def promise(facts: dict[str, Any]) -> str:
    """The promise of a model's entry `privacy`, in one sentence."""
    return (
        f"This model, and every image drawn from it, is ({facts['epsilon']:.9g}, {facts['delta']:.9g})-differentially "
        f"private with respect to adding or removing {facts['unit']}."
    )
