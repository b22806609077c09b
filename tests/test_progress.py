"""What is printed by rich is printed as it is: names of files may look like markup."""

import io
import re

from paths import ROOT
from rich.progress import Progress, TextColumn
from rich.table import Table

from ibeton.progress import plain_console

NAMES = ("[/final]", "[red]photos[/red]", "a[", "[bold", "[link=x]y")


def test_names_that_look_like_markup_are_printed_as_they_are() -> None:
    text = io.StringIO()
    console = plain_console(file=text, width=100)
    table = Table("[/head]", title=f"of {NAMES[0]}", caption=NAMES[1])
    for name in NAMES:
        console.print(name)
        table.add_row(name)
    console.print(table)
    console.rule(NAMES[0])
    said = text.getvalue()
    assert "[/head]" in said
    assert f"of {NAMES[0]}" in said
    for name in NAMES:
        assert said.count(name) >= 2


def test_a_progress_bar_is_named_as_it_is() -> None:
    text = io.StringIO()
    column = TextColumn(NAMES[0], markup=False)
    with Progress(column, console=plain_console(file=text, width=100)) as shown:
        shown.add_task(NAMES[0], total=1)
    assert NAMES[0] in text.getvalue()


def test_no_other_console_and_no_column_with_markup_is_made() -> None:
    for room in ("ibeton", "pipeline", "model", "training", "evaluation", "benchmarks"):
        for path in sorted((ROOT / room).glob("*.py" if room == "ibeton" else "**/*.py")):
            text = path.read_text()
            made = re.findall(r"\bConsole\(", text)
            assert len(made) == (path == ROOT / "ibeton" / "progress.py"), path
            assert not re.findall(r"TextColumn\((?![^)]*markup=False)", text), path
