"""What is the machine's or the installation's is one line; a defect of the program keeps its traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sae_research.runtime.errors import environment_line

ROOT = Path(__file__).parents[2]
PROGRAMS = [
    ".".join(path.with_suffix("").relative_to(ROOT).parts).removesuffix(".__main__")
    for folder in ("scripts", "benchmarks", "sae_research/cli", "sae_research/__main__.py")
    for path in sorted([*(ROOT / folder).glob("*.py"), ROOT / folder])
    if path.is_file() and '__name__ == "__main__"' in path.read_text()
]
EACH = """
import runpy, sys
for name in sys.argv[1:]:
    sys.argv = [name] if name.endswith("ground_truth") else [name, "core"]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=False)
    except SystemExit as end:
        print(name, end.code if isinstance(end.code, str) else "", file=sys.stderr)
"""


def run(body: str) -> subprocess.CompletedProcess[str]:
    """`run_main` of a function, given its lines."""
    program = (
        "import os\nfrom pathlib import Path\nfrom sae_research.runtime.errors import run_main\n"
        f"def main():\n    {body}\nrun_main(main)\n"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)


def missing(name: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    "number",
    [
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EMFILE,
        errno.EIO,
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
    ],
)
def test_what_the_machine_refuses_names_the_file(number: int) -> None:
    line = environment_line(OSError(number, "x", "metrics/core.json"))
    assert line is not None and "(metrics/core.json): " in line and "\n" not in line


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EINVAL, "x", "a"),
        OSError(errno.EACCES, "x"),
        FileNotFoundError(errno.ENOENT, "x", "a"),
        RuntimeError("x"),
        missing("sae_research.gone"),
        missing("scripts.gone"),
        ModuleNotFoundError("x"),
    ],
    ids=repr,
)
def test_defects_keep_their_traceback(error: Exception) -> None:
    assert environment_line(error) is None


def test_memory_and_packages_are_one_line() -> None:
    assert environment_line(MemoryError()) == "out of memory: lower batch sizes, widths or numbers of tokens"
    assert "you tried to allocate 9 bytes" in str(
        environment_line(
            RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        )
    )
    assert "the package torch is not installed: run `make setup`" in str(environment_line(missing("torch")))
    assert "as a version with torch.new" in str(environment_line(missing("torch.new")))
    assert "was built without _sqlite3" in str(environment_line(missing("_sqlite3")))


def test_every_program_says_what_is_missing_before_setup() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-c", EACH, *PROGRAMS],  # -S: no installed packages
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
        env=os.environ | {"PATH": "/nowhere"},
    )
    assert done.returncode == 0 and len(PROGRAMS) > 30, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("run `make setup`") == len(PROGRAMS), done.stderr


@pytest.mark.parametrize(
    ("limit", "body", "line"),
    [
        (
            "RLIMIT_FSIZE, (10, 10)",
            "from sae_research.runtime.files import write_json; write_json(Path('FOLDER/a.json'), [1] * 99)",
            "error: the file would be larger than allowed (FOLDER/a.json): ",
        ),
        ("RLIMIT_NOFILE, (8, 8)", "files = [open(os.devnull) for _ in range(99)]", "error: too many open files (/dev/null)"),
        ("RLIMIT_AS, (2**29, 2**29)", "bytes(2**34)", "error: out of memory"),
    ],
    ids=["file", "files", "memory"],
)
def test_limits_of_the_shell_are_one_line(limit: str, body: str, line: str, tmp_path: Path) -> None:
    done = run(f"import resource; resource.setrlimit(resource.{limit}); {body.replace('FOLDER', str(tmp_path))}")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(line.replace("FOLDER", str(tmp_path))) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "body",
    [
        "from sae_research.runtime.files import write_json; write_json(Path('eval_results/a.json'), 1)",
        "from sae_research.runtime.files import replaced_folder\n    with replaced_folder('trained_saes') as folder: pass",
        "from sae_research.runtime.cache import ResultCache; ResultCache('x').put('a', 1)",
    ],
    ids=["file", "folder", "cache"],
)
def test_a_project_that_is_somebody_elses_is_one_line(body: str) -> None:
    """Root may write everywhere, so that the program then becomes somebody else."""
    with tempfile.TemporaryDirectory() as project:
        (Path(project) / "eval_results").mkdir()
        for folder in (project, f"{project}/eval_results"):
            os.chmod(folder, 0o555)
        drop = "os.setuid(65534)" if os.geteuid() == 0 else "pass"
        start = f"import contextvars, sae_research.runtime.files; os.environ.pop('DVC_ROOT', None); os.chdir({project!r})"
        done = run(f"{start}\n    {drop}\n    {body}")
        for folder in (project, f"{project}/eval_results"):
            os.chmod(folder, 0o755)
    line = "error: .cache" if "Cache" in body else "error: permission denied ("
    assert done.returncode == 1 and done.stderr.startswith(line) and done.stderr.count("\n") == 1
    assert (".json" in done.stderr) == ("json" in body) and ".tmp" not in done.stderr


def test_a_pipe_that_nobody_reads_ends_quietly() -> None:
    program = "import sae_research.runtime.errors as e; e.run_main(lambda: print('x ' * 99999))"
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "{program}" | head -c 1; exit ${{PIPESTATUS[0]}}'],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("x", "", 141)
    inside = run("raise BrokenPipeError(32, 'Broken pipe')")
    assert inside.returncode == 1 and "Traceback" in inside.stderr, "some connection's, not the output's"


def test_a_program_that_is_not_there_is_one_line() -> None:
    done = run("import subprocess; subprocess.run(['dvc_is_not_here'])")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the program dvc_is_not_here is not there: run `make setup`")
