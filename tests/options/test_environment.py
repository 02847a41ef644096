"""CUDA_DEVICE_MAX_CONNECTIONS: one queue or several, by the flags of the run."""

import pytest

from megatron_helix.options.environment import CONNECTIONS, needed

AHEAD = [
    ["--use-megatron-fsdp"],
    ["--use-torch-fsdp2", "--ckpt-format", "torch_dist"],
    ["--tensor-parallel-num-weight-shards", "2"],
    ["--tensor-parallel-num-weight-shards=2"],
]


@pytest.mark.parametrize("flags", AHEAD, ids=lambda flags: flags[0])
def test_what_gathers_ahead_gets_several_queues(flags: list[str]) -> None:
    assert needed(flags, {}) == {CONNECTIONS: "8"}
    assert needed(flags, {CONNECTIONS: "1"}) == {CONNECTIONS: "8"}
    assert needed(flags, {CONNECTIONS: "32"}) == {}


def test_all_others_get_one_unless_the_user_says_another() -> None:
    flags = ["torchrun", "-m", "x", "--tensor-model-parallel-size", "2", "--sequence-parallel"]
    assert needed(flags, {}) == {CONNECTIONS: "1"}
    assert needed(flags, {CONNECTIONS: "32"}) == {}
