"""Option groups (`hf_gdn.options`) as options of a command."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import Field, fields, is_dataclass, replace
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from ..errors import UserError


def names(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in names(text))
    except ValueError as error:
        raise UserError(f"--{option} {text}: expected whole numbers with commas between them, e.g. 1,8") from error


class _Option:
    """A field of a group as an option."""

    def __init__(self, field: Field, hint: Any) -> None:
        self.field, self.hint, self.metadata = field, hint, field.metadata
        self.name: str = self.metadata["name"] or field.name.replace("_", "-")
        self.argument = self.name.replace("-", "_")
        self.is_tuple, self.repeat = get_origin(hint) is tuple, self.metadata["repeat"]

    def parameter(self, default: Any, panel: str) -> inspect.Parameter:
        """What typer reads."""
        kind, shown = self.hint, default
        if self.is_tuple:
            kind = list[str] | None if self.repeat else str
            shown = (list(default) or None) if self.repeat else ",".join(map(str, default))
        info = typer.Option(
            f"--{self.name}",
            help=self.metadata["help"],
            min=self.metadata["minimum"],
            rich_help_panel=panel,
            show_default=shown not in (None, "", False),
        )
        return inspect.Parameter(
            self.argument, inspect.Parameter.KEYWORD_ONLY, default=shown, annotation=Annotated[kind, info]
        )

    def value(self, given: Any) -> Any:
        """What the group holds. Raises UserError for what is no number."""
        if not self.is_tuple:
            return given
        if self.repeat:
            return tuple(given or ())
        return _numbers(self.name, given) if get_args(self.hint)[0] is int else names(given)


def _options(group: Any) -> list[_Option]:
    hints = get_type_hints(group)
    return [_Option(field, hints[field.name]) for field in fields(group) if "help" in field.metadata]


def expanded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose parameters that are groups are replaced with the groups' options, for typer to read.

    A group's own defaults hold, or those of a group that is a parameter's default.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, tuple[Any, list[_Option]]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if not is_dataclass(hint):
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(annotation=hint, kind=keyword))
            continue
        defaults: Any = hint() if parameter.default is parameter.empty else parameter.default  # type: ignore[operator]
        groups[parameter.name] = defaults, _options(hint)
        parameters += [o.parameter(getattr(defaults, o.field.name), defaults.PANEL) for o in _options(hint)]

    @functools.wraps(function)
    def called(**given: Any) -> Any:
        built = {
            name: replace(defaults, **{o.field.name: o.value(given.pop(o.argument)) for o in options})
            for name, (defaults, options) in groups.items()
        }
        return function(**built, **given)

    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del called.__wrapped__  # type: ignore[attr-defined]
    return called
