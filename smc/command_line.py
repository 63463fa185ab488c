"""What every command does with an error: one line on standard error, and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable

from smc.errors import Corrupt, SpectralMCError

__all__ = ["exit_status"]


def exit_status(command: Callable[[], int], *, may_be_cut: bool = False) -> int:
    """Run a command; -> its status, 1 for a corrupt ledger, 2 for what could not be carried out, 130 for Ctrl-C.

    `may_be_cut`: the command only prints, and whoever reads it may stop doing so.
    """
    try:
        return command()
    except Corrupt as error:
        print(f"corrupt: {error}", file=sys.stderr)
        return 1
    except (SpectralMCError, OSError) as error:
        if may_be_cut and isinstance(error, BrokenPipeError):
            return 0
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
