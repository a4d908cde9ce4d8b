"""What ranks that share a model do together: sums of partial products, gathers of logits.

Every rank makes the same calls in the same order. A sum adds in the order of the ranks, so that its
bits depend on neither the size of a batch nor who asks. Knows no model and starts no process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class Collective(Protocol):
    """One rank's end. `rank` is 0 .. `world_size` - 1."""

    rank: int
    world_size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, in its dtype, added up in float32.

        Raises:
            EngineError: another rank is gone.
        """
        ...

    def all_gather(self, x: Tensor, columns: Sequence[int], out: Tensor | None = None) -> Tensor:
        """Every rank's [rows, columns[rank]] float32 side by side: [rows, sum of columns].

        The result is `out`, contiguous, if that is given.

        Raises:
            EngineError: another rank is gone.
        """
        ...

    def progress(self) -> int:
        """Messages this rank has sent; it stands still where a rank hangs. From any thread."""
        ...

    def abort(self) -> None:
        """Make waiting and later calls fail, on all ranks that can be told. From any thread."""
        ...

    def check(self) -> None:
        """Raise `EngineError` if a call was given up, also one made inside a native step."""
        ...

    def native(self, first_token: int, num_tokens: int) -> Any:
        """A C struct by which native code makes these calls; None where there is but one rank.

        Args:
            first_token: the first row of the token table that this rank holds.
            num_tokens: how many it holds.
        """
        ...


class Alone:
    """The only rank: nothing to add and nobody to wait for."""

    rank = 0
    world_size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x

    def all_gather(self, x: Tensor, columns: Sequence[int], out: Tensor | None = None) -> Tensor:
        """Return `x`."""
        return x

    def progress(self) -> int:
        """Nothing is ever sent."""
        return 0

    def abort(self) -> None:
        """Nobody waits."""

    def check(self) -> None:
        """Nothing can be given up."""

    def native(self, first_token: int, num_tokens: int) -> None:
        """No calls are made."""
        return


ALONE = Alone()
