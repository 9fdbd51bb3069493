"""Speed and memory on one GPU, as a record that docs/gpu.md is made from: `make gpu`, or `python -m benchmarks.gpu`.

    python -m benchmarks.gpu                              # on a GPU, 8 minutes: docs/gpu/record.json, docs/gpu.md
    python -m benchmarks.gpu --device cpu --small         # that it runs; writes nothing unless --out says where
    python -m benchmarks.gpu --parts training pursuit     # some of it

Needs torch and transformers, and the few packages that `benchmarks.gpu_bundle` brings along; nothing is downloaded.
Models have the shapes of published ones and random weights. What lacks a package is left out with a line, a part that fails
is recorded as failed, and no part starts once the time is up.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[1]
RECORD, PAGE = ROOT / "docs/gpu/record.json", ROOT / "docs/gpu.md"
PARTS = ("tests", "training", "pursuit", "evaluations", "sae_bench")
TEST_SECONDS = 120
"""Longest that the `gpu` tests may take."""


Value = TypeVar("Value")


class Run:
    """One run: where, how long, what was found."""

    def __init__(self, device: str, small: bool, minutes: float, out: Path | None) -> None:
        import torch

        self.device = torch.empty(0, device=device).device
        self.small, self.out, self.ends = small, out, time.monotonic() + 60 * minutes
        self.left_out: dict[str, str] = {}
        self.values: dict[str, Any] = {"machine": machine(self.device), "left_out": self.left_out, "failed": {}}

    def wait(self) -> None:
        """Until the device has done all it was given."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @property
    def seconds_left(self) -> float:
        return self.ends - time.monotonic()

    def skip(self, what: str, why: str) -> None:
        print(f"left out: {what}: {why}", flush=True)
        self.left_out[what] = why

    def part(self, name: str, measure: Callable[[Run], Any]) -> None:
        """Measure one part and write the record as it stands. What fails is named there, and the rest goes on."""
        if self.seconds_left < 20:
            self.skip(name, "the time was up")
            return
        print(f"{name} ({self.seconds_left:.0f} s left)", flush=True)
        began = time.monotonic()
        found = self.tried(name, lambda: measure(self))
        if found is not None:
            self.values[name] = found
        self.values.setdefault("seconds", {})[name] = time.monotonic() - began
        self.write()

    def tried(self, what: str, measure: Callable[[], Value]) -> Value | None:
        """What `measure` gives; None where it lacks a package, is refused or fails, which the record then says."""
        from sae_research.runtime.errors import UserError

        try:
            return measure()
        except ModuleNotFoundError as error:
            self.skip(what, f"needs {error.name}")
        except UserError as error:
            self.skip(what, str(error))
        except Exception as error:  # noqa: BLE001 - told, recorded, and the exit code says so
            traceback.print_exc()
            self.values["failed"][what] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        return None

    def write(self) -> None:
        from sae_research.runtime.files import round_significant, write_json

        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.out, round_significant(self.values, 3))


def machine(device: Any) -> dict[str, Any]:
    """What the record was measured on."""
    import torch

    cuda = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if cuda else None
    return {
        "device": properties.name if properties else device.type,
        "memory_gib": properties.total_memory / 2**30 if properties else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


# --- parts -----------------------------------------------------------------------------------


def tests(run: Run) -> dict[str, Any]:
    """The tests marked `gpu`: how many passed, failed, were skipped, and which files lack a package."""
    if find_spec("pytest") is None:
        raise ModuleNotFoundError(name="pytest")
    if run.device.type != "cuda":
        run.skip("tests marked gpu", "no CUDA device")
        return {}
    ends, total = time.monotonic() + min(TEST_SECONDS, run.seconds_left / 3), dict[str, Any]()
    for folder, files in gpu_tests().items():
        # a folder at a time: a fixture file that lacks a package ends pytest at once
        report = Path(tempfile.mkdtemp()) / "tests.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu and not slow",
            "--continue-on-collection-errors",
            "--tb=short",
        ]
        try:
            done = subprocess.run(
                [*command, f"--junitxml={report}", *files],
                cwd=ROOT,
                timeout=max(1.0, ends - time.monotonic()),
                capture_output=True,
                text=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            run.skip(f"tests in {folder}", "the time for tests was up")
            continue
        print(done.stdout[-3000:], flush=True)
        if not report.is_file():
            run.skip(f"tests in {folder}", (done.stderr.strip().splitlines() or ["pytest wrote no report"])[-1])
            continue
        for key, value in counted(report).items():
            total[key] = total[key] + value if key in total else value
    return total


def gpu_tests() -> dict[str, list[str]]:
    """Files that hold tests marked `gpu`, by folder."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        if "mark.gpu" in text or "DEVICES" in text:
            found.setdefault(str(path.parent.relative_to(ROOT)), []).append(str(path.relative_to(ROOT)))
    return found


def counted(report: Path) -> dict[str, Any]:
    """What a JUnit report says."""
    from xml.etree import ElementTree

    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    found = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None]
    return {**found, "failed": failed[:20]}


def training(run: Run) -> list[dict[str, Any]]:
    """Tokens and SAE-tokens a second of the trainer, the model's pass included, by model and recipe."""
    import torch

    from benchmarks.gpu_models import random_model, shapes
    from benchmarks.gpu_training import RECIPES_ON, measure, recipes, several

    rows = []
    for name, shape in shapes(run.small).items():
        dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
        lm = random_model(name, shape, run.device, dtype)
        jobs = {f"{recipe}": {recipe: entry} for recipe, entry in recipes(shape.d_sae).items()}
        if name in RECIPES_ON:
            jobs = {key: entries for key, entries in jobs.items() if key in RECIPES_ON[name]}
        jobs |= several(shape.d_sae)
        for job, entries in jobs.items():
            if run.seconds_left < 60:
                run.skip(f"training, {name}, {job}", "the time was up")
                continue
            found = run.tried(f"training, {name}, {job}", partial(measure, lm, shape, entries, run.small, run.wait))
            if found is None:
                continue
            rows.append({"model": name, "recipe": job, "saes": len(entries), "d_sae": shape.d_sae, **found})
            print(
                f"  {name:12} {job:24} {found['tokens_per_second']:12,.0f} tokens/s "
                f"{found['tokens_per_second'] * len(entries):12,.0f} SAE-tokens/s {found['peak_gib']:6.1f} GiB",
                flush=True,
            )
        del lm
    return rows


def pursuit(run: Run) -> list[dict[str, Any]]:
    """MPSAE and IHTP against plain loops, and every encoder's tokens a second."""
    import torch

    from benchmarks.pursuit import Shape, measured, speeds
    from sae_research.saes.pursuit import matching

    sizes = [Shape(32, 256, 4, 16)] if run.small else [Shape(512, 16_384, 64, 128), Shape(2_304, 16_384, 64, 128)]
    rows = []
    for shape in sizes:
        with torch.no_grad():
            against = measured(shape, str(run.device))
            rate = speeds(shape, str(run.device))
        for name, (ours, loop) in against.items():
            print(
                f"  {shape.d_in} x {shape.d_sae}: {name:32} {ours:8.4f} s, loop {loop:8.4f} s, {loop / ours:6.1f}x",
                flush=True,
            )
        rows.append(
            {
                "d_in": shape.d_in,
                "d_sae": shape.d_sae,
                "against": {name: {"ours_seconds": o, "loop_seconds": theirs} for name, (o, theirs) in against.items()},
                "tokens_per_second": rate,
                "compiled_steps": all(matching.SERVES.values()) if matching.SERVES else None,
            }
        )
    return rows


def evaluations(run: Run) -> dict[str, Any]:
    """Seconds per SAE, on the shape of the smaller model."""
    import torch

    from benchmarks.gpu_evaluations import seconds_per_sae
    from benchmarks.gpu_models import random_model, shapes

    name, shape = next(iter(shapes(run.small).items()))
    lm = random_model(name, shape, run.device, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        found = seconds_per_sae(lm, shape, Path(folder), run)
    return {"model": name, "d_sae": shape.d_sae, "by_evaluation": found}


def sae_bench(run: Run) -> dict[str, Any]:
    """Ours against SAE Bench on this device."""
    if run.small:
        run.skip("against SAE Bench", "takes minutes; left out with --small")
        return {}
    from benchmarks.gpu_evaluations import against_sae_bench

    return against_sae_bench(run.device, run.skip)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU runs in a minute or two")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--minutes", type=float, default=8, help="no part starts once they are over (default 8)")
    parser.add_argument("--out", type=Path, help=f"the record (default {RECORD.relative_to(ROOT)}; nowhere with --small)")
    parser.add_argument(
        "--needs", action="store_true", help="list the packages that this needs beyond torch and transformers"
    )
    options = parser.parse_args()
    try:
        from benchmarks import gpu_page
    except ModuleNotFoundError as error:
        print(
            f"error: benchmarks.gpu needs the package {error.name}; docs/gpu.md says how to bring it along", file=sys.stderr
        )
        return 1
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("error: no CUDA device here; --device cpu --small tries everything without one", file=sys.stderr)
        return 1
    os.environ["SAE_RESEARCH_NO_CACHE"] = "1"
    out = options.out or (None if options.small else RECORD)
    run = Run(options.device, options.small, options.minutes, out)
    print(", ".join(f"{key} {value}" for key, value in run.values["machine"].items()), flush=True)
    with tempfile.TemporaryDirectory() if "DVC_ROOT" not in os.environ else nullcontext() as folder:
        if folder is not None:
            os.environ["DVC_ROOT"] = folder  # caches of this run alone
        for name in options.parts:
            run.part(name, {part.__name__: part for part in (tests, training, pursuit, evaluations, sae_bench)}[name])
    if out == RECORD:
        gpu_page.write_page(PAGE, RECORD)
    for name, why in run.values["failed"].items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    return 1 if run.values["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
