"""Runs scripts in processes that have imported already what takes them seconds to import.

    python tests/commands.py MODULE ...

imports the modules; then each line that it reads, a JSON object, is one script in a fork of it.
Everything else is as at a start of its own: the script is ``__main__``, with its arguments,
working folder, output and exit status.
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Commands:
    """Starts scripts of the repository, like ``subprocess.run`` with everything captured."""

    def __init__(self, modules, environment):
        self.server = subprocess.Popen(
            [sys.executable, __file__, *modules],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, script, *arguments, cwd):
        """The exit status, and what was written to either output."""
        written = Path(cwd, ".written")
        task = {"argv": [str(script), *map(str, arguments)], "cwd": str(cwd), "to": str(written)}
        self.server.stdin.write(json.dumps(task) + "\n")
        self.server.stdin.flush()
        status = int(self.server.stdout.readline())
        return status, written.read_text("utf-8")

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
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if not child:
            run(**task)
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run(argv, cwd, to):
    target = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.chdir(cwd)
    sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1:])
