"""`tgi launch`: the flag table against TGI's, the configuration it gives, what it refuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tgi_cli.cli.app import load_command
from tgi_cli.cli.launch import server_url
from tgi_cli.cli.launch_config import SECTIONS, LaunchConfig, build, without_nodes
from tgi_cli.cli.launch_flags import SETTINGS, WORKING
from tgi_cli.config import EngineConfig, resolve
from tgi_cli.errors import UsageError

# Flags and variables of text-generation-launcher 3.3.
TGI_FLAGS = """
model-id revision validation-workers sharded num-shard quantize speculate dtype kv-cache-dtype
trust-remote-code max-concurrent-requests max-best-of max-stop-sequences max-top-n-tokens
max-input-tokens max-input-length max-total-tokens waiting-served-ratio max-batch-prefill-tokens
max-batch-total-tokens max-waiting-tokens max-batch-size cuda-graphs hostname port prometheus-port
shard-uds-path master-addr master-port huggingface-hub-cache weights-cache-override
disable-custom-kernels cuda-memory-fraction rope-scaling rope-factor json-output otlp-endpoint
otlp-service-name cors-allow-origin api-key watermark-gamma watermark-delta ngrok ngrok-authtoken
ngrok-edge tokenizer-config-path disable-grammar-support env max-client-batch-size lora-adapters
usage-stats payload-limit enable-prefill-logprobs graceful-termination-timeout
"""
VLLM_FLAGS = """
model served-model-name max-model-len max-num-seqs max-num-batched-tokens tensor-parallel-size
host api-key chat-template enable-prefix-caching gpu-memory-utilization enable-auto-tool-choice
tool-call-parser reasoning-parser enable-chunked-prefill enforce-eager dtype port seed revision
download-dir hf-token trust-remote-code load-format tokenizer-mode swap-space block-size
pipeline-parallel-size data-parallel-size enable-lora lora-modules speculative-config
limit-mm-per-prompt disable-log-requests disable-log-stats uvicorn-log-level ssl-keyfile
ssl-certfile quantization ssl-ca-certs ssl-cert-reqs uds api-server-count allowed-origins
max-num-queued-reqs otlp-traces-endpoint guided-decoding-backend scheduling-policy max-logprobs
response-role root-path
"""
# What the launch line of TGI's documentation asks for.
LAUNCH_LINE = """--model-id meta-llama/Llama-3.1-70B-Instruct --num-shard 4
 --quantize bitsandbytes-nf4 --max-batch-total-tokens 32768 --max-input-length 8192
 --max-total-tokens 12288"""


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("TGI_") and name not in ("MODEL_ID", "PORT", "HOSTNAME")
    }
    return subprocess.run(
        [sys.executable, "-m", "tgi_cli", "launch", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**clean, **environ},
    )


def configure(flags: dict[str, Any], environ: dict[str, str] | None = None) -> LaunchConfig:
    resolution = resolve(SETTINGS, {"--model-id": "m", **flags}, environ or {})
    return build(SETTINGS, resolution, default_host="127.0.0.1")


@pytest.mark.parametrize("name", [*TGI_FLAGS.split(), *VLLM_FLAGS.split()])
def test_every_flag_of_tgi_and_vllm_is_known(name: str) -> None:
    assert any(f"--{name}" in setting.spellings for setting in SETTINGS)


@pytest.mark.parametrize("name", TGI_FLAGS.split())
def test_every_tgi_flag_is_read_from_its_bare_variable(name: str) -> None:
    variable = name.upper().replace("-", "_")
    [setting] = [setting for setting in SETTINGS if f"--{name}" in setting.spellings]
    assert variable in setting.variables[-1]
    assert f"TGI_{variable}" in setting.variables[0]


def test_spellings_and_variables_belong_to_one_setting_each() -> None:
    spellings = [name for setting in SETTINGS for name in setting.spellings]
    variables = [name for setting in SETTINGS for names in setting.variables for name in names]
    assert len(spellings) == len(set(spellings))
    assert len(variables) == len(set(variables))


def test_every_working_setting_goes_somewhere_and_every_field_is_reached() -> None:
    assert [setting.name for setting in WORKING if not setting.fields] == ["sharded", "env"]
    reached = {field for setting in SETTINGS for field in setting.fields}
    fields = {
        f"{section}.{name}"
        for section, struct in SECTIONS.items()
        for name in struct.__struct_fields__
        if section != "engine" or name not in SECTIONS
    }
    # Repository code is never run, so nothing may turn this on.
    assert fields - reached == {"model.trust_remote_code"}
    assert reached <= fields


def _another_value(setting: Any) -> str:
    if setting.choices:
        return str(setting.choices[-1])
    return {"integer": "77", "number": "0.25", "switch": "false", "address": "10.1.2.3"}.get(
        setting.kind, "some-text"
    )


@pytest.mark.parametrize("setting", [s for s in WORKING if s.fields], ids=lambda s: s.name)
def test_every_working_setting_arrives_in_its_fields(setting: Any, tmp_path: Path) -> None:
    text = _another_value(setting)
    if (
        setting.name in ("chat_template", "tokenizer_config_path")
        or "file" in setting.name
        or (setting.name == "ssl_ca_certs")
    ):
        text = str(tmp_path / "file")
        Path(text).touch()
    if setting.name in (
        "json_output",
        "disable_grammar_support",
        "strict_fields",
    ):  # off unless told
        text = "true"
    if setting.name.endswith("_route"):
        text = "/path"
    together = {"nnodes": "77", "node_rank": "78"}  # one alone contradicts the others' defaults
    needed = {}
    if (nodes := together.get(setting.name)) is not None:
        needed = {"--nnodes": nodes, "--num-shard": nodes, "--master-addr": "10.0.0.1"}
    config = configure({**needed, setting.flag: text})
    for field in setting.fields:
        section, name = field.split(".")
        owner: Any = config.server if section == "server" else config.engine
        if section not in ("server", "engine"):
            owner = getattr(owner, section)
        value = getattr(owner, name)
        if setting.name == "lora_adapters":  # parsed already
            value = tuple(adapter.name for adapter in value)
        shown = {True: "true", False: "false"}.get(value, value) if type(value) is bool else value
        assert str(shown) in (text, f"('{text}',)")
        default = LaunchConfig(
            engine=EngineConfig(model=configure({}).engine.model), server=configure({}).server
        )
        assert msgspec.to_builtins(config) != msgspec.to_builtins(default)


def test_the_documented_launch_line_works() -> None:
    line = LAUNCH_LINE.split()
    shown = run(*line, "--show-config")
    assert shown.returncode == 0, shown.stderr
    config = json.loads(shown.stdout)
    assert config["engine"]["model"]["quantize"] == "bitsandbytes-nf4"
    assert config["engine"]["parallel"]["num_shard"] == 4
    assert config["engine"]["cache"]["kv_cache_tokens"] == 32768
    assert config["engine"]["model"]["max_model_len"] == 12288
    assert config["server"]["max_input_tokens"] == 8192
    assert config["server"]["max_total_tokens"] == 12288


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--sharded", "true"), "--sharded is true, but the model is to have 1 shard"),
        (("--sharded", "false", "--num-shard", "2"), "--sharded is false, but --num-shard asks"),
        (("--nnodes", "2", "--num-shard", "2"), "--nnodes 2 needs --master-addr"),
        (("--nnodes", "2", "--num-shard", "3"), "3 shards do not divide over 2 nodes"),
        (
            ("--nnodes", "2", "--num-shard", "2", "--node-rank", "2", "--master-addr", "h"),
            "--node-rank 2 is not one of 2 nodes",
        ),
    ],
)
def test_contradictory_shards_are_refused(words: tuple[str, ...], said: str) -> None:
    flags = dict(zip(words[::2], words[1::2], strict=True))
    with pytest.raises(UsageError, match=said):
        configure(flags)


def test_settings_of_several_nodes_have_no_effect_on_one() -> None:
    resolution = resolve(
        SETTINGS, {"--model-id": "m", "--dist-timeout": "9"}, {"MASTER_ADDR": "10.0.0.1"}
    )
    config = build(SETTINGS, resolution, default_host="127.0.0.1")
    assert list(without_nodes(config, resolution)) == [
        f"{name} has no effect: there is one node (--nnodes)"
        for name in ("MASTER_ADDR", "--dist-timeout")
    ]


def test_show_config_reads_the_environment_and_masks_secrets() -> None:
    shown = run(
        *("--token", "hf_secret", "--show-config", "--waiting-served-ratio", "1.2"),
        MODEL_ID="bare",
        TGI_MODEL_ID="prefixed",
        TGI_API_KEY="sesame",
        HOSTNAME="3f2a91bc",
        PORT="8080",
    )
    assert shown.returncode == 0, shown.stderr
    config = json.loads(shown.stdout)
    assert config["engine"]["model"]["model_id"] == "prefixed"
    assert config["server"]["host"] == "127.0.0.1"
    assert config["server"]["port"] == 8080
    assert "hf_secret" not in shown.stdout
    assert "sesame" not in shown.stdout
    assert "--waiting-served-ratio has no effect" in shown.stderr


def test_env_puts_the_report_of_tgi_env_on_stderr() -> None:
    shown = run("--model-id", "m", "--show-config", ENV="true")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["engine"]["model"]["model_id"] == "m"
    assert "deterministic" in shown.stderr
    assert run("--model-id", "m", "--show-config", ENV="production").stderr == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no model", "--model-id demo"]),
        (["--model-id", "m", "--port", "99999"], ["--port is '99999'", "65535"]),
        (["--model", "a", "--model-id", "b"], ["--model-id and --model are the same setting"]),
        (["--model-id", "m", "--dtype", "int3"], ["--dtype is 'int3'", "bfloat16"]),
        (["--model-id", "m", "--no-such-flag"], ["--no-such-flag"]),
        (["--model-id", "m", "--json"], ["--json goes with --dry-run"]),
        (["--model-id", "m", "--chat-template", "/no/file"], ["--chat-template names /no/file"]),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(
    arguments: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("MODEL_ID", "TGI_MODEL_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as ended:
        load_command("launch").main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    for word in words:
        assert word in said.err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            {"--max-input-tokens": "10", "--max-total-tokens": "10"},
            "--max-input-tokens is 10 but must be less than --max-total-tokens, which is 10",
        ),
        (
            {"--max-total-tokens": "100", "--max-model-len": "99"},
            "--max-total-tokens is 100 but must be at most --max-model-len, which is 99",
        ),
        (
            {"--max-total-tokens": "100", "--max-batch-total-tokens": "50"},
            "--max-total-tokens is 100 but must be at most --max-batch-total-tokens, which is 50",
        ),
        (
            {"--kv-cache-tokens": "8"},
            "--block-size is 16 but must be at most --kv-cache-tokens, which is 8",
        ),
    ],
)
def test_limits_that_contradict_each_other_are_named(flags: dict[str, str], sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        configure(flags)
    assert refused.value.message == sentence


def test_a_chat_template_may_be_given_itself() -> None:
    template = "{{ messages[0].content }}"
    assert configure({"--chat-template": template}).server.chat_template == template


def test_a_launch_line_of_vllm() -> None:
    line = """--model m --served-model-name n --max-model-len 4096 --max-num-seqs 8 --host 0.0.0.0
     --enable-prefix-caching --tensor-parallel-size 1 --pipeline-parallel-size 1 --api-key k
     --gpu-memory-utilization 0.9 --enable-auto-tool-choice --tool-call-parser hermes
     --reasoning-parser qwen3 --enable-chunked-prefill --disable-log-requests"""
    shown = run(*line.split(), "--show-config")
    assert shown.returncode == 0, shown.stderr
    config = json.loads(shown.stdout)
    assert config["engine"]["model"]["model_id"] == "m"
    assert config["engine"]["model"]["max_model_len"] == 4096
    assert config["server"]["served_model_name"] == "n"
    assert config["engine"]["scheduler"]["max_num_seqs"] == 8
    said = shown.stderr.splitlines()
    without = ("gpu-memory-utilization", "tool-call-parser", "reasoning-parser", "disable-log")
    assert len(said) == len(without)  # those that ask for what is so anyway are not worth a line
    for name in without:
        assert any(f"--{name}" in text and "has no effect" in text for text in said)
    adapted = run(
        *line.split(), "--enable-lora", "--max-lora-rank", "32", "--show-config",
        "--lora-modules", "a=/x,b=org/repo@v1", "--lora-modules", "org/c",
    )  # fmt: skip
    assert adapted.returncode == 0, adapted.stderr
    lora = json.loads(adapted.stdout)["engine"]["lora"]
    assert lora["max_rank"] == 32
    assert [(each["name"], each["source"], each["revision"]) for each in lora["adapters"]] == [
        ("a", "/x", None),
        ("b", "org/repo", "v1"),
        ("org/c", "org/c", None),
    ]
    clash = run(*line.split(), "--lora-adapters", "n=/x", "--show-config")
    assert clash.returncode == 2
    assert "--lora-adapters calls an adapter `n`, which is the model's own name" in clash.stderr
    refused = run(
        *line.split(), "--enable-sleep-mode", "--speculative-config", "{}", "--show-config"
    )
    assert refused.returncode == 2
    assert "--enable-sleep-mode (sleeping)" in refused.stderr
    assert "--speculative-config {} (speculative decoding)" in refused.stderr


def test_hosting_platforms_say_port_routes_and_model() -> None:
    vertex = {"AIP_HTTP_PORT": "8080", "PORT": "80", "AIP_HEALTH_ROUTE": "/h"}
    resolution = resolve(SETTINGS, {"--model-id": "m"}, {**vertex, "AIP_PREDICT_ROUTE": "/p"})
    server = build(SETTINGS, resolution, default_host="127.0.0.1").server
    assert (server.host, server.port) == ("0.0.0.0", 8080)
    assert (server.health_route, server.predict_route) == ("/h", "/p")
    sagemaker = {"SAGEMAKER_BIND_TO_PORT": "8081", "HF_MODEL_ID": "org/model"}
    config = build(SETTINGS, resolve(SETTINGS, {}, sagemaker), default_host="127.0.0.1")
    assert (config.server.host, config.server.port) == ("0.0.0.0", 8081)
    assert config.engine.model.model_id == "org/model"
    own = {**vertex, "TGI_PORT": "3001", "HOSTNAME": "127.0.0.1"}
    config = build(SETTINGS, resolve(SETTINGS, {"--model-id": "m"}, own), default_host="0.0.0.0")
    assert (config.server.host, config.server.port) == ("127.0.0.1", 3001)
    wrong = resolve(SETTINGS, {"--model-id": "m"}, {"AIP_HEALTH_ROUTE": "h"})
    with pytest.raises(UsageError, match="AIP_HEALTH_ROUTE is 'h'"):
        build(SETTINGS, wrong, default_host="127.0.0.1")


def test_the_alias_is_open_to_the_network_and_a_variable_still_wins() -> None:
    resolution = resolve(SETTINGS, {"--model-id": "m"}, {})
    assert build(SETTINGS, resolution, default_host="0.0.0.0").server.host == "0.0.0.0"
    resolution = resolve(SETTINGS, {"--model-id": "m"}, {"HOSTNAME": "127.0.0.1"})
    assert build(SETTINGS, resolution, default_host="0.0.0.0").server.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:5"),
        ("0.0.0.0", "http://127.0.0.1:5"),
        ("::", "http://[::1]:5"),
        ("10.1.2.3", "http://10.1.2.3:5"),
    ],
)
def test_the_printed_url_can_be_opened_on_this_machine(host: str, url: str) -> None:
    assert server_url(host, 5) == url


def test_help_names_every_flag_that_is_not_an_alias() -> None:
    shown = run("--help", COLUMNS="200", TERM="dumb", NO_COLOR="1")
    assert shown.returncode == 0
    for setting in SETTINGS:
        for spelling in setting.spellings[:1]:
            assert spelling in shown.stdout


def test_a_taken_port_is_an_expected_failure() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("--model-id", "/no/such/model", "--port", str(port))
    assert done.returncode == 1
    assert str(port) in done.stderr
    assert "Traceback" not in done.stderr


def test_port_0_prints_the_url_and_the_server_ends_with_its_stdin(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "tgi_cli", "launch", "--port", "0", "--stop-with-stdin"),
            *("--model-id", str(tiny_checkpoint("llama")), "--dtype", "float32"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("http://127.0.0.1:")
        out, err = server.communicate("", timeout=60)  # closes stdin
        assert out == ""
        assert server.returncode == 0, err
        assert "for this machine only" in err
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
