"""What a run has finished, on disk beside its work: read back after a kill.

The state is replaced in one step once everything it speaks of is on the disk, so what it says is
true whenever the run ends. Knows no tensors.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tgi_cli.errors import CheckpointError, UsageError
from tgi_cli.quantize.convert.shards import write_json

WORK_FOLDER = ".tgi-quantize"


@dataclass
class State:
    """Progress of one run.

    Attributes:
        identity: model, recipe and texts of the run, by name; another run has another.
        layers_done: layers whose shard and following streams are on the disk.
        errors: relative error of each matrix so far.
        seconds: spent on finished layers.
        peak_bytes: largest resident memory of the processes so far.
    """

    identity: dict[str, str]
    layers_done: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    peak_bytes: int = 0


class StateFile:
    """The state of the run that writes into a folder."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output / WORK_FOLDER
        self._path = self.folder / "state.json"

    def open(self, identity: dict[str, str], *, resume: bool) -> State:
        """The state to go on from, or a new one.

        Raises:
            UsageError: the folder holds something else, an unfinished run that is not to be
                resumed, or one of another model, recipe or text.
            CheckpointError: the state file is damaged.
        """
        if not self._path.is_file():
            self._begin()
            state = State(identity)
            self.save(state)
            return state
        state = self._read()
        if not resume:
            raise UsageError(
                f"`{self.output}` holds an unfinished run with {state.layers_done} layers done",
                hint="add --resume to go on with it, or remove the folder",
            )
        other = [key for key, value in identity.items() if state.identity.get(key) != value]
        if other:
            raise UsageError(
                f"the unfinished run in `{self.output}` has another {' and '.join(other)}",
                hint="resume it with the options it was started with, or remove the folder",
            )
        return state

    def save(self, state: State) -> None:
        """Replace the state on disk."""
        write_json(self._path, asdict(state))

    def remove(self) -> None:
        """Delete the work folder; the run is finished."""
        shutil.rmtree(self.folder)

    def _begin(self) -> None:
        # A kill before the first state leaves an empty work folder behind, or half of the state.
        strangers = [path.name for path in self.output.glob("*") if path != self.folder]
        if self.output.is_file() or strangers:
            what = f", such as `{sorted(strangers)[0]}`" if strangers else ""
            raise UsageError(
                f"the output `{self.output}` exists and holds other things{what}",
                hint="name a folder that is empty or does not exist",
            )
        self.folder.mkdir(parents=True, exist_ok=True)

    def _read(self) -> State:
        try:
            return State(**json.loads(self._path.read_bytes()))
        except (ValueError, TypeError, OSError) as error:
            raise CheckpointError(
                f"`{self._path}` is damaged: {error}",
                hint="remove the output folder and start again without --resume",
            ) from error
