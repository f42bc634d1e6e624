"""Python objects as Arrow columns and back, by one declaration: `Leaf`, `Items`, `Struct`.

A column knows its Arrow type, builds an array from a list of values all at once, and reads it back. Nothing is done row
by row with dictionaries, which is what makes it several times faster than `Table.from_pylist` and `to_pylist`. What the
columns are of, it does not know: `rollout.records` declares them for trajectories.

Example::

    span = Struct(Field("start", Leaf(pa.int32())), Field("end", Leaf(pa.int32())), make=Span)
    array = Items(span).build([trajectory_spans, other_spans])
    Items(span).read(array)          # [(Span(...), ...), (Span(...),)]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from itertools import accumulate, chain, pairwise
from operator import attrgetter
from typing import Any, Protocol

import numpy as np
import pyarrow as pa


class Column(Protocol):
    """How one column is kept."""

    @property
    def type(self) -> pa.DataType: ...

    @property
    def null(self) -> bool:
        """Whether None is a value of it."""
        ...

    def build(self, values: Sequence[Any]) -> pa.Array: ...

    def read(self, array: pa.Array) -> list[Any]: ...


class Leaf:
    """Numbers, booleans, strings, and enums of strings; `read` raises `ValueError` for a value that `enum` has not."""

    def __init__(self, type_: pa.DataType, *, null: bool = False, enum: type[Enum] | None = None) -> None:
        self.type, self.null = type_, null
        self._members = None if enum is None else {each.value: each for each in enum}
        self._enum = enum

    def build(self, values: Sequence[Any]) -> pa.Array:
        if self._members is not None:
            values = [each.value for each in values]
        try:
            return pa.array(values, self.type)
        except UnicodeEncodeError:  # a model may write half a surrogate pair; that must not cost the whole batch
            return pa.array([_encodable(each) for each in values], self.type)

    def read(self, array: pa.Array) -> list[Any]:
        if pa.types.is_primitive(self.type) and array.null_count == 0 and not pa.types.is_boolean(self.type):
            return array.to_numpy().tolist()
        values = array.to_pylist()
        if self._members is None:
            return values
        try:
            return [self._members[each] for each in values]
        except KeyError as error:
            raise ValueError(f"{error.args[0]!r} is no {self._enum.__name__ if self._enum else ''}") from None


class Items:
    """A tuple of `of` per value."""

    def __init__(self, of: Column, *, null: bool = False) -> None:
        self._of, self.null = of, null
        self.type = pa.list_(pa.field("element", of.type, nullable=of.null))

    def build(self, values: Sequence[Sequence[Any] | None]) -> pa.Array:
        lengths = [0 if each is None else len(each) for each in values]
        offsets = np.zeros(len(values) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        if offsets[-1] >= 2**31:
            raise ValueError(f"{offsets[-1]} list items in one table; write fewer rows at once")
        items = self._of.build(list(chain.from_iterable(each for each in values if each)))
        mask = None
        if self.null and any(each is None for each in values):
            mask = pa.array([each is None for each in values], pa.bool_())
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), items, type=self.type, mask=mask)

    def read(self, array: pa.Array) -> list[tuple[Any, ...] | None]:
        items = self._of.read(array.flatten())
        lengths = array.value_lengths().to_pylist()
        bounds = accumulate((length or 0 for length in lengths), initial=0)
        found = [tuple(items[start:stop]) for start, stop in pairwise(bounds)]
        if array.null_count:
            return [None if length is None else each for length, each in zip(lengths, found, strict=True)]
        return list(found)


class Field:
    """One named column of a `Struct`: `get` takes it from the object, its attribute of that name by default.

    `since` is the schema version that brought it: tables of before come without it. One that is not `read` is written
    for people and tools alone, being known from other columns.
    """

    def __init__(
        self, name: str, column: Column, *, get: Callable[[Any], Any] | None = None, since: int = 1, read: bool = True
    ) -> None:
        self.name, self.column, self.since, self.read = name, column, since, read
        self.get = get or attrgetter(name)

    def arrow(self) -> pa.Field:
        return pa.field(self.name, self.column.type, nullable=self.column.null)


class Struct:
    """An object per value: `make` is called with what its fields hold, by name. With `blank`, an object to write in the
    place of None, it may be None."""

    def __init__(self, *fields: Field, make: Callable[..., Any], blank: Any = None) -> None:
        self.fields, self._make, self._blank = fields, make, blank
        self._arrow = [each.arrow() for each in fields]
        self.type = pa.struct(self._arrow)
        self.null = blank is not None

    def build(self, values: Sequence[Any]) -> pa.Array:
        mask = None
        if self.null:
            mask = pa.array([each is None for each in values], pa.bool_())
            values = [self._blank if each is None else each for each in values]
        arrays = self.build_fields(values)
        return pa.StructArray.from_arrays(arrays, fields=self._arrow, mask=mask)

    def build_fields(self, values: Sequence[Any]) -> list[pa.Array]:
        return [each.column.build([each.get(value) for value in values]) for each in self.fields]

    def read(self, array: pa.Array) -> list[Any]:
        if array.null_count:  # what the fields hold where the whole is null means nothing
            valid = array.is_valid()
            found = iter(self.read(array.filter(valid)))
            return [next(found) if each else None for each in valid.to_pylist()]
        return self.read_fields({each.name: array.field(each.name) for each in array.type}, len(array))

    def read_fields(self, arrays: dict[str, pa.Array], length: int) -> list[Any]:
        """`arrays` may lack fields (of a later version); `make` is not told of them then."""
        fields = [each for each in self.fields if each.read and each.name in arrays]
        names = [each.name for each in fields]
        if not fields:
            return [self._make() for _ in range(length)]
        columns = [each.column.read(arrays[each.name]) for each in fields]
        make = self._make
        return [make(**dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]


def _encodable(value: Any) -> Any:
    return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value
