"""Weights gathered inside linears of TransformerEngine's, against the torch path, on gloo ranks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_helix.exchange import gathered_weight, shards, step_sums
from megatron_helix.exchange.gathered_weight import GatheredWeight
from megatron_helix.exchange.plan import Plan
from megatron_helix.exchange.step_sums import StepSums
from megatron_helix.layers import linear
from megatron_helix.layers.lookahead import Neighbours
from megatron_helix.layers.weight_forms import finish_step
from megatron_helix.partition.layout import HelixLayout
from megatron_helix.partition.process_groups import HelixGroups, carve
from megatron_helix.recording.comm_ledger import CommLedger, install
from tests.distributed import run_distributed
from tests.engine_case import engine_class, oracle_class

D, F, HEADS, CHANNELS, N = 16, 48, 4, 8, 16
X = 3 * HEADS * CHANNELS
SIZES = {
    "linear_qkv": (D, X),
    "linear_proj": (HEADS * CHANNELS, D),
    "linear_fc1": (D, 2 * F),
    "linear_fc2": (F, D),
}
COLUMNS = ("linear_qkv", "linear_fc1")
MICRO_BATCHES = 2
PLAIN = Plan(exchange="weights", split="batch")
ONCE = Plan(exchange="weights", split="batch", gather="once")
STEP = Plan(exchange="weights", split="batch", gather="step")
Tensors = dict[str, torch.Tensor]


def everybody() -> dist.ProcessGroup:
    """All ranks."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def layout_of(m: int, n: int) -> HelixLayout:
    """Of a :class:`Chain`."""
    return HelixLayout(
        m=m, n=n, num_attention_heads=HEADS, num_query_groups=HEADS, kv_channels=CHANNELS
    )


class Chain:
    """The four linears of a layer, each on an input of its own, as a block calls them."""

    def __init__(
        self,
        m: int,
        n: int,
        make: Any,
        dtype: torch.dtype,
        *,
        main_grad: bool = True,
        bias: bool = True,
        groups: HelixGroups | None = None,
    ):
        layout = layout_of(m, n)
        self.m, self.n, self.dtype = m, n, dtype
        self.groups = groups or carve(layout, everybody())
        config = SimpleNamespace(gated_linear_unit=True, params_dtype=dtype)
        self.linears: dict[str, Any] = {}
        for name, (inputs, outputs) in SIZES.items():
            torch.manual_seed(dist.get_rank())
            self.linears[name] = make(name)(
                inputs,
                outputs,
                layout=layout,
                groups=self.groups,
                config=config,
                init_method=torch.nn.init.normal_,
                bias=bias,
            )
            for parameter in self.linears[name].parameters():
                if main_grad:
                    _as_megatron(parameter)

    def link(self, **known: bool) -> None:
        """As :func:`megatron_helix.layers.lookahead.link` does in a block."""
        chain = list(self.linears.values())
        for place, each in enumerate(chain):
            each.neighbours = Neighbours(
                preceding=chain[place - 1] if place else None,
                following=chain[place + 1] if place + 1 < len(chain) else None,
                beyond=None if place else chain[2],
                layer=tuple(chain),
                **known,
            )

    def step(self, plan: Plan, micro_batches: int = MICRO_BATCHES) -> Tensors:
        """Outputs and gradients of a step."""
        found: Tensors = {}
        for each in self.linears.values():
            each.plan = plan
            for parameter in each.parameters():
                parameter.grad = None
                if hasattr(parameter, "main_grad"):
                    parameter.main_grad.zero_()
        for turn in range(micro_batches):
            ys, grads = [], []
            for place, (name, each) in enumerate(self.linears.items()):
                x = self._input(name, 10 * turn + place)
                y, bias = each(x)
                assert bias is None
                ys.append(y)
                grads.append(self._drawn(500 + 10 * turn + place, *y.shape))
                found[f"{name} y {turn}"], found[f"{name} x {turn}"] = y.detach(), x
            torch.autograd.backward(ys, grads)
        finish_step(list(self.linears.values()))
        for name, tensor in found.items():
            found[name] = tensor.grad if tensor.grad is not None else tensor
        for name, each in self.linears.items():
            for kind, parameter in each.named_parameters():
                gradient = getattr(parameter, "main_grad", parameter.grad)
                found[f"{name} {kind}"] = gradient.clone()
        return found

    def _input(self, name: str, seed: int) -> torch.Tensor:
        column = name in COLUMNS
        rows = N // self.m // (self.n if column else 1)
        width = SIZES[name][0] // (1 if column else self.n)
        return self._drawn(seed, rows, 1, width).requires_grad_()

    def _drawn(self, seed: int, *shape: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(seed + 10_000 * dist.get_rank())
        return torch.randn(*shape, generator=draw).to(self.dtype)


def _as_megatron(parameter: Any) -> None:
    """Give a parameter what ``DistributedDataParallel`` gives it, its hook included."""
    parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float64)
    parameter.grad_added_to_main_grad = False

    def hook(*_: Any) -> None:
        if parameter.grad is not None and not parameter.grad_added_to_main_grad:
            parameter.main_grad += parameter.grad
        parameter.grad = None

    node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
    node.register_hook(hook)
    parameter.keeps_node = node


@contextmanager
def rows_in_engine(rows: bool = True) -> Iterator[None]:
    """Row linears too, as with FP8; or not, as without."""
    before = linear.in_float8
    linear.in_float8 = lambda: rows
    try:
        yield
    finally:
        linear.in_float8 = before


def _farthest(found: Tensors, exact: Tensors) -> float:
    assert found.keys() == exact.keys()
    return max(
        float((found[name].double() - exact[name].double()).norm() / exact[name].double().norm())
        for name in exact
    )


def differences(
    m: int, n: int, late: bool, main_grad: bool, rows: bool = True, bias: bool = True
) -> dict[str, float]:
    """Of the engine's chain from the torch path's, in double."""
    found = {}
    for copies in (step_sums.COPIES, 0):  # then no factor is copied
        with mock.patch.object(step_sums, "COPIES", copies):
            of_this = _differences(m, n, late, main_grad, rows, bias)
        found |= {f"{what}, {copies}": difference for what, difference in of_this.items()}
    return found


def _differences(
    m: int, n: int, late: bool, main_grad: bool, rows: bool, bias: bool
) -> dict[str, float]:
    oracle = Chain(m, n, oracle_class, torch.float64, main_grad=main_grad, bias=bias)
    engine = Chain(m, n, engine_class, torch.float64, main_grad=main_grad, bias=bias)
    oracle.link()
    engine.link(sums_later=late)
    found = {}
    with rows_in_engine(rows):
        exact = oracle.step(PLAIN)
        found["plain"] = _farthest(engine.step(PLAIN), exact)
        found["again"] = _farthest(engine.step(PLAIN), exact)
        found["once"] = _farthest(engine.step(ONCE), exact)
        found["step"] = _farthest(engine.step(STEP), exact)
        found["after step"] = _farthest(engine.step(PLAIN), exact)
    for each in engine.linears.values():
        assert each.is_first_microbatch  # a weight of its own is not in FP8 yet
        assert each.tp_group is engine.groups.tp
        assert "_lend" not in vars(each)
        assert each.wgrad_store is None
    return found


@pytest.mark.parametrize(("m", "n"), [(2, 1), (2, 2)])
@pytest.mark.parametrize(
    ("late", "main_grad", "bias"),
    [(False, True, False), (True, True, True), (True, False, True), (True, True, False)],
)
def test_outputs_and_gradients_are_those_of_the_torch_path(
    m: int, n: int, late: bool, main_grad: bool, bias: bool
) -> None:
    """Without biases the factors of a step's weight gradients are handed over, not products."""
    for found in run_distributed(differences, m * n, m, n, late, main_grad, True, bias):
        for what, difference in found.items():
            assert difference < 1e-13, what


def test_tiles_with_padding_are_multiplied_without_it() -> None:
    """By rows with ``step`` alone, as in half precision: FP8 is not for padded tiles."""
    for found in run_distributed(differences, 3, 3, 1, True, True, False):
        for what, difference in found.items():
            assert difference < 1e-13, what


def uses() -> tuple[list[str], float]:
    """What a step of the chain does with its weights, in order, where gathers begin early."""
    early, shards.runs_beside_compute = shards.runs_beside_compute, lambda _: True
    methods = {name: getattr(GatheredWeight, name) for name in ("whole", "send", "settle")}
    gathers = gathered_weight._gathers
    log: list[str] = []
    try:
        chain = Chain(2, 1, engine_class, torch.float64)
        chain.link(sums_later=True)
        names = {id(each.weight): name[7:] for name, each in chain.linears.items()}

        def noted(word: str, method: Any, when: Any) -> Any:
            def call(weight: GatheredWeight, *args: Any) -> Any:
                if id(weight.shard) in names and when(weight):
                    log.append(f"{word} {names[id(weight.shard)]}")
                return method(weight, *args)

            return call

        def gathered(weights: Sequence[GatheredWeight]) -> Any:
            known = (names[id(one.shard)] for one in weights if id(one.shard) in names)
            log.extend(f"gather {name}" for name in known)
            return gathers(weights)

        always: Any = lambda _: True  # noqa: E731
        leaving: Any = lambda weight: weight._leaves is not None  # noqa: E731
        pending = lambda weight: weight._sums_up is not None or leaving(weight)  # noqa: E731
        gathered_weight._gathers = gathered
        GatheredWeight.whole = noted("use", methods["whole"], always)
        GatheredWeight.send = noted("send", methods["send"], leaving)
        GatheredWeight.settle = noted("add", methods["settle"], pending)
        with rows_in_engine():
            chain.step(PLAIN)  # a first pass finds out what its linears gather
            log.clear()
            found = chain.step(PLAIN)
        half = len(log) // MICRO_BATCHES
        assert log[:half] == log[half:]
        oracle = Chain(2, 1, oracle_class, torch.float64)
        oracle.link()
        return log[:half], _farthest(found, oracle.step(PLAIN))
    finally:
        shards.runs_beside_compute, gathered_weight._gathers = early, gathers
        for name, method in methods.items():
            setattr(GatheredWeight, name, method)


def test_the_next_weight_is_on_its_way_and_gradients_are_sent_and_added_by_the_next() -> None:
    for log, difference in run_distributed(uses, 2):
        assert difference < 1e-13
        assert log == [
            *("use qkv", "gather qkv", "gather proj", "gather fc1", "use proj"),
            *("use fc1", "gather fc2", "use fc2"),
            *("use fc2", "gather fc2", "gather fc1", "use fc1", "send fc2", "gather proj"),
            *("add fc2", "use proj", "send fc1", "gather qkv", "add fc1"),
            *("use qkv", "send proj", "add proj", "add qkv", "send qkv"),
        ]


def returns() -> tuple[list[list[str]], list[float]]:
    """When steps send sums home, where that begins early, and how far their gradients are off."""
    early, shards.runs_beside_compute = shards.runs_beside_compute, lambda _: True
    log: list[str] = []
    original = {name: getattr(StepSums, name) for name in ("_send", "finish")}

    def noted(name: str) -> Any:
        def call(weight: StepSums) -> None:
            if name == "finish" or weight._of_others is not None:
                log.append(name)
            original[name](weight)

        return call

    try:
        for name in original:
            setattr(StepSums, name, noted(name))
        chain = Chain(2, 1, engine_class, torch.float64)
        oracle = Chain(2, 1, oracle_class, torch.float64)
        chain.link(sums_later=True)
        oracle.link()
        logs, distances = [], []
        for micro_batches in (2, 2, 3, 1):
            log.clear()
            with rows_in_engine():
                found = chain.step(STEP, micro_batches)
            logs.append([*log])
            distances.append(_farthest(found, oracle.step(PLAIN, micro_batches)))
        return logs, distances
    finally:
        shards.runs_beside_compute = early
        for name, method in original.items():
            setattr(StepSums, name, method)


def test_sums_of_a_step_go_home_with_its_last_gradient() -> None:
    late, early = ["finish", "_send"] * 4, ["_send"] * 4 + ["finish"] * 4
    for logs, distances in run_distributed(returns, 2):
        # As many as in the step before; more are a sum of their own, fewer go when all is through.
        assert logs == [late, early, ["_send"] * 4 + late, late]
        assert max(distances) < 1e-13


def sent(m: int, n: int, plan: Plan) -> dict[tuple[str, str], int]:
    """Elements that a rank sends in a step, by axis and kind."""
    chain = Chain(m, n, engine_class, torch.float64)
    chain.link()
    ledger = CommLedger()
    uninstall = install(ledger)
    with rows_in_engine():
        chain.step(plan)
    uninstall()
    return {key: entry.elements for key, entry in ledger.take().items()}


@pytest.mark.parametrize("plan", [PLAIN, ONCE, STEP], ids=["microbatch", "once", "step"])
def test_a_step_sends_what_the_closed_forms_say(plan: Plan) -> None:
    m, n = 2, 2
    T = m * n
    weights = sum(inputs * outputs for inputs, outputs in SIZES.values())
    biases = sum(SIZES[name][1] for name in COLUMNS)
    gathers = 2 * MICRO_BATCHES if plan is PLAIN else 1
    sends = 0 if plan is STEP else MICRO_BATCHES
    tokens = (n - 1) * N * D // T * MICRO_BATCHES * 2  # two column and two row linears
    expected = {
        ("HELIX_DIM_GROUP", "all_gather"): (m - 1)
        * (gathers * weights + MICRO_BATCHES * biases)
        // T,
        ("HELIX_DIM_GROUP", "all_to_all"): (m - 1)
        * (sends * weights + MICRO_BATCHES * biases)
        // T,
        ("HELIX_HEAD_GROUP", "all_gather"): 3 * tokens,
        ("HELIX_HEAD_GROUP", "reduce_scatter"): 2 * tokens,
    }
    if plan is STEP:
        expected["HELIX_DIM_GROUP", "send"] = (m - 1) * weights // T
        expected["HELIX_DIM_GROUP", "recv"] = 0
    for found in run_distributed(sent, T, m, n, plan):
        assert found == expected
