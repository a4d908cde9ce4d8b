"""Which of a repository's files make up a model: weights in one format, configuration, tokenizer.

Pure functions over names and sizes; knows no network and no disk. Called by `hub` for repositories
on the hub, for copies in the cache and for local folders alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tgi_cli.errors import ModelMissing

_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})$")
_QUANT = re.compile(
    r"(?:^|[-._/])((?:UD-)?(?:I?Q\d[0-9A-Z_]*|TQ\d_\d|MXFP4(?:_MOE)?|BF16|FP?16|FP?32))$", re.I
)
_NOT_WEIGHTS = re.compile(r"^(training|optimizer|scheduler|rng_state)|arguments|args", re.I)
# Configuration, tokenizer and templates; everything else at the top level is not needed to run.
_SIDE_FILES = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
)
_SIDE_FOLDERS = ("additional_chat_templates/",)


@dataclass(frozen=True, slots=True)
class RepoFile:
    """One file of a repository. `sha256` is known for large files, which the hub names by it."""

    name: str
    size: int  # bytes
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """The files to fetch. `gguf` is the file to open when the model is a GGUF one."""

    files: tuple[RepoFile, ...]
    gguf: str | None = None
    pickles: tuple[RepoFile, ...] = ()  # weights that must be converted before use

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(file.size for file in self.files)


def select(
    model_id: str,
    files: Sequence[RepoFile],
    *,
    quant: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Selection:
    """Choose the files of `model_id` to fetch.

    Without `include` these are the weights in one format (safetensors, else GGUF, else `.bin`) and
    what belongs to them; with it, exactly the files that match one of its globs. `exclude` takes
    files away from either.

    Raises:
        ModelMissing: nothing matches, there are no weights, or the GGUF choice is not unique.
    """
    ordered = sorted(files, key=lambda file: file.name)
    kept = [file for file in ordered if not _matches(file.name, exclude)]
    if include:
        chosen = tuple(file for file in kept if _matches(file.name, include))
        if not chosen:
            raise ModelMissing(
                f"no file of {model_id!r} matches --include {' '.join(map(repr, include))}",
                hint=f"its files are: {_listing(file.name for file in files)}",
            )
        return Selection(chosen)
    if quant is not None:
        return _gguf(model_id, kept, quant)
    side = [file for file in kept if _is_side_file(file.name)]
    weights = _safetensors(kept)
    if weights:
        return Selection(_with_index(weights, side, ".safetensors"))
    if any(_is_model_gguf(file.name) for file in kept):
        return _gguf(model_id, kept, None)
    weights = _pickles(kept)
    if weights:
        return Selection(_with_index(weights, side, ".bin"), pickles=tuple(weights))
    raise ModelMissing(
        f"{model_id!r} has no weights in a format that tgi reads (.safetensors, .gguf, .bin)",
        hint=f"its files are: {_listing(file.name for file in files)}",
    )


def quant_of(name: str) -> str | None:
    """Return the quantization that a GGUF file's name (or folder) tells: `Q4_K_M`, or None."""
    stem = _SPLIT.sub("", name.removesuffix(".gguf"))
    match = _QUANT.search(stem) or _QUANT.search(stem.rpartition("/")[0])
    return match[1].upper() if match else None


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob + "*" if glob.endswith("/") else glob) for glob in globs)


def _is_side_file(name: str) -> bool:
    # A glob's `*` crosses folders, which here it must not: `onnx/config.json` is not wanted.
    return _matches(name, _SIDE_FILES) and ("/" not in name or _matches(name, _SIDE_FOLDERS))


def _safetensors(files: Sequence[RepoFile]) -> list[RepoFile]:
    top = {file.name: file for file in files if "/" not in file.name}
    names = [name for name in top if name.endswith(".safetensors")]
    if "model.safetensors.index.json" in top:
        names = [name for name in names if _SPLIT.search(name.removesuffix(".safetensors"))]
    elif "model.safetensors" in top:
        names = ["model.safetensors"]
    return [top[name] for name in names]


def _pickles(files: Sequence[RepoFile]) -> list[RepoFile]:
    top = [file for file in files if "/" not in file.name and file.name.endswith(".bin")]
    named = [file for file in top if file.name.startswith("pytorch_model")]
    return named or [file for file in top if not _NOT_WEIGHTS.search(file.name)]


def _with_index(
    weights: Sequence[RepoFile], side: Sequence[RepoFile], suffix: str
) -> tuple[RepoFile, ...]:
    indexes = [file for file in side if file.name.endswith(".index.json")]
    wanted = [file for file in indexes if file.name.endswith(f"{suffix}.index.json")]
    others = [file for file in side if file not in indexes]
    return (*weights, *wanted, *others)


def _is_model_gguf(name: str) -> bool:
    # `mmproj` files hold a vision projector, `imatrix` ones calibration data: neither is a model.
    lower = name.lower()
    return lower.endswith(".gguf") and "mmproj" not in lower and "imatrix" not in lower


def _gguf(model_id: str, files: Sequence[RepoFile], quant: str | None) -> Selection:
    """Choose the one GGUF model, whole or split, that `quant` names (None: the only one)."""
    sets: dict[str, list[RepoFile]] = {}
    for file in files:
        if _is_model_gguf(file.name):
            sets.setdefault(_SPLIT.sub("", file.name[: -len(".gguf")]), []).append(file)
    if not sets:
        raise ModelMissing(f"{model_id!r} has no .gguf files, so {quant!r} cannot be chosen")
    labels = {stem: quant_of(stem) or stem for stem in sets}
    available = ", ".join(dict.fromkeys(labels.values()))
    found = list(sets) if quant is None else _named(labels, quant)
    if len(found) == 1:
        parts = sets[found[0]]
        _check_split(model_id, parts)
        return Selection(tuple(parts), gguf=parts[0].name)
    choose = f"choose one with {model_id}:QUANT, of: {available}"
    if not found:
        raise ModelMissing(f"{model_id!r} has no quantization {quant!r}", hint=choose)
    if quant is None:
        raise ModelMissing(f"{model_id!r} has {len(found)} GGUF models", hint=choose)
    raise ModelMissing(
        f"{quant!r} is ambiguous in {model_id!r}: it names {_listing(found)}",
        hint=f"name the file instead, as in {model_id}:{found[0].rpartition('/')[2]}",
    )


def _named(labels: dict[str, str], quant: str) -> list[str]:
    """The stems that `quant` names: by file name, else by exact label, else by how they end."""
    wanted = quant.lower().removesuffix(".gguf")
    names = [stem for stem in labels if stem.rpartition("/")[2].lower() == wanted]
    exact = [stem for stem, label in labels.items() if label.lower() == wanted]
    ending = [stem for stem in labels if re.search(rf"[-._/]{re.escape(wanted)}$", stem.lower())]
    return names or exact or ending


def _check_split(model_id: str, parts: Sequence[RepoFile]) -> None:
    match = _SPLIT.search(parts[0].name[: -len(".gguf")])
    if match and len(parts) != int(match[2]):
        raise ModelMissing(
            f"{model_id!r} has {len(parts)} of the {int(match[2])} parts of {parts[0].name}",
            hint="the repository is incomplete; choose another quantization or revision",
        )


def _listing(names: Iterable[str], limit: int = 12) -> str:
    listed = sorted(names)
    more = f", and {len(listed) - limit} more" if len(listed) > limit else ""
    return (", ".join(listed[:limit]) or "none") + more
