"""`tgi download` in processes of its own: the hub's client reads its variables when imported.

To be quick, one process per set of such variables imports everything once and forks for each run.
`python -m tests.hub_server.client` is that process: a JSON job per line in, an exit code out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOREIGN = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "XDG_", "TGI_")


def environment(endpoint: str, home: Path, **variables: str) -> dict[str, str]:
    """This process's environment without the user's own hub settings, plus `variables`."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(FOREIGN) and not key.lower().endswith("_proxy")
    }
    own = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home / "hf"),
        "XDG_CACHE_HOME": str(home / "xdg"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }
    return kept | own | variables


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        return json.loads(self.out)

    @property
    def names(self) -> set[str]:
        return {file["name"] for file in self.report["files"]}


@dataclass
class Drivers:
    """The forking processes, one for each endpoint and offline switch."""

    home: Path
    _running: dict[tuple[str, str], subprocess.Popen[str]] = field(default_factory=dict)

    def run(self, arguments: list[str], scratch: Path, variables: Mapping[str, str]) -> Outcome:
        endpoint, offline = variables["HF_ENDPOINT"], variables.get("HF_HUB_OFFLINE", "0")
        key = endpoint, offline
        if key not in self._running:
            self._running[key] = subprocess.Popen(
                [sys.executable, "-m", "tests.hub_server.client"],
                env=environment(endpoint, self.home, HF_HUB_OFFLINE=offline),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        driver = self._running[key]
        assert driver.stdin is not None
        assert driver.stdout is not None
        out, err = scratch / "stdout", scratch / "stderr"
        job = {"arguments": arguments, "out": str(out), "err": str(err), "set": dict(variables)}
        driver.stdin.write(json.dumps(job) + "\n")
        driver.stdin.flush()
        code = int(driver.stdout.readline())
        return Outcome(code, out.read_text(), err.read_text())

    def close(self) -> None:
        for driver in self._running.values():
            assert driver.stdin is not None
            assert driver.stdout is not None
            driver.stdin.close()
            driver.wait(10)
            driver.stdout.close()


def _run_job(job: dict[str, Any]) -> int:
    """In the child: be `tgi` with these arguments."""
    from tgi_cli.cli.app import main

    for number, path in ((1, job["out"]), (2, job["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(job["set"])
    sys.argv = ["tgi", *job["arguments"]]
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        return int(end.code or 0)


def _drive() -> None:
    import tgi_cli.cli.download  # noqa: F401  # so that the children need not

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 99
            try:
                code = _run_job(json.loads(line))
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _drive()
