"""The small experiment that several test files look at from all sides; it runs once."""

import copy
from typing import Any

from megatron_helix.experiment.config import ExperimentConfig

FILE = "small.yaml"  # that it was read from
DOCUMENT: dict[str, Any] = {
    "name": "small",
    "models": [
        {
            "name": "tiny",
            "num_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "kv_channels": 16,
            "ffn_hidden_size": 256,
        }
    ],
    "layouts": [
        {"name": "tp2_pp2", "tp": 2, "pp": 2, "micro_batch": 4},
        {"name": "helix_2x2", "m": 2, "n": 2, "exchange": "weights", "micro_batch": 4},
    ],
    "world_size": 4,
    "batch": {"sequences": 8, "sequence_length": 32},
    "phases": ["train", "prefill", "decode"],
    "decode": {"sequences": 4, "prompt_length": 8, "output_length": 4},
    "hardware": {
        "name": "four slow ranks",
        "devices": 4,
        "devices_per_node": 4,
        "gemm": {"value": 5, "unit": "GFLOP/s", "source": "made up"},
        "memory": {"value": 1, "unit": "GB", "source": "made up"},
        "memory_bandwidth": {"value": 1, "unit": "GB/s", "source": "made up"},
        "intra_node": {
            "bandwidth": {"value": 0.1, "unit": "GB/s", "source": "made up"},
            "latency": {"value": 500, "unit": "us", "source": "made up"},
        },
        "element_bytes": 4,
    },
    "steps": 4,
    "claims": [
        {
            "model": "tiny",
            "layout": "tp2_pp2",
            "phase": "train",
            "tokens_per_s": 100000,
            "tpot_ms": 0.8,
            "of": "another machine",
        },
        {
            "model": "tiny",
            "layout": "helix_2x2",
            "phase": "train",
            "tokens_per_s": 123456,
            "tpot_ms": 0.5,
            "of": "another machine",
        },
    ],
    "device": "cpu",
    # Ranks that are short of cores are held up long after the profiler has seen the end of a call.
    "verification": {"time_factor": 10.0, "busy_balance": 3.0},
}
DOCUMENT["outlook"] = {
    "experiment": {
        **{key: DOCUMENT[key] for key in ("models", "world_size", "claims")},
        "name": "elsewhere",
        "layouts": [
            *({**layout, "micro_batch": 8} for layout in DOCUMENT["layouts"]),
            {"name": "tp4", "tp": 4, "micro_batch": 8},
        ],
        "batch": {"sequences": 64, "sequence_length": 32},
        "phases": ["train", "prefill"],
        "steps": 1,
        "device": "cpu",
    },
    "hardware": [DOCUMENT["hardware"], {**DOCUMENT["hardware"], "name": "four others"}],
}
Values = dict[str, Any]


def experiment(**changed: Any) -> ExperimentConfig:
    """The small experiment, changed; without its request where it has no phase for it."""
    if "decode" not in changed.get("phases", ["decode"]):
        changed["decode"] = None
    if "layouts" in changed:  # the outlook has none of their names
        changed.setdefault("outlook", None)
    return ExperimentConfig.model_validate({**DOCUMENT, **changed})


def of(values: Values, component: str, run: str = "tiny-helix_2x2") -> Any:
    """A copy of a node's value, to be spoilt."""
    return copy.deepcopy(values[f"{component}/{run}"])
