"""What version 0.1 wrote loads, and computes what it computed then."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adapters
from vitft import load_model

ARCHIVE = Path(__file__).parents[1] / "archive" / "0.1"
EXPECTED = load_file(ARCHIVE / "expected.safetensors")


@pytest.mark.parametrize("name", sorted(EXPECTED.keys() - {"images"}))
def test_what_an_older_version_wrote_computes_what_it_did(name: str) -> None:
    model = load_model(ARCHIVE / "base.safetensors")
    if name != "base":
        adapters.load_adapter(model, ARCHIVE / name)
        assert adapters.METHODS[name]
    assert model.classes == ("ant", "bee", "cat")
    with torch.no_grad():
        found = model(EXPECTED["images"])
    torch.testing.assert_close(found, EXPECTED[name], atol=1e-5, rtol=0)
