"""How hits become the text of an observation: named formatters, one function each.

A student learns from the very bytes that its teacher saw, so each of these is fixed; a change is a new name. `paper`,
`verl`, `search_r1` and `skyrl` reproduce what models of those projects were trained on.

Example::

    format_hits("numbered", hits)        # '[1] Paris: Paris is the capital of France.\\n[2] ...'

Sources: agent-distillation (arXiv 2505.17612, its WikipediaRetrieverTool), verl (tools/utils/search_r1_like_utils.py),
SkyRL (skyrl_gym/tools/search.py and envs/search/env.py), Search-R1 (search_r1/llm_agent/generation.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from envs.retrieval.retriever import Hit

Formatter = Callable[[Sequence[Hit]], str]


def numbered(hits: Sequence[Hit]) -> str:
    """Ours, and compact: one line a passage, and a sentence when there is none."""
    if not hits:
        return "No results found."
    lines = []
    for number, hit in enumerate(hits, start=1):
        title = f"{hit.passage.title}: " if hit.passage.title else ""
        lines.append(f"[{number}] {title}{hit.passage.text}")
    return "\n".join(lines)


def paper(hits: Sequence[Hit]) -> str:
    """As smolagents' retriever tool has it in agent-distillation; counts from 0."""
    return "\nRetrieved documents:" + "".join(
        f"\n\n===== Document {number}, similarity: {hit.score:.2f} =====\n{hit.passage.contents}"
        for number, hit in enumerate(hits)
    )


def verl(hits: Sequence[Hit]) -> str:
    """As verl's search tool has it; the title is the first line of the contents, with its quotation marks."""
    parts = []
    for number, hit in enumerate(hits, start=1):
        title, _, text = hit.passage.contents.partition("\n")
        parts.append(f"Doc {number} (Title: {title})\n{text}\n\n")
    return "".join(parts).strip()


def verl_json(hits: Sequence[Hit]) -> str:
    """`verl` inside the JSON object that verl's tool wraps around it."""
    return json.dumps({"result": verl(hits)}, ensure_ascii=False)


def search_r1(hits: Sequence[Hit]) -> str:
    """As Search-R1's generation loop has it, between its `<information>` tags, which env `search` writes."""
    parts = []
    for number, hit in enumerate(hits, start=1):
        title, _, text = hit.passage.contents.partition("\n")
        parts.append(f"Doc {number}(Title: {title}) {text}\n")
    return "".join(parts)


def skyrl(hits: Sequence[Hit]) -> str:
    """As SkyRL's search env shows it, without its JSON object."""
    return f"\n<information>{_skyrl_documents(hits)}</information>\n"


def skyrl_json(hits: Sequence[Hit]) -> str:
    """As SkyRL's search env shows it, with the JSON object that its tool wraps around the documents."""
    return f"\n<information>{json.dumps({'result': _skyrl_documents(hits)})}</information>\n"


def _skyrl_documents(hits: Sequence[Hit]) -> str:
    return "".join(f"Doc {number}: {hit.passage.contents.strip()}\n" for number, hit in enumerate(hits, start=1))


FORMATTERS: dict[str, Formatter] = {
    "numbered": numbered,
    "paper": paper,
    "verl": verl,
    "verl_json": verl_json,
    "search_r1": search_r1,
    "skyrl": skyrl,
    "skyrl_json": skyrl_json,
}


def get_formatter(name: str) -> Formatter:
    """The formatter of that name. Raises `ValueError` naming those that exist."""
    try:
        return FORMATTERS[name]
    except KeyError:
        raise ValueError(f"formatter {name!r} does not exist; there are {', '.join(sorted(FORMATTERS))}") from None


def format_hits(name: str, hits: Sequence[Hit]) -> str:
    """`hits` as text by the formatter of that name. Raises `ValueError` for an unknown name."""
    return get_formatter(name)(hits)
