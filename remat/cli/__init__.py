"""The command line, `remat`: a thin layer over the library. Needs the extra `cli`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit: 0 when done, 1 where the answer is no, 2 for what cannot be asked, 3 for a fault of ours
    or of a library's, 130 when interrupted."""
    try:
        from remat.cli.app import run
    except ImportError as error:
        print(f"error: the command line needs more packages ({error.name}): pip install 'remat[cli]'", file=sys.stderr)
        sys.exit(2)
    sys.exit(run(sys.argv[1:]))
