"""Memory on huge pages: it is zeroed and one's own, and the system does give huge pages."""

from pathlib import Path

import psutil
import pytest
import torch

from tgi_cli.kernels.backend import select
from tgi_cli.kernels.cpu.huge_pages import HUGE_PAGE, HugePages, commit, huge_pages_setting
from tgi_cli.kernels.cpu.library import load
from tgi_cli.kernels.cpu.packed import PackedWeight

needs_huge_pages = pytest.mark.skipif(
    huge_pages_setting() in (None, "never"), reason="this system gives no huge pages"
)


def huge_bytes_at(address: int) -> int:
    """Bytes on huge pages in the mapping that holds an address, as the kernel counts them."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(bound, 16) for bound in first.split("-"))
            inside = start <= address < end
        elif inside and first == "AnonHugePages:":
            return int(line.split()[1]) * 1024
    return 0


def test_buffers_are_zeroed_apart_and_outlive_their_owner() -> None:
    memory = HugePages()
    sizes = [1, 4096, 4097, 3 * HUGE_PAGE, 100 << 20, 0]
    buffers = [memory.buffer(size) for size in sizes]
    del memory
    for number, (buffer, size) in enumerate(zip(buffers, sizes, strict=True)):
        assert buffer.shape == (size,)
        assert buffer.data_ptr() % 64 == 0
        assert not buffer.any()
        buffer.fill_(number + 1)
    for number, buffer in enumerate(buffers):
        assert (buffer == number + 1).all()


@needs_huge_pages
def test_what_is_written_lies_on_huge_pages() -> None:
    memory = HugePages()
    buffers = [memory.buffer(1 << 20) for _ in range(16)]
    for buffer in buffers:
        buffer.fill_(1)
    assert huge_bytes_at(buffers[0].data_ptr()) >= 14 << 20


@needs_huge_pages
@pytest.mark.skipif(load() is None, reason="the native kernels are not built")
def test_packed_weights_and_the_kv_cache_are_there() -> None:
    library = load()
    assert library is not None
    context = library.context(library.variants()[0], 1)
    weight = PackedWeight.dense(context, torch.zeros(2048, 2048, dtype=torch.bfloat16))
    assert huge_bytes_at(weight.data.data_ptr()) >= 4 << 20
    keys, values = select("cpu").allocate_kv(1024, 16, 4, 64, torch.bfloat16)
    keys.fill_(1)
    values.fill_(1)
    assert huge_bytes_at(keys.data_ptr()) >= 8 << 20
    assert huge_bytes_at(values.data_ptr()) >= 8 << 20


@pytest.mark.parametrize(
    ("text", "setting"),
    [("always [madvise] never\n", "madvise"), ("[always] madvise never", "always"), ("", None)],
)
def test_the_setting_is_read(tmp_path: Path, text: str, setting: str | None) -> None:
    path = tmp_path / "enabled"
    path.write_text(text)
    assert huge_pages_setting(path) == setting
    assert huge_pages_setting(tmp_path / "missing") is None


def test_committed_memory_is_there_and_keeps_what_it_holds() -> None:
    buffer = HugePages().buffer(8 * HUGE_PAGE)
    buffer[:100] = 7
    part = buffer[50 : 3 * HUGE_PAGE]

    def resident() -> int:
        return psutil.Process().memory_info().rss

    before = resident()
    assert commit(part)
    assert resident() - before > HUGE_PAGE
    assert (buffer[:100] == 7).all()
    assert not buffer[100 : 3 * HUGE_PAGE].any()
