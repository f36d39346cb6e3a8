"""How many inputs each entry point gets: 2,000 in all by default, 20,000 with pytest -m fuzz."""

import pytest

from tests.conftest import is_asked_for
from tests.data.conftest import tokenizer, tokenizer_folder  # noqa: F401  fixtures
from tests.training.conftest import small_world  # noqa: F401

INPUTS = {
    "data files and images": 400,
    "containers and archives": 100,
    "model and tokenizer folders": 500,
    "weight files": 150,
    "run folders": 250,
    "documents": 250,
    "results": 200,
    "settings": 150,
}
assert sum(INPUTS.values()) == 2000


@pytest.fixture(scope="session")
def seeds(request):
    """seeds(entry point): its seeds, one for each input."""
    factor = 10 if is_asked_for(request.config, "fuzz") else 1
    return lambda name: range(factor * INPUTS[name])
