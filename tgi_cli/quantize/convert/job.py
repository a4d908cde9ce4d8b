"""The whole conversion: streams in, layers one by one, the finished folder out.

What a layer needs done is its method's business (`procedures`), how it is stored its layout's.
After every layer the state on disk is true, so a killed run goes on from the last one finished.
"""

from __future__ import annotations

import hashlib
import json
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from tgi_cli import __version__
from tgi_cli.errors import UnsupportedModel, UsageError
from tgi_cli.heap import keep_large_memory
from tgi_cli.kernels.backend import Backend
from tgi_cli.model.checkpoint import Checkpoint
from tgi_cli.quantize.convert.calibration import Samples
from tgi_cli.quantize.convert.folder import finish_folder, model_dtype
from tgi_cli.quantize.convert.layer_work import LayerWork
from tgi_cli.quantize.convert.procedures import PROCEDURES, QuantizedLayer
from tgi_cli.quantize.convert.quality import End, Quality, embed
from tgi_cli.quantize.convert.recipe import Recipe
from tgi_cli.quantize.convert.reload import MAX_TOKENS
from tgi_cli.quantize.convert.requirements import Requirements, estimate
from tgi_cli.quantize.convert.shards import write_tensors
from tgi_cli.quantize.convert.state import State, StateFile
from tgi_cli.quantize.convert.stream import Stream

_REST = "rest.safetensors"


@dataclass(frozen=True, slots=True)
class Progress:
    """`layer` of `num_layers` is finished; `errors` are those of its matrices, by module name.

    `seconds` were spent on it; `resumed`: it was finished by an earlier run.
    """

    layer: int
    num_layers: int
    errors: dict[str, float]
    seconds: float
    resumed: bool = False


Listener = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run has to say, before the folder is loaded again.

    Attributes:
        bytes_before: weights of the original on disk.
        bytes_after: weights of the result on disk.
        quality: measured on the held-out text.
        probe: the beginning of that text, as tokens.
        expected: the quantized model's best next token after each of them.
        errors: relative error of each matrix by module name (see `output_error`).
        seconds: spent, over all runs.
        peak_bytes: largest resident memory, over all runs.
    """

    bytes_before: int
    bytes_after: int
    quality: Quality
    probe: list[int]
    expected: list[int]
    errors: dict[str, float]
    seconds: float
    peak_bytes: int

    def worst(self, count: int = 5) -> list[tuple[str, float]]:
        """The matrices with the largest errors, the worst first."""
        return sorted(self.errors.items(), key=lambda each: -each[1])[:count]


class Job:
    """One conversion of `checkpoint` into the folder `output`.

    Args:
        checkpoint: an opened, unquantized safetensors checkpoint.
        recipe: what to do.
        calibration: text whose activations the method looks at; FP8 may do without.
        held_out: text that the result is measured on.
        backend: where it runs.
        output: the folder to write; new or empty, or that of an unfinished run.

    Raises:
        UnsupportedModel: the checkpoint is quantized already.
        UsageError: the recipe does not fit the model, or samples are longer than its context.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        calibration: Samples | None,
        held_out: Samples,
        backend: Backend,
        output: Path,
    ) -> None:
        if checkpoint.format.name != "dense":
            raise UnsupportedModel(
                f"`{checkpoint.path}` is quantized already ({checkpoint.format.name})",
                hint="quantize the model as it was published in bfloat16 or float16 safetensors",
            )
        recipe.check(checkpoint.spec)
        if calibration is None and recipe.needs_text:
            raise UsageError(
                f"--method {recipe.method} needs calibration text",
                hint="use --samples 1 or more, or --method fp8, which can do without",
            )
        texts = [text for text in (calibration, held_out) if text is not None]
        length = max(text.tokens.shape[1] for text in texts)
        if length > checkpoint.max_position_embeddings:
            raise UsageError(
                f"samples of {length:,} tokens are longer than the model's context of "
                f"{checkpoint.max_position_embeddings:,}",
                hint=f"use --seqlen {checkpoint.max_position_embeddings} or less",
            )
        self.checkpoint = checkpoint.for_length(length)
        self.recipe, self.backend, self.output = recipe, backend, output
        self.calibration = calibration
        self.held_out = held_out
        self.files = StateFile(output)

    @property
    def requirements(self) -> Requirements:
        """What running it takes."""
        calibration = (0, 0) if self.calibration is None else self.calibration.shape
        return estimate(self.checkpoint, calibration, self.held_out.shape)

    @torch.inference_mode()
    def run(self, listener: Listener, *, resume: bool = False) -> Outcome:
        """Convert, or go on converting, and measure.

        Raises:
            UsageError: the output folder is in use, see `StateFile.open`.
            OutOfMemory: memory or disk do not suffice; nothing has been done.
            CheckpointError: the checkpoint or an unfinished run's files are broken.
        """
        self.requirements.check(self.backend.free_memory(), self.output)
        keep_large_memory()
        state = self.files.open(self._identity(), resume=resume)
        num_layers = len(self.checkpoint.spec.layers)
        if state.layers_done:
            listener(Progress(state.layers_done, num_layers, {}, state.seconds, resumed=True))
        else:
            self._begin()
        for index in range(state.layers_done, num_layers):
            began = time.monotonic()
            errors = self._layer(index)
            seconds = time.monotonic() - began
            state.layers_done = index + 1
            state.errors.update(errors)
            state.seconds += seconds
            state.peak_bytes = max(state.peak_bytes, _peak_memory())
            self.files.save(state)
            for stream in self._streams(index):
                stream.remove()
            listener(Progress(index + 1, num_layers, errors, seconds))
        return self._finish(state)

    def clean(self) -> None:
        """Remove the run's own files; the folder then holds the model alone."""
        self.files.remove()

    def _identity(self) -> dict[str, str]:
        """What must be the same for a run to be resumed."""
        stored = {
            path.name: (path.stat().st_size, path.stat().st_mtime_ns)
            for path in sorted(Path(self.checkpoint.path).glob("*.safetensors"))
        }
        model = json.dumps([self.checkpoint.config, stored], sort_keys=True)
        recipe = self.recipe
        return {
            "version of tgi": __version__,
            "model": hashlib.sha256(model.encode()).hexdigest(),
            "recipe": recipe.label,
            "calibration text": self.calibration.digest if self.calibration else "",
            "held-out text": self.held_out.digest,
        }

    def _streams(self, layer: int) -> list[Stream]:
        """Calibration (if any), held-out through the original, held-out through the result."""
        width, folder = self.checkpoint.spec.hidden_size, self.files.folder
        streams = [
            Stream(folder, name, (*self.held_out.shape, width), layer)
            for name in ("original", "quantized")
        ]
        if self.calibration is not None:
            shape = (*self.calibration.shape, width)
            streams.insert(0, Stream(folder, "calibration", shape, layer))
        return streams

    def _begin(self) -> None:
        """Write everything that is in front of the layers or beside them."""
        streams = self._streams(0)
        for stream in streams:
            samples = self.calibration if stream.name == "calibration" else self.held_out
            assert samples is not None
            embed(self.checkpoint, self.backend, samples.tokens, stream)
        source, names = self.checkpoint.source, self.checkpoint.spec.names
        in_layers = {
            key
            for index in range(len(self.checkpoint.spec.layers))
            for key in source.keys()  # noqa: SIM118
            if key.startswith(names.layer.format(index=index))
        }
        rest = [
            key
            for key in source.keys()  # noqa: SIM118
            if key not in in_layers and not key.endswith(names.ignored)
        ]
        write_tensors(self.files.folder / _REST, {key: source.read(key) for key in rest})
        self._release(rest)

    def _layer(self, index: int) -> dict[str, float]:
        """Quantize a layer, write its shard and the streams in front of the next one."""
        work = LayerWork(self.checkpoint, self.backend, index)
        *calibration, original, quantized = self._streams(index)
        work.advance(original)
        dtype = model_dtype(self.checkpoint)
        scale_dtype = self.recipe.layout.scale_dtype(dtype)
        procedure = PROCEDURES[self.recipe.method]
        done = procedure(work, calibration[0] if calibration else None, self.recipe, scale_dtype)
        write_tensors(self._shard(index), self._tensors(work, done))
        for stream in (*calibration, quantized):
            work.advance(stream)
        self._release(work.tensor_names)
        return done.errors

    def _release(self, names: Iterable[str]) -> None:
        """Let what was read of the checkpoint go."""
        for name in names:
            self.checkpoint.source.release(name)

    def _tensors(self, work: LayerWork, done: QuantizedLayer) -> dict[str, torch.Tensor]:
        """The layer as it is stored: packed matrices, and the rest in the model's dtype."""
        layout, dtype = self.recipe.layout, model_dtype(self.checkpoint)
        stored: dict[str, torch.Tensor] = {}
        for name in work.tensor_names:
            module, _, kind = name.rpartition(".")
            if module not in done.matrices:
                stored[name] = work.tensor(name).to(dtype)
            elif kind == "weight":
                stored.update(layout.tensors(module, done.matrices[module]))
            else:
                stored[name] = work.tensor(name).to(layout.vector_dtype(dtype))
        return stored

    def _finish(self, state: State) -> Outcome:
        num_layers = len(self.checkpoint.spec.layers)
        *_, original, quantized = self._streams(num_layers)
        tokens = self.held_out.tokens
        end = End(self.checkpoint, self.backend)
        quality = end.compare(tokens, original, quantized)
        probe = tokens[0, :MAX_TOKENS].tolist()
        parts = [self.files.folder / _REST, *map(self._shard, range(num_layers))]
        size = finish_folder(self.checkpoint, self.recipe, parts, self.output)
        source = self.checkpoint.source
        return Outcome(
            bytes_before=sum(map(source.nbytes, source.keys())),
            bytes_after=size,
            quality=quality,
            probe=probe,
            expected=end.next_tokens(quantized, len(probe)),
            errors=state.errors,
            seconds=state.seconds,
            peak_bytes=max(state.peak_bytes, _peak_memory()),
        )

    def _shard(self, index: int) -> Path:
        return self.files.folder / f"layer-{index:05d}.safetensors"


def _peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
