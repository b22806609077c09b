"""Settings as dataclasses, and the command line that is made from them.

Each folder keeps its settings in one dataclass whose fields carry their own help, so help, defaults
and the saved configuration cannot disagree. A name that occurs in two dataclasses (patch_size, say)
is one option with one value.
"""

import argparse
import dataclasses
import math
import os
import sys
import typing
from collections.abc import Iterable, Iterator
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ibeton.published_names import nearest_option, nearest_value

Settings = TypeVar("Settings")
expand = os.path.expanduser  # the type of options that are paths but not `Path`s
_SWITCH = {"true": True, "yes": True, "false": False, "no": False}


def option(
    default: Any, help: str, choices: tuple[str, ...] | None = None, path: bool = False
) -> Any:
    """A dataclass field with its help text, its choices if any, and whether it names a path."""
    return field(default=default, metadata={"help": help, "choices": choices, "path": path})


def flag(name: str) -> str:
    """The command-line spelling of a field: out_dim -> --out-dim."""
    return f"--{name.replace('_', '-')}"


def check_output_file(option: str, path: Path, suffix: str, begins: bytes | None = None) -> None:
    """Raise ValueError or OSError, naming the option, unless a file may be written at `path`.

    Its name must end in `suffix`. One that is there may be replaced if it begins with `begins`, as
    what the command writes does; None: never.
    """
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder: give the name of a file")
    if path.suffix.lower() != suffix:
        raise ValueError(f"{option} {path}: give a name that ends in {suffix}")
    if path.exists() and (begins is None or _first_bytes(path, len(begins)) != begins):
        raise FileExistsError(f"{option} {path} exists, and is not replaced: give another name")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{option} {path}: the folder {path.parent} cannot be written")


def _first_bytes(path: Path, count: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)


def finite(text: str) -> float:
    """A float that is neither infinite nor NaN."""
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return number


def whole(text: str) -> int:
    """An integer of 64 bits."""
    number = int(text)
    if abs(number) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} does not fit in 64 bits")
    return number


class Help(argparse.RawDescriptionHelpFormatter):
    """Lists options with a short name for their values. The usage line leaves them out if they are
    many."""

    MANY = 8
    VALUES: ClassVar[dict[Any, str]] = {int: "N", float: "X", Path: "PATH", expand: "PATH"}

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any) -> str:
        needed = [action for action in actions if action.required or not action.option_strings]
        if usage is not None or len(actions) - len(needed) <= self.MANY:
            return super()._format_usage(usage, actions, groups, prefix)
        text = super()._format_usage(usage, needed, [], prefix)
        return text.replace(self._prog, f"{self._prog} [OPTIONS]", 1)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return self.VALUES.get(action.type) or super()._get_default_metavar_for_optional(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that reports every mistake of a command line at once, one sentence each,
    with exit status 2, and suggests the nearest option or value. Options are not abbreviated, `~`
    is expanded in paths (`type=Path` or `type=expand`), floats are finite, and integers have 64
    bits. Underscores in options, the published spelling, count as dashes. As a subcommand of
    `ibeton` it goes by that name."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        command = sys.argv[0]
        if command.startswith("ibeton "):
            below = settings.get("prog", "").removeprefix(command)  # of a subparser: " attention"
            named = below.startswith(" ") and not command.endswith(below)
            settings["prog"] = command + below if named else command
        settings.setdefault("allow_abbrev", False)
        settings.setdefault("formatter_class", Help)
        super().__init__(*args, **settings)
        self.register("type", Path, lambda text: Path(text).expanduser())
        self.register("type", float, finite)
        self.register("type", int, whole)
        self.register("type", None, expand)
        self._problems: list[str] = []

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"error: {message}\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; unknown options are errors."""
        words = self._our_spelling(list(sys.argv[1:] if args is None else args))
        found, unknown = super().parse_known_args(words, namespace)
        known = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action._name_parser_map.values():
                    known += parser._option_string_actions
        options = [word for word in unknown if word.startswith("-")]
        self._problems += [nearest_option(word, known) for word in options or unknown]
        self._report()
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; unknown options are returned."""
        words = self._our_spelling(list(sys.argv[1:] if args is None else args))
        found = super().parse_known_args(words, namespace)
        self._report()
        return found

    def _our_spelling(self, words: list[str]) -> list[str]:
        """The words in our spelling, where the published trainers have another: `--a_name` as
        `--a-name`, `--name true` as `--name`, `--name false` as `--no-name`."""
        plain: list[str] = []
        known = self._option_string_actions
        for i, word in enumerate(words):
            if word == "--":  # no options below
                return plain + words[i:]
            name, equals, value = word.partition("=")
            if word.startswith("--") and (dashed := name.replace("_", "-")) in known:
                word = dashed + equals + value
            before = plain[-1] if plain else ""
            switch = isinstance(known.get(before), argparse.BooleanOptionalAction)
            if not switch or before.startswith("--no-") or word.lower() not in _SWITCH:
                plain.append(word)
            elif not _SWITCH[word.lower()]:
                plain[-1] = f"--no-{before[2:]}"
        return plain

    def _report(self) -> None:
        problems, self._problems = self._problems, []
        if problems:
            self.error("\nerror: ".join(problems))

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        try:
            return super()._get_values(action, arg_strings)
        except argparse.ArgumentError as error:
            if action.nargs in (argparse.PARSER, argparse.REMAINDER):
                raise
            name = action.option_strings[0] if action.option_strings else action.dest
            self._problems.append(f"{name}: {error.message}")
            return None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(action, nearest_value(str(value), choices))


def add_options(parser: argparse.ArgumentParser, *settings: type) -> None:
    """Add one option per field. What is not given on the command line stays out of the namespace,
    so that a preset can come between the defaults and the user."""
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
        "help": _help(item).replace("%", "%%"),
    }
    if hint is bool:
        group.add_argument(flag(item.name), action=argparse.BooleanOptionalAction, **arguments)
        return
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        arguments["nargs"] = "+" if kinds[-1] is Ellipsis else len(kinds)
        hint = kinds[0]
    if item.metadata.get("choices"):
        arguments["choices"] = item.metadata["choices"]
    group.add_argument(flag(item.name), type=expand if item.metadata["path"] else hint, **arguments)


def _help(item: dataclasses.Field) -> str:
    """The help of a field, with its default unless that is empty or the help says it."""
    text, default = str(item.metadata["help"]), item.default
    if default in ("", ()) or "(default:" in text:
        return text
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f"{text} (default: {shown})"


def fill(cls: type[Settings], values: dict[str, Any]) -> Settings:
    """Build `cls` from those of `values` that it has fields for; lists become tuples."""
    names = {item.name for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return cls(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}
    )


def wrong_types(values: dict[str, Any], *settings: type) -> list[str]:
    """A sentence for each of `values` whose type is not its field's, or that is not finite. An
    integer counts as a float."""
    hints = {k: hint for cls in settings for k, hint in typing.get_type_hints(cls).items()}
    return [
        f"{flag(name)} {value!r}: expected {_in_words(hints[name])}"
        for name, value in values.items()
        if name in hints and not _is_of(value, hints[name])
    ]


def _is_of(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if not isinstance(value, list | tuple):
            return False
        return all(_is_of(v, kinds[0]) for v in value) and (
            kinds[-1] is Ellipsis or len(value) == len(kinds)
        )
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value)
    return type(value) is hint


def _in_words(hint: Any) -> str:
    if typing.get_origin(hint) is not tuple:
        return {float: "a finite number", int: "an integer", bool: "true or false"}.get(
            hint, "a string"
        )
    kinds = typing.get_args(hint)
    kind = {float: "finite numbers", int: "integers"}.get(kinds[0], "strings")
    return kind if kinds[-1] is Ellipsis else f"{len(kinds)} {kind}"


def changes(values: dict[str, Any], usual: dict[str, Any], leave_out: Iterable[str] = ()) -> str:
    """The settings of `values` that differ from `usual`, as the command line takes them."""
    return ", ".join(
        f"{flag(name)} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in values.items()
        if name not in leave_out and value != usual[name]
    )


def too_low(settings: Any, least: dict[tuple[str, ...], float]) -> Iterator[str]:
    """A sentence for each setting below the least value that `least` gives its name."""
    for names, limit in least.items():
        for name in names:
            if not (value := getattr(settings, name)) >= limit:  # NaN too
                yield f"{flag(name)} {value} must be at least {limit}"


def unknown_choices(settings: Any) -> Iterator[str]:
    """A sentence for each setting, or item of one, that is neither a choice nor the default."""
    for item in dataclasses.fields(settings):
        value, choices = getattr(settings, item.name), item.metadata.get("choices")
        for one in value if isinstance(value, tuple) else (value,):
            if choices and one not in (*choices, item.default):
                yield f"{flag(item.name)} {one}: expected one of {', '.join(choices)}"


def refuse(problems: Iterable[str]) -> None:
    """Raise one ValueError for all of `problems`, if there are any. Printed after "error: ", it is
    one line per problem."""
    if problems := list(dict.fromkeys(problems)):
        raise ValueError("\nerror: ".join(problems))
