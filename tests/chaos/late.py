"""`python -m tests.chaos.late <overrides>`: trains, but locks the run only when it is finished."""

import time

from cosyexp.errors import UserError
from cosyexp.run.directory import RunDirectory
from cosyexp.train import main
from tests.chaos.jobs import wait_until
from tests.chaos.runs import STEPS
from tests.resume.checks import newest

if __name__ == "__main__":
    lock = RunDirectory.lock

    def late(run: RunDirectory) -> object:
        wait_until(lambda: newest(run.path) == STEPS, "the other training")
        while True:
            try:
                return lock(run)
            except UserError:
                time.sleep(0.1)

    RunDirectory.lock = late  # type: ignore[method-assign, assignment]
    main()
