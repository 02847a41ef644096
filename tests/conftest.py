"""One Megatron import for the whole suite, and the text that its training runs learn from.

The import costs seconds of CPU in every process. It happens here, once, and every distributed test
forks its ranks from this process (see :mod:`tests.distributed`).
"""

import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from megatron_helix import compat, corpus, cpu_device

cpu_device.enable()  # before Megatron is imported: some of its modules bind torch.cuda's names
compat.quieten_imports()

import megatron.training  # noqa: E402, F401

compat.use_compiled_dataset_helpers()
torch.set_num_threads(1)  # a forked rank cannot use its parent's thread pool

# The first example of a property pays for imports: how long one takes says nothing here.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


MEGATRONS_WARNINGS = (
    r"ignore:::megatron\.",
    # Said elsewhere of what Megatron does: collectives called by their old names, old arguments of
    # its parser, memory pinned for a GPU whether there is one or not, and the gradient that its
    # distributed optimizer looks for on shards of parameters.
    "ignore:.torch.distributed.all_gather_into_tensor. is deprecated:FutureWarning",
    "ignore:.torch.distributed.reduce_scatter_tensor. is deprecated:FutureWarning",
    "ignore:.*is deprecated as of Python 3.12:DeprecationWarning:argparse",
    "ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, in ranks too, except those that Megatron gives rise to."""
    for line in MEGATRONS_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session")
def corpus_prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a byte-level dataset of some of the standard library's sources."""
    library = Path(sysconfig.get_paths()["stdlib"])
    prefix = tmp_path_factory.mktemp("corpus") / "stdlib"
    corpus.build([library / "json", library / "email"], prefix, pattern="*.py")
    return prefix
