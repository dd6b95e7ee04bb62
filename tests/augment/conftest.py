from __future__ import annotations

import pytest
from augment_cases import make_model

from glem_augment import GLEM


@pytest.fixture(scope="session")
def model() -> GLEM:
    return make_model()


@pytest.fixture(scope="session")
def rgb() -> GLEM:
    return make_model(3)
