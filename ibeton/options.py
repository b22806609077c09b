"""Settings as dataclasses, and the command line that is made from them.

Each folder keeps its settings in one dataclass whose fields carry their own help, so help, defaults
and the saved configuration cannot disagree. A name that stands in two dataclasses (patch_size, say)
is one option with one value.
"""

import argparse
import dataclasses
import math
import sys
import typing
from dataclasses import field
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field that carries its help text and, where it has them, its choices."""
    return field(default=default, metadata={"help": help, "choices": choices})


def finite_float(text: str) -> float:
    """A float of the command line. Raises ArgumentTypeError for NaN and infinity, ValueError for
    what is no number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def flag(name: str) -> str:
    """The command-line spelling of a field: out_dim -> --out-dim."""
    return f"--{name.replace('_', '-')}"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, with exit status 2. Run as a subcommand of
    `ibeton`, it calls itself by that."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        if sys.argv[0].startswith("ibeton "):
            settings["prog"] = sys.argv[0]
        super().__init__(*args, **settings)
        self.register("type", float, finite_float)  # what type=float means here

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"error: {message}\n")


def add_options(parser: argparse.ArgumentParser, *settings: type) -> None:
    """Add one option a field. What is not given on the command line stays out of the namespace, so
    that a preset can come between the defaults and the user."""
    seen: set[str] = set()
    for cls in settings:
        group = parser.add_argument_group((cls.__doc__ or cls.__name__).split(".")[0])
        hints = typing.get_type_hints(cls)
        for item in dataclasses.fields(cls):
            if item.name not in seen:
                seen.add(item.name)
                _add_option(group, item, hints[item.name])


def _add_option(group: Any, item: dataclasses.Field, hint: Any) -> None:
    arguments: dict[str, Any] = {
        "dest": item.name,
        "default": argparse.SUPPRESS,
        "help": f"{item.metadata['help']} (default: {_shown(item.default)})".replace("%", "%%"),
    }
    names = list(dict.fromkeys((flag(item.name), f"--{item.name}")))  # published spelling too
    if hint is bool:
        group.add_argument(*names, action=argparse.BooleanOptionalAction, **arguments)
        return
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        arguments["nargs"] = "+" if kinds[-1] is Ellipsis else len(kinds)
        hint = kinds[0]
    if item.metadata.get("choices"):
        arguments["choices"] = item.metadata["choices"]
    group.add_argument(*names, type=hint, **arguments)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(str(v) for v in value)
    return "none" if value == "" else str(value)


def fill(cls: type[Settings], values: dict[str, Any]) -> Settings:
    """Build `cls` from those of `values` that it has fields for; lists become tuples."""
    names = {item.name for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return cls(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}
    )
