"""``python -m attnzoo``: the command ``attnzoo``."""

from attnzoo.command import run

if __name__ == "__main__":
    run()
