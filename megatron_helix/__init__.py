"""Two-level attention partitioning for Megatron-LM: n head groups x m head-dimension segments.

What an entry point or a layer spec of your own needs:

* :func:`enable`: give a Megatron model config helix layers, as the parsed flags ask;
* :class:`HelixLayout`: the m x n partition, its checks and its index arithmetic;
* :func:`helixify`: any stock layer spec with its attention cut m x n.

Importing the package loads neither torch nor Megatron; using one of the names does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_helix.layers.layer_spec import helixify
    from megatron_helix.partition.layout import HelixLayout
    from megatron_helix.plugin import enable

__all__ = ["HelixLayout", "__version__", "enable", "helixify"]
__version__ = "0.1.0"

_MODULES = {"HelixLayout": "partition.layout", "enable": "plugin", "helixify": "layers.layer_spec"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
