import pytest

import sd_vae.data
from sd_vae.data.config import DataConfig
from sd_vae.errors import UserError
from sd_vae.validation import from_plain


def test_data_config_reads_a_recipe():
    config = from_plain(DataConfig, {"train": "photos", "size": 64, "crop_scale": [0.8, 1.0]}, source="recipe")

    assert config == DataConfig(train="photos", size=64, crop_scale=(0.8, 1.0))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"train": ""}, r"data\.train is empty, name a folder"),
        ({"validation": ""}, r"data\.validation is empty, name a folder"),
        ({"size": 0}, r"data\.size is 0, it must be at least 1 pixel"),
        ({"crop_scale": (0.0, 1.0)}, r"data\.crop_scale is \(0\.0, 1\.0\), it must satisfy 0 < smallest"),
        ({"crop_scale": (0.9, 0.5)}, r"data\.crop_scale is \(0\.9, 0\.5\)"),
        ({"crop_scale": (0.5, 1.5)}, r"data\.crop_scale is \(0\.5, 1\.5\)"),
        ({"crop_scale": (float("nan"), 1.0)}, r"data\.crop_scale is \(nan, 1\.0\)"),
        ({"num_workers": -1}, r"data\.num_workers is -1, it must be 0 or more"),
        ({"image_column": ""}, r"data\.image_column is empty"),
        ({"train": ()}, r"data\.train is empty"),
        ({"train": ("a", "a")}, r"data\.train names a source twice"),
        ({"train": ("a", "b"), "weights": (1.0,)}, r"data\.weights holds 1 numbers for 2 sources"),
        ({"weights": (0.0,)}, r"data\.weights is \[0\.0\], each must be a finite number above 0"),
        ({"shuffle_window": -1}, r"data\.shuffle_window is -1, it must be 0 or more"),
        ({"retries": -1}, r"data\.retries is -1, it must be 0 or more"),
        ({"timeout_s": 0.0}, r"data\.timeout_s is 0\.0, it must be a finite number of seconds"),
        ({"size": 0, "num_workers": -1}, r"data\.size is 0.*; data\.num_workers is -1"),
    ],
)
def test_data_config_rejects(fields, complaint):
    with pytest.raises(UserError, match=complaint):
        DataConfig(**{"train": "photos", **fields})


def test_data_package_exports_lazily():
    assert sd_vae.data.DataConfig is DataConfig
    assert "training_loader" in dir(sd_vae.data)


def test_data_package_has_no_other_names():
    with pytest.raises(AttributeError, match="no attribute 'webdataset'"):
        sd_vae.data.webdataset  # noqa: B018
