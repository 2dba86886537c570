"""The command line. Commands parse, call the API and return an exit code.

Exit codes: 0 done, 1 checked data are unfit or runs of a sweep failed, 2 a mistake that the message explains,
128 + N left on signal N.
"""

import os
import sys
from collections.abc import Sequence

from fishr.cli.app import call, spread_values
from fishr.cli.console import print_error, print_notice, warnings_to_stderr
from fishr.errors import FishrError, RunInterruptedError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ``fishr`` command; returns its exit code."""
    # Read by torch at its first large allocation: without huge pages, full-batch training on a CPU spends
    # half its time on page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    warnings_to_stderr()
    try:
        return call(spread_values(sys.argv[1:] if arguments is None else arguments))
    except RunInterruptedError as error:
        print_notice(str(error))
        return 128 + error.signal_number
    except FishrError as error:
        print_error(str(error))
        return 2
    except BrokenPipeError:
        # The reader of our output left: so do we, without Python's complaint at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        print_error(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        return 2
