"""docs/networks.md: its code runs, and what it asserts holds."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "networks.md"


def test_its_blocks_are_one_program():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    found: dict = {}
    exec(compile("\n".join(blocks), str(PAGE), "exec"), found)
    assert found["by_hand"].shape == found["changed"].pixels.shape
