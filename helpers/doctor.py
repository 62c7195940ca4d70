"""What is here, what is missing and what to do about it, before a profile is run: ``workbook doctor``.

Nothing is downloaded and no model is loaded. Of the hub is asked only whose the token is and whether the profile's
models may be had; a request takes five seconds at most, and the token is never shown.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from helpers import hardware, loading, memory, profiles
from helpers.types import QUANTIZED, ROOT, Machine, ModelRef, Profile, Requirement, WorkbookError, gib
from helpers.workarounds.bitsandbytes_messages import quiet_bitsandbytes
from helpers.workarounds.falcon_linear import needs_repair
from helpers.workarounds.rebinding import rebound

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    import torch
    from torch import nn
    from transformers import PretrainedConfig

T = TypeVar("T")
Status = Literal["ok", "warn", "fail", "skipped"]
LOCKS = ROOT / "env" / "requirements"
HUB_SECONDS = 5.0
LITTLE = 100 * 2**20  # bytes on a GPU that are not worth naming the process for
# How far a product with quantized weights may be from the fp32 product, relative, in 2-norms, for normal weights and
# inputs of width 256. Measured on a CPU: nf4 0.091, int8 0.0075. Nearer than the lower bound: nothing was quantized.
PRODUCT_ERRORS = {"nf4": (0.06, 0.12), "int8": (0.004, 0.015)}
NEW_TOKEN = "Make a token at https://huggingface.co/settings/tokens; give it to hf auth login, or set HF_TOKEN."
UNUSABLE = "See in nvidia-smi who holds the GPU, or leave it out with CUDA_VISIBLE_DEVICES."
UNREADABLE = "See whether the Hugging Face cache may be read, or set HF_HOME to another folder."
SMALLER = "Choose a smaller profile: workbook doctor --profile auto"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. "fail": the profile cannot run; "warn": it can. ``advice`` says what to do."""

    name: str
    status: Status
    found: str
    advice: str = ""


@dataclass(frozen=True)
class GpuProcess:
    """A process that holds memory of a GPU; ``used_bytes`` is None where the driver does not tell."""

    pid: int
    name: str
    used_bytes: int | None


@dataclass(frozen=True)
class GpuState:
    """One GPU as the driver lists it, whether or not this process may use it."""

    name: str
    total_bytes: int
    free_bytes: int
    processes: tuple[GpuProcess, ...] = ()


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver: its version, the newest CUDA that it runs, and its GPUs."""

    version: str
    cuda: str
    gpus: tuple[GpuState, ...] = ()


class DriverError(WorkbookError):
    """The driver is not there, or does not answer."""


def examine(profile: Profile) -> list[Finding]:
    """All that decides whether the profile can run on this machine; a check that breaks is a finding itself."""
    driver = ask_driver()  # before anything opens a CUDA context here, which would count as memory in use
    machine, broken = _or_else("GPUs", hardware.detect, lambda: hardware.detect(gpus=()), UNUSABLE)
    left, unread = _or_else("models", lambda: left_to_download(profile), lambda: _whole(profile), UNREADABLE)
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "driver": lambda: check_driver(profile, driver, len(machine.gpus), *_torch_build()),
        "machine": lambda: check_machine(profile, machine),
        "free memory": lambda: check_free_memory(profile, machine, driver),
        "disk": lambda: check_disk(profile, machine, left),
        "models": lambda: check_models(profile, left),
        "login": lambda: check_hub(profile, left),
        "versions": check_versions,
        "bitsandbytes": lambda: check_quantization(profile, _devices(machine)),
    }
    return [*broken, *unread, *(finding for name, check in checks.items() for finding in _guarded(name, check))]


def failures(findings: Sequence[Finding]) -> list[str]:
    """The names of the findings because of which the profile cannot run; empty where it can."""
    return [finding.name for finding in findings if finding.status == "fail"]


def _guarded(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:
        return [_broken(name, error, "Run make setup again; then report it.")]


def _or_else(name: str, look: Callable[[], T], other: Callable[[], T], advice: str) -> tuple[T, list[Finding]]:
    """What ``look`` finds; where it breaks off, what ``other`` does, and the finding that says so."""
    try:
        return look(), []
    except Exception as error:
        return other(), [_broken(name, error, advice)]


def _broken(name: str, error: Exception, advice: str) -> Finding:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return Finding(name, "fail", f"this check broke off: {reason}", advice)


# --- the machine ------------------------------------------------------------------------------------------------------


def ask_driver() -> Driver | DriverError:
    """What ``nvidia-smi`` reports, or why it does not: not installed, an error, no answer in 20 seconds."""
    try:
        done = subprocess.run(["nvidia-smi", "-q", "-x"], capture_output=True, text=True, timeout=20, check=False)
        if done.returncode:
            lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            return DriverError(f"nvidia-smi fails: {lines[0] if lines else f'exit code {done.returncode}'}")
        return read_driver(done.stdout)
    except OSError:
        return DriverError("no NVIDIA driver: there is no nvidia-smi")
    except subprocess.TimeoutExpired:
        return DriverError("nvidia-smi does not answer")
    except DriverError as error:
        return error


def read_driver(text: str) -> Driver:
    """What the XML of ``nvidia-smi -q -x`` says (nvsmi_device_v11.dtd to v13). Raises DriverError for other texts."""
    from xml.etree import ElementTree

    try:
        log = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise DriverError(f"nvidia-smi wrote no XML ({error})") from error
    gpus = [
        GpuState(
            gpu.findtext("product_name", "unknown"),
            _mib(gpu.findtext("fb_memory_usage/total")) or 0,
            _mib(gpu.findtext("fb_memory_usage/free")) or 0,
            tuple(
                GpuProcess(int(each.findtext("pid", "0")), _name(each), _mib(each.findtext("used_memory")))
                for each in gpu.iterfind("processes/process_info")
            ),
        )
        for gpu in log.iterfind("gpu")
    ]
    return Driver(log.findtext("driver_version", "unknown"), log.findtext("cuda_version", "unknown"), tuple(gpus))


def check_driver(
    profile: Profile, driver: Driver | DriverError, usable: int, build: str, cuda: str | None
) -> Iterator[Finding]:
    """The driver, and whether torch can use it: ``build`` is torch's version, ``cuda`` the CUDA it was built for.

    ``usable`` GPUs are seen by torch. A driver runs what was built for any release of its CUDA's major version (NVIDIA,
    CUDA Compatibility, section "Minor Version Compatibility").
    """
    wanted: Status = "fail" if profile.requires.gpus else "skipped"
    if isinstance(driver, DriverError):
        advice = "Install NVIDIA's driver; start a container with --gpus all." if wanted == "fail" else ""
        yield Finding("driver", wanted, str(driver), advice)
        return
    found = f"{driver.version}, runs CUDA {driver.cuda}; torch {build}"
    if cuda is None:
        yield Finding("driver", wanted, f"{found} uses no GPU", "Set up the CUDA build of torch: make setup LOCK=gpu")
    elif _major(driver.cuda) < _major(cuda):
        advice = f"Install a driver that runs CUDA {_major(cuda)}."
        yield Finding("driver", wanted, f"{found} needs CUDA {cuda}", advice)
    elif usable < len(driver.gpus):
        advice = "See CUDA_VISIBLE_DEVICES, and how many GPUs the job asked for."
        yield Finding("driver", "warn", f"{found} sees {usable} of {len(driver.gpus)} GPUs", advice)
    else:
        yield Finding("driver", "ok", f"{found} built for CUDA {cuda}")


def check_machine(profile: Profile, machine: Machine) -> Iterator[Finding]:
    """GPUs, processors and memory against the least that the profile asks for."""
    need = profile.requires
    kinds = {
        "GPUs": (Requirement(gpus=need.gpus, gpu_bytes=need.gpu_bytes, cpus=0), _gpus(machine)),
        "processors": (Requirement(cpus=need.cpus), f"{machine.cpu_count} of {machine.cpu_name}"),
        "memory": (Requirement(ram_bytes=need.ram_bytes, cpus=0), gib(machine.ram_bytes)),
    }
    for name, (part, found) in kinds.items():
        missing = "; ".join(profiles.missing(replace(profile, requires=part), machine))
        yield Finding(name, "fail", missing, SMALLER) if missing else Finding(name, "ok", found)


def check_free_memory(profile: Profile, machine: Machine, driver: Driver | DriverError) -> Iterator[Finding]:
    """Whether what is in memory together fits into what is free now; who else holds memory of the GPUs is named."""
    if profile.requires.gpus and not machine.gpus:
        yield Finding("free memory", "skipped", "no GPU to look at")
        return
    gpus = () if isinstance(driver, DriverError) or not machine.gpus else driver.gpus
    others = [text for index, gpu in enumerate(gpus) for text in _holders(index, gpu)]
    found = "; ".join([_free(machine), *others])
    missing: list[str] = []
    for group in profile.resident:
        missing += _shortfalls(group, profile, machine)
    if missing:
        advice = "End what holds the memory, or choose a smaller profile: workbook plan"
        # Models that are in several groups are named once.
        yield Finding("free memory", "fail", "; ".join([found, *dict.fromkeys(missing)]), advice)
    elif others:
        yield Finding("free memory", "warn", found, "The models fit all the same; ending these leaves more room.")
    else:
        yield Finding("free memory", "ok", f"{found}: the models fit in {profile.precision}")


def _shortfalls(group: Sequence[str], profile: Profile, machine: Machine) -> Iterator[str]:
    """What is missing for each of the models that are in memory at the same time, a phrase each."""
    residents: list[memory.Resident] = []
    for ref in (profile.models[role] for role in group):
        if config := _config(ref):
            residents.append(memory.Resident(config, profile.precision, ref.label))
    placements = memory.place_together(residents, memory.Devices.free(machine))
    for resident, placement in zip(residents, placements, strict=True):
        if placement.shortfall:
            yield f"{resident.name} {placement.shortfall}"


def _config(ref: ModelRef) -> PretrainedConfig | None:
    try:
        return loading.config(ref)
    except loading.LoadError:  # the models' own finding says so
        return None


def _holders(index: int, gpu: GpuState) -> Iterator[str]:
    """Who holds memory of a GPU, a phrase each; a process of another container is not seen, only what it holds."""
    for each in gpu.processes:
        if each.used_bytes is None or each.used_bytes >= LITTLE:
            held = "an unknown part" if each.used_bytes is None else gib(each.used_bytes)
            yield f"{each.name} (process {each.pid}) holds {held} of GPU {index}"
    if not gpu.processes and gpu.free_bytes < 0.9 * gpu.total_bytes:
        yield f"{gib(gpu.total_bytes - gpu.free_bytes)} of GPU {index} are held by nothing that can be seen from here"


def _free(machine: Machine) -> str:
    sizes = [gpu.free_bytes for gpu in machine.gpus]
    if not sizes:
        return f"{gib(machine.ram_available_bytes)} free"
    return f"at least {gib(min(sizes))} free on each of {len(sizes)} GPU{'s' if len(sizes) > 1 else ''}"


def _gpus(machine: Machine) -> str:
    names = [f"{gpu.name} of {gib(gpu.total_bytes)}" for gpu in machine.gpus]
    return "; ".join(f"{names.count(name)}x {name}" for name in dict.fromkeys(names)) or "none, and none needed"


def _mib(text: str | None) -> int | None:
    """Bytes of a text such as "81920 MiB"; None for "N/A"."""
    number = (text or "").split()[:1]
    return int(number[0]) * 2**20 if number and number[0].isdigit() else None


def _name(process: Element) -> str:
    return Path(process.findtext("process_name") or "unknown").name or "unknown"


def _major(version: str) -> int:
    number = version.partition(".")[0]
    return int(number) if number.isdigit() else 0


def _torch_build() -> tuple[str, str | None]:
    import torch

    return torch.__version__, torch.version.cuda


def _devices(machine: Machine) -> list[str]:
    return [f"cuda:{gpu.index}" for gpu in machine.gpus] or ["cpu"]


# --- disk and models --------------------------------------------------------------------------------------------------


def left_to_download(profile: Profile, cache: Path | None = None) -> int:
    """Bytes of the profile's models that are not in the Hugging Face cache yet (``cache``: another folder)."""
    return max(_whole(profile) - profiles.downloaded_bytes(profile, cache), 0)


def _whole(profile: Profile) -> int:
    """Bytes of the profile's models that are to be downloaded where nothing was."""
    return sum({ref.id: ref.download_bytes or 0 for ref in _distinct(profile) if ref.source == "hub"}.values())


def check_disk(profile: Profile, machine: Machine, left: int) -> Iterator[Finding]:
    """The disk of the Hugging Face cache against what is left to download, and what the runner asks for."""
    part = replace(profile, requires=Requirement(disk_bytes=profile.requires.disk_bytes, cpus=0))
    missing = "; ".join(profiles.missing(part, machine, profiles.downloaded_bytes(profile)))
    cache = hardware.download_folder()
    free = hardware.disk_free(cache)
    if left > free:
        found = f"{gib(left)} to download, {gib(free)} free at {cache}"
        yield Finding("disk", "fail", found, "Free some space, or set HF_HOME to a folder on a larger disk.")
    elif missing:
        larger = f"move {ROOT}" if profile.offline else "set HF_HOME to a folder"
        yield Finding("disk", "fail", missing, f"Free some space, or {larger} on a larger disk.")
    elif profile.offline:
        yield Finding("disk", "ok", f"{gib(machine.disk_free_bytes)} free, nothing to download")
    else:
        yield Finding("disk", "ok", f"{gib(free)} free at {cache}, {gib(left)} to download")


def check_models(profile: Profile, left: int) -> Iterator[Finding]:
    """Whether the models that come with the workbook are here, and how much of the others is."""
    missing = [text for ref in _distinct(profile) if (text := _missing(ref))]
    if missing:
        yield Finding("models", "fail", " ".join(missing), "Run make setup, or git restore env/models.")
        return
    labels = ", ".join(ref.name for ref in _distinct(profile))
    absent = [ref.name for ref in _distinct(profile) if ref.source == "hub" and not loading.is_here(ref)]
    if absent and not left:
        found = f"{', '.join(absent)}: not all files are here, though their sizes add up"
        yield Finding("models", "warn", found, f"Fetch them: workbook fetch --profile {profile.name}")
    else:
        yield Finding("models", "ok", f"{labels}: " + (f"{gib(left)} to download" if left else "here"))


def _missing(ref: ModelRef) -> str:
    try:
        if ref.source == "package":
            loading.packaged_file(ref)
        elif ref.source == "embedded":
            loading.resolve(ref)
    except loading.LoadError as error:
        return str(error)
    return ""


def _distinct(profile: Profile) -> list[ModelRef]:
    return list(dict.fromkeys(profile.models.values()))


# --- the hub ----------------------------------------------------------------------------------------------------------


def check_hub(profile: Profile, left: int) -> Iterator[Finding]:
    """Whether the token is valid, and whether the hub gives each of the profile's models to its owner."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import get_session

    repositories = [ref.id for ref in _distinct(profile) if ref.source == "hub"]
    if not repositories:
        yield Finding("login", "skipped", "no model of this profile comes from the hub")
        return
    with rebound(get_session(), "timeout", HUB_SECONDS):
        login = _login(get_token(), left)
        yield login
        if login.status in ("ok", "warn"):
            yield from _licences(repositories, left)


def _login(token: str | None, left: int) -> Finding:
    """Whose token it is. Errors are named by their type alone, whose text might hold the token."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError

    if is_offline_mode():
        return Finding("login", _unreachable(left), "HF_HUB_OFFLINE is set: not asked", "Unset it to download.")
    if token is None:
        return Finding("login", "warn", "no token", f"Models with a licence to accept need one. {NEW_TOKEN}")
    try:
        found = Finding("login", "ok", f"the token is {HfApi().whoami()['name']}'s")
    except UnicodeError:
        found = Finding("login", "fail", "the token holds characters that no token has", NEW_TOKEN)
    except HfHubHTTPError as error:
        found = Finding("login", "warn", f"the hub answers {error.response.status_code}", "Try again later.")
        if error.response.status_code == 401:
            found = Finding("login", "fail", "the hub does not know the token (401)", NEW_TOKEN)
    except Exception as error:
        found = _not_reached("login", error, left)
    return found


def _licences(repositories: Sequence[str], left: int) -> Iterator[Finding]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    refused, advice = [], []
    for name in repositories:
        try:
            HfApi().auth_check(name)
        except GatedRepoError:
            refused.append(f"{name}: its licence is not accepted")
            advice.append(f"Accept it at https://huggingface.co/{name}")
        except HfHubHTTPError as error:
            refused.append(f"{name}: the hub answers {error.response.status_code}")
            advice.append(f"See whether https://huggingface.co/{name} is there for you.")
        except Exception as error:
            yield _not_reached("licences", error, left)
            return
    if refused:
        yield Finding("licences", "fail", "; ".join(refused), " ".join(advice))
    else:
        yield Finding("licences", "ok", f"{', '.join(repositories)} may be downloaded")


def _not_reached(name: str, error: Exception, left: int) -> Finding:
    advice = "See the network and HTTPS_PROXY, or set HF_ENDPOINT to a mirror." if left else ""
    return Finding(name, _unreachable(left), f"the hub cannot be reached ({type(error).__name__})", advice)


def _unreachable(left: int) -> Status:
    return "fail" if left else "skipped"


# --- the software -----------------------------------------------------------------------------------------------------


def check_versions(lock: Path | None = None) -> Iterator[Finding]:
    """The installed packages against the lock of this build: cpu.txt or gpu.txt."""
    lock = lock or LOCKS / ("cpu.txt" if _cpu_build() else "gpu.txt")
    pins = locked_versions(lock.read_text(encoding="utf-8"))
    found = {name: _installed(name) for name in pins}
    missing = [f"{name} {pin} is not installed" for name, pin in pins.items() if found[name] is None]
    others = [f"{name} {found[name]}, not {pin}" for name, pin in pins.items() if found[name] not in (None, pin)]
    if missing or others:
        texts = [*missing, *others]
        more = f" and {len(texts) - 5} more" if len(texts) > 5 else ""
        advice = f"Install what {lock.name} says: make setup"
        yield Finding("versions", "fail" if missing else "warn", ", ".join(texts[:5]) + more, advice)
    else:
        yield Finding("versions", "ok", f"{len(pins)} packages as in {lock.name}")


def locked_versions(text: str) -> dict[str, str]:
    """Package -> version that a lock's text pins for this Python and system."""
    from packaging.requirements import Requirement as Pin

    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    pins = [Pin(line) for line in lines if line and not line.startswith("-")]
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    return {pin.name: next(iter(pin.specifier)).version for pin in here}


def check_quantization(profile: Profile, devices: Sequence[str]) -> Iterator[Finding]:
    """bitsandbytes by a small product on each device, and whether Falcon needs the repair of ``helpers.loading``."""
    precisions = [name for name in profile.precisions if name in QUANTIZED]
    if not precisions:
        yield Finding("bitsandbytes", "skipped", "this profile quantizes nothing")
        return
    errors = {(name, device): product_error(name, device) for name in precisions for device in devices}
    wrong = [key for key, error in errors.items() if not PRODUCT_ERRORS[key[0]][0] < error < PRODUCT_ERRORS[key[0]][1]]
    shown = wrong or [max((key for key in errors if key[0] == name), key=errors.__getitem__) for name in precisions]
    found = ", ".join(f"{name} on {device} {errors[name, device]:.2g}" for name, device in shown)
    found = f"relative error of a quantized product: {found}"
    advice = "Run make setup again; on a GPU, see whether bitsandbytes supports it."
    yield Finding("bitsandbytes", "fail", found, advice) if wrong else Finding("bitsandbytes", "ok", found)
    version = f"transformers {importlib.metadata.version('transformers')}"
    repair = f"{version} quantizes no layer of Falcon by itself: load with helpers.loading.load, which repairs it"
    yield Finding("Falcon repair", "ok", repair if needs_repair() else f"{version} needs none")


def product_error(precision: str, device: str = "cpu", width: int = 256) -> float:
    """Relative distance (2-norms) of a product with quantized weights from the same product in fp32, on a device.

    Weights of shape (width, width) and 16 inputs are drawn from a normal distribution; both multiply in bfloat16.
    """
    import torch

    random = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(width, width, generator=random), torch.randn(16, width, generator=random)
    layer = _quantized_linear(precision, weight).to(device)
    with torch.inference_mode():
        product = layer(inputs.to(device, torch.bfloat16)).float().cpu()
    exact = inputs @ weight.T
    return ((product - exact).norm() / exact.norm()).item()


def _quantized_linear(precision: str, weight: torch.Tensor) -> nn.Module:
    """A layer of bitsandbytes that quantizes ``weight`` (outputs, inputs) once it is moved to a device."""
    import torch

    quiet_bitsandbytes()
    import bitsandbytes as bnb

    rows, columns = weight.shape
    if precision == "nf4":
        layer = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict({"weight": weight})
    return layer


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_build() -> bool:
    return sys.platform == "darwin" or "+cpu" in (_installed("torch") or "")
