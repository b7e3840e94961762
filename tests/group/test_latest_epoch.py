"""The latest epoch that ranks tell one another through the store."""

from __future__ import annotations

import torch.distributed

from compactdist.group.epochs import LatestEpoch


class Gone:
    """A store whose server has ended."""

    def __getattr__(self, name):
        raise RuntimeError("connection reset")


def test_the_latest_one_is_read_until_it_is_removed():
    store = torch.distributed.HashStore()
    one, other, elsewhere = (LatestEpoch(store, name) for name in ("g", "g", "h"))
    assert one.read() == 0
    before = store.num_keys()
    for told, latest in ((3, 3), (2, 3), (12, 12)):
        one.tell(told)
        assert other.read() == latest
    other.tell(13)
    assert (one.read(), elsewhere.read()) == (13, 0)
    elsewhere.forget()  # it told nothing
    assert one.read() == 13
    one.forget()
    assert (other.read(), store.num_keys()) == (0, before)
    other.tell(4)
    assert one.read() == 4


def test_a_store_that_is_gone_or_never_was_is_left_alone():
    for store in (None, Gone()):
        latest = LatestEpoch(store, "g")
        latest.tell(3)
        assert latest.read() == 0
        latest.forget()
