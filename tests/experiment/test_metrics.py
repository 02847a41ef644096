"""What the ranks wrote, put together."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_helix.basics import files
from megatron_helix.experiment import metrics
from tests.distributed import measured, tiny_gpt


def line(**known: Any) -> dict[str, Any]:
    """A step of a rank as it is written; what a test does not name is of no account to it."""
    step = {"step_s": 1.0, "communication_s": 0.0, "batch": 8, "tokens": 256, "loss": 5.0}
    return {**step, "grad_norm": 1.0, "skipped": False, "traffic": [], **known}


def write(folder: Path, *ranks: list[dict[str, Any]]) -> Path:
    """One file a rank, of a run that was started once."""
    for rank, lines in enumerate(ranks):
        told = [
            {"iteration": 1 + done, "first": done == 0, "ranks": len(ranks), **step}
            for done, step in enumerate(lines)
        ]
        text = "".join(json.dumps(step) + "\n" for step in told)
        files.of_rank(folder, rank, ".jsonl").write_text(text)
    return folder


def moved(axis: str, kind: str, sent_bytes: int) -> dict[str, Any]:
    """An entry of a step's traffic."""
    counts = {"calls": 1, "elements": 1, "sent_bytes": sent_bytes, "kept_bytes": 0}
    return {"axis": axis, "kind": kind, **counts}


def test_times_are_medians_of_the_slowest_rank_without_the_first_step(tmp_path: Path) -> None:
    first = [line(step_s=s) for s in (100.0, 1.0, 2.0, 9.0)]
    second = [line(step_s=s) for s in (100.0, 3.0, 1.0, 1.0)]
    found = metrics.read(write(tmp_path, first, second))
    assert found.step_ms == 3000.0  # of 3, 2 and 9 s
    assert found.tokens_per_s == 256 / 3.0


def test_communication_is_a_mean_over_ranks_for_every_batch_tokens(tmp_path: Path) -> None:
    ranks = [[line(communication_s=0.0), line(communication_s=s)] for s in (0.1, 0.3)]
    found = metrics.read(write(tmp_path, *ranks))
    assert found.tpot_ms == pytest.approx(0.2 * 1e3 * 8 / 256)


def test_memory_is_that_of_the_rank_with_most(tmp_path: Path) -> None:
    ranks = [[line(peak_memory_bytes=1), line(peak_memory_bytes=size)] for size in (7, 5)]
    found = metrics.read(write(tmp_path, *ranks))
    assert found.peak_memory_bytes == 7
    assert found.hidden_ms is found.computed_ms is None


def test_traffic_is_that_of_a_step_as_a_mean_over_ranks(tmp_path: Path) -> None:
    ranks = [
        [line(), line(traffic=[moved("TP", "all_gather", 100), moved("DIM", "all_to_all", 8)])],
        [line(), line(traffic=[moved("TP", "all_gather", 300)])],
    ]
    found = metrics.read(write(tmp_path, *ranks))
    assert found.sent_bytes == {"TP/all_gather": 200.0, "DIM/all_to_all": 4.0}


def test_a_value_that_only_some_ranks_know_is_taken_from_those(tmp_path: Path) -> None:
    first_stage = [line(loss=None, grad_norm=2.0), line(loss=None, grad_norm=1.5)]
    last_stage = [line(loss=5.5, grad_norm=2.0), line(loss=5.4, grad_norm=1.5)]
    for order in ((first_stage, last_stage), (last_stage, first_stage)):
        found = metrics.read(write(tmp_path, *order))
        assert found.losses == [5.5, 5.4]
        assert found.grad_norms == [2.0, 1.5]


def test_a_run_of_one_step_is_read(tmp_path: Path) -> None:
    assert metrics.read(write(tmp_path, [line(step_s=2.0)])).step_ms == 2000.0


def test_the_shortest_time_of_a_call_is_communication_and_the_rest_waiting(tmp_path: Path) -> None:
    ranks = [
        [
            line(),
            line(
                step_s=1.0,
                communication_s=s + 0.1,
                calls=[["g", 0, "all_gather", s], ["p", 0, p2p, 0.1]],
            ),
        ]
        for s, p2p in ((0.2, "send"), (0.6, "recv"))
    ]
    ranks[1][1]["calls"][1][3] = 0.3
    ranks[1][1]["communication_s"] = 0.9
    parts = metrics.read(write(tmp_path, *ranks)).breakdown_ms
    assert parts["communication"] == pytest.approx((0.2 + 0.1) * 1e3)
    assert parts["waiting"] == pytest.approx((0.0 + 0.4) / 2 * 1e3)
    assert parts["pipeline_idle"] == pytest.approx((0.0 + 0.2) / 2 * 1e3)
    assert parts["compute"] == pytest.approx((0.7 + 0.1) / 2 * 1e3)


def test_a_part_is_a_median_over_steps_as_the_step_is(tmp_path: Path) -> None:
    """One step that was held up says no more of the parts than of the whole."""
    steps = [line(), *(line(step_s=s, communication_s=s / 2) for s in (1.0, 2.0, 90.0))]
    found = metrics.read(write(tmp_path, steps))
    assert found.step_ms == 2000.0
    assert found.breakdown_ms["compute"] == 1000.0


@pytest.mark.parametrize(("steps", "known"), [(20, False), (21, True)])
def test_a_99th_percentile_needs_twenty_steps(tmp_path: Path, steps: int, known: bool) -> None:
    lines = [line(communication_s=float(step)) for step in range(steps)]  # the first warms up
    found = metrics.read(write(tmp_path, lines))
    assert (found.tpot_p99_ms is not None) is known
    assert not known or found.tpot_ms < (found.tpot_p99_ms or 0) < 20 * 1e3 * 8 / 256


def test_a_profiled_step_counts_in_no_time(tmp_path: Path) -> None:
    profile = {"ledger_s": 1.0, "profiler_s": 1.0, "hidden_s": 0.5, "computed_s": 1.5}
    steps = [line(step_s=9.0), line(step_s=2.0), line(step_s=7.0, profile=profile)]
    found = metrics.read(write(tmp_path, steps))
    assert found.step_ms == 2000.0
    assert found.per_rank[0]["profile"] == profile
    assert (found.hidden_ms, found.computed_ms) == (500.0, 1500.0)


@pytest.mark.parametrize(
    ("ranks", "counts"),
    [
        ([], r"set\(\)"),
        ([[], []], r"\{0\}"),
        ([[line(), line()], [line()]], r"\{1, 2\}"),
    ],
)
def test_ranks_that_disagree_or_wrote_nothing_are_refused(
    tmp_path: Path, ranks: list[list[dict[str, Any]]], counts: str
) -> None:
    with pytest.raises(
        ValueError, match=f"need the same number of steps of every rank, got {counts}"
    ):
        metrics.read(write(tmp_path, *ranks))


def restart(iteration: int, **known: Any) -> dict[str, Any]:
    """The first step of a run that goes on from a checkpoint."""
    return line(iteration=iteration, first=True, **known)


def test_what_a_restart_does_again_counts_as_it_was_done_last(tmp_path: Path) -> None:
    lost = [line(loss=loss, step_s=50.0) for loss in (9.0, 8.0, 7.0, 6.0)]
    redone = [restart(3, loss=5.0, step_s=90.0), line(iteration=4, loss=4.0, step_s=2.0)]
    found = metrics.read(write(tmp_path, [*lost, *redone], [*lost[:3], *redone]))
    assert found.losses == [9.0, 8.0, 5.0, 4.0]
    assert found.step_ms_spread == (2e3, 50e3)  # without the first step of either start
    assert metrics.steps_done(tmp_path) == 4


def test_a_run_from_the_beginning_counts_alone(tmp_path: Path) -> None:
    before, after = [line(loss=9.0)] * 4, [restart(1, loss=5.0), line(iteration=2, loss=4.0)]
    assert metrics.read(write(tmp_path, [*before, *after])).losses == [5.0, 4.0]
    assert metrics.steps_done(tmp_path) == 2


def test_a_line_that_is_being_written_is_no_step_yet(tmp_path: Path) -> None:
    write(tmp_path, [line(loss=5.0), line(loss=4.0)])
    file = files.of_rank(tmp_path, 0, ".jsonl")
    file.write_text(file.read_text() + '{"iteration": 3, "lo')
    assert metrics.steps_done(tmp_path) == 2
    assert metrics.read(tmp_path).losses == [5.0, 4.0]


def test_ranks_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    ranks = 102
    write(tmp_path, *([line(), line(busy_s=float(rank))] for rank in range(ranks)))
    found = [rank["busy_s"] for rank in metrics.read(tmp_path).per_rank]
    assert found == [float(rank) for rank in range(ranks)]


def test_ranks_that_a_wider_run_had_before_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, *[[line(loss=9.0, busy_s=1.0)]] * 4)
    write(tmp_path, *[[line(loss=5.0, busy_s=1.0)]] * 2)
    found = metrics.read(tmp_path)
    assert found.losses == [5.0]
    assert len(found.per_rank) == 2


def test_progress_is_that_of_the_slowest_rank(tmp_path: Path) -> None:
    assert metrics.steps_done(tmp_path) == 0
    write(tmp_path, [line(), line()], [line()])
    assert metrics.steps_done(tmp_path) == 1


def test_a_real_run_writes_what_its_collectives_moved(corpus_prefix: Path, tmp_path: Path) -> None:
    flags = ("--helix-m", "2", "--helix-n", "1", "--helix-exchange", "activations")
    found = measured(tiny_gpt(corpus_prefix, *flags, train_iters=2), 2, tmp_path)
    assert len(found.losses) == 2
    assert found.step_ms > 0
    assert 0 < found.tpot_ms < found.step_ms * 8 / 256  # a part of the step is communication
    # Two layers, two micro-batches of 4 x 32 tokens, forward and backward. Over the dim axis goes
    # (m-1)/m of a rank's packed QKV (3 heads of 16 channels for each of 4, cut in T) and context.
    tokens, m, T = 4 * 32, 2, 2
    elements = (m - 1) / m * tokens * (3 * 4 + 4) * 16 / T
    assert found.sent_bytes["HELIX_DIM_GROUP/all_to_all"] == 4 * elements * 2 * 2 * 2
