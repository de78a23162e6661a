"""Runs scripts in processes that have imported already what takes them seconds to import.

    python tests/commands.py MODULE ...

imports the modules; then each line that it reads starts a script in a fork of it, or waits for
one. Everything else is as at a start of its own: the script is ``__main__``, with its arguments,
working folder, output and exit status.
"""

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import time
import traceback
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[1]
# What the recipes import once their flags are read, and Accelerate and digits when they are used.
HEAVY = (
    "peft",
    "sklearn.datasets",
    "recipes.lab.data.encoding",
    "recipes.lab.evaluation.evaluate",
    "recipes.lab.sampling",
    "recipes.lab.training.session",
)


class Commands:
    """Starts scripts of the repository, like ``subprocess`` with everything captured."""

    def __init__(self, modules, environment):
        self.server = subprocess.Popen(
            [sys.executable, __file__, *modules],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, script, *arguments, cwd):
        """The exit status, and what was written to either output."""
        written = Path(cwd, ".written")
        status = self.wait(self.start(script, *arguments, cwd=cwd, to=written))
        return status, written.read_text("utf-8")

    def start(self, script, *arguments, cwd, to, errors=None, **variables):
        """The number of a process that writes to the file or pipe ``to``."""
        places = {"cwd": str(cwd), "to": str(to), "errors": str(errors or to)}
        argv = [str(script), *map(str, arguments)]
        return self._answer({"argv": argv, **places, "variables": variables})

    def wait(self, process):
        """The exit status of a process that was started."""
        return self._answer(process)

    def launch(self, processes, script, *arguments, cwd):
        """As torchrun, whose workers find each other at a port of the launcher's."""
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        shared = {
            "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost",
            "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True,
        }  # fmt: skip
        files = [Path(cwd, f".written-{rank}") for rank in range(processes)]
        started = []
        for rank, file in enumerate(files):
            variables = {**shared, "RANK": rank, "LOCAL_RANK": rank}
            started.append(self.start(script, *arguments, cwd=cwd, to=file, **variables))
        statuses = [self.wait(process) for process in started]
        return max(statuses), "".join(file.read_text("utf-8") for file in files)

    def _answer(self, task):
        self.server.stdin.write(json.dumps(task) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def close(self):
        self.server.stdin.close()
        assert self.server.wait(timeout=60) == 0
        self.server.stdout.close()


class Forked:
    """A script's main in a fork of the tests themselves, which have imported and patched all.

    Args:
        main: Of a script.
        arguments: Of its command line.
        output: File descriptor that gets both its outputs.
    """

    def __init__(self, main, arguments, output):
        self.pid = os.fork()
        if not self.pid:
            self._run(main, arguments, output)

    def _run(self, main, arguments, output):
        status = 70
        try:
            from recipes.lab.console import run_script

            for target, source in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
                os.dup2(source, target)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
            sys.argv = ["script", *arguments]
            run_script(main)
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def wait(self, timeout):
        """The exit status."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"it takes longer than {timeout} s")


def serve(modules):
    sys.path.insert(0, str(ROOT))
    for name in modules:
        importlib.import_module(name)
    gc.freeze()  # or every child would look at all of it, and so copy it
    for line in sys.stdin:
        task = json.loads(line)
        if isinstance(task, int):
            print(os.waitstatus_to_exitcode(os.waitpid(task, 0)[1]), flush=True)
            continue
        child = os.fork()
        if not child:
            run(**task)
            return
        print(child, flush=True)


def run(argv, cwd, to, errors, variables):
    os.environ.update({name: str(value) for name, value in variables.items()})
    # As an interpreter reads them, whose locale may not be UTF-8.
    argv, (cwd, to, errors) = decoded(argv), decoded([cwd, to, errors])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    target = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, 1)
    os.dup2(target if errors == to else os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.close(target)
    for number, name in ((1, "stdout"), (2, "stderr")):  # whether they can seek is read at once
        old, buffering = getattr(sys, name), 1 if name == "stderr" else -1
        new = os.fdopen(number, "w", buffering, old.encoding, old.errors, closefd=False)
        setattr(sys, name, new)
    os.chdir(cwd)
    sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
    runpy.run_path(argv[0], run_name="__main__")


def decoded(words):
    return [os.fsdecode(word.encode("utf-8", "surrogateescape")) for word in words]


if __name__ == "__main__":
    serve(sys.argv[1:])
