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


class _KeysOnce(yaml.SafeLoader):
    """YAML's own rule, which PyYAML does not keep: of two equal keys it would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML's; a merge key (``<<``) may well bring what is given here, too."""
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        given: list[Any] = []
        for key in own:
            name = self.construct_object(key, deep=True)
            if name in given:
                where = f"line {key.start_mark.line + 1}"
                raise yaml.YAMLError(f"{where}: the key {name!r} is given twice; leave one away")
            given.append(name)
        return super().construct_mapping(node, deep)


def loaded(text: str) -> Any:
    """What a YAML document holds.

    Raises:
        yaml.YAMLError: saying where it is none, and of a mapping that has a key twice.
    """
    return yaml.load(text, _KeysOnce)


def read_mapping(path: Path) -> dict[str, Any]:
    """The YAML mapping in the file.

    Raises:
        UserError: naming the file, when it cannot be read or holds something else.
    """
    try:
        document = loaded(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: must be a mapping of keys to values")
    return document
