"""Commands that compute nothing start at once: torch takes seconds to import."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from megatron_helix import cli
for line in sys.argv[1:]:
    cli.app(line.split(), standalone_mode=False)
    assert "torch" not in sys.modules, line
"""


def test_what_plans_and_prints_does_without_torch(tmp_path: Path) -> None:
    quickstart = "configs/experiments/quickstart.yaml"
    plan = "plan --model configs/models/dense.yaml --hardware configs/hardware/h100_nvl16.yaml"
    lines = [
        *("data --help", f"{plan} --layout tp=16,micro_batch=1", f"dag {quickstart}"),
        f"data docs --pattern *.md --out {tmp_path}/data",
        f"launch {quickstart} tiny_dense helix_4x4 --dry-run",
    ]
    subprocess.run([sys.executable, "-c", PROGRAM, *lines], check=True, capture_output=True)
