"""Models that draw, and pictures beside those that they are made from, for what is trained on both."""

import pytest

from tests import checkpoints
from tests.training import pairs


@pytest.fixture(scope="module", params=["SD", "SDXL"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    checkpoints.saved(folder, {"SD": checkpoints.pipeline, "SDXL": checkpoints.pipeline_xl}[request.param])
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return pairs.write(tmp_path_factory.mktemp("pictures"))
