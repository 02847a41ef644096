"""One Megatron import for the whole suite, and the text that its training runs learn from.

The import costs seconds of CPU in every process. It happens here, once, and every distributed test
forks its ranks from this process (see :mod:`tests.distributed`). A plugin of :mod:`tests.conftest`.
"""

import fcntl
import os
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from rich.console import Console

from megatron_helix import corpus
from megatron_helix.upstream import cpu_device, patches

cpu_device.enable()  # before Megatron is imported: some of its modules bind torch.cuda's names
patches.quieten()

import megatron.training  # noqa: E402, F401

from megatron_helix import workflow  # noqa: E402
from tests.experiment_case import FILE, Values, experiment  # noqa: E402

patches.use_compiled_dataset_helpers()
torch.set_num_threads(1)  # a forked rank cannot use its parent's thread pool

# The first example of a property pays for imports: how long one takes says nothing here.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def corpus_prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a byte-level dataset of some of the standard library's sources."""
    library = Path(sysconfig.get_paths()["stdlib"])
    prefix = tmp_path_factory.mktemp("corpus") / "stdlib"
    corpus.build([library / "json", library / "email"], prefix, pattern="*.py")
    return prefix


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Values]:
    """The small experiment, run: its folder and the values of its nodes.

    Once for all of pytest's processes: the first one runs it, another reads what is finished.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with (folder / "experiment.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        out = folder / "experiment"
        return out, workflow.run(experiment(), out, Console(quiet=True), FILE)
