"""An adapter fits only UNets with the layers that it was trained for."""

import pytest

from sa_inject.core.adapter import REFERENCE_MODES, AdapterMismatchError
from sa_inject.core.kv import BlockKey
from tests.core.tiny_adapter import random_adapter


def test_blocks_are_those_of_the_layers():
    adapter = random_adapter()
    assert adapter.blocks()[:2] == (BlockKey("input", 1, 0), BlockKey("input", 3, 0))
    assert adapter.blocks() == tuple(layer.key for layer in adapter.info.layers)


def test_model_of_the_same_shape_fits():
    adapter = random_adapter()
    adapter.check_fits("SD1.x", list(adapter.info.layers))


def test_model_of_another_shape_is_refused_with_both_names():
    adapter = random_adapter("my cat")
    with pytest.raises(AdapterMismatchError, match=r"'my cat'.*SD1\.x \(7 .*but the connected model is SDXL \(6\)"):
        adapter.check_fits("SDXL", adapter.info.layers[1:])


def test_model_of_another_family_is_refused_though_its_layers_are_the_same():
    """SD1.x and SD2.x have the same self-attention and texts of different width."""
    adapter = random_adapter()
    with pytest.raises(AdapterMismatchError, match=r"trained for SD1\.x.*connected model is SD2\.x"):
        adapter.check_fits("SD2.x", adapter.info.layers)


def test_layer_of_another_width_is_refused():
    adapter = random_adapter()
    *others, last = adapter.info.layers
    with pytest.raises(AdapterMismatchError):
        adapter.check_fits("SD1.x", [*others, last._replace(inner_dim=last.inner_dim + 1)])


@pytest.mark.parametrize(
    ("trained", "connected", "fits"),
    [
        ("eps", "eps", True),
        ("v_prediction", "eps", False),
        ("eps", "edm", False),
        (None, "v_prediction", True),
        ("eps", None, True),
        (["eps"], "v_prediction", True),
        ("of a later version", "eps", True),
    ],
)
def test_model_that_predicts_something_else_is_refused_where_both_are_known(trained, connected, fits):
    adapter = random_adapter("my cat")
    adapter.info.training["prediction_type"] = trained
    if fits:
        adapter.check_fits("SD1.x", adapter.info.layers, connected)
    else:
        with pytest.raises(
            AdapterMismatchError, match=rf"cat'.*predicts {trained}, .* SD1\.x model predicts {connected}"
        ):
            adapter.check_fits("SD1.x", adapter.info.layers, connected)


def test_reference_modes_are_the_two_of_the_method():
    assert REFERENCE_MODES == ("clean", "noised")
