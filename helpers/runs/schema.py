"""The files of a run, and those that a run is judged by, as models: which fields they have, and of which types.

``store`` reads and writes them. A run folder, ``runs/<UTC time>-<profile>/``, holds::

    manifest.json   _Manifest: what ran, where, with which versions, models, seeds and parameters (by the runner), and
                    the origin of each notebook's values: code, packages, machine and models that they came from
    status.json     _Status: the state of each notebook, kept up to date while it runs (by the runner)
    results.json    _Results: what the notebooks recorded (by ``recording``)
    notebooks/      the executed notebooks            figures/   <notebook>_<name>.png
    logs/           what a notebook's process wrote   report.html, html/<notebook>.html

Beside the notebooks lie ``expected/<profile>.json`` (_ExpectedValue by "<notebook>/<name>") and ``data/claims.yaml``
(_Claim by its number). Each file has a ``version`` at its top.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from helpers.runs.secrecy import REDACTED

Value = bool | int | float | str
Verdict = Literal["as expected", "differs", "unmeasured"]
AS_EXPECTED: Verdict = "as expected"
DIFFERS: Verdict = "differs"
UNMEASURED: Verdict = "unmeasured"
Wording = Literal["about", "at least", "enough"]
NotebookState = Literal["pending", "running", "passed", "failed"]
# A count of bytes, cells or cores; and what a float can hold, for an integer of any length is valid JSON.
_LARGEST_COUNT = 2**63
_LARGEST = 10**308


def _plain_value(value: object) -> Value:
    # pydantic's own union would turn "1" or True into a number, which is another value.
    if isinstance(value, str) and not _is_whole(value):
        raise ValueError("a text of whole letters is needed")
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int | float) and abs(value) <= _LARGEST:
        return value
    raise ValueError("a number, a text, true or false is needed")


def _is_whole(text: str) -> bool:
    # Half a letter, a lone surrogate, can be in a text of Python's but in no file.
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _distance(value: object) -> int | float | None:
    if value is None or value == REDACTED:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LARGEST:
        raise ValueError("a number from 0 up, or null, is needed")
    return value


def _number(value: object) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
        raise ValueError("a number above 0 is needed")
    return value


def _zero_if_redacted(value: object) -> object:
    # Earlier workbooks blanked numbers too, and one must not make a whole run unreadable.
    return 0 if value == REDACTED else value


def _moment(value: str) -> str:
    datetime.fromisoformat(value)
    return value


def _file_name(value: str) -> str:
    # The names of notebooks and profiles become parts of paths, which must not lead anywhere else.
    if value in ("", ".", "..") or "/" in value or "\\" in value or not value.isprintable():
        raise ValueError("the name of a file is needed, without a folder")
    return value


def _figure_path(value: str) -> str:
    folder, _, name = value.partition("/")
    if folder != "figures":
        raise ValueError("a file in the folder figures is needed")
    _file_name(name)
    return value


_AnyValue = Annotated[Value, PlainValidator(_plain_value)]
_Distance = Annotated[int | float | None, PlainValidator(_distance)]
_Number = Annotated[int | float, PlainValidator(_number)]
_Count = Annotated[int, BeforeValidator(_zero_if_redacted), Field(ge=0, le=_LARGEST_COUNT)]
_Seconds = Annotated[float, BeforeValidator(_zero_if_redacted), Field(ge=0, le=_LARGEST_COUNT)]
_Moment = Annotated[str, AfterValidator(_moment)]
_FileName = Annotated[str, AfterValidator(_file_name)]
_FigurePath = Annotated[str, AfterValidator(_figure_path)]


class _Part(BaseModel):
    """A part of a file. A field that it does not know is an error: somebody wrote something else."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _Mirror(BaseModel):
    """A part that repeats a dataclass of the package. What the dataclass gains later is kept as it is."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class _RecordedValue(_Part):
    """One value that a notebook recorded.

    ``claim`` is the number of a statement of the article, such as "A1", and ``agrees`` says whether the value agrees
    with that statement as published (None: it only illustrates it). ``expected``, ``tolerance`` and ``source`` repeat
    the expected value at that time. ``floor`` is the least that a tolerance made from this run may be. ``model`` is the
    label of the model that the value was measured on (None: it was computed from published configurations).
    """

    value: _AnyValue
    unit: str
    claim: str | None = None
    expected: _AnyValue | None = None
    tolerance: _Distance = None
    source: str | None = None
    verdict: Verdict = UNMEASURED
    floor: _Distance = None
    agrees: bool | None = None
    model: str | None = None


class _Results(_Part):
    """``results.json``: values and the paths of figures, both by notebook and name, in the order of recording."""

    values: dict[_FileName, dict[str, _RecordedValue]] = Field(default_factory=dict)
    figures: dict[_FileName, dict[str, _FigurePath]] = Field(default_factory=dict)


class _ExpectedValue(_Part):
    """The value that a run should give, within an absolute tolerance. ``source``: "run ..." or "citation ..."."""

    value: _AnyValue
    tolerance: _Distance = None
    source: str

    @property
    def cited(self) -> bool:
        """True if a publication gives the value, and not a run."""
        return self.source.startswith("citation")


class _ClaimPart(_Part):
    """One reading of a statement, with a verdict of its own; ``claims.yaml`` says what each field holds.

    It is judged by what its ``wording`` demands of the recorded ``values`` that it names, or it is only ``cited``.
    """

    name: str = ""
    wording: Wording | None = None
    number: _Number | None = None
    margin: _Distance = None
    values: list[str] = Field(default_factory=list)
    cited: str = ""
    source: str = ""

    @model_validator(mode="after")
    def _judged_or_cited(self) -> Self:
        judged = self.wording is not None and self.number is not None and bool(self.values)
        unjudged = self.wording is None and self.number is None and not self.values
        if not (unjudged if self.cited else judged):
            raise ValueError("a part needs wording, number and values, or cited alone")
        return self


class _Claim(_Part):
    """One statement of the article. The head of ``claims.yaml`` says what each field holds."""

    statement: str
    published: str
    source: str
    test: Literal["arithmetic", "model", "real model", "citation"]
    notebooks: list[str] = Field(default_factory=list)
    how: str
    why: str = ""
    reach: str = ""
    parts: list[_ClaimPart] = Field(default_factory=list)


class _NotebookStatus(_Part):
    """How far a notebook is, and how it ended.

    ``cell`` counts the code cells of the executed notebook from 1, injected parameters included, as ``In [n]`` does;
    ``line`` is that cell's first line. ``peak_bytes`` is the most resident memory of the notebook's processes together,
    looked at each second. ``inputs`` is a hash of source, parameters and profile. ``recorded`` is how many values it
    had recorded at its end, by which a loss is found later (None: an earlier run, which did not count them).
    """

    status: NotebookState
    reason: str | None = None
    cell: _Count = 0
    cells: _Count = 0
    line: str = ""
    seconds: _Seconds = 0.0
    started: _Moment | None = None
    budget_seconds: _Seconds
    expected_seconds: _Seconds | None = None
    peak_bytes: _Count = 0
    inputs: str
    recorded: _Count | None = Field(default=None, exclude_if=lambda count: count is None)


class _Status(_Part):
    """``status.json``. ``peak_bytes`` is the most memory of all processes of the run, the runner's own included.

    Pages that processes share count in each. 0: an earlier run, which did not record it. ``abandoned`` is never in the
    file: whoever reads it finds out, see ``folder._status_now``.
    """

    state: Literal["running", "finished", "interrupted"]
    peak_bytes: _Count = 0
    notebooks: dict[_FileName, _NotebookStatus]
    abandoned: bool = Field(default=False, exclude=True)

    @property
    def state_text(self) -> str:
        """The state in words."""
        return f"{self.state}: nobody runs it" if self.abandoned else self.state


class _GpuFacts(_Mirror):
    """One GPU of the machine of a run."""

    name: str
    total_bytes: _Count


class _Hardware(_Mirror):
    """The machine of a run, as ``machine.hardware.detect`` reports it."""

    gpus: list[_GpuFacts]
    ram_bytes: _Count
    cpu_count: _Count
    cpu_name: str
    system: str


class _UnknownHardware(_Part):
    """A machine that could not be looked at; ``error`` says why."""

    error: str


class _NotebookFacts(_Part):
    """The file of a notebook (SHA-256), the parameters that it ran with, and its place in the manifest's ``origins``.

    A notebook's values, figures and page are all of one execution, and so of one origin. None: it has not started, or
    an earlier workbook ran it, which did not keep origins. ``own`` is the path of a reader's own notebook; None for one
    of the workbook.
    """

    sha256: str
    parameters: dict[str, object]
    own: str | None = Field(default=None, exclude_if=lambda path: path is None)
    origin: _Count | None = Field(default=None, exclude_if=lambda origin: origin is None)


class _ModelFacts(_Mirror):
    """A model of the run's profile: its ``models.references.ModelRef``, label, commit and the SHA-256 of its files."""

    id: str
    label: str
    source: str
    revision: str | None = None
    file: str | None = None
    stand_in_for: str | None = None
    licence: str | None = None
    rehearsed: bool = False
    sha256: dict[str, str]
    commit: str | None = None


class _LoadedModel(_Mirror):
    """A model that a notebook of the run loaded, see ``models.loaded.Load``.

    ``role`` is None if the profile does not name the model.
    """

    notebook: str
    role: str | None
    model: str
    label: str
    precision: str
    commit: str | None = None


class _GitState(_Part):
    """The commit of the checkout and whether it holds changes; both None outside of git."""

    commit: str | None
    dirty: bool | None


class _Origin(_Part):
    """What values come from, besides their notebook and its parameters.

    ``since`` is when the run first had it. ``code`` is the SHA-256 of the package and of the notebooks' data, which
    tells two sets of uncommitted changes apart. ``models`` holds the SHA-256 of files by model; those of a hub are
    known by their commit, to which a whole run keeps.
    """

    since: _Moment
    git: _GitState
    code: str | None = None
    python: str
    packages: dict[str, str]
    hardware: _Hardware | _UnknownHardware
    models: dict[str, dict[str, str]] = Field(default_factory=dict)


class _PlannedModel(_Mirror):
    """A model planned at its true size in a rehearsal, see ``planning.rehearsal._Planned``."""

    model: str
    precision: str
    parameters: _Count
    device_bytes: list[_Count]
    limit_bytes: _Count


class _SubstitutionFacts(_Mirror):
    """One thing that was not as on the real machine, see ``planning.rehearsal._Substitution``."""

    what: str
    real: str
    here: str


class _RehearsalFacts(_Part):
    """What stood in for what in a rehearsal, and the plans at the true size."""

    machine: _Hardware | None = None
    plans: list[_PlannedModel] = Field(default_factory=list)
    substitutions: list[_SubstitutionFacts] = Field(default_factory=list)


class _Manifest(_Part):
    """``manifest.json``: what a run needs to be told apart from, and compared with, another.

    ``parameters`` are what the command line gave, ``notebooks`` hold the effective ones. ``finished`` is None until the
    end. ``loaded`` are the models that its notebooks loaded. ``resumed`` lists the times of later starts. ``commits``
    are those that the run keeps to, by repository. ``git``, ``python``, ``packages``, ``hardware`` and the hashes of
    ``models`` are those of the last start; ``origins`` are those that values came from. ``clean_start`` lists what the
    kernels were kept from, start-up files and variables of the user's own, and what of these stayed.
    """

    profile: _FileName
    description: str
    command: list[str]
    started: _Moment
    finished: _Moment | None = None
    parameters: dict[str, str]
    seeds: dict[str, object]
    notebooks: dict[_FileName, _NotebookFacts]
    models: dict[str, _ModelFacts]
    git: _GitState
    python: str
    packages: dict[str, str]
    hardware: _Hardware | _UnknownHardware
    loaded: list[_LoadedModel] = Field(default_factory=list, exclude_if=lambda loads: not loads)
    rehearsal: _RehearsalFacts | None = Field(default=None, exclude_if=lambda facts: facts is None)
    resumed: list[_Moment] = Field(default_factory=list, exclude_if=lambda starts: not starts)
    commits: dict[str, str] = Field(default_factory=dict, exclude_if=lambda commits: not commits)
    origins: list[_Origin] = Field(default_factory=list, exclude_if=lambda origins: not origins)
    clean_start: list[str] = Field(default_factory=list, exclude_if=lambda dropped: not dropped)

    @model_validator(mode="after")
    def _known_origins(self) -> Self:
        for name, facts in self.notebooks.items():
            if facts.origin is not None and facts.origin >= len(self.origins):
                raise ValueError(f"the origin of {name} is not in the list of origins")
        return self

    @property
    def of_own_notebooks(self) -> bool:
        """True if the run is of a reader's own notebooks."""
        return any(notebook.own for notebook in self.notebooks.values())
