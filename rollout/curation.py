"""Curation: which trajectories a student is trained on, as a list of small named filters, and what each removed.

The filters are in `rollout.curation_filters` (one trajectory at a time, on a stream) and `rollout.curation_sets`
(duplicates, balance, caps: over all rows). They act in the order of the list. Nothing is changed or deleted: a
curation picks rows, the ledger keeps all.

Example::

    curation = Curation.from_config(["correct", "no_parse_error", {"name": "length", "max_steps": 5}])
    curation.stream.keeps(trajectory)                  # while a collection runs: no filter that needs all rows
    curated = curation.apply(ledger.trajectories)      # what can be asked again: set filters take two passes
    for trajectory in curated.kept: ...
    print(curated.report.to_json())                    # what each filter removed, and examples
"""

from __future__ import annotations

import dataclasses
import difflib
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from rollout.curation_filters import FILTERS, Filter
from rollout.curation_sets import SET_FILTERS, SetFilter, SuccessRates
from rollout.trajectory import Trajectory

if TYPE_CHECKING:
    from rich.table import Table

_KINDS: dict[str, Any] = {kind.name: kind for kind in (*FILTERS, *SET_FILTERS)}
_EXAMPLES = 3

Source = Iterable[Trajectory] | Callable[[], Iterable[Trajectory]]
"""Trajectories, or what gives them from the start each time it is called (`ledger.trajectories`)."""


class CurationError(ValueError):
    """A list of filters that cannot be used; the message names the filter and what there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """What one filter did."""

    filter: str
    """Its name, and its parameters where they are not the defaults: `length(max_steps=5)`."""
    removed: int
    left: int
    examples: tuple[str, ...]
    """Keys of some that were removed, the first in sorted order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurationReport:
    """What each filter removed, in their order."""

    seen: int
    removals: tuple[Removal, ...]

    @property
    def kept(self) -> int:
        return self.removals[-1].left if self.removals else self.seen

    def to_json(self) -> dict[str, Any]:
        return {
            "seen": self.seen,
            "kept": self.kept,
            "filters": [{**dataclasses.asdict(each), "examples": list(each.examples)} for each in self.removals],
        }

    def table(self, title: str = "Curation") -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("filter")
        for column in ("removed", "left"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("for example")
        table.add_row("(all)", "", f"{self.seen:,}", "")
        for each in self.removals:
            example = each.examples[0] if each.examples else ""
            table.add_row(Text(each.filter), f"{each.removed:,}", f"{each.left:,}", Text(example))
        return table


class Curated:
    """What is kept of a source. `kept` can be gone through once; `report` is complete when it has been, and at once
    when a filter needed all rows."""

    def __init__(self, kept: Iterator[Trajectory], tally: _Tally) -> None:
        self.kept = kept
        self._tally = tally

    @property
    def report(self) -> CurationReport:
        return self._tally.report()


class Curation:
    """A list of filters, in order. Stateless: one may be used for many sources."""

    def __init__(self, filters: Sequence[Filter | SetFilter] = ()) -> None:
        self.filters = tuple(filters)
        self._alone = [(at, each) for at, each in enumerate(filters) if isinstance(each, Filter)]
        self._sets = [(at, each) for at, each in enumerate(filters) if isinstance(each, SetFilter)]

    @classmethod
    def from_config(cls, filters: Iterable[Any]) -> Curation:
        """From what YAML holds: names, or mappings of `name` and parameters. Raises `CurationError`."""
        if isinstance(filters, str | Mapping) or not isinstance(filters, Iterable):
            raise CurationError(f"filters must be a list such as [correct, no_parse_error], not {filters!r}")
        return cls([_filter(entry) for entry in filters])

    @property
    def stream(self) -> Curation:
        """The filters that judge one trajectory by itself."""
        return Curation([each for _, each in self._alone])

    @property
    def needs_all(self) -> bool:
        """A filter compares trajectories, so that all must be seen before any is kept."""
        return bool(self._sets)

    def removed_by(self, trajectory: Trajectory) -> str | None:
        """Name of the first filter of `stream` that removes it; None when all keep it."""
        at = self._fails_at(trajectory)
        return None if at is None else self.filters[at].name

    def keeps(self, trajectory: Trajectory) -> bool:
        """All filters of `stream` keep it."""
        return self.removed_by(trajectory) is None

    def apply(self, source: Source) -> Curated:
        """What is kept, in the source's order. Without filters that need all rows nothing is held in memory and the
        source is read once, as `kept` is; with them it is read twice, and key and features of a row are held between.

        Raises `CurationError` for an iterator, which cannot be read twice, where that is needed.
        """
        tally = _Tally([describe(each) for each in self.filters])
        if not self.needs_all:
            return Curated(self._streamed(_start(source), tally), tally)
        if isinstance(source, Iterator):
            names = ", ".join(each.name for _, each in self._sets)
            raise CurationError(
                f"{names} must see all trajectories first, and an iterator can be read only once: give a list, or a "
                "function that starts again, such as ledger.trajectories"
            )
        chosen = self._choose(_start(source), tally)
        return Curated(_pick(_start(source), chosen), tally)

    def _streamed(self, trajectories: Iterable[Trajectory], tally: _Tally) -> Iterator[Trajectory]:
        for trajectory in trajectories:
            tally.seen += 1
            at = self._fails_at(trajectory)
            if at is None:
                yield trajectory
            else:
                tally.remove(at, trajectory.key)

    def _choose(self, trajectories: Iterable[Trajectory], tally: _Tally) -> set[str]:
        """Pass one: keys that all filters keep."""
        rates, counting = SuccessRates(), any(each.needs_rates for _, each in self._sets)
        fails: dict[str, int] = {}
        """Key -> index of the first stream filter that removes it, the number of filters where none does."""
        features: dict[int, dict[str, Any]] = {at: {} for at, _ in self._sets}
        for trajectory in trajectories:
            if counting:
                rates.see(trajectory)
            key = trajectory.key
            if key in fails:  # a key names one trajectory; of rows that share it the first counts, as in a ledger
                continue
            tally.seen += 1
            at = self._fails_at(trajectory)
            if at is not None and at < self._sets[0][0]:
                tally.remove(at, key)
                continue
            fails[key] = len(self.filters) if at is None else at
            for index, each in self._sets:
                if index < fails[key]:
                    features[index][key] = each.feature(trajectory)
        alive = set(fails)
        for index, each in enumerate(self.filters):
            if isinstance(each, SetFilter):
                left = each.choose({key: features[index][key] for key in alive}, rates)
            else:
                left = {key for key in alive if fails[key] != index}
            for key in alive - left:
                tally.remove(index, key)
            alive = left
        return alive

    def _fails_at(self, trajectory: Trajectory) -> int | None:
        return next((at for at, each in self._alone if not each.keeps(trajectory)), None)


def describe(each: Filter | SetFilter) -> str:
    """`length(max_steps=5)`: the name, and parameters that are not the defaults."""
    set_ = []
    for spec in dataclasses.fields(each):  # type: ignore[arg-type]
        default = spec.default_factory() if callable(spec.default_factory) else spec.default
        value = getattr(each, spec.name)
        if value != default:
            set_.append(f"{spec.name}={value}")
    return f"{each.name}({', '.join(set_)})" if set_ else each.name


class _Tally:
    """Counts, and the first few keys in sorted order, of what each filter removed."""

    def __init__(self, names: Sequence[str]) -> None:
        self.seen = 0
        self._names = names
        self._removed = [0] * len(names)
        self._examples: list[list[str]] = [[] for _ in names]

    def remove(self, index: int, key: str) -> None:
        self._removed[index] += 1
        self._examples[index] = heapq.nsmallest(_EXAMPLES, (*self._examples[index], key))

    def report(self) -> CurationReport:
        removals, left = [], self.seen
        for name, removed, examples in zip(self._names, self._removed, self._examples, strict=True):
            left -= removed
            removals.append(Removal(filter=name, removed=removed, left=left, examples=tuple(examples)))
        return CurationReport(seen=self.seen, removals=tuple(removals))


def _start(source: Source) -> Iterable[Trajectory]:
    return source() if callable(source) else source


def _pick(trajectories: Iterable[Trajectory], chosen: set[str]) -> Iterator[Trajectory]:
    left = set(chosen)
    for trajectory in trajectories:
        if trajectory.key in left:
            left.remove(trajectory.key)
            yield trajectory


def _filter(entry: Any) -> Filter | SetFilter:
    from pydantic import TypeAdapter, ValidationError

    parameters = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(parameters, Mapping) or "name" not in parameters:
        raise CurationError(f"filter {entry!r}: write a name, or {{name: ..., parameter: value}}")
    parameters = {str(key): _plain(value) for key, value in parameters.items()}
    name = str(parameters.pop("name"))
    kind = _KINDS.get(name)
    if kind is None:
        raise CurationError(f"filter {name!r} is unknown{_close(name, _KINDS)}; there are {', '.join(_KINDS)}")
    known = [spec.name for spec in dataclasses.fields(kind)]
    for parameter in parameters:
        if parameter not in known:
            there = f"there are {', '.join(known)}" if known else "it has none"
            raise CurationError(f"filter {name!r} has no parameter {parameter!r}{_close(parameter, known)}; {there}")
    hints = get_type_hints(kind)
    for parameter, value in parameters.items():
        try:
            TypeAdapter(hints[parameter]).validate_python(value, strict=True)
        except ValidationError as error:
            message = error.errors()[0]["msg"].lower()
            raise CurationError(f"filter {name!r}: {parameter} is {value!r}: {message}") from None
    try:
        return kind(**parameters)
    except ValueError as error:
        raise CurationError(f"filter {name!r}: {error}") from None


def _plain(value: Any) -> Any:
    """YAML's lists are tuples here."""
    return tuple(value) if isinstance(value, list) else value


def _close(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
