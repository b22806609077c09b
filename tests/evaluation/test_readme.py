"""The README's use of a backbone, run as it stands there."""

import re

import torch
from paths import ROOT

README = ROOT / "README.md"


def snippet() -> str:
    found = [
        code
        for code in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
        if "load_backbone(" in code
    ]
    assert len(found) == 1, f"{README} has {len(found)} snippets that load a backbone"
    return found[0]


def test_the_readmes_lines_give_class_and_patch_tokens(checkpoint, folders, tmp_path, monkeypatch):
    (tmp_path / "checkpoint.pt").symlink_to(checkpoint)
    (tmp_path / "photo.jpg").symlink_to(next(folders[1].rglob("*.jpg")))
    monkeypatch.chdir(tmp_path)
    names: dict[str, torch.Tensor] = {}
    exec(snippet(), names)
    assert names["class_token"].shape == (1, 32)
    assert names["patch_tokens"].shape == (1, 16, 32)
    assert torch.isfinite(names["patch_tokens"]).all()
    lines = snippet()[snippet().index("backbone, config") :].strip().splitlines()
    assert len(lines) == 5
