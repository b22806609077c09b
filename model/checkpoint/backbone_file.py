"""A backbone alone as one safetensors file, with a model card beside it.

The file holds the backbone's own tensor names and, in its header, the run's settings: whatever
reads a checkpoint of this program reads it too.
"""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ibeton.atomic import replacing, write_text

SETTINGS = "ibeton_config"  # entry of the header that holds the run's settings as JSON


def write_backbone(
    path: Path,
    backbone: nn.Module,
    config: dict[str, Any],
    facts: Mapping[str, str],
    unlisted: Collection[str] = (),
) -> None:
    """Write `backbone` to `path` (.safetensors) and its model card to the same name with .md.

    `config`: the run's settings. `facts`: rows of the card's first table, such as photos and
    scores. `unlisted`: settings that its second table leaves out. Both files are written whole or
    not at all. Raises OSError.
    """
    state = {name: tensor.contiguous().cpu() for name, tensor in backbone.state_dict().items()}
    state.pop("masked_embed", None)
    with replacing(path) as partial:
        header = {SETTINGS: json.dumps(config), "image_size": str(config["image_size"])}
        write_safetensors(partial, state, header)
    count = sum(tensor.numel() for tensor in state.values())
    write_text(path.with_suffix(".md"), card(path.name, config, count, facts, unlisted))


def write_safetensors(path: Path, state: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write tensors and what belongs in the header, through to the disk."""
    from safetensors.torch import save

    with open(path, "wb") as file:  # save_file's could be read by their owner alone
        file.write(save(state, {"format": "pt", **header}))
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A safetensors file and its header; SETTINGS, if a backbone of this program has them, as a
    dict. Raises as `refuse_other_files`, and ValueError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    refuse_other_files(Path(path))
    try:
        with safe_open(path, "pt") as file:
            header: dict[str, Any] = file.metadata() or {}
            if SETTINGS in header:
                header[SETTINGS] = _tuples(json.loads(header[SETTINGS]))
            yield file, header
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no safetensors file, or a damaged one ({error})") from error


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a safetensors file. Raises as `refuse_other_files`, and ValueError for
    a damaged file."""
    with _opened(path) as (file, header):
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118


def read_backbone(path: str | Path) -> dict[str, Any] | None:
    """The file as a checkpoint, {"teacher": tensors, "config": settings}; None, by its header
    alone, for a safetensors file of another program. Raises as `read_safetensors`."""
    with _opened(path) as (file, header):
        if SETTINGS not in header:
            return None
        teacher = {f"backbone.{name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {"teacher": teacher, "config": header[SETTINGS]}


def refuse_other_files(path: Path) -> None:
    """Raise FileNotFoundError, or ValueError for what cannot be a checkpoint by its first bytes."""
    if path.is_dir():
        newest = path / "checkpoint.pt"
        advice = f"give {newest}" if newest.is_file() else "give a file in it"
        raise ValueError(f"checkpoint {path} is a folder: {advice}")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    with open(path, "rb") as file:
        start = file.read(512).lstrip().lower()
    if not start:
        raise ValueError(f"{path} is no checkpoint: it is empty")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path} is a web page, not weights: download the file itself")
    if path.suffix == ".beton":
        raise ValueError(f"{path} is a .beton file of photos, not a checkpoint")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`")


def card(
    file: str,
    config: dict[str, Any],
    parameters: int,
    facts: Mapping[str, str],
    unlisted: Collection[str],
) -> str:
    """A model card in Markdown, with the header that Hugging Face reads."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    listed = sorted(name for name in config if name not in unlisted)
    recipe = "\n".join(f"| `{name}` | {_cell(config[name])} |" for name in listed)
    return f"""---
library_name: ibeton
tags: [self-supervised, iBOT, image-feature-extraction]
---

# {config["arch"]} pre-trained with iBOT

The teacher's backbone ({parameters / 1e6:.1f} million parameters) of a self-supervised run
([iBOT](https://arxiv.org/abs/2111.07832)), trained by ibeton without labels.

| | |
| --- | --- |
{rows}

## Use

```python
import ibeton

backbone, config = ibeton.load_backbone("{file}")
tokens = backbone(images)  # float32 [B, 3, H, W], normalized -> [B, 1 + N, C], class token first
```

Images are RGB on 0 to 1, normalized by mean {_cell(config["mean"])} and standard deviation
{_cell(config["std"])}; {config["image_size"]} pixels a side is what the network was trained for.

## Recipe

| setting | value |
| --- | --- |
{recipe}
"""


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text.replace("|", "\\|")


def _tuples(config: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
