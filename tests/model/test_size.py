"""What docs/design.md says about the size of the model's code."""

import re

from paths import ROOT


def test_the_stated_number_of_lines_is_true_within_three_percent():
    text = (ROOT / "docs" / "design.md").read_text()
    stated = re.search(r"`model/`, ([\d,]+) lines", text)
    lines = sum(len(f.read_text().splitlines()) for f in (ROOT / "model").rglob("*.py"))
    assert abs(lines - int(stated[1].replace(",", ""))) <= 0.03 * lines, lines
