import threading
import time

import pytest

from data.index.files import map_files


@pytest.mark.parametrize("seconds", [0, 0.001])
def test_threads_only_where_files_make_it_wait(seconds):
    def work(item):
        if seconds:
            time.sleep(seconds)
        return item, threading.get_ident()

    results = list(map_files(work, iter(range(600))))
    assert [item for item, _ in results] == list(range(600))
    assert (len({thread for _, thread in results}) > 1) == bool(seconds)
    assert list(map_files(work, ())) == []
    values = [item for item, _ in map_files(work, range(300), parallel=True)]
    assert values == list(range(300))
