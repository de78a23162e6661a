"""Files that take long begin first, so that no process is left with one at the end."""

from pathlib import Path

TESTS = Path(__file__).parent
# By the seconds they take; the others follow in their own order.
LONG = [
    TESTS / name
    for name in (
        "test_roads.py",
        "attnzoo/test_interpreted.py",
        "attnzoo/test_kernels_compile.py",
        "bench/test_suite.py",
        "bench/test_borders.py",
        "recipes/test_compare_safety.py",
        "bench/test_gpu_goals.py",
        "bench/test_whole_models.py",
        "attnzoo/test_counting.py",
        "recipes/test_session.py",
        "recipes/test_compare.py",
        "recipes/test_distributed.py",
        "recipes/test_train.py",
    )
]
FIRST = {path: place for place, path in enumerate(LONG)}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.get(item.path, len(FIRST)))
