"""`make test-gpu`: everything that this machine's GPUs can check, and one table of it at the end."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import torch
from rich.console import Console
from rich.table import Table

from hiermoe.ranks.gpus import check_gpus
from hiermoe.records.provenance import nccl_version

CONTROL = "nvidia-cuda-mps-control"
RUNS = (["tests/gpu"], ["tests/benchmarks/test_gpu_local_work.py", "--benchmark-only"])


@contextmanager
def several_at_once(folder: Path) -> Iterator[bool]:
    """Have CUDA's MPS run kernels of several processes side by side, where it is installed: else they take turns."""
    control = shutil.which(CONTROL)
    if control is None or "CUDA_MPS_PIPE_DIRECTORY" in os.environ:  # or somebody has seen to it
        yield control is not None
        return
    os.environ.update(CUDA_MPS_PIPE_DIRECTORY=str(folder), CUDA_MPS_LOG_DIRECTORY=str(folder))
    started = subprocess.run([control, "-d"], capture_output=True).returncode == 0
    if not started:
        del os.environ["CUDA_MPS_PIPE_DIRECTORY"], os.environ["CUDA_MPS_LOG_DIRECTORY"]
    try:
        yield started
    finally:
        if started:
            subprocess.run([control], input=b"quit\n", capture_output=True)


def results_of(path: Path) -> Iterator[tuple[str, str, float]]:
    """Name, outcome and seconds of every test in a file of pytest's."""
    for case in ElementTree.parse(path).iter("testcase"):
        outcome = next((part.tag for part in case if part.tag in ("failure", "error", "skipped")), "passed")
        yield case.get("name", ""), outcome, float(case.get("time", 0))


def main() -> int:
    """Run the tests; the exit code is 0 where all passed."""
    console = Console()
    try:
        check_gpus()
    except ValueError as error:
        console.print(f"nothing was checked: {error}".replace("ranks.device=cuda: ", ""))
        return 1
    codes, found = [], []
    with tempfile.TemporaryDirectory() as name, several_at_once(Path(name)) as at_once:
        for number, what in enumerate(RUNS):
            report = Path(name) / f"{number}.xml"
            command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", *what, f"--junitxml={report}"]
            codes.append(subprocess.run(command).returncode)
            if report.exists():
                found += results_of(report)
    num_gpus = torch.cuda.device_count()
    nccl = ".".join(map(str, nccl_version() or ()))
    title = f"{num_gpus} × {torch.cuda.get_device_name(0)}, torch {torch.__version__}, NCCL {nccl}"
    table = Table(title=title, title_justify="left")
    for column in ("check", "", "s"):
        table.add_column(column, justify="right" if column == "s" else "left")
    for test, outcome, seconds in found:
        table.add_row(test, outcome, f"{seconds:.0f}")
    console.print(table)
    lacks = [
        "" if at_once else "CUDA's MPS, so ranks took turns",
        "" if num_gpus >= 8 else f"{8 - num_gpus} GPUs, so nothing here says how fast ranks exchange",
        "" if shutil.which("nvidia-smi") else "nvidia-smi, so records do not name the card",
    ]
    console.print(f"lacking: {'; '.join(filter(None, lacks)) or 'nothing'}")
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
