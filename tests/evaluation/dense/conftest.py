"""Both small sets, made once a session."""

from pathlib import Path

import pytest
from dense_sets import write_coco, write_segmentation


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    return write_segmentation(tmp_path_factory.mktemp("scenes"), {"train": 12, "val": 4})


@pytest.fixture(scope="session")
def coco(tmp_path_factory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"), 6)
