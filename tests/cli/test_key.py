"""`tgi key`: an entry that the server reads, and a key that opens it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tgi_cli.cli.app import load_command
from tgi_cli.serve.api_keys import ApiKeys, read_key_file


def make(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int | str | None, str, str]:
    with pytest.raises(SystemExit) as ended:
        load_command("key").main(list(arguments))
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_the_entry_is_read_and_the_key_opens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ("--requests-per-minute", "60", "--concurrency", "4", "--weight", "2")
    code, entry, said = make("team-a", *limits, "--quiet", capsys=capsys)
    assert code == 0
    other = make("team-b", capsys=capsys)[1]
    path = tmp_path / "keys.toml"
    path.write_text(entry + other)
    key = said.split()[-1]
    assert key not in entry
    assert ApiKeys(None, str(path)).tenant(key) == "team-a"
    read = read_key_file(str(path))
    assert (read["team-a"].requests_per_minute, read["team-a"].concurrency) == (60, 4)
    assert (read["team-a"].tokens_per_minute, read["team-a"].weight) == (None, 2.0)
    assert read["team-b"].requests_per_minute is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("team a",), "the tenant's name is 'team a'"),
        (("a", "--weight", "0"), "--weight is 0"),
        (("a", "--concurrency", "0"), "concurrency"),
    ],
)
def test_wrong_usage(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, said = make(*arguments, capsys=capsys)
    assert (code, out) == (2, "")
    assert words in said
