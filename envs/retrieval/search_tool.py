"""The agent's `web_search`: a `Tool` over any function that searches.

Example::

    tool = web_search_tool(RayRetrieverClient(handle, timeout_s=30).search, k=3, formatter="numbered")
    tool.call(["capital of France"], {})         # '[1] Paris: Paris is the capital of France.\\n[2] ...'

A query that is not a string is the model's mistake (`ToolError`); a search that fails is ours (`EnvError`) and goes
through. A query that finds nothing, an empty one included, is answered as the formatter has it.
"""

from __future__ import annotations

from collections.abc import Callable

from envs.retrieval.formatting import get_formatter
from envs.retrieval.retriever import Hit, check_k
from envs.tools import Tool, ToolError


def web_search_tool(search: Callable[[str, int], list[Hit]], *, k: int = 3, formatter: str = "numbered") -> Tool:
    """`web_search(query)` that shows the `k` best hits of `search(query, k)`.

    `search` is called from several threads at the same moment. Raises `ValueError` for a wrong `k` or an unknown
    formatter.
    """
    check_k(k)
    as_text = get_formatter(formatter)

    def web_search(query: str) -> str:
        """Search an encyclopedia and return the passages that fit the query best.

        Args:
            query: what to look for, in words; names of people, places and things work best.
        """
        if not isinstance(query, str):
            raise ToolError(f"web_search: query must be a string, got {type(query).__name__} {query!r:.80}")
        return as_text(search(query, k))

    return Tool.from_function(web_search)
