"""The planner reads an experiment's flags for the precision of gradients."""

from collections.abc import Sequence

import pytest

from megatron_helix.basics.errors import UserError
from megatron_helix.experiment import gradients, runs
from megatron_helix.options import arguments, parsed
from megatron_helix.run_config.gradients import GradientFlags
from tests.experiment_case import experiment


@pytest.mark.parametrize(
    ("flags", "fsdp", "summed", "sent"),
    [
        ((), None, 4, 4),
        (("--grad-reduce-in-bf16",), None, 2, 2),
        (("--accumulate-allreduce-grads-in-fp32", "--grad-reduce-in-bf16"), None, 2, 2),
        (("--main-grads-dtype", "bf16"), None, 2, 2),
        (("--main-grads-dtype=bf16", "--accumulate-allreduce-grads-in-fp32"), None, 4, 4),
        ((), "megatron_fsdp", 2, 2),
        (("--megatron-fsdp-main-grads-dtype", "fp32"), "megatron_fsdp", 4, 4),
        (("--megatron-fsdp-main-grads-dtype", "fp32"), "torch_fsdp2", 2, 2),
        (("--megatron-fsdp-main-grads-dtype", "fp32"), None, 4, 4),
        (("--megatron-fsdp-grad-comm-dtype=fp32",), "megatron_fsdp", 2, 4),
    ],
)
def test_flags_are_read_as_megatron_reads_them(
    flags: Sequence[str], fsdp: str | None, summed: int, sent: int
) -> None:
    told = gradients.flags(experiment(flags=list(flags)))
    assert (told.summed_bytes("bf16", fsdp), told.sent_bytes("bf16", fsdp)) == (summed, sent)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    "flags", [(), ("--grad-reduce-in-bf16",), ("--accumulate-allreduce-grads-in-fp32",)], ids=str
)
def test_every_run_of_an_experiment_is_predicted_so(precision: str, flags: tuple) -> None:
    chosen = experiment(flags=list(flags), precision=precision, hardware=None, claims=[])
    for one in runs.compared(chosen):
        if one.phase == "train":
            wide = precision == "bf16" and "--grad-reduce-in-bf16" not in flags
            wide |= precision == "fp32" or "--accumulate-allreduce-grads-in-fp32" in flags
            assert runs.deployment(chosen, one).gradient_bytes == (4 if wide else 2)


def test_names_and_defaults_are_megatrons() -> None:
    args = vars(parsed.require_flags(arguments.complete(["--helix-device", "cpu"], 1)))
    assert {name: args[name] for name in vars(GradientFlags())} == vars(GradientFlags())


def test_a_flag_without_its_value_is_refused() -> None:
    with pytest.raises(UserError, match="--main-grads-dtype: expected one argument; correct"):
        gradients.flags(experiment(flags=["--main-grads-dtype"]))
