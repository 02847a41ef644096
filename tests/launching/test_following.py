"""Lines of a file that grows."""

from pathlib import Path

from megatron_helix.launching.following import Follower


def test_lines_are_told_once_and_whole(tmp_path: Path) -> None:
    told: list[str] = []
    file = tmp_path / "rank01.log"
    look = Follower(file, r"loss", told.append)
    look()
    for text, then in (
        ("noise\n loss: 1 |\n lo", ["loss: 1 |"]),
        ("ss: 2", ["loss: 1 |"]),
        (" |\n", ["loss: 1 |", "loss: 2 |"]),
        ("", ["loss: 1 |", "loss: 2 |"]),
    ):
        with file.open("a") as out:
            out.write(text)
        look()
        assert told == then
