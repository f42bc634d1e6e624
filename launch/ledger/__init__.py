"""Looks into ledgers and makes new ones, without generating anything: `python -m launch.ledger COMMAND LEDGER...`."""
