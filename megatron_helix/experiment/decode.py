"""The phase ``decode`` of an experiment: one request of equal prompts, served by every layout.

Data-parallel ranks share the sequences, and the stages of a pipeline get as many micro-batches as
there are stages, where the sequences can be cut so. :mod:`megatron_helix.inference.measure` says
what is measured; here a layout's replicas are added up and its bytes are predicted.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np

from megatron_helix import corpus
from megatron_helix.basics import files
from megatron_helix.experiment import routed, runs
from megatron_helix.experiment.config import DecodeConfig, ExperimentConfig, VerificationConfig
from megatron_helix.experiment.runs import Run
from megatron_helix.launching.launchers import Program
from megatron_helix.planner.deployment import Deployment
from megatron_helix.planner.sizes import padded_rows
from megatron_helix.planner.traffic import step_bytes
from megatron_helix.run_config.batch import BatchConfig

# A prompt is a line of a file, so what would end or change one is a space.
_PLAIN = [chr(byte) if 32 <= byte < 127 and chr(byte) != "\\" else " " for byte in range(256)]


def asked(experiment: ExperimentConfig) -> DecodeConfig:
    """What the phase serves; an experiment that has the phase says it."""
    assert experiment.decode is not None
    return experiment.decode


def deployment(experiment: ExperimentConfig, run: Run) -> Deployment:
    """The run as the planner sees it: its last step, whose context is the longest."""
    request = asked(experiment)
    length = request.prompt_length + request.output_length
    batch = BatchConfig(sequences=request.sequences, sequence_length=length)
    whole = Deployment(
        run.model,
        run.layout,
        batch,
        experiment.world_size,
        "decode",
        run.precision,
        padded_vocabulary=padded_rows(corpus.VOCAB_SIZE, run.layout.tensor_parallel_size),
    )
    share = max(1, request.sequences // max(1, whole.batch_ranks))
    parts = run.layout.pp if share % run.layout.pp == 0 else 1
    layout = run.layout.model_copy(update={"micro_batch": share // parts})
    return replace(whole, layout=layout)


def predicted_bytes(experiment: ExperimentConfig, run: Run, rank: int) -> dict[Any, float]:
    """What a rank sends in a decode step, mean over the steps, by (axis, kind)."""
    here, request = deployment(experiment, run).check(), asked(experiment)
    # The context that each step attends to; what is sent depends on it for scores only.
    contexts = [request.prompt_length + step for step in range(1, request.output_length)]
    if here.plan.exchange != "scores":
        contexts = contexts[:1]
    sums: dict[Any, float] = defaultdict(float)
    for context in contexts:
        batch = BatchConfig(sequences=request.sequences, sequence_length=context)
        sent = step_bytes(replace(here, batch=batch), rank)
        for key, value in sent.items():
            sums[key] += value / len(contexts)
    return dict(sums)


def write_prompts(experiment: ExperimentConfig, run: Run, prefix: Path, file: Path) -> None:
    """The prompts of one replica, a line each: pieces of the dataset at ``prefix``, in order."""
    request, here = asked(experiment), deployment(experiment, run)
    own, length = request.sequences // here.batch_ranks, request.prompt_length
    tokens = np.fromfile(prefix.with_suffix(".bin"), dtype=np.uint8, count=own * length)
    tokens = np.resize(tokens, (own, length))  # a short dataset is read again from its start
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ("".join(_PLAIN[token] for token in row) + "\n" for row in tokens)
    files.write(file, "".join(lines))


def program(experiment: ExperimentConfig, run: Run, prompts: Path, out: Path) -> Program:
    """Serve the prompts from the weights that all runs of the model start from, and measure."""
    request, here = asked(experiment), deployment(experiment, run)
    load, folder = runs.initial_folder(out, run.model), runs.folder(out, run) / "metrics"
    # The optimizer is not there to be distributed.
    layout = here.layout.model_copy(update={"distributed_optimizer": False})
    precision = [] if run.precision == "fp32" else [f"--{run.precision}"]
    flags = ["--helix-device", experiment.device, *layout.flags(run.model), *precision]
    own = request.sequences // here.batch_ranks

    def forked() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        from megatron_helix import generate
        from megatron_helix.inference.requests import Request, read_prompts
        from megatron_helix.inference.sampling import Sampling

        wanted = Request(
            prompts=read_prompts((), prompts),
            new_tokens=request.output_length,
            max_batch=own,
            microbatches=here.microbatches,
        )
        job = generate.prepare(load, wanted, flags, experiment.world_size, experiment.device)
        return generate.measure, (job, Sampling(), folder)

    words = [
        *("megatron_helix.cli", "generate", "--load", str(load), "--prompts", str(prompts)),
        *("--tokens", str(request.output_length), "--max-batch", str(own)),
        *("--microbatches", str(here.microbatches), "--measure", str(folder), "--", *flags),
    ]
    return Program(words=words, forked=forked)


def read(experiment: ExperimentConfig, run: Run, folder: Path) -> dict[str, Any]:
    """What the ranks of a finished run measured; sequences and TPS of all replicas together."""
    from megatron_helix.inference import measure

    here, found = deployment(experiment, run), asdict(measure.read(folder))
    found["batch"] *= here.batch_ranks
    found["tokens_per_s"] *= here.batch_ranks
    return {**found, "microbatches": here.microbatches}


def verify(
    run: Run, cut: dict[str, Any], result: dict[str, Any], limits: VerificationConfig
) -> list[dict[str, Any]]:
    """The ledger's bytes of a decode step are the predicted ones, and the cache is balanced.

    What goes to experts and back is compared as it were at even loads.
    """
    means: dict[str, float] = defaultdict(float)
    for place in cut["ranks"]:
        for key, value in place["predicted_bytes"].items():
            means[key] += value / len(cut["ranks"])
    found = dict(result["sent_bytes"])
    if routed.KEY in found:
        ranks = len(cut["ranks"][0]["groups"]["ep"])
        kept = result["kept_bytes"].get(routed.KEY, 0)
        found[routed.KEY] = routed.at_even_loads(found[routed.KEY], kept, ranks)
    problems = [
        f"{key}: {means[key]:,.1f} bytes predicted, {found.get(key, 0):,.1f} sent"
        for key in sorted({*means, *found})
        if not isclose(means[key], found.get(key, 0), rel_tol=1e-9)
    ]
    total = sum(result["sent_bytes"].values()) * len(cut["ranks"]) / 1e6
    said = f"{total:,.3f} MB of all ranks in a decode step, all as predicted"
    held = result["kv_bytes"]
    ratio = max(held) * len(held) / sum(held)
    even = ratio <= limits.balance
    return [
        {
            "check": "communication: bytes",
            "run": run.name,
            "passed": not problems,
            "detail": "; ".join(problems) or said,
        },
        {
            "check": "load: KV cache",
            "run": run.name,
            "passed": even if run.layout.is_helix else None,
            "detail": f"max/mean over ranks of {max(held):,} bytes of cache: {ratio:.3f}"
            f" (limit {limits.balance:g})",
        },
    ]
