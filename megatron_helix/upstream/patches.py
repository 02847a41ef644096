"""Every place where upstream is touched, with the version it was read in.

Megatron offers a seam for all the rest: layer specs, the argument parser, the model config. What is
here has none.
"""

import argparse
import logging
import warnings
from collections.abc import Callable
from functools import cache, partial, wraps
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from signal import SIGKILL
from typing import Any

from packaging.version import Version

from megatron_helix.basics import signals

SUPPORTED = ("0.19", "0.20")  # first, and first no longer


def require_supported_megatron() -> None:
    """Refuse a megatron-core the plugin was not written against.

    Raises:
        ImportError: outside megatron-core 0.19.
    """
    found = Version(version("megatron-core"))
    if not Version(SUPPORTED[0]) <= found < Version(SUPPORTED[1]):
        raise ImportError(
            f"megatron-core: need >= {SUPPORTED[0]} and < {SUPPORTED[1]}, found {found};"
            f" pip install 'megatron-core=={SUPPORTED[0]}.*'"
        )


# What is said to those who write Megatron or torch, and its user can do nothing about.
_SAID_TO_OTHERS = (
    ".*(Apex|Transformer Engine|transformer-engine|absl).*",  # optional, and not there
    ".*Mimo.*is experimental",  # imported with the rest; helix has nothing to do with it
    ".*torch.distributed.* is deprecated",  # torch 2.13's new names, which 0.19 does not know
)


def quieten() -> None:
    """Keep back what Megatron and torch say of themselves, when imported and when they run.

    To be called before they are imported; forked ranks inherit it.
    """
    for message in _SAID_TO_OTHERS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def use_compiled_dataset_helpers() -> None:
    """Spare Megatron the compilation of dataset helpers that are compiled already.

    A Megatron-LM checkout compiles them with the Makefile beside them. The wheel ships them
    compiled, without the Makefile, and calls it all the same.
    """
    from megatron.core.datasets import utils

    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401  # is it there?
    except ImportError:
        return
    utils.compile_helpers = lambda: None


@cache
def read_flag_help_once() -> None:
    """Read the help texts of Megatron's flags now, and keep them.

    Megatron finds them by parsing the source of its config classes, 0.6 s of CPU for every parser
    it makes, and a run makes two. What is kept is inherited by forked ranks.
    """
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.arguments import add_megatron_arguments

    factory = object.__new__(ArgumentGroupFactory)  # reading needs none of what a group is made of
    help_of = cache(partial(ArgumentGroupFactory._get_field_docstrings, factory))
    ArgumentGroupFactory._get_field_docstrings = lambda self, config: help_of(config)
    add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


@cache
def fork_checkpoint_manager() -> None:
    """The process through which a checkpoint's writers report is a fork of its rank, on the CPU.

    Megatron spawns it, and it imports Megatron again: 4 s of CPU a rank. A fork has its rank's
    pipes and sockets, and ends with it, lest nobody see that the rank has ended.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def results_queue(mp_mode: str = "fork") -> Any:
        if filesystem_async._results_queue is None:
            manager = SyncManager(ctx=get_context("fork"))
            manager.start(signals.end_with_parent, (SIGKILL,))
            filesystem_async._results_queue = manager.Queue()
        return filesystem_async._results_queue

    filesystem_async.get_write_results_queue = results_queue


def skip_warm_up() -> None:
    """Leave out Megatron's warm-up of fused GPU kernels, which a CPU does not have.

    It draws tensors whose sizes depend on the layout. A GPU draws them from a generator of its own;
    on the CPU they would come from the one that draws the first weights, and move those.
    """
    from megatron.training import training

    training.set_jit_fusion_options = lambda tp_size=None: None


def load_into_torch_adam() -> None:
    """Let a distributed optimizer load its state where Adam is torch's, as it is on a CPU.

    Megatron's counts on the fused Adam of TransformerEngine or Apex, which keeps the step with the
    parameter groups. Torch's keeps it with each parameter, and has none before the first step. 0.19
    asks a fresh optimizer for it, asks a parameter's loaded state, which is without, and then gives
    all parameters one tensor for it, which each of them counts up.
    """
    import torch
    from megatron.core.optimizer import distrib_optimizer

    optimizer = distrib_optimizer.DistributedOptimizer
    describe, load = optimizer.sharded_state_dict, optimizer.load_state_dict
    fill = optimizer._set_main_param_and_optimizer_states
    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(describe, "__wrapped__"):
        return

    @wraps(describe)
    def sharded_state_dict(
        self: Any, model: dict[str, Any], is_loading: bool = False, **kwargs: Any
    ) -> Any:
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()  # the load overwrites them
        return describe(self, model, is_loading, **kwargs)

    @wraps(load)
    def load_state_dict(self: Any, state: dict[str, Any]) -> None:
        load(self, state)
        for of_parameter in self.optimizer.state.values():
            of_parameter["step"] = of_parameter["step"].clone()

    @wraps(fill)
    def fill_without_step(self: Any, param: Any, tensors: dict[str, Any]) -> None:
        with torch.no_grad():  # in single precision it writes into the model's own parameters
            fill(self, param, {**tensors, "step": None})  # what is no tensor is passed over

    optimizer.sharded_state_dict, optimizer.load_state_dict = sharded_state_dict, load_state_dict
    optimizer._set_main_param_and_optimizer_states = fill_without_step


class _AnyDegree(int):
    """A number of heads that every tensor-parallel size divides."""

    def __mod__(self, other: int) -> int:
        return 0


def relax_head_check() -> None:
    """Let a ``TransformerConfig`` have more tensor-parallel ranks than heads or query groups.

    Its ``__post_init__`` refuses heads that the tensor-parallel size does not divide, and query
    groups that are neither its multiple nor its divisor. That holds for stock attention; helix
    requires of the head counts what :class:`megatron_helix.partition.layout.HelixLayout` says.
    Nothing else of the check is touched. To be called only where helix is on.

    Raises:
        ImportError: when this megatron-core does not check what 0.19 does.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    stock = TransformerConfig.__post_init__
    if hasattr(stock, "__wrapped__"):
        return
    three_on_two = {"num_layers": 1, "hidden_size": 6, "num_attention_heads": 3}
    try:
        TransformerConfig(**three_on_two, tensor_model_parallel_size=2)
    except ValueError:
        pass
    else:
        raise ImportError(
            "megatron-core: TransformerConfig was expected to refuse 3 heads on 2 tensor-parallel"
            f" ranks, as 0.19 does, and did not; found {version('megatron-core')}"
        )

    @wraps(stock)
    def checked(self: TransformerConfig) -> None:
        self.num_attention_heads = _AnyDegree(self.num_attention_heads)
        if self.num_query_groups is not None:
            self.num_query_groups = _AnyDegree(self.num_query_groups)
        try:
            stock(self)
        finally:
            self.num_attention_heads = int(self.num_attention_heads)
            if self.num_query_groups is not None:
                self.num_query_groups = int(self.num_query_groups)

    TransformerConfig.__post_init__ = checked


def map_mtp_spec(layer_spec: Callable[..., Any], change: Callable[[Any], Any]) -> None:
    """Apply ``change`` to the spec of the multi-token-prediction block.

    ``GPTModelBuilder`` makes it from the stock layer, whatever layer spec the config names, by a
    function that it looks up in its module. One whose block has no layer on a stage makes another
    one of it there, without norms of queries and keys: it is given the spec that stock has.

    Args:
        layer_spec: of a config and a virtual stage, what stock would build the decoder from.
        change: of the spec that comes of it.
    """
    from megatron.training.models import gpt

    stock = gpt.mtp_block_spec
    stock = getattr(stock, "__wrapped__", stock)

    @wraps(stock)
    def mtp_block_spec(config: Any, given: Any, vp_stage: int | None = None) -> Any:
        return change(stock(config, layer_spec(config, vp_stage), vp_stage=vp_stage))

    gpt.mtp_block_spec = mtp_block_spec


def observe_train_step(observer: Callable[..., Any]) -> None:
    """Call ``observer(train_step, *args)`` where the loop calls ``train_step(*args)``.

    ``megatron.training.training.train`` looks the function up in its module at every step, and has
    no callback that sees losses, gradient norm and duration of a step.
    """
    from megatron.training import training

    training.train_step = partial(observer, training.train_step)
