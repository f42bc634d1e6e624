"""The pages: what is asked for by an address, and the template that shows it.

Every handler is a plain function that Starlette runs in a thread; none keeps anything between requests, all state of a
list is in its address.

Example::

    app = make_app(catalog, TokenViews(tokenizer=None), Access())
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.viewer import shown_text, word_query, wording
from launch.viewer.access import Access, Guard
from launch.viewer.answers import NotThere, Row
from launch.viewer.catalog import Catalog
from launch.viewer.export import FORMATS, export
from launch.viewer.selection import FACETS, OUTCOMES, SORTS, Selection, SelectionError, quoted
from launch.viewer.texts import shown_prompts, text_of
from launch.viewer.token_view import TokenViews
from launch.viewer.trajectory_page import turns
from rollout.ledger import LedgerError
from rollout.trajectory import Trajectory

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

HERE = Path(__file__).parent
_FACET_TITLES = {
    "outcome": "outcome",
    "kind": "kind of task",
    "policy": "policy",
    "ledger": "ledger",
    "failure": "failure class",
    "stop": "stop reason",
}
assert set(_FACET_TITLES) == set(FACETS)
_SHOWN_VALUES = 12
"""Of a facet; the rest behind a click."""
_MOST_VALUES = 200
_OUTCOME_SIGNS = {"success": "\u2713", "wrong": "\u2717", "failed": "!"}
_BAD_REQUEST, _NOT_FOUND, _UNREADABLE = 400, 404, 502


def make_app(catalog: Catalog, tokens: TokenViews, access: Access) -> Any:
    """The ASGI application, guarded."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    pages = Pages(catalog, tokens)
    app = Starlette(
        routes=[
            Route("/", pages.list),
            Route("/t/{identity:str}", pages.trajectory),
            Route("/t/{identity:str}/tokens", pages.tokens),
            Route("/t/{identity:str}/record.json", pages.record),
            Route("/t/{identity:str}/text/{part:str}", pages.text),
            Route("/compare", pages.compare),
            Route("/policies", pages.policies),
            Route("/export", pages.export),
            Route("/progress", pages.progress),
            Mount("/static", StaticFiles(directory=HERE / "static")),
        ],
        exception_handlers={
            SelectionError: pages.refuse(_BAD_REQUEST),
            NotThere: pages.refuse(_NOT_FOUND),
            LedgerError: pages.refuse(_UNREADABLE),
            HTTPException: pages.refuse(_NOT_FOUND),
        },
    )
    return Guard(app, access)


class Pages:
    """The handlers."""

    def __init__(self, catalog: Catalog, tokens: TokenViews) -> None:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from starlette.templating import Jinja2Templates

        self._catalog, self._tokens = catalog, tokens
        self._labels = wording.labels([index.uri for index in catalog.indices])
        environment = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters.update(
            line=shown_text.line,
            plain=shown_text.plain,
            moment=wording.moment,
            span=wording.span,
            count=wording.count,
            short=wording.short,
            small=wording.small,
        )
        environment.globals.update(signs=_OUTCOME_SIGNS, outcomes=OUTCOMES, labels=self._labels, formats=FORMATS)
        self._templates = Jinja2Templates(env=environment)

    # -- pages

    def list(self, request: Request) -> Response:
        selection = self._selection(request)
        after, before = request.query_params.get("after", ""), request.query_params.get("before", "")
        found = self._catalog.page(selection, after=after, before=before)
        return self._page(
            request,
            "list.html",
            selection=selection,
            found=found,
            marked=_marked(selection),
            groups=[self._facet(name, found.facets[name], selection) for name in FACETS],
            sorts=SORTS,
            paged=bool(after or before),
            title="Ledgers",
        )

    def trajectory(self, request: Request) -> Response:
        row, trajectory, selection = self._asked(request)
        before, after = self._catalog.beside(row, selection)
        marked = _marked(selection)
        return self._page(
            request,
            "trajectory.html",
            row=row,
            of=trajectory,
            selection=selection,
            turns=turns(trajectory, marked),
            marked=marked,
            before=before,
            after=after,
            others=[each for each in self._catalog.rows_of_task(row.task_id) if each.number != row.number],
            shown=shown_prompts(trajectory),
            title=row.question or row.task_id,
        )

    def tokens(self, request: Request) -> Response:
        row, trajectory, selection = self._asked(request)
        view = self._tokens.of(trajectory, self._catalog.indices[row.ledger].uri)
        return self._page(
            request,
            "tokens.html",
            row=row,
            of=trajectory,
            selection=selection,
            view=view,
            title=f"Tokens of {row.question or row.task_id}",
        )

    def compare(self, request: Request) -> Response:
        selection = self._selection(request)
        a = self._catalog.row(request.query_params.get("a", ""))
        rows = self._catalog.rows_of_task(a.task_id)
        asked = request.query_params.get("b", "")
        other = next((each for each in rows if each.number != a.number), a)
        b = self._catalog.row(asked) if asked else other
        sides = [(row, self._catalog.trajectory(row)) for row in (a, b)]
        marked = _marked(selection)
        steps = [turns(trajectory, marked) for _, trajectory in sides]
        return self._page(
            request,
            "compare.html",
            sides=sides,
            pairs=[tuple(side[i] if i < len(side) else None for side in steps) for i in range(max(map(len, steps)))],
            rows=rows,
            same_task=a.task_id == b.task_id,
            selection=selection,
            title=f"Side by side: {a.question}",
        )

    def policies(self, request: Request) -> Response:
        groups = self._catalog.policies()
        chosen = [request.query_params.get(name, "") for name in ("a", "b")]
        known = {each.id: each for each in groups}
        for each in chosen:
            if each and each not in known:
                raise SelectionError(f"policy {each!r} is in none of these ledgers")
        if not all(chosen) and len(groups) > 1:
            chosen = [chosen[i] or each.id for i, each in enumerate(groups[:2])]
        met = self._catalog.meet(known[chosen[0]], known[chosen[1]]) if all(chosen) else None
        which = request.query_params.get("which", "a" if met and met.counts["a"] else "b")
        if which not in ("a", "b", "both", "neither"):
            raise SelectionError(f"which={which!r}: use a, b, both or neither")
        page = request.query_params.get("page", "0")
        if not (page.isascii() and page.isdigit() and len(page) < 9):
            raise SelectionError(f"page={page!r}: use a whole number from 0 on")
        tasks = self._catalog.met_tasks(known[chosen[0]], known[chosen[1]], which, int(page)) if met else []
        return self._page(
            request,
            "policies.html",
            groups=groups,
            chosen=chosen,
            met=met,
            which=which,
            page=int(page),
            tasks=tasks,
            known=known,
            selection=Selection(),
            title="Two policies on the same tasks",
        )

    # -- files

    def record(self, request: Request) -> Response:
        from starlette.responses import Response

        from rollout.records import to_table

        row, trajectory, _ = self._asked(request)
        text = json.dumps(to_table([trajectory]).to_pylist()[0], ensure_ascii=False, indent=1)
        return Response(text, media_type="application/json", headers=_download(f"trajectory-{row.identity}.json"))

    def text(self, request: Request) -> Response:
        """One text, whole, as a plain file."""
        from starlette.responses import PlainTextResponse

        row, trajectory, _ = self._asked(request)
        part = request.path_params["part"]
        found = text_of(trajectory, part)
        if found is None:
            raise NotThere(f"trajectory {row.identity} has no text {part!r}")
        return PlainTextResponse(found, headers=_download(f"{row.identity}-{part}.txt"))

    def export(self, request: Request) -> Response:
        from starlette.responses import StreamingResponse

        name = request.query_params.get("format", "")
        if name not in FORMATS:
            raise SelectionError(f"format={name!r}: use one of {', '.join(FORMATS)}")
        body: Iterator[bytes] = export(self._catalog, self._selection(request), name)
        kind = FORMATS[name]
        return StreamingResponse(body, media_type=kind.media_type, headers=_download(f"trajectories.{kind.suffix}"))

    def progress(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        progress = self._catalog.progress()
        told = {
            "rows": progress.rows,
            "words": progress.words,
            "unread": progress.unread_shards,
            "version": progress.version,
            "reading": progress.reading,
            "text": self._progress_text(),
        }
        return JSONResponse(told, headers={"cache-control": "no-store"})

    # -- what they share

    def refuse(self, status: int) -> Any:
        """An exception handler that says what is wrong on a page."""

        def refused(request: Request, error: Exception) -> Response:
            code = getattr(error, "status_code", status)
            text = getattr(error, "detail", None) or str(error)
            return self._page(
                request, "refused.html", status=code, text=text, title="Not this way", selection=Selection()
            )

        return refused

    def _page(self, request: Request, name: str, *, status: int = 200, **context: Any) -> Response:
        theme = request.cookies.get("theme", "")
        context = {
            **context,
            "theme": theme if theme in ("light", "dark") else "",
            "progress": self._catalog.progress(),
            "progress_text": self._progress_text(),
            "notes": self._catalog.notes,
        }
        made = self._templates.TemplateResponse(request, name, context, status_code=status)
        made.headers["cache-control"] = "no-store"
        made.headers["vary"] = "cookie"
        return made

    def _progress_text(self) -> str:
        progress = self._catalog.progress()
        if progress.unread_shards:
            return f"{progress.rows:,} rows read, {progress.unread_shards:,} shards to go"
        if not progress.reading:
            return ""
        if not progress.rows:
            return "reading the ledger"
        return f"text of {progress.words:,} of {progress.rows:,} rows can be searched so far"

    def _selection(self, request: Request) -> Selection:
        selection = Selection.from_query(request.query_params.multi_items())
        for each in selection.ledger:
            if int(each) >= len(self._labels):
                raise SelectionError(f"ledger={each!r}: there are {len(self._labels)}, from 0 on")
        return selection

    def _asked(self, request: Request) -> tuple[Row, Trajectory, Selection]:
        row = self._catalog.row(request.path_params["identity"])
        return row, self._catalog.trajectory(row), self._selection(request)

    def _facet(self, name: str, values: list[tuple[str, int]], selection: Selection) -> dict[str, Any]:
        chosen = getattr(selection, name)
        titles = {"outcome": OUTCOMES, "ledger": dict(wording.enumerate_text(self._labels))}.get(name, {})
        shown = sorted(values[:_MOST_VALUES], key=lambda each: each[0] not in chosen)
        items = [
            {"value": quoted(value), "title": titles.get(value, value), "count": n, "on": value in chosen}
            for value, n in shown
        ]
        return {
            "name": name,
            "title": _FACET_TITLES[name],
            "few": items[:_SHOWN_VALUES],
            "more": items[_SHOWN_VALUES:],
            "worth": bool(chosen) or len(values) > 1,
        }


def _marked(selection: Selection) -> Any:
    try:
        return word_query.parse(selection.q).marked
    except word_query.QueryError as error:
        raise SelectionError(str(error)) from None


def _download(name: str) -> dict[str, str]:
    return {"content-disposition": f'attachment; filename="{name}"', "cache-control": "no-store"}
