"""`tgi quantize`: a model in fewer bits, in a folder that the common servers load.

What is done, and how, is `tgi_cli.quantize`'s business; this file reads the options, shows the
progress and tells the result.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tgi_cli import hub, log
from tgi_cli.cli.console import invocation
from tgi_cli.hub_faults import gigabytes

if TYPE_CHECKING:
    from tgi_cli.quantize.convert.calibration import Samples
    from tgi_cli.quantize.convert.job import Job, Outcome
    from tgi_cli.quantize.convert.report import Report
    from tgi_cli.tokenizer import Tokenizer

_HELD_OUT_SAMPLES = 32
_HELD_OUT_LENGTH = 512  # tokens
_CHARACTERS = 8  # read of a data set for each token that is asked for: twice what most texts take


def command(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="org/name or a local folder, not quantized yet.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    method: Annotated[str, typer.Option(help="gptq, awq, fp8 or int8.")],
    bits: Annotated[
        int | None, typer.Option(help="Bits of a weight: 4 (or 8 with gptq); else the method's.")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Inputs that share a scale: 128 if not given, 64, 32 or, with gptq, -1 for all."
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="gptq or compressed-tensors, how --method gptq is stored."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Calibration text: .txt or .jsonl, or owner/name[:config[:split]] on the hub; "
            "ours if not given.",
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The same for the text to measure the result on."),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(min=0, help="Calibration samples at most; 0, to use no text, with fp8 alone."),
    ] = 128,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens of a sample.")] = 2048,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was interrupted.")
    ] = False,
    verify: Annotated[
        bool, typer.Option(help="Load the result again with every installed loader.")
    ] = True,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit; the main branch if not given.")
    ] = None,
    token: Annotated[
        str | None, typer.Option(help="Access token of the hub; HF_TOKEN if not given.")
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Where downloads are kept; the hub's own cache if not given."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write a model in 4 or 8 bits: GPTQ, AWQ, FP8 or INT8.

    Works layer by layer, on a CPU too; run it again with --resume after an interruption.
    """
    printer = invocation(ctx).printer
    log.configure("INFO" if printer.verbose else "WARNING")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from tgi_cli.quantize.convert.recipe import Recipe

    recipe = Recipe.choose(method, bits, group_size, layout)
    from tgi_cli.cli.quantize_view import shown, tell
    from tgi_cli.engine.machine import usable_cores
    from tgi_cli.kernels.backend import select
    from tgi_cli.model.checkpoint import open_checkpoint
    from tgi_cli.quantize.convert.job import Job
    from tgi_cli.quantize.convert.shards import write_text
    from tgi_cli.tokenizer import load_tokenizer

    path = hub.resolve(model, revision=revision, token=token, cache_dir=cache_dir)
    checkpoint = open_checkpoint(str(path))
    texts = _Texts(load_tokenizer(str(path)), token, cache_dir)
    seen = None
    if samples:
        seen = texts.samples("calibration", calibration, samples, seqlen)
    elif calibration is not None:
        printer.say("--calibration has no meaning with --samples 0")
    length = min(_HELD_OUT_LENGTH, seqlen, checkpoint.max_position_embeddings)
    measured = texts.samples("held_out", held_out, _HELD_OUT_SAMPLES, length)
    backend = select(device, num_threads=usable_cores())
    job = Job(checkpoint, recipe, seen, measured, backend, output)
    needed = job.requirements
    printer.say(f"{model}: {recipe.label}")
    if seen is not None and len(seen.tokens) < samples:
        printer.say(
            f"the calibration text gives {len(seen.tokens)} of {samples} samples; "
            "--calibration takes a longer one"
        )
    printer.say(
        f"takes about {gigabytes(needed.memory)} of memory and {gigabytes(needed.disk)} of disk"
    )
    try:
        with shown(printer) as listener:
            outcome = job.run(listener, resume=resume)
    except KeyboardInterrupt:
        printer.say("finished layers are kept: the same command with --resume goes on")
        raise
    if verify:
        printer.say("loading the result again")
    name = Path(model).name if Path(model).exists() else model
    report = _report(name, job, outcome, verify=verify)
    write_text(output / "README.md", report.model_card())
    job.clean()
    tell(printer, report)
    if as_json:
        printer.json(report.data())
    else:
        printer.data(str(output))


@dataclass(frozen=True, slots=True)
class _Texts:
    """Gets what options of texts name, cut into samples."""

    tokenizer: Tokenizer
    token: str | None
    cache_dir: Path | None

    def samples(self, name: str, given: str | None, count: int, length: int) -> Samples:
        from tgi_cli.quantize.convert.calibration import samples_of, shipped_text

        if given is None:
            text, source = shipped_text(name), f"the {name.replace('_', '-')} text of the package"
        else:
            text, source = self._text(given, count * length * _CHARACTERS), given
        return samples_of(text, source, self.tokenizer, count=count, length=length)

    def _text(self, given: str, enough: int) -> str:
        from tgi_cli.hub_datasets import DatasetName, parquet_files
        from tgi_cli.quantize.convert.calibration import read_text
        from tgi_cli.quantize.convert.dataset_text import dataset_text

        name = None if Path(given).exists() else DatasetName.parse(given)
        if name is None or given.endswith((".txt", ".jsonl", ".ndjson")):
            return read_text(given)
        files = parquet_files(name, token=self.token, cache_dir=self.cache_dir)
        return dataset_text(given, files, enough)


def _report(model: str, job: Job, outcome: Outcome, *, verify: bool) -> Report:
    from tgi_cli.quantize.convert import reload
    from tgi_cli.quantize.convert.report import Report

    recipe = job.recipe
    verdicts = []
    if verify:
        verdicts = reload.verify(job.output, recipe.layout_name, outcome.probe, outcome.expected)
    return Report(
        base_model=model,
        recipe=recipe,
        calibration=None if job.calibration is None else _described(job.calibration),
        held_out=_described(job.held_out),
        outcome=outcome,
        verdicts=verdicts,
    )


def _described(samples: Samples) -> str:
    count, length = samples.shape
    return f"{samples.source} ({count} x {length} tokens)"
