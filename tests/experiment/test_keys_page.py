"""docs/experiments.md has every key of an experiment file, as the config classes have it."""

import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from megatron_helix.experiment import config
from megatron_helix.run_config.batch import BatchConfig
from tests.script_module import script_module

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "experiments.md").read_text()


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script that writes the tables."""
    return script_module("docs/experiments.py")


def test_the_tables_are_current(script: ModuleType) -> None:
    assert script.page(PAGE) == PAGE, "call python docs/experiments.py"
    forged = PAGE.replace("| `world_size` | integer > 0 |", "| `world_size` | text |")
    assert forged != PAGE
    assert script.page(forged) == PAGE


def test_every_mapping_of_a_file_has_a_table(script: ModuleType) -> None:
    found = dict(script.kinds())
    assert found["batch"] is BatchConfig
    assert set(found) >= {"", "models", "layouts", "verification.fp16", "launcher", "outlook"}
    for path, kind in found.items():
        table = PAGE.partition(f"## {f'`{path}`' if path else script.TOP}\n")[2].partition("\n## ")[
            0
        ]
        assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(kind.model_fields)


def test_a_key_that_nothing_is_said_of_is_found(script: ModuleType) -> None:
    class Silent(BatchConfig):
        """Tokens.

        Attributes:
            sequences: of a step.
            sequence_length: tokens of each.
            documents: of unlike lengths.
        """

        silent: int

    with pytest.raises(KeyError, match=r"Silent: the docstring must say what .*silent"):
        script.meanings(Silent)


def test_the_example_of_the_page_is_an_experiment(tmp_path: Path) -> None:
    example = yaml.safe_load(PAGE.partition("```yaml\n")[2].partition("```")[0])
    file = DOCS.parent / "configs" / "experiments"
    example["models"] = [str(file / model) for model in example["models"]]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(example))
    assert config.load(tmp_path / "own.yaml").name == "own"
