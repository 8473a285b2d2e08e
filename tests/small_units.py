"""`scfm prepare` for tests: units of SCFM_TEST_UNIT values, so that a small corpus has many.

Worker processes import nothing of this: only the plan, which this process makes, knows the size of units.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    from scfm.cli import main
    from scfm.data.building import workers

    workers.VALUES_PER_UNIT = int(os.environ.get("SCFM_TEST_UNIT", "2000"))
    sys.exit(main(["prepare", *sys.argv[1:]]))
