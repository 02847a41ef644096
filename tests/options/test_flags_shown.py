"""``--help`` shows the flags, on any machine: helix's first."""

import pytest
from typer.testing import CliRunner

from megatron_helix import cli, pretrain_gpt
from megatron_helix.options.flags import add_helix_arguments, shown


def test_a_rank_shows_both_groups_whatever_stands_beside(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a device is asked for, nor a flag read that is wrong."""
    monkeypatch.setattr(pretrain_gpt, "make_ready", lambda device: pytest.fail("not for a help"))
    for rank, words in (("1", ["--help"]), ("0", ["--helix-m", "x", "--help"]), ("0", ["-h"])):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended:
            pretrain_gpt.main(words)
        assert not ended.value.code
        told = capsys.readouterr()
        assert told.err == ""
        if rank == "1":
            assert told.out == ""
        else:
            assert told.out.startswith(shown(add_helix_arguments))
            assert "--num-layers NUM_LAYERS" in told.out.split("Megatron's:")[1]


@pytest.mark.parametrize("command", ["pretrain", "launch"])
def test_a_command_that_hands_flags_on_shows_helixs(command: str) -> None:
    result = CliRunner().invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert shown(add_helix_arguments) in result.output
    assert "python -m megatron_helix.pretrain_gpt --help" in result.output


def test_flags_of_a_command_may_ask_for_help_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    words = ["pretrain", "--nproc-per-node", "2", "--", "--help"]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0
    assert result.output.startswith("helix:")
