"""A benchmark's option that cannot work is one sentence with status 2, before any measuring."""

from importlib import import_module
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        ("graph", "--cases vit_s:fp16", "--cases vit_s:fp16: expected MODEL:PRECISION:IMAGES"),
        ("graph", "--cases vit_s:fp16:many", "expected MODEL:PRECISION:IMAGES"),
        ("graph", "--cases tiny:fp32:0", "--cases tiny:fp32:0: expected at least 1 image"),
        ("graph", "--cases swin_t7:fp32:1", "with a model of vit_t, vit_s"),
        ("budget", "--precision fp32", "invalid choice: 'fp32'"),
        ("budget", "--precision bf16 --device v100", "--precision bf16: a V100 has no bf16"),
        ("budget", "--batch-size 0", "argument --batch-size: 0 is below 1"),
        ("kernels", "--images 0", "argument --images: 0 is below 1"),
        ("model", "--batch-size 0", "argument --batch-size: 0 is below 1"),
        ("model", "--batch-size x", "argument --batch-size: invalid integer value: 'x'"),
        ("evaluation.dense", "--archs nope", "argument --archs: invalid choice: 'nope'"),
        ("evaluation.dense", "--checkpoint X", "--checkpoint and --data go together"),
        ("evaluation.dense", "--data X", "--checkpoint and --data go together"),
        ("masks", "--json {folder}/nope/x.json", "there is no folder {folder}/nope"),
        ("masks", "--json {folder}", "{folder} is a folder"),
        ("masks", "--json {folder}/photos.beton", "give a name that ends in .json"),
        ("masks", "--json {folder}/mine.json", "mine.json exists, and is not replaced"),
    ],
)
def test_it_is_a_sentence(
    name: str,
    line: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mine.json").write_text("not of a benchmark")
    monkeypatch.setattr("sys.argv", [name, *line.format(folder=tmp_path).split()])
    with pytest.raises(SystemExit) as ended:
        import_module(f"ibeton.benchmarks.{name}").main()
    assert ended.value.code == 2
    assert says.format(folder=tmp_path) in capsys.readouterr().err.splitlines()[-1]


def test_figures_of_an_earlier_call_may_be_replaced(tmp_path: Path) -> None:
    from ibeton.benchmarks.harness.measure import make_parser

    path = tmp_path / "old.json"
    path.write_text('{\n "machine": {}}')
    assert make_parser("").parse_args(["--json", str(path)]).json == path
