"""What is in shards, remembered."""

import io
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sslvision.data.archive import Members
from sslvision.data.encoded import PathTable
from sslvision.data.shard_index import Shard, load_shard, save_shard


def test_threads_that_read_indices_parse_one_header_at_a_time(monkeypatch):
    """Python 3.11 fails now and then ("AST constructor recursion depth mismatch") when several threads do."""
    numbers = np.arange(2, dtype=np.int64)
    members = Members(PathTable.of([b"a.jpg", b"a.cls"]), numbers, numbers, np.zeros(2, np.uint8), numbers)
    content = io.BytesIO()
    save_shard(content, Shard(members, numbers[1:], PathTable.of([b"7"])))
    inside, most, load = 0, 0, np.load

    def watched(*args, **kwargs):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.002)
        arrays = load(*args, **kwargs)
        inside -= 1
        return arrays

    monkeypatch.setattr(np, "load", watched)
    with ThreadPoolExecutor(8) as pool:
        shards = pool.map(lambda _: load_shard(io.BytesIO(content.getvalue())), range(20))
        assert {shard.texts[0] for shard in shards} == {"7"}
    assert most == 1
