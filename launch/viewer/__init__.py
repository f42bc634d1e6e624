"""The pages behind `python -m launch.view`: ledgers of any size, looked at in a browser.

A small server of its own: Starlette renders every page (Jinja2 with autoescape), a few hundred lines of JavaScript add
the keyboard. What makes it quick is an index beside each ledger (`launch.viewer.ledger_index`): DuckDB for the columns,
SQLite's FTS5 for the words, filled shard by shard in the background. The ledger itself is only read.

Example::

    app = make_app(Catalog(["runs/a/ledger"], cache=folder), Access())
"""
