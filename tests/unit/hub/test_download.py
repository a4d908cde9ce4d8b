"""`hub.download` through `tgi download`, against a server that speaks the Hub's protocol."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from tests.hub_server.server import TOKEN, File, Hub, Repo
from tests.unit.hub.conftest import Client, blob, text

WANTED = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
}
SHARD = "model-00001-of-00002.safetensors"


def stored(client: Client, file: File) -> Path:
    return client.cache / "models--org--model/blobs" / file.sha256


def test_fetches_the_model_and_nothing_else(hub: Hub, client: Client, model: Repo) -> None:
    hub.delay = 0.002
    outcome = client.download("org/model")
    assert outcome.names == WANTED
    folder = Path(outcome.report["path"])
    assert {str(p.relative_to(folder)) for p in folder.rglob("*")} == WANTED
    for name in WANTED:
        assert (folder / name).read_bytes() == model.files[name].data
    assert outcome.report["commit"] == model.commit
    assert "done" in outcome.err
    assert hub.most_at_once >= 2, "files are fetched in parallel"
    assert not any(answer.authorized for answer in hub.served)

    sent = len(hub.served)
    again = client.download("org/model")
    assert again.report == outcome.report
    assert "is here already" in again.err
    assert len(hub.served) == sent, "nothing is fetched twice"


def test_prints_only_the_path_on_stdout(client: Client, model: Repo) -> None:
    done = client.start("org/model")
    out, _ = done.communicate(timeout=60)
    (line,) = out.splitlines()
    assert Path(line, "config.json").is_file()
    assert Path(line).is_relative_to(client.home / "hf/hub"), "HF_HOME is obeyed"
    other = client.start("org/model", HUGGINGFACE_HUB_CACHE=str(client.home / "b"))
    assert other.communicate(timeout=60)[0].startswith(str(client.home / "b"))


def test_goes_on_after_cut_connections(hub: Hub, client: Client, model: Repo) -> None:
    hub.cut_at[SHARD] = [1_000_000, 1_000_500, 2_500_000]
    outcome = client.download("org/model")
    data = (Path(outcome.report["path"]) / SHARD).read_bytes()
    assert data == model.files[SHARD].data
    assert [a.start for a in hub.served if a.name == SHARD] == [0, 1_000_000, 1_000_500, 2_500_000]
    assert hub.sent(SHARD) == len(data), "no byte is fetched twice"


def test_server_without_ranges(hub: Hub, client: Client, model: Repo) -> None:
    hub.ranges = False
    hub.cut_at[SHARD] = [1_000_000]
    outcome = client.download("org/model")
    assert (Path(outcome.report["path"]) / SHARD).read_bytes() == model.files[SHARD].data


def test_interrupted_download_resumes_in_the_next_run(
    hub: Hub, client: Client, model: Repo
) -> None:
    file = model.files[SHARD]
    hub.delay, hub.piece = 0.05, 100_000
    first = client.start("org/model", HF_HUB_CACHE=str(client.cache))
    part = stored(client, file).with_name(f"{file.sha256}.incomplete")
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size > 500_000):
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    _, complaint = first.communicate(timeout=30)
    assert first.returncode == 130
    assert "Traceback" not in complaint
    kept = part.stat().st_size
    assert kept > 500_000
    hub.delay = 0.0
    outcome = client.download("org/model")
    assert (Path(outcome.report["path"]) / SHARD).read_bytes() == file.data
    assert hub.served[-1].start > 0
    assert kept in {answer.start for answer in hub.served if answer.name == SHARD}


def test_two_processes_fetch_a_large_file_once(hub: Hub, client: Client, model: Repo) -> None:
    hub.delay = 0.02
    runs = [client.start("org/model") for _ in range(2)]
    (first, _), (second, complaint) = (run.communicate(timeout=60) for run in runs)
    assert first == second, complaint
    assert hub.sent(SHARD) == model.files[SHARD].size


def test_gives_up_on_a_server_that_sends_nothing(hub: Hub, client: Client, model: Repo) -> None:
    hub.cut_at[SHARD] = [0] * 50
    outcome = client.download("org/model")
    assert outcome.code == 1
    assert "error: cannot fetch 'org/model'" in outcome.err
    assert "a new try goes on from there" in outcome.err
    assert "Traceback" not in outcome.err


def test_damaged_file_is_fetched_again(hub: Hub, client: Client, model: Repo) -> None:
    hub.corrupt[SHARD] = 1
    outcome = client.download("org/model")
    assert (Path(outcome.report["path"]) / SHARD).read_bytes() == model.files[SHARD].data

    hub.repos["org/other"] = Repo({"config.json": text(), "model.safetensors": blob(9_000, 7)})
    hub.corrupt["model.safetensors"] = 2
    outcome = client.download("org/other")
    assert outcome.code == 1
    assert "arrived damaged twice" in outcome.err
    assert not list(client.cache.glob("models--org--other/snapshots/*/model.safetensors"))


def test_gated(hub: Hub, client: Client, model: Repo) -> None:
    model.gated = True
    outcome = client.download("org/model")
    assert outcome.code == 1
    assert "error: 'org/model' is gated: its owner gives access on request" in outcome.err
    assert f"{hub.url}/org/model" in outcome.err
    assert "HF_TOKEN" in outcome.err
    with_token = client.download("org/model", HF_TOKEN=TOKEN)
    assert "this token's account has no access" in with_token.err
    assert not hub.served


def test_a_name_from_the_server_is_no_path(hub: Hub, client: Client) -> None:
    class Traversal(File):
        sha256 = "../../../../escaped"

    hub.repos["org/evil"] = Repo({"model.safetensors": Traversal(b"x" * 100, lfs=True)})
    outcome = client.download("org/evil")
    assert outcome.code == 1
    assert not list(client.home.rglob("escaped*"))


def test_private_needs_the_token_and_only_the_hub_sees_it(
    hub: Hub, client: Client, model: Repo
) -> None:
    model.private = True
    without = client.download("org/model")
    assert without.code == 1
    assert "there is no model 'org/model'" in without.err
    assert "for a private model set HF_TOKEN (or pass --token)" in without.err
    wrong = client.download("org/model", "--token", "hf_wrong")
    assert "refused the token (401)" in wrong.err
    assert "hf_wrong" not in wrong.err
    assert client.download("org/model", HF_TOKEN=TOKEN).names == WANTED
    large = [answer for answer in hub.served if answer.name.endswith(".safetensors")]
    assert large
    assert not any(answer.authorized for answer in large), "the storage host gets no token"


def test_missing_model_and_revision(client: Client, model: Repo) -> None:
    missing = client.download("org/modle")
    assert missing.code == 1
    assert "there is no model 'org/modle'" in missing.err
    revision = client.download("org/model", "--revision", "v9")
    assert "error: 'org/model' has no revision 'v9'" in revision.err
    assert client.download("org/model", "--revision", model.commit).names == WANTED


def test_offline_from_the_cache(hub: Hub, client: Client, model: Repo) -> None:
    never = client.download("org/model", HF_HUB_OFFLINE="1")
    assert never.code == 1
    assert "error: 'org/model' is not in the cache, and HF_HUB_OFFLINE is set" in never.err
    online = client.download("org/model")
    requests = len(hub.requests)
    assert client.download("org/model", HF_HUB_OFFLINE="1").report == online.report
    assert len(hub.requests) == requests
    (Path(online.report["path"]) / SHARD).unlink()
    part = client.download("org/model", HF_HUB_OFFLINE="1")
    assert "is only in part in the cache" in part.err


def test_no_network(hub: Hub, client: Client, model: Repo) -> None:
    nowhere = "http://127.0.0.1:9"
    never = client.download("org/model", HF_ENDPOINT=nowhere)
    assert never.code == 1
    assert f"error: cannot fetch 'org/model': {nowhere} does not answer" in never.err
    online = client.download("org/model")
    cached = client.download("org/model", HF_ENDPOINT=nowhere)
    assert cached.report == online.report
    assert "using the copy of org/model in the cache" in cached.err


def test_hub_out_of_order(hub: Hub, client: Client, model: Repo) -> None:
    hub.down = True
    outcome = client.download("org/model")
    assert outcome.code == 1
    assert "answered 503" in outcome.err
    hub.down, hub.portal = False, True
    outcome = client.download("org/model")
    assert outcome.code == 1
    assert f"error: {hub.url} does not answer like a hub" in outcome.err


def test_disk_too_small_is_said_before_anything_is_fetched(
    hub: Hub, client: Client, model: Repo
) -> None:
    model.files[SHARD].declared_size = 10**15
    outcome = client.download("org/model", "--cache-dir", str(client.home / "here"))
    assert outcome.code == 1
    assert "error: 'org/model' needs 1000000.0 GB, but" in outcome.err
    assert f"{str(client.home / 'here')!r} has" in outcome.err
    assert "--cache-dir" in outcome.err
    assert not hub.served


def test_disk_full_on_the_way(client: Client, model: Repo) -> None:
    part = stored(client, model.files[SHARD]).with_name(f"{model.files[SHARD].sha256}.incomplete")
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")  # every write to it fails with ENOSPC
    outcome = client.download("org/model")
    assert outcome.code == 1
    assert "error: 'org/model' does not fit, but" in outcome.err
    assert "make room" in outcome.err


def test_cache_not_writable(client: Client, model: Repo, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    outcome = client.download("org/model", "--cache-dir", str(tmp_path / "file"))
    assert outcome.code == 1
    assert "error: cannot keep 'org/model' in" in outcome.err


def test_include_and_exclude(client: Client, model: Repo) -> None:
    outcome = client.download("org/model", "--include", "onnx/", "--include", "*.md")
    assert outcome.names == {"onnx/model.onnx", "onnx/config.json", "README.md"}
    pickled = client.download("org/model", "--exclude", "*.safetensors")
    assert pickled.code == 1
    assert "pytorch_model-00001-of-00001.bin cannot be read as plain tensors" in pickled.err


def test_gguf_quantization(hub: Hub, client: Client) -> None:
    hub.repos["org/gguf"] = Repo(
        {
            "README.md": text(),
            "tiny-Q4_K_M.gguf": blob(5_000, 1),
            "tiny-Q8_0-00001-of-00002.gguf": blob(5_000, 2),
            "tiny-Q8_0-00002-of-00002.gguf": blob(5_000, 3),
        }
    )
    split = client.download("org/gguf:q8_0")
    assert split.names == {"tiny-Q8_0-00001-of-00002.gguf", "tiny-Q8_0-00002-of-00002.gguf"}
    assert split.report["path"].endswith("/tiny-Q8_0-00001-of-00002.gguf")
    again = client.download("org/gguf:q8_0", HF_HUB_OFFLINE="1")
    assert again.report == split.report
    wrong = client.download("org/gguf:Q2_K")
    assert wrong.code == 1
    assert "error: 'org/gguf' has no quantization 'Q2_K'" in wrong.err
    assert "hint: choose one with org/gguf:QUANT, of: Q4_K_M, Q8_0" in wrong.err


def test_token_is_never_shown(client: Client, model: Repo) -> None:
    model.gated = True
    outcome = client.download("org/model", "--verbose", "--token", TOKEN)
    assert TOKEN not in outcome.err + outcome.out
