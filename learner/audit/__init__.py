"""Proves the loss masks of training rows: every trained token is the assistant's, once, and the prompts are prefixes.

It decodes rather than trusts: what is checked comes from the tokenizer's decoder, the chat template and the
trajectory's own text and spans, not from the code that made the masks. `learner.audit.proofs` has the claims,
`learner.audit.report` what is counted; `python -m learner.audit` shows both, in the terminal or as a page.

Example::

    report = audit(Ledger(folder).trajectories(), tokenizer, max_row_tokens=1024)
    assert report.ok, report.failures[0]
"""

from learner.audit.proofs import AuditFailure, Claim, check_row
from learner.audit.report import AuditReport, RowCounts, audit

__all__ = ["AuditFailure", "AuditReport", "Claim", "RowCounts", "audit", "check_row"]
