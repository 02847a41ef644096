"""scripts/planted_faults.yaml follows the code: each of its lines is there, once."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_every_line_that_is_to_be_spoilt_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "scripts" / "planted_faults.py"
    spec = importlib.util.spec_from_file_location("planted_faults", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)  # its dataclasses look there
    spec.loader.exec_module(script)
    faults = script.load([])
    assert len(faults) > 100
    for fault in faults:
        assert fault.planted(ROOT) != (ROOT / fault.file).read_text(encoding="utf-8")
