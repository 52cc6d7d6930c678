"""Law: any program of grow, share and release keeps every page with exactly its holders (checked against Python lists)."""

import pathlib
import platform
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanojax import kv_cache
from nanojax.config import EngineConfig
from nanojax.huge_pages import use_huge_pages
from nanojax.kv_cache import KVPages

CONFIG = EngineConfig(num_slots=4, num_pages=12, max_len=20, page_size=4)
S, P, N = CONFIG.num_slots, CONFIG.pages_per_slot, CONFIG.num_pages

grow = jax.jit(chex.assert_max_traces(kv_cache.grow, n=1), static_argnums=2)
share = jax.jit(chex.assert_max_traces(kv_cache.share, n=1))
release = jax.jit(chex.assert_max_traces(kv_cache.release, n=1))

per_slot = st.lists(st.integers(0, 3), min_size=S, max_size=S)
operations = st.one_of(
    st.tuples(st.just("grow"), per_slot),
    st.tuples(st.just("release"), st.lists(st.booleans(), min_size=S, max_size=S)),
    st.tuples(st.just("share"), st.tuples(st.integers(0, S - 1), st.integers(0, S - 1), st.integers(0, P))),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(operations, max_size=12))
def test_pool_equals_python_lists(program):
    pool, held = kv_cache.init_pool(CONFIG), [[] for _ in range(S)]
    for name, argument in program:
        owned = {page for pages in held for page in pages}
        if name == "grow":
            if sum(argument) > N - len(owned) or any(len(h) + n > P for h, n in zip(held, argument, strict=True)):
                continue
            pool = grow(pool, jnp.array(argument, jnp.int32), N)
            for slot, n in enumerate(argument):
                table = np.asarray(pool.page_indices[slot])
                new = table[len(held[slot]) : len(held[slot]) + n].tolist()
                assert not owned & set(new), "a page that somebody holds was handed out"
                owned |= set(new)
                held[slot] += new
        elif name == "share":
            source, target, count = argument
            if held[target] or count > len(held[source]) or source == target:
                continue
            pool = share(pool, jnp.int32(source), jnp.int32(target), jnp.int32(count))
            held[target] = held[source][:count]
        else:
            pool = release(pool, jnp.array(argument))
            held = [[] if gone else pages for pages, gone in zip(held, argument, strict=True)]
        assert_same(pool, held)


def test_releasing_nothing_changes_nothing_where_it_is_not_skipped(as_on_a_gpu):
    pool = grow(kv_cache.init_pool(CONFIG), jnp.array([2, 0, 3, 1], jnp.int32), N)
    for mask in ([False, False, True, False], [False] * 4):
        pool = kv_cache.release(pool, jnp.array(mask))
        assert_same(pool, [[11, 10], [], [], [6]])


def assert_same(pool, held):
    table, num = np.asarray(pool.page_indices), np.asarray(pool.num_pages)
    assert [table[s, : num[s]].tolist() for s in range(S)] == held
    counts = np.bincount([page for pages in held for page in pages], minlength=N)
    np.testing.assert_array_equal(pool.ref_count, counts)
    assert sorted(np.asarray(pool.free[: int(pool.num_free)]).tolist()) == np.flatnonzero(counts == 0).tolist()


def test_write_reaches_its_page_and_offset_and_drops_padding():
    kv = KVPages(k=jnp.zeros((2, 5, 3, 4, 8)), v=jnp.zeros((2, 5, 3, 4, 8)))
    k = jax.random.normal(jax.random.key(0), (3, 3, 8))
    new = kv_cache.write(kv, 1, k, 2 * k, jnp.array([4, 0, 5]), jnp.array([3, 0, 1]))
    expected = np.zeros((2, 5, 3, 4, 8), np.float32)
    expected[1, 4, :, 3], expected[1, 0, :, 0] = k[0], k[1]
    np.testing.assert_array_equal(new.k, expected)
    np.testing.assert_array_equal(new.v, 2 * expected)


def test_pages_for_rounds_up():
    np.testing.assert_array_equal(kv_cache.pages_for(jnp.array([0, 1, 4, 5, 8]), 4), [0, 1, 1, 2, 2])


def huge_bytes() -> int:
    """What this process has in huge pages."""
    with open("/proc/self/smaps_rollup") as lines:
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


def has_huge_pages() -> bool:
    version = re.match(r"(\d+)\.(\d+)", platform.release())
    is_new = version is not None and tuple(map(int, version.groups())) >= (6, 1)
    return is_new and pathlib.Path("/sys/kernel/mm/transparent_hugepage").exists()


@pytest.mark.skipif(not has_huge_pages(), reason="needs Linux 6.1 or later with huge pages")
def test_pages_move_into_huge_pages_and_stay_as_they_are():
    shape = 4, 512, 2, 64, 64  # 32 MiB
    pages = KVPages(*(jax.random.bits(jax.random.key(i), shape, jnp.uint16) for i in range(2)))
    before, values, address = huge_bytes(), jax.device_get(pages), pages.k.unsafe_buffer_pointer()
    use_huge_pages(pages).join()
    assert huge_bytes() - before >= 2 * 28 * 2**20
    assert pages.k.unsafe_buffer_pointer() == address
    chex.assert_trees_all_equal(jax.device_get(pages), values)


def test_small_arrays_stay_where_they_are():
    pages = KVPages(jnp.ones((1, 2, 1, 4, 8)), jnp.zeros((1, 2, 1, 4, 8)))
    use_huge_pages(pages).join()
    chex.assert_trees_all_equal(pages, KVPages(jnp.ones((1, 2, 1, 4, 8)), jnp.zeros((1, 2, 1, 4, 8))))
