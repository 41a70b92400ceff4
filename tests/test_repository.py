"""Repository-wide checks: the scripts' help, imports between rooms, requirements and style."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# The flags that each script documents.
SHARED = ("gpu_id", "dataset", "preset", "data_dir", "input", "trans", "logdir", "seed", "config.KEY", "model_name")
CHAIN = (
    "score",
    "model",
    "experiment_name_forward",
    "experiment_name_backward",
    "checkpoint_forward",
    "checkpoint_backward",
    "use_ddim",
    "sampling",
    "timestep_respacing",
    "smooth",
)
FLAGS = {
    "modality_cyclic_train.py": (*SHARED, "training_process", "experiment_name", "overwrite"),
    "modality_cyclic_test.py": (*SHARED, *CHAIN, "select", "compare", "combine", "rescore"),
    "modality_cyclic_predict.py": (
        *(flag for flag in SHARED if flag != "data_dir"),
        *CHAIN,
        "scan",
        "scan_trans",
        "output_dir",
        "scoring",
        "combined",
        "threshold",
        "slices",
    ),
    "datasets/phantom.py": ("output_dir", "train", "val", "test", "healthy", "seed", "workers", "figure"),
    "datasets/brats_preprocess.py": (
        "modality",
        "data_dir",
        "csv",
        "output_dir",
        "percentage_upper",
        "percentage_lower",
        "train_split",
        "val_split",
        "test_split",
        "slices",
        "test_slices",
        "workers",
        "overwrite",
    ),
    "datasets/split_traintest.py": ("data_dir", "output_dir", "seed"),
}

# The rooms that each room may import besides itself.
MAY_IMPORT = {
    "utils": set(),
    "guided_diffusion": {"utils"},
    "models": {"guided_diffusion", "utils"},
    "evaluation": {"models", "utils"},
    "datasets": {"utils"},
    "config": {"models", "utils"},
    "scoring": {"models", "datasets", "evaluation", "config", "guided_diffusion", "utils"},
}
ROOMS = set(MAY_IMPORT)

# Import names of packages, where they differ from the package's name.
IMPORTED_AS = {
    "absl-py": "absl",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
    "tensorboard": "torch.utils.tensorboard",
}
# Packages that no line imports, and the imported package that needs them.
NEEDED_BY = {"mpich": "mpi4py"}  # its MPI library, and mpiexec


def run_python(*args: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, check=False)


# ----------------------------------------------------------------------------------------------------------
# Help

# Runs `script --help` as Python would, and prints the exit code and the slow packages it imported.
SHOW_HELP = """
import json, runpy, sys
sys.argv = [sys.argv[1], "--help"]
sys.path[0] = sys.argv[0].rpartition("/")[0]
code = None
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    code = end.code
names = "torch monai numpy scipy nibabel nilearn sklearn matplotlib absl tqdm"
slow = sorted(set(names.split()) & set(sys.modules))
print(json.dumps({"code": code, "slow": slow}))
"""


@pytest.mark.parametrize("script", FLAGS)
def test_help_explains_every_flag_and_imports_nothing_slow(tmp_path, script):
    done = run_python("-c", SHOW_HELP, str(REPOSITORY / script), cwd=tmp_path)
    assert done.stderr == ""
    text, _, end = done.stdout.removesuffix("\n").rpartition("\n")
    assert json.loads(end) in ({"code": code, "slow": []} for code in (None, 0))
    entries = re.split(r"\n  (?=-)", text[text.index("\noptions:") :])[1:]
    explained = {}
    for entry in entries:
        # "--flag VALUE", two spaces or a new line, then the explanation
        names, explanation = re.split(r"\s{2,}", entry.strip(), maxsplit=1)
        for name in re.findall(r"--([\w.]+)", names):
            explained[name] = explanation
    assert set(explained) == {"help", *FLAGS[script]}
    for name, explanation in explained.items():
        assert len(re.findall(r"[^\W\d_]{2,}", explanation)) >= 3, f"--{name} is hardly explained"
    assert "None" not in text


def test_help_works_in_a_process_of_its_own():
    done = run_python("modality_cyclic_train.py", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: modality_cyclic_train.py")


# ----------------------------------------------------------------------------------------------------------
# Imports


def sources(*folders: str) -> list[Path]:
    """Return the Python files of these rooms."""
    return [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]


def imported_names(path: Path) -> Iterator[str]:
    """Yield the absolute dotted names that a file imports, at any level of nesting."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                assert node.level == 1, f"{path} reaches out of its room"
            else:
                yield node.module
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_rooms_import_only_the_rooms_they_may(room):
    files = sources(room)
    assert files
    for path in files:
        rooms = {name.partition(".")[0] for name in imported_names(path)} & ROOMS
        assert rooms - {room} <= MAY_IMPORT[room], path
        scripts = {name for name in imported_names(path) if name.startswith("modality_cyclic")}
        assert not scripts, path


def test_imports_have_no_cycle():
    """Between files, including imports inside functions."""
    modules = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in sources(*ROOMS)}
    graph = {}
    for module, path in modules.items():
        room = module.partition(".")[0]
        relative = {
            f"{room}.{node.module or alias.name}"
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.level
            for alias in node.names
        }
        graph[module] = ({*imported_names(path)} | relative) & modules.keys() - {module}
    assert graph["evaluation.report"] >= {"evaluation.metrics", "evaluation.tables"}
    list(TopologicalSorter(graph).static_order())  # a CycleError names the cycle


@pytest.mark.parametrize("room", ["models", "guided_diffusion"])
def test_the_method_handles_no_files(room):
    """Except for the modules that log and save training: no files, arguments or progress bars."""
    exceptions = {"checkpoint.py", "dist_util.py", "logger.py", "train_util.py"}
    for path in sources(room):
        if path.name not in exceptions:
            names = {name.partition(".")[0] for name in imported_names(path)}
            assert not names & {"argparse", "json", "os", "pathlib", "sys", "tqdm"}, path


# ----------------------------------------------------------------------------------------------------------
# Requirements


def read_requirements() -> tuple[dict[str, str], dict[str, str]]:
    """Return version by package, of the code and of the tests, whose section begins with a comment."""
    code, tests = {}, {}
    section = code
    for line in (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            section = tests if "test" in line and code else code
        elif line.strip():
            package, version = re.fullmatch(r"([\w-]+)==([\d.]+)", line.strip()).groups()
            section[package] = version
    return code, tests


def code_files() -> list[Path]:
    return [*sorted(REPOSITORY.glob("*.py")), *sources(*ROOMS)]


def test_every_requirement_is_used_and_every_import_required():
    required, for_tests = read_requirements()
    assert {"torch", "ml_collections", "nilearn"} <= set(required)
    assert {"pytest", "ruff"} <= set(for_tests)
    imported = {name for path in code_files() for name in imported_names(path)}
    assert set(NEEDED_BY.values()) <= set(required)
    modules = {package: IMPORTED_AS.get(package, package) for package in required if package not in NEEDED_BY}
    unused = {package for package, module in modules.items() if module not in imported_or_parents(imported)}
    assert not unused
    own = ROOMS | {path.stem for path in REPOSITORY.glob("*.py")}
    third_party = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) - own
    assert third_party <= set(modules.values())


def imported_or_parents(names: set[str]) -> set[str]:
    """Return the names and their parent packages: a.b.c also imports a and a.b."""
    return {".".join(parts[:i]) for name in names for parts in [name.split(".")] for i in range(1, len(parts) + 1)}


def test_installed_versions_equal_the_required_ones():
    from importlib.metadata import version

    for packages in read_requirements():
        for package, required in packages.items():
            # builds for one kind of device append it, as in 2.0+cpu
            assert version(package).partition("+")[0] == required, package


def test_conda_environment():
    text = (REPOSITORY / "environment.yml").read_text(encoding="utf-8")
    assert re.search(r"^name: MMCCD$", text, re.MULTILINE)
    assert re.search(r"^ +- pip:\n +- -r requirements\.txt$", text, re.MULTILINE)
    python = re.search(r"^ +- python *[=>]+ *(\d+)\.(\d+)", text, re.MULTILINE)
    assert tuple(map(int, python.groups())) >= (3, 11)


# ----------------------------------------------------------------------------------------------------------
# Style


def test_no_file_contains_an_absolute_path():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git repository")
    pattern = re.compile(r"(?<![\w.:/~-])/(" + "|".join(["root", "tmp", "home", "work", "Users"]) + r")\b")
    assert pattern.search("in " + "/".join(["", "home", "me"]))
    paths = [REPOSITORY / name.decode() for name in listed.stdout.split(b"\0") if name]
    assert REPOSITORY / "pyproject.toml" in paths
    found = [
        f"{path.relative_to(REPOSITORY)}: {line.strip()}"
        for path in paths
        if path.is_file()
        for line in path.read_bytes().decode("utf-8", errors="ignore").splitlines()
        if pattern.search(line)
    ]
    assert not found


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_passes(command):
    done = run_python("-m", "ruff", *command, ".")
    assert done.returncode == 0, done.stdout + done.stderr


def test_test_files_have_unique_names():
    """Without packages under tests/, pytest identifies modules by their base names."""
    assert "testpaths" in tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    names = [path.name for path in (REPOSITORY / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
    assert not list((REPOSITORY / "tests").rglob("__init__.py"))
