"""Settings: precedence, environment names, values out of range, the three classes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tgi_cli import config
from tgi_cli.config import Resolution, Setting, resolve
from tgi_cli.errors import UsageError

PORT = Setting(name="port", kind="integer", minimum=0, maximum=65535, bare=("PORT",), short="-p")
INPUT = Setting(
    name="max_input_tokens",
    kind="integer",
    minimum=1,
    aliases=("--max-input-length",),
    bare=("MAX_INPUT_TOKENS", "MAX_INPUT_LENGTH"),
)
HOST = Setting(name="hostname", kind="address", bare=("HOSTNAME",), shared=True)
ENV = Setting(name="env", kind="switch", bare=("ENV",), shared=True)
DTYPE = Setting(name="dtype", choices=("auto", "float32"), bare=("DTYPE",))
ORIGINS = Setting(name="cors_allow_origin", kind="list", bare=("CORS_ALLOW_ORIGIN",))
RATIO = Setting(name="ratio", kind="number", status="no meaning", note="nothing waits for it")
SHARDS = Setting(
    name="num_shard", kind="integer", status="to come", neutral=(1,), note="tensor parallelism"
)
SPECULATE = Setting(
    name="speculate", kind="integer", status="to come", neutral=(0,), note="drafting"
)


def one(setting: Setting, flags: dict[str, object], environ: dict[str, str]) -> Resolution:
    return resolve([setting], flags, environ)


@pytest.mark.parametrize(
    ("flags", "environ", "value", "source"),
    [
        ({"--port": "1"}, {"TGI_PORT": "2", "PORT": "3"}, 1, "--port"),
        ({}, {"TGI_PORT": "2", "PORT": "3"}, 2, "TGI_PORT"),
        ({"--port": None}, {"PORT": "3"}, 3, "PORT"),
        ({}, {"TGI_PORT": "", "PORT": "3"}, 3, "PORT"),
    ],
)
def test_a_flag_beats_the_prefixed_variable_beats_the_bare_one(
    flags: dict[str, object], environ: dict[str, str], value: int, source: str
) -> None:
    found = one(PORT, flags, environ)
    assert found.values == {"port": value}
    assert found.sources == {"port": source}


def test_nothing_given_leaves_the_default_to_the_struct() -> None:
    assert one(PORT, {}, {"HOME": "/"}) == Resolution({}, {}, ())


@pytest.mark.parametrize(
    ("setting", "flags", "environ", "sentence"),
    [
        (PORT, {"--port": "70000"}, {}, "--port is '70000' but must be an integer from 0 to 65535"),
        (PORT, {}, {"PORT": "http"}, "PORT is 'http' but must be an integer from 0 to 65535"),
        (PORT, {"--port": "-1"}, {}, "--port is '-1' but must be an integer from 0 to 65535"),
        (INPUT, {"--max-input-length": "0"}, {}, "--max-input-length is '0' but must be an inte"),
        (DTYPE, {}, {"TGI_DTYPE": "int3"}, "TGI_DTYPE is 'int3' but must be one of auto, float32"),
        (HOST, {"--hostname": "box"}, {}, "--hostname is 'box' but must be an IP address"),
        (RATIO, {"--ratio": "nan"}, {}, "--ratio is 'nan' but must be a number"),
        (ENV, {}, {"TGI_ENV": "maybe"}, "TGI_ENV is 'maybe' but must be true or false"),
    ],
)
def test_a_value_outside_its_range_is_named_with_its_limit(
    setting: Setting, flags: dict[str, object], environ: dict[str, str], sentence: str
) -> None:
    with pytest.raises(UsageError, match=f"^{sentence}"):
        one(setting, flags, environ)


def test_two_spellings_of_one_setting_are_an_error() -> None:
    with pytest.raises(UsageError, match="--max-input-tokens and --max-input-length are the same"):
        one(INPUT, {"--max-input-tokens": "5", "--max-input-length": "5"}, {})
    with pytest.raises(UsageError, match="MAX_INPUT_TOKENS and MAX_INPUT_LENGTH are the same"):
        one(INPUT, {}, {"MAX_INPUT_TOKENS": "5", "MAX_INPUT_LENGTH": "6"})
    assert one(INPUT, {}, {"MAX_INPUT_LENGTH": "6"}).values == {"max_input_tokens": 6}
    assert one(INPUT, {}, {"TGI_MAX_INPUT_LENGTH": "7"}).values == {"max_input_tokens": 7}


def test_hostname_counts_only_if_it_is_an_address() -> None:
    assert one(HOST, {}, {"HOSTNAME": "0.0.0.0"}).values == {"hostname": "0.0.0.0"}
    assert one(HOST, {}, {"HOSTNAME": "3f2a91bc"}) == Resolution({}, {}, ())
    named = one(HOST, {}, {"TGI_HOSTNAME": "box", "HOSTNAME": "::1"})
    assert named.values == {"hostname": "::1"}
    assert named.notices == ("TGI_HOSTNAME=box is ignored: it is not an IP address",)
    assert one(HOST, {"--hostname": "localhost"}, {}).values == {"hostname": "127.0.0.1"}


def test_variables_that_belong_to_others_are_passed_over() -> None:
    assert one(ENV, {}, {"ENV": "production"}) == Resolution({}, {}, ())
    linked = one(PORT, {}, {"TGI_PORT": "tcp://10.0.0.1:80", "PORT": "80"})
    assert linked.values == {"port": 80}
    assert "Kubernetes service link" in linked.notices[0]


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("TRUE", True), ("on", True), ("0", False), ("no", False)]
)
def test_booleans_from_the_environment(text: str, value: bool) -> None:
    assert one(ENV, {}, {"TGI_ENV": text}).values == {"env": value}


def test_lists_repeat_as_flags_and_take_commas_in_variables() -> None:
    assert one(ORIGINS, {"--cors-allow-origin": ["a", "b,c"]}, {}).values == {
        "cors_allow_origin": ("a", "b", "c")
    }
    assert one(ORIGINS, {}, {"CORS_ALLOW_ORIGIN": "a, b"}).values == {
        "cors_allow_origin": ("a", "b")
    }


def test_a_setting_without_meaning_says_why_and_sets_nothing() -> None:
    found = one(RATIO, {"--ratio": "0.3"}, {})
    assert found == Resolution({}, {}, ("--ratio has no effect: nothing waits for it",))


def test_features_to_come_are_refused_together_and_their_neutral_values_are_not() -> None:
    with pytest.raises(UsageError) as refused:
        resolve([SHARDS, SPECULATE], {"--num-shard": "4"}, {"TGI_SPECULATE": "3"})
    assert refused.value.message == (
        "not in this build yet: --num-shard 4 (tensor parallelism), TGI_SPECULATE 3 (drafting)"
    )
    found = resolve([SHARDS, SPECULATE], {"--num-shard": "1", "--speculate": "0"}, {})
    assert found.values == {"num_shard": 1, "speculate": 0}


def test_a_misspelled_variable_is_pointed_out() -> None:
    found = one(INPUT, {}, {"TGI_MAX_INPUT_TOKEN": "5", "TGI_SERVICE_HOST": "10.0.0.1"})
    assert found.notices == (
        "TGI_MAX_INPUT_TOKEN is not a setting and is ignored; did you mean TGI_MAX_INPUT_TOKENS?",
    )


def test_folders_follow_the_xdg_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert config.cache_dir() == tmp_path / "c" / "tgi"
    assert config.state_dir() == tmp_path / ".local" / "state" / "tgi"


def test_only_our_own_key_variable_is_sent_to_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "of another program")
    monkeypatch.delenv("TGI_API_KEY", raising=False)
    assert config.default_api_key() is None
    monkeypatch.setenv("TGI_API_KEY", "ours")
    assert config.default_api_key() == "ours"
    assert config.environment()["TGI_API_KEY"] == "ours"
