"""What to expect of a private fit, from public numbers alone: said before anything is spent.

The size of a fit is the images of a class times mu of one image, divided by the numbers of a latent over 512: the
noise falls on all numbers. `SHARES` has, for several sizes, how much of the accuracy above chance a private fit keeps.
`python benchmarks/recipes/expectation.py` measured it on photographs of ten classes that the public knowledge does not
have, with 300 images each at 64 pixels.
"""

from __future__ import annotations

import math

from glem_augment.privacy.mechanism import Privacy

SHARES = {0.25: 0.03, 0.75: 0.04, 2.5: 0.11, 7.5: 0.36, 25: 0.76, 75: 0.86, 250: 0.91}
_LEAST = 0.1  # a smaller share is refused
_SHOWN = 30, 100, 300, 1000, 3000  # images of a class


def kept(size: float) -> float:
    """The share at a size > 0, from 0 to 1; linear in the logarithm of the size."""
    sizes, shares = list(SHARES), list(SHARES.values())
    if size <= sizes[0]:
        return shares[0] * size / sizes[0]
    for low, high, a, b in zip(sizes, sizes[1:], shares, shares[1:], strict=False):
        if size <= high:
            return a + (b - a) * math.log(size / low) / math.log(high / low)
    return shares[-1]


def expectation(privacy: Privacy, classes: int, image_shape: tuple[int, int, int]) -> str:
    """One sentence on a fit of so many classes, from the stated number of images, or for several numbers.

    ValueError: with the stated number of images, a fit would hardly be better than chance.
    """
    of = "of the accuracy above chance that the same fit keeps without a promise"
    blocks = math.ceil(image_shape[1] / 8) * math.ceil(image_shape[2] / 8)  # of TAEF2, with 32 numbers each
    unit = privacy.mu_per_image * 16 / blocks
    if privacy.images is None:
        shares = (f"{n:,} images of each class: {100 * kept(n * unit):.0f} %" for n in _SHOWN)
        return f"a private fit of photographs kept so much {of}: {', '.join(shares)}; --images gives one number"
    per_class = privacy.images / classes
    share = kept(per_class * unit)
    if share < _LEAST:
        raise ValueError(
            f"{privacy.images:,} images of {classes} classes are too few for epsilon={privacy.epsilon:g} and "
            f"images_per_person={privacy.images_per_person}: the model would be noise, so nothing was spent; give more "
            "images, fewer classes, or a larger epsilon"
        )
    return (
        f"with {per_class:,.0f} photographs of each class, a private fit kept about {100 * share:.0f} % {of}; fewer "
        f"images than the stated {privacy.images:,} teach less, and other images can differ"
    )
