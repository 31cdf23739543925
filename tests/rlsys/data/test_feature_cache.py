"""The feature cache keeps its bound in bytes and forgets what was not used for longest."""

import numpy as np

from rlsys.data.feature_cache import FeatureCache

ENTRY = np.zeros((5, 5), np.float32)  # 100 bytes


def test_the_least_recently_used_goes_first() -> None:
    cache = FeatureCache(max_bytes=250)
    cache.put("a", ENTRY)
    cache.put("b", ENTRY)
    assert cache.get("a") is ENTRY  # now b is the older one
    cache.put("c", ENTRY)
    assert [cache.get(key) is not None for key in "abc"] == [True, False, True]
    assert (cache.num_bytes, cache.evictions) == (200, 1)


def test_an_entry_larger_than_the_cache_is_not_kept() -> None:
    cache = FeatureCache(max_bytes=99)
    cache.put("a", ENTRY)
    assert (cache.get("a"), cache.num_bytes, len(cache)) == (None, 0, 0)


def test_putting_the_same_key_again_does_not_count_twice() -> None:
    cache = FeatureCache(max_bytes=1000)
    cache.put("a", ENTRY)
    cache.put("a", ENTRY)
    assert (cache.num_bytes, len(cache)) == (100, 1)
