"""The judge that was trained on ImageNet, for tests. It is downloaded when it is first needed."""

from types import ModuleType
from typing import Any

import pytest


def embedder(imagenet: ModuleType) -> Any:
    """`imagenet`: the demo's module, under the name by which the test imports the demo. Skips without a network."""
    try:
        return imagenet.Embedder()
    except imagenet.NotFetchedError as error:
        pytest.skip(str(error))
