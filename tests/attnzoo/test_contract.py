"""Every registered mechanism keeps the contract."""

import pytest

from attnzoo import list_attention
from attnzoo.testing import CHECKS


@pytest.mark.parametrize("name", list_attention())
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check, name):
    check(name)
