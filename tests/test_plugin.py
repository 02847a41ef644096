"""What ``plugin.enable`` gives Megatron's loop."""

from typing import Any

import pytest

from megatron_helix import plugin


def test_a_users_own_end_of_a_step_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(plugin, "finish_step", lambda model: calls.append(("helix", model)))
    finalize = plugin._finalize_model_grads(lambda *of, **named: calls.append((of, named)))
    finalize([], 3, pg_collection="groups")
    assert calls == [("helix", []), (([], 3), {"pg_collection": "groups"})]
