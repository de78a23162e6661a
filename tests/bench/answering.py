"""What a test's other process runs: it imports nothing that takes long."""

import dataclasses
import os
import time


@dataclasses.dataclass(frozen=True)
class Asked:
    """In place of a ``Job``."""

    part: str
    seconds: float = 170.0


def answers(connection, *_):
    """Breaks at "peaks", sleeps at "check" and dies at "launches"."""
    while True:
        job = connection.recv()
        if job.part == "check":
            time.sleep(60)
        if job.part == "launches":
            os._exit(3)
        row = {"process": os.getpid(), "seconds": job.seconds}
        connection.send((row, "", job.part != "peaks"))
        if job.part == "peaks":
            return
