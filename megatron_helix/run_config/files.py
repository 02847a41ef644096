"""A config file: YAML in, a frozen config out, or one line for every key that is wrong."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_helix.basics.errors import UserError


class Config(BaseModel):
    """A mapping of a config file; frozen, and without keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def read_config[T: Config](kind: type[T], path: Path) -> T:
    """The config of one ``kind`` in the file.

    Raises:
        UserError: naming the file, the path of each bad key, and what was wrong with it.
    """
    return validated(kind, read_mapping(path), path)


def validated[T: Config](kind: type[T], document: dict[str, Any], path: Path) -> T:
    """The config of one ``kind`` that the ``document`` from a file holds.

    Raises:
        UserError: naming the file, the path of each bad key, and what was wrong with it.
    """
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        lines = [f"{path}: {_said(item)}" for item in error.errors()]
        raise UserError("\n".join(lines)) from None


def _said(error: Any) -> str:
    """One error of pydantic's. One of our own says what was given, one of its does not."""
    place = ".".join(map(str, error["loc"]))
    said = f"{error['msg']}, got {error['input']!r}"
    if error["type"] == "value_error":
        said = error["msg"].removeprefix("Value error, ")
    return f"{place}: {said}" if place else said


def read_mapping(path: Path) -> dict[str, Any]:
    """The YAML mapping in the file.

    Raises:
        UserError: naming the file, when it cannot be read or holds something else.
    """
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: must be a mapping of keys to values")
    return document
