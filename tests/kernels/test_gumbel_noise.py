"""Philox against published vectors, noise against an independent computation and its law."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tgi_cli.kernels.backend import Backend, select
from tgi_cli.kernels.philox import philox

#: Known answers of the authors' Random123 distribution: counter, key, result.
VECTORS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = philox(
        tuple(torch.tensor([word]) for word in counter), tuple(torch.tensor([w]) for w in key)
    )
    assert words.tolist() == [expected]


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def scalar_noise(seed: int, position: int, token: int) -> float:
    """The definition in `Ops.gumbel_noise`, in Python's integers and doubles."""
    counter = [token // 4, position % 2**32, position >> 32, 0]
    word = scalar_philox(counter, [seed % 2**32, seed >> 32])[token % 4]
    uniform = ((word >> 9) + 0.5) * 2**-23
    return torch.tensor(-math.log(-math.log(uniform)), dtype=torch.float64).float().item()


def signed(seed: int) -> int:
    """An unsigned 64-bit seed as the int64 tensors hold it."""
    return seed - 2**64 if seed >= 2**63 else seed


@given(
    seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**40), token=st.integers(0, 300_000)
)
def test_noise_follows_its_definition(seed: int, position: int, token: int) -> None:
    ops = select("cpu").ops
    seeds, positions = torch.tensor([signed(seed)]), torch.tensor([position])
    chosen = ops.gumbel_noise_at(seeds, positions, torch.tensor([[token]]))
    assert chosen.item() == scalar_noise(seed, position, token)


def test_rounding_leaves_no_room_for_another_log() -> None:
    """For all but one value of u, errors of 1 ulp in both logs cannot change the float32 bits."""
    uniform = (torch.arange(2**23, dtype=torch.float64) + 0.5) * 2.0**-23
    wide = -(-uniform.log()).log()
    narrow = wide.float()
    error = 2.0**-52 + wide.abs() * 2.0**-52
    nearest_tie = torch.full_like(wide, torch.inf)
    for direction in (-torch.inf, torch.inf):
        neighbour = narrow.nextafter(torch.tensor(direction))
        tie = (narrow.double() + neighbour.double()) / 2
        nearest_tie = torch.minimum(nearest_tie, (wide - tie).abs())
    assert (nearest_tie <= error).nonzero().tolist() == [[3085996]]


@pytest.mark.parametrize("vocab_size", [1, 3, 4, 257, 1000])
def test_values_do_not_depend_on_the_batch_or_the_vocabulary(
    backend: Backend, vocab_size: int
) -> None:
    seeds = torch.tensor([0, -1, 12345, 2**40])
    positions = torch.tensor([0, 5, 5, 2**33])
    noise = backend.ops.gumbel_noise(seeds, positions, vocab_size)
    assert noise.dtype == torch.float32
    assert noise.shape == (4, vocab_size)
    for row in range(4):
        alone = backend.ops.gumbel_noise(seeds[row : row + 1], positions[row : row + 1], 2000)
        assert torch.equal(alone[0, :vocab_size], noise[row])
    ids = torch.randint(0, vocab_size, (4, 9), generator=torch.Generator().manual_seed(0))
    chosen = backend.ops.gumbel_noise_at(seeds, positions, ids)
    assert torch.equal(chosen, noise.gather(1, ids))


def test_seeds_positions_and_tokens_all_matter(backend: Backend) -> None:
    seeds, positions = torch.tensor([1, 2, 1, 1 << 32]), torch.tensor([1, 1, 2, 1])
    noise = backend.ops.gumbel_noise(seeds, positions, 512)
    assert len({tuple(row) for row in noise.tolist()}) == 4
    assert noise[0].unique().numel() > 500


def test_noise_has_gumbels_law(backend: Backend) -> None:
    """Gumbel-max over equal logits is uniform, and over logits it is their softmax."""
    draws, vocab_size = 4000, 8
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.0])
    ids = torch.arange(vocab_size).expand(draws, -1)
    noise = backend.ops.gumbel_noise_at(torch.full((draws,), 77), torch.arange(draws), ids)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.03)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.06)
    for row in (torch.zeros(vocab_size), logits):
        counts = (noise + row).argmax(-1).bincount(minlength=vocab_size)
        expected = row.softmax(-1) * draws
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        assert chi_square < 24.3  # 0.1 % of the chi-square distribution with 7 degrees of freedom
