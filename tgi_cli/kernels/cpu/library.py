"""The native library: found, loaded through ctypes, and its C structs by name.

Knows pointers and sizes, not models. The library is built by the package's own build with the
system compiler and needs no torch headers; where it is missing, `load` says why and the backend
falls back to plain torch, loudly.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import logging
import weakref
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from tgi_cli.kernels.cpu.huge_pages import HugePages

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_POINTER, _INT64, _INT32, _FLOAT = (
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int32,
    ctypes.c_float,
)

#: Output features of one packed panel, tokens of one KV block (`csrc/kernels.h`).
PANEL = 32
BLOCK = 16


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a tensor's first element; the caller keeps the tensor alive."""
    return None if tensor is None else tensor.data_ptr()


class Matrix(ctypes.Structure):
    """A matrix [n, k] in one of the forms of `csrc/kernels.h`."""

    _fields_ = (
        ("data", _POINTER),
        ("n", _INT64),
        ("k", _INT64),
        *((name, _INT32) for name in ("form", "group", "wide_activations")),
        ("order", _POINTER),
    )


class Gemm(ctypes.Structure):
    """`out = epilogue(x @ w.T + bias)`; see `csrc/kernels.h` for layouts."""

    _fields_ = (
        ("x", _POINTER),
        ("w", Matrix),
        *((name, _POINTER) for name in ("bias", "out")),
        *((name, _INT64) for name in ("m", "ldx", "ldo")),
        ("epilogue", _INT32),
    )


class PackGrouped(ctypes.Structure):
    """Codes, scales and minima of whole panels, to be packed."""

    _fields_ = (("w", Matrix), *((name, _POINTER) for name in ("codes", "scales", "minima")))


class RmsNorm(ctypes.Structure):
    """Root-mean-square norm of fp32 rows into bf16 or fp32."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "weight", "out")),
        *((name, _INT64) for name in ("rows", "dim", "ldx")),
        ("eps", _FLOAT),
        ("out_float", _INT32),
    )


class RopeStore(ctypes.Structure):
    """Head norms, rotary embedding, and the store into the paged cache."""

    _fields_ = (
        *(
            (name, _POINTER)
            for name in (
                "qkv",
                "cos_sin",
                "q_norm",
                "k_norm",
                "positions",
                "slots",
                "q",
                "k_cache",
                "v_cache",
            )
        ),
        *((name, _INT64) for name in ("tokens", "heads", "kv_heads", "head_dim", "rotary_dim")),
        ("eps", _FLOAT),
        ("kv_form", _INT32),
    )


class Attention(ctypes.Structure):
    """Causal attention of ragged queries over the paged cache."""

    _fields_ = (
        *(
            (name, _POINTER)
            for name in (
                "q",
                "k_cache",
                "v_cache",
                "block_tables",
                "seq_lens",
                "query_start",
                "out",
            )
        ),
        *(
            (name, _INT64)
            for name in ("seqs", "table_stride", "heads", "kv_heads", "head_dim", "window")
        ),
        ("scale", _FLOAT),
        ("softcap", _FLOAT),
        ("kv_form", _INT32),
        ("slopes", _POINTER),
        ("sinks", _POINTER),
    )


class Embed(ctypes.Structure):
    """Rows of the embedding table, scaled, as fp32."""

    _fields_ = (
        ("table", Matrix),
        *((name, _POINTER) for name in ("ids", "out")),
        ("tokens", _INT64),
        ("scale", _FLOAT),
    )


class Probe(ctypes.Structure):
    """What to measure the machine with: see `csrc/probe.inc.h`."""

    _fields_ = (("kind", _INT32), ("data", _POINTER), ("sink", _POINTER), ("amount", _INT64))


class LayerProgram(ctypes.Structure):
    """One layer of a decoder: weights, cache and sizes."""

    _fields_ = (
        ("attention_norm", _POINTER),
        ("qkv", Matrix),
        *((name, _POINTER) for name in ("qkv_bias", "q_norm", "k_norm", "cos_sin")),
        ("output", Matrix),
        *((name, _POINTER) for name in ("output_bias", "after_attention_norm", "feed_norm")),
        ("gate_up", Matrix),
        ("gate_up_bias", _POINTER),
        ("down", Matrix),
        *((name, _POINTER) for name in ("down_bias", "after_feed_norm", "k_cache", "v_cache")),
        ("slopes", _POINTER),
        ("sinks", _POINTER),
        *(
            (name, _INT64)
            for name in (
                "heads",
                "kv_heads",
                "head_dim",
                "rotary_dim",
                "window",
                "intermediate",
                "group",
            )
        ),
        *((name, _FLOAT) for name in ("scale", "qk_eps", "eps", "softcap")),
        ("activation", _INT32),
        ("kv_form", _INT32),
    )


class LoraPart(ctypes.Structure):
    """What an adapter adds to some columns of a matrix's result."""

    _fields_ = (
        *((name, _POINTER) for name in ("a", "b")),
        *((name, _INT64) for name in ("rank", "columns", "first", "stride")),
        ("scale", _FLOAT),
    )


class LoraParts(ctypes.Structure):
    """All that one adapter adds to one matrix."""

    _fields_ = (("parts", ctypes.POINTER(LoraPart)), ("count", _INT64))


class Program(ctypes.Structure):
    """A whole decoder."""

    _fields_ = (
        ("layers", ctypes.POINTER(LayerProgram)),
        ("table", Matrix),
        ("final_norm", _POINTER),
        *((name, _INT64) for name in ("num_layers", "hidden")),
        *((name, _FLOAT) for name in ("embedding_scale", "final_eps")),
        ("head", Matrix),
        ("ranks", _POINTER),
        ("adapters", ctypes.POINTER(ctypes.POINTER(LoraParts))),
    )


class StepInput(ctypes.Structure):
    """The tensors of one step, workspace included."""

    _fields_ = (
        *((name, _POINTER) for name in ("ids", "positions", "seq_lens", "query_start")),
        ("slots", ctypes.POINTER(_POINTER)),
        ("block_tables", ctypes.POINTER(_POINTER)),
        ("table_strides", ctypes.POINTER(_INT64)),
        *(
            (name, _POINTER)
            for name in (
                "residual",
                "wide",
                "narrow",
                "queries",
                "attended",
                "activated",
                "hidden",
            )
        ),
        *((name, _INT64) for name in ("tokens", "seqs")),
        *((name, _POINTER) for name in ("logit_rows", "logits")),
        ("num_logits", _INT64),
        *((name, _POINTER) for name in ("adapter_slots", "gated")),
    )


def library_path() -> Path | None:
    """Where the built library is, None if the package was installed without it."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = _FOLDER / f"_native{suffix}"
        if path.exists():
            return path
    return None


class Library:
    """The loaded library. Raises `OSError` if the file cannot be loaded."""

    def __init__(self, path: Path) -> None:
        self._dll = ctypes.CDLL(str(path))
        self._dll.tgi_variants.restype = ctypes.c_char_p
        self._dll.tgi_context.restype = ctypes.c_void_p
        self._dll.tgi_context.argtypes = (ctypes.c_char_p, ctypes.c_int)
        self._dll.tgi_close.argtypes = (ctypes.c_void_p,)
        self._dll.tgi_pack.argtypes = (_POINTER, _POINTER, _INT64, _INT64, _POINTER)
        self._dll.tgi_ahead_finish.argtypes = (_POINTER, _POINTER, _POINTER)

    def variants(self) -> list[str]:
        """Instruction-set variants this CPU can run, best first."""
        names: bytes = self._dll.tgi_variants()
        return [name for name in names.decode().split(",") if name]

    @property
    def functions(self) -> ctypes.CDLL:
        """The library's C functions, for modules that have some of their own there."""
        return self._dll

    def context(self, variant: str, num_threads: int) -> Context:
        """A thread pool with the kernels of one variant."""
        handle = self._dll.tgi_context(variant.encode(), num_threads)
        if not handle:
            raise ValueError(f"this CPU cannot run the `{variant}` kernels")
        return Context(self._dll, handle, variant, num_threads)


class Context:
    """Kernels of one variant on a pool of their own. Calls must come from one thread at a time."""

    def __init__(self, dll: ctypes.CDLL, handle: int, variant: str, num_threads: int) -> None:
        self._dll = dll
        self.handle = ctypes.c_void_p(handle)
        self.variant = variant
        self.num_threads = num_threads
        self._finalize = weakref.finalize(self, dll.tgi_close, self.handle)
        #: Memory for what every step reads.
        self.buffer = HugePages().buffer

    @property
    def functions(self) -> ctypes.CDLL:
        """The library's C functions, for modules that have some of their own there."""
        return self._dll

    def call(self, name: str, arguments: ctypes.Structure) -> None:
        """Run `tgi_<name>(context, &arguments)`."""
        getattr(self._dll, f"tgi_{name}")(self.handle, ctypes.byref(arguments))

    def bind(self, name: str, arguments: ctypes.Structure) -> Callable[[], object]:
        """The same call, to be made many times over one struct, which it keeps alive."""
        function = getattr(self._dll, f"tgi_{name}")
        return functools.partial(function, self.handle, ctypes.byref(arguments))

    def step(self, program: Program, step: StepInput) -> None:
        """Run a whole step."""
        self._dll.tgi_step(self.handle, ctypes.byref(program), ctypes.byref(step))

    def settle(self) -> None:
        """Give up what runs by itself, see `ahead`; harmless on a closed context."""
        if self._finalize.alive:
            self._dll.tgi_ahead_settle(self.handle)

    def pack(self, weight: Tensor, out: Tensor) -> None:
        """Pack a contiguous bf16 [n, k] matrix (k even) into panels of `PANEL` outputs."""
        n, k = weight.shape
        self._dll.tgi_pack(self.handle, weight.data_ptr(), n, k, out.data_ptr())

    def pack_grouped(self, arguments: PackGrouped) -> None:
        """Pack rows that are given as codes, scales and minima; on the calling thread."""
        self._dll.tgi_pack_grouped(self.handle, ctypes.byref(arguments))

    def close(self) -> None:
        """End the pool's threads; the context must not be used afterwards."""
        self._finalize()


def load() -> Library | None:
    """The library if it is built and loads on this machine, else None."""
    path = library_path()
    if path is None:
        return None
    try:
        return Library(path)
    except OSError as error:
        log.error("the native kernels are built but cannot be loaded: %s", error)
        return None
