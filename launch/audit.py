"""`python -m launch.audit LEDGER`: the same as `python -m learner.audit`, which see."""

import sys

from learner.audit.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
