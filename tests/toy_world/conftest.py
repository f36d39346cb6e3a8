import pytest

from mmalign.toy_world import ToyWorld, toy_world
from tests.toy_world.helpers import MINIATURE


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> ToyWorld:
    return toy_world(tmp_path_factory.mktemp("world"), MINIATURE)
