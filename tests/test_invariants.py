"""Law: every kind of corruption is caught by the law that it breaks."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from nanojax import invariants
from nanojax.invariants import InvariantError
from nanojax.kv_cache import PagePool
from nanojax.scheduler import SchedulerState


@pytest.fixture(scope="module")
def running():
    """An engine in the middle of its work."""
    engine = tiny.engine(tiny.GREEDY)
    for request in tiny.requests(6, max_tokens=19):
        engine.submit(request)
    for _ in range(4):
        engine.poll()
    return engine


def corrupt(state, **changes):
    pool = {k: v for k, v in changes.items() if k in {f.name for f in dataclasses.fields(PagePool)}}
    rows = {k: v for k, v in changes.items() if k in {f.name for f in dataclasses.fields(SchedulerState)}}
    assert len(pool) + len(rows) == len(changes)
    return state.replace(pool=state.pool.replace(**pool), scheduler=state.scheduler.replace(**rows))


CORRUPTIONS = {
    "a lost page": (lambda s: {"num_free": s.pool.num_free - 1}, "free + owned == all"),
    "a page counted twice": (lambda s: {"ref_count": s.pool.ref_count.at[s.pool.page_indices[0, 0]].add(1)}, "reference counts"),
    "a held page in the free list": (lambda s: {"free": s.pool.free.at[0].set(s.pool.page_indices[0, 0])}, "owned by nobody"),
    "a page stolen from a neighbour": (
        lambda s: {"page_indices": s.pool.page_indices.at[0, 0].set(s.pool.page_indices[1, 0])}, "reference counts",
    ),
    "a table that names no page": (lambda s: {"page_indices": s.pool.page_indices.at[0, 0].set(-7)}, "existing pages"),
    "pages of a request that is gone": (lambda s: {"active": s.scheduler.active.at[0].set(False)}, "only active requests"),
    "an active slot without a request": (lambda s: {"resident": s.scheduler.resident.at[0].set(False)}, "only active"),
    "more computed than pages hold": (lambda s: {"num_computed": s.scheduler.num_computed.at[0].add(4)}, "exactly the pages"),
    "computed beyond known": (lambda s: {"num_tokens": s.scheduler.num_tokens.at[0].set(1)}, "computed < known"),
    "known beyond the limit": (lambda s: {"max_tokens": s.scheduler.max_tokens.at[0].set(2)}, "computed < known <= limit"),
}  # fmt: skip


def test_a_sound_state_passes(running):
    law_holds = invariants.holds(running.config, running._state)
    assert law_holds.shape == (len(invariants.LAWS),)
    invariants.check(running.config, running._state, law_holds)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_is_caught_and_the_state_printed(running, name):
    change, law = CORRUPTIONS[name]
    bad = corrupt(running._state, **change(running._state))
    with pytest.raises(InvariantError) as caught:
        invariants.check(running.config, bad, invariants.holds(running.config, bad))
    first_line, *state = str(caught.value).splitlines()
    assert law in first_line
    assert any(line.startswith("slot 0: request 0 ") for line in state)


def test_the_engine_checks_itself_after_every_step(running):
    engine = tiny.engine(tiny.GREEDY)
    engine.submit(tiny.requests(1, max_tokens=19)[0])
    engine.poll()
    engine._state = corrupt(engine._state, num_free=engine._state.pool.num_free - 1)
    with pytest.raises(InvariantError, match="free \\+ owned == all"):
        engine.poll()


def test_a_stall_is_reported_not_waited_for():
    engine = tiny.engine(tiny.GREEDY, check_invariants=False)
    engine.submit(tiny.requests(1, max_tokens=19)[0])
    engine.poll()
    state = engine._state
    engine._state = corrupt(state, num_free=jnp.int32(0), num_computed=state.pool.num_pages * np.int32(4))
    engine.poll()  # launched ahead: the step that computes nothing is read by the next poll
    with pytest.raises(InvariantError, match="no request can move"):
        engine.poll()
