"""`/metrics`: TGI's names, types, labels and buckets; what the engine's heartbeat adds."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.http.conftest import Site
from tests.unit.runtime.harness import make_request
from tests.unit.runtime.test_core import make_core
from tgi_cli.engine.messages import EngineStats, Heartbeat, StepRecord
from tgi_cli.serve.histogram import Histogram
from tgi_cli.serve.keys import METRICS

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
DOCS = Path(__file__).parents[2] / "docs"

# Read from TGI's source: 35 geometric buckets; 100 linear ones; sizes one by one.
DURATIONS = [0.00015 * 1.5**i for i in range(35)]
SIZES = [float(i) for i in range(1, 1025)]
INPUTS = [511 * i / 100 for i in range(1, 101)]
TOTALS = [512 * i / 100 for i in range(1, 101)]
PLAIN: dict[str, tuple[str, str | None]] = {
    "tgi_request_count": ("counter", None),
    "tgi_request_success": ("counter", None),
    "tgi_request_failure": ("counter", "err"),
    "tgi_queue_size": ("gauge", None),
    "tgi_batch_current_size": ("gauge", None),
    "tgi_batch_current_max_tokens": ("gauge", None),
    "tgi_batch_total_tokens": ("gauge", None),
    "tgi_batch_max_total_tokens": ("gauge", None),
    "tgi_batch_inference_count": ("counter", "method"),
    "tgi_batch_inference_success": ("counter", "method"),
    "tgi_batch_inference_failure": ("counter", "method"),
    "tgi_batch_concat": ("counter", "reason"),
}
HISTOGRAMS: dict[str, tuple[list[float], str | None]] = {
    "tgi_request_duration": (DURATIONS, None),
    "tgi_request_validation_duration": (DURATIONS, None),
    "tgi_request_queue_duration": (DURATIONS, None),
    "tgi_request_inference_duration": (DURATIONS, None),
    "tgi_request_mean_time_per_token_duration": (DURATIONS, None),
    "tgi_request_input_length": (INPUTS, None),
    "tgi_request_max_new_tokens": (TOTALS, None),
    "tgi_request_generated_tokens": (TOTALS, None),
    "tgi_batch_next_size": (SIZES, None),
    "tgi_batch_inference_duration": (DURATIONS, "method"),
    "tgi_batch_forward_duration": (DURATIONS, "method"),
    "tgi_batch_decode_duration": (DURATIONS, "method"),
    "tgi_batch_filter_duration": (DURATIONS, "method"),
    "tgi_batch_concat_duration": (DURATIONS, "method"),
}


async def scrape(site: Site) -> str:
    async with site.session.get("/metrics") as answer:
        return await answer.text()


@pytest.fixture
async def text(site: Site) -> str:
    await site.post(CHAT, HELLO)
    await site.post("/generate", {"inputs": ""})
    return await scrape(site)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_metrics_of_tgi(text: str, name: str) -> None:
    kind, label = PLAIN[name]
    assert f"\n# TYPE {name} {kind}\n" in f"\n{text}"
    label_text = r"\{" + label + r'="\w+"\}' if label else ""
    assert re.search(rf"^{name}{label_text} \S+$", text, re.MULTILINE)


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_histograms_of_tgi(text: str, name: str) -> None:
    bounds, label = HISTOGRAMS[name]
    assert f"\n# TYPE {name} histogram\n" in f"\n{text}"
    samples = re.findall(rf'^{name}_bucket\{{le="([^"]+)"(.*)\}}', text, re.MULTILINE)
    first = samples[0][1]
    assert (label is None and not first) or first.startswith(f",{label}=")
    found = [float(bound) for bound, labels in samples if labels == first]
    assert found == pytest.approx([*bounds, math.inf])


def test_every_metric_is_in_the_docs(text: str) -> None:
    quoted = " ".join(re.findall(r"`([^`]+)`", (DOCS / "metrics.md").read_text()))
    assert (
        "`tgi_batch_inference_count`, `_success`, `_failure`" in (DOCS / "metrics.md").read_text()
    )
    for family in text_string_to_metric_families(text):
        name = family.name + ("_total" if f"{family.name}_total" in text else "")
        suffix = re.sub("^tgi_batch_inference(_success|_failure)$", r"\1", name)
        assert re.search(rf"(^|\W){suffix}\b", quoted), name


async def test_tenants(site: Site) -> None:
    await site.post(CHAT, HELLO)
    found = await site.metrics()
    assert found['tgi_tenant_tokens_total{kind="generated",tenant=""}'] == 13
    assert found['tgi_tenant_queue_duration_sum{tenant=""}'] == 0.25


async def test_steps_arrive_by_heartbeat(site: Site) -> None:
    core, _ = make_core()
    for name in ("a", "b"):
        core.accept(make_request(request_id=name, max_tokens=3))
        core.step()
    core.step()
    assert core.heartbeat().tokens_held > 0
    while core.has_work():
        core.step()
    record = core.heartbeat().steps
    assert record is not None
    steps = sum(times.done for times in record.times.values())
    site.app[METRICS].engine.beat(core.heartbeat())
    found = await site.metrics()
    by_method = [found[f'tgi_batch_inference_count{{method="{m}"}}'] for m in ("prefill", "decode")]
    assert sum(by_method) == steps == core.heartbeat().num_steps
    assert min(by_method) > 0
    assert found['tgi_batch_inference_duration_count{method="prefill"}'] == by_method[0]
    assert found['tgi_batch_forward_duration_count{method="decode"}'] == by_method[1]
    booked = [name for name in found if re.match("tgi_batch_(decode|filter)_duration_count", name)]
    assert sum(found[name] for name in booked) == steps
    assert found["tgi_batch_next_size_count"] == 2
    assert found["tgi_batch_next_size_sum"] == 2
    assert found['tgi_batch_next_size_bucket{le="1.0"}'] == 2
    assert found['tgi_batch_concat{reason="chunking"}'] == 1
    assert found['tgi_batch_concat_duration_count{method="decode"}'] == 1
    assert found["tgi_batch_max_total_tokens"] == 4096


async def test_the_step_an_engine_died_in_has_failed(site: Site) -> None:
    core, executor = make_core()
    core.accept(make_request(max_tokens=3))
    core.step()
    executor.submit = None  # type: ignore[assignment]  # the next step raises
    with pytest.raises(TypeError):
        core.step()
    engine = site.app[METRICS].engine
    engine.beat(core.heartbeat())
    engine.lost()
    found = await site.metrics()
    assert found['tgi_batch_inference_failure{method="decode"}'] == 1
    assert found['tgi_batch_inference_failure{method="prefill"}'] == 0
    engine.beat(Heartbeat(num_steps=0, step_age=0.0, has_work=False, steps=StepRecord()))
    assert (await site.metrics())['tgi_batch_inference_failure{method="decode"}'] == 1


def test_a_bound_belongs_to_its_bucket() -> None:
    histogram = Histogram("h", "what", (1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    [family] = histogram.collect()
    buckets = {s.labels["le"]: s.value for s in family.samples if s.name == "h_bucket"}
    assert buckets == {"1.0": 2, "2.0": 4, "+Inf": 5}
    assert [s.value for s in family.samples if s.name in ("h_sum", "h_count")] == [5, 14.0]


async def test_stats_of_the_engine_are_read_when_scraped(site: Site) -> None:
    site.engine.stats = EngineStats(num_running=3)
    assert (await site.metrics())["tgi_running_sequences"] == 3
