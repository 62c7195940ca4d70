"""Check, before a profile is run, what is here, what is missing and how to fix it: ``workbook doctor``.

Nothing is downloaded and no model is loaded. The hub is asked only for the token's owner and whether the profile's
models may be downloaded; a request takes five seconds at most, and the token is never shown.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from helpers.base.files import ROOT
from helpers.base.text import shell_word
from helpers.base.units import gib
from helpers.machine import hardware
from helpers.machine.driver import DriverError, ask_driver
from helpers.machine.placement import Devices, Resident, place_together
from helpers.models import checkpoint, hub, profiles
from helpers.models import finding as models_finding
from helpers.models.finding import resolve
from helpers.models.references import Requirement
from helpers.models.unpacking import packaged_file
from helpers.models.workarounds.rebinding import rebound
from helpers.planning.findings import Finding, _check_quantization, _check_versions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from transformers import PretrainedConfig

    from helpers.machine.driver import Driver
    from helpers.machine.hardware import Machine
    from helpers.models.references import ModelRef, Profile
    from helpers.planning.findings import Status

_T = TypeVar("_T")
HUB_SECONDS = 5.0
NEW_TOKEN = "Make a token at https://huggingface.co/settings/tokens; give it to hf auth login, or set HF_TOKEN."
UNUSABLE = "Run nvidia-smi to see which process uses the GPU, or exclude it with CUDA_VISIBLE_DEVICES."
UNREADABLE = "Check the permissions of the Hugging Face cache, or set HF_HOME to another folder."
SMALLER = "Choose a smaller profile: workbook doctor --profile auto"


def examine(profile: Profile) -> list[Finding]:
    """Check everything that decides whether the profile can run here; a check that fails itself is a finding, too."""
    driver = ask_driver()  # before anything opens a CUDA context here, which would count as memory in use
    machine, broken = _or_else("GPUs", hardware.detect, lambda: hardware.detect(gpus=()), UNUSABLE)
    left, unread = _or_else("models", lambda: _left_to_download(profile), lambda: _whole(profile), UNREADABLE)
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "driver": lambda: _check_driver(profile, driver, len(machine.gpus), *_torch_build()),
        "machine": lambda: _check_machine(profile, machine),
        "free memory": lambda: _check_free_memory(profile, machine, driver),
        "disk": lambda: _check_disk(profile, machine, left),
        "models": lambda: _check_models(profile, left),
        "login": lambda: _check_hub(profile, left),
        "versions": _check_versions,
        "bitsandbytes": lambda: _check_quantization(profile, _devices(machine)),
    }
    findings = [*broken, *unread]
    for name, check in checks.items():
        findings += _guarded(name, check)
    return findings


def failures(findings: Sequence[Finding]) -> list[str]:
    """Names of the findings because of which the profile cannot run; empty if it can."""
    return [finding.name for finding in findings if finding.status == "fail"]


def _guarded(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:
        return [_broken(name, error, "Run make setup again; if that does not help, report it.")]


def _or_else(name: str, look: Callable[[], _T], other: Callable[[], _T], advice: str) -> tuple[_T, list[Finding]]:
    """What ``look`` returns; if it fails, what ``other`` returns, and the finding that says so."""
    try:
        return look(), []
    except Exception as error:
        return other(), [_broken(name, error, advice)]


def _broken(name: str, error: Exception, advice: str) -> Finding:
    # The errors of CUDA have several lines; the first one names the trouble.
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return Finding(name, "fail", f"this check failed unexpectedly: {reason}", advice)


def _check_driver(
    profile: Profile, driver: Driver | DriverError, usable: int, build: str, cuda: str | None
) -> Iterator[Finding]:
    """Check the driver, and whether torch can use it.

    torch sees ``usable`` GPUs; ``build`` is its version, ``cuda`` the CUDA it was built for. A driver runs what was
    built for any release of its CUDA's major version (NVIDIA, CUDA Compatibility, "Minor Version Compatibility").
    """
    wanted: Status = "skipped"
    if profile.requires.gpus:
        wanted = "fail"
    if isinstance(driver, DriverError):
        advice = ""
        if wanted == "fail":
            advice = "Install NVIDIA's driver. Start a container with --gpus all."
        yield Finding("driver", wanted, str(driver), advice)
        return
    found = f"{driver.version}, runs CUDA {driver.cuda}; torch {build}"
    if cuda is None:
        yield Finding("driver", wanted, f"{found} uses no GPU", "Set up the CUDA build of torch: make setup LOCK=gpu")
    elif _major(driver.cuda) < _major(cuda):
        advice = f"Set up the build that this driver runs: make setup LOCK=gpu. Or install one for CUDA {_major(cuda)}."
        yield Finding("driver", wanted, f"{found} needs CUDA {cuda}", advice)
    elif usable < len(driver.gpus):
        advice = "Check CUDA_VISIBLE_DEVICES, and how many GPUs the job asked for."
        yield Finding("driver", "warn", f"{found} sees {usable} of {len(driver.gpus)} GPUs", advice)
    else:
        yield Finding("driver", "ok", f"{found} built for CUDA {cuda}")


def _check_machine(profile: Profile, machine: Machine) -> Iterator[Finding]:
    """Check the GPUs, the CPU and the memory against the least that the profile needs."""
    need = profile.requires
    # Each part is asked for alone, so that each shortfall becomes a finding of its own; cpus=0 asks for no CPU.
    parts = {
        "GPUs": (Requirement(gpus=need.gpus, gpu_bytes=need.gpu_bytes, cpus=0), _gpus(machine)),
        "CPUs": (Requirement(cpus=need.cpus), f"{machine.cpu_count} of {machine.cpu_name}"),
        "memory": (Requirement(ram_bytes=need.ram_bytes, cpus=0), gib(machine.ram_bytes)),
    }
    for name, (part, found) in parts.items():
        shortfall = "; ".join(profiles.missing(replace(profile, requires=part), machine))
        if shortfall:
            yield Finding(name, "fail", shortfall, SMALLER)
        else:
            yield Finding(name, "ok", found)


def _check_free_memory(profile: Profile, machine: Machine, driver: Driver | DriverError) -> Iterator[Finding]:
    """Whether what is in memory together fits into what is free now; who else holds memory of the GPUs is named."""
    if profile.requires.gpus and not machine.gpus:
        yield Finding("free memory", "skipped", "no GPU to look at")
        return
    others: list[str] = []
    if machine.gpus and not isinstance(driver, DriverError):
        others = list(driver.holders())
    found = "; ".join([_free(machine), *others])
    missing: list[str] = []
    for group in profile.resident:
        missing += _shortfalls(group, profile, machine)
    if missing:
        advice = "End what holds the memory, or choose a smaller profile: workbook plan"
        # Models that are in several groups are named once.
        yield Finding("free memory", "fail", "; ".join([found, *dict.fromkeys(missing)]), advice)
    elif others:
        advice = "The models fit all the same. To free more memory, end these programs."
        yield Finding("free memory", "warn", found, advice)
    else:
        yield Finding("free memory", "ok", f"{found}: the models fit in {profile.precision}")


def _shortfalls(group: Sequence[str], profile: Profile, machine: Machine) -> Iterator[str]:
    """What is missing for each of the models that are in memory at the same time, a phrase each."""
    residents: list[Resident] = []
    for ref in (profile.models[role] for role in group):
        if config := _config(ref):
            residents.append(Resident(config, profile.precision, ref.label))
    placements = place_together(residents, Devices.free(machine))
    for resident, placement in zip(residents, placements, strict=True):
        if placement.shortfall:
            yield f"{resident.name} {placement.shortfall}"


def _config(ref: ModelRef) -> PretrainedConfig | None:
    try:
        return models_finding.config(ref)
    except checkpoint.LoadError:  # the models' own finding says so
        return None


def _free(machine: Machine) -> str:
    sizes = [gpu.free_bytes for gpu in machine.gpus]
    if not sizes:
        return f"{gib(machine.ram_available_bytes)} free"
    if len(sizes) == 1:
        return f"{gib(sizes[0])} free on the GPU"
    return f"at least {gib(min(sizes))} free on each of {len(sizes)} GPUs"


def _gpus(machine: Machine) -> str:
    if not machine.gpus:
        return "none, and none needed"
    names = [f"{gpu.name} of {gib(gpu.total_bytes)}" for gpu in machine.gpus]
    return "; ".join(f"{names.count(name)}x {name}" for name in dict.fromkeys(names))


def _major(version: str) -> int:
    """The first number of a version; 0 if the driver did not tell it."""
    number = version.partition(".")[0]
    if not number.isdigit():
        return 0
    return int(number)


def _torch_build() -> tuple[str, str | None]:
    import torch

    return torch.__version__, torch.version.cuda


def _devices(machine: Machine) -> list[str]:
    return [f"cuda:{gpu.index}" for gpu in machine.gpus] or ["cpu"]


def _left_to_download(profile: Profile, cache: Path | None = None) -> int:
    """Bytes of the profile's models that are not in the Hugging Face cache yet (``cache``: another folder)."""
    return max(_whole(profile) - profiles.downloaded_bytes(profile, cache), 0)


def _whole(profile: Profile) -> int:
    """Bytes to download for the profile's models if none of them is here."""
    sizes: dict[str, int] = {}
    for ref in _distinct(profile):
        if ref.source == "hub":
            sizes[ref.id] = ref.download_bytes or 0  # by repository: two roles may share one
    return sum(sizes.values())


def _check_disk(profile: Profile, machine: Machine, left: int) -> Iterator[Finding]:
    """Check the disk of the Hugging Face cache against what is left to download, and what the runner needs."""
    part = replace(profile, requires=Requirement(disk_bytes=profile.requires.disk_bytes, cpus=0))
    shortfall = "; ".join(profiles.missing(part, machine, profiles.downloaded_bytes(profile)))
    cache = hardware.download_folder()
    free = hardware.disk_free(cache)
    if left > free:
        found = f"{gib(left)} to download, {gib(free)} free at {cache}"
        yield Finding("disk", "fail", found, "Free some space, or set HF_HOME to a folder on a larger disk.")
    elif shortfall:
        larger = "set HF_HOME to a folder"
        if profile.offline:
            larger = f"move {ROOT}"
        yield Finding("disk", "fail", shortfall, f"Free some space, or {larger} on a larger disk.")
    elif profile.offline:
        yield Finding("disk", "ok", f"{gib(machine.disk_free_bytes)} free, nothing to download")
    else:
        yield Finding("disk", "ok", f"{gib(free)} free at {cache}, {gib(left)} to download")


def _check_models(profile: Profile, left: int) -> Iterator[Finding]:
    """Check whether the models that come with the workbook are here, and how much of the others is."""
    refs = _distinct(profile)
    missing = list(filter(None, map(_missing, refs)))
    if missing:
        yield Finding("models", "fail", " ".join(missing), "Run make setup, or git restore env/models.")
        return
    names = ", ".join(ref.name for ref in refs)
    incomplete = [ref.name for ref in refs if ref.source == "hub" and not hub.is_here(ref)]
    # What is left is computed from sizes alone, so one file too many may hide that another is missing.
    if incomplete and not left:
        found = f"{', '.join(incomplete)}: not all files are here, though their sizes add up"
        yield Finding("models", "warn", found, f"Fetch them: workbook fetch --profile {shell_word(profile.name)}")
        return
    state = "here"
    if left:
        state = f"{gib(left)} to download"
    yield Finding("models", "ok", f"{names}: {state}")


def _missing(ref: ModelRef) -> str:
    """Why a model that comes with the workbook is missing; empty if it is here."""
    try:
        if ref.source == "package":
            packaged_file(ref)
        elif ref.source == "embedded":
            resolve(ref)
    except checkpoint.LoadError as error:
        return str(error)
    return ""


def _distinct(profile: Profile) -> list[ModelRef]:
    return list(dict.fromkeys(profile.models.values()))


def _check_hub(profile: Profile, left: int) -> Iterator[Finding]:
    """Check whether the token is valid, and whether its owner may download each of the profile's models."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import get_session

    repositories = [ref.id for ref in _distinct(profile) if ref.source == "hub"]
    if not repositories:
        yield Finding("login", "skipped", "no model of this profile comes from the hub")
        return
    # HfApi.whoami and auth_check take no timeout of their own, so the session's is set.
    with rebound(get_session(), "timeout", HUB_SECONDS):
        login = _login(get_token(), left)
        yield login
        if login.status in ("ok", "warn"):
            yield from _licences(repositories, left)


def _login(token: str | None, left: int) -> Finding:
    """Whose token it is. Errors are named by their type alone, because their text might hold the token."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError

    if is_offline_mode():
        return Finding("login", _unreachable(left), "HF_HUB_OFFLINE is set: not asked", "Unset it to download.")
    if token is None:
        return Finding("login", "warn", "no token", f"Models with a licence to accept need one. {NEW_TOKEN}")
    try:
        return Finding("login", "ok", f"the token is {HfApi().whoami()['name']}'s")
    except UnicodeError:
        return Finding("login", "fail", "the token holds characters that no token has", NEW_TOKEN)
    except HfHubHTTPError as error:
        return _not_answered(error.response.status_code)
    except Exception as error:
        return _not_reached("login", error, left)


def _not_answered(status: int) -> Finding:
    if status == 401:
        return Finding("login", "fail", "the hub does not know the token (401)", NEW_TOKEN)
    return Finding("login", "warn", f"the hub answers {status}", "Try again later.")


def _licences(repositories: Sequence[str], left: int) -> Iterator[Finding]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    refused, advice = [], []
    for name in repositories:
        try:
            HfApi().auth_check(name)
        except GatedRepoError:  # first, as it is an HfHubHTTPError as well
            refused.append(f"{name}: its licence is not accepted")
            advice.append(f"Accept it at https://huggingface.co/{name}")
        except HfHubHTTPError as error:
            refused.append(f"{name}: the hub answers {error.response.status_code}")
            advice.append(f"Check whether your account can open https://huggingface.co/{name}.")
        except Exception as error:
            yield _not_reached("licences", error, left)
            return
    if refused:
        yield Finding("licences", "fail", "; ".join(refused), " ".join(advice))
    else:
        yield Finding("licences", "ok", f"{', '.join(repositories)} may be downloaded")


def _not_reached(name: str, error: Exception, left: int) -> Finding:
    advice = ""
    if left:
        advice = "Check the network and HTTPS_PROXY, or set HF_ENDPOINT to a mirror."
    return Finding(name, _unreachable(left), f"the hub cannot be reached ({type(error).__name__})", advice)


def _unreachable(left: int) -> Status:
    """A hub out of reach matters only if something is left to download."""
    if left:
        return "fail"
    return "skipped"
