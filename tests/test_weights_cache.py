"""Is the parameter cache exact, keyed by content, and never believed when damaged?"""

import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax.config import ModelConfig
from nanojax.models.decoder import abstract_params
from nanojax.weights import cache
from nanojax.weights.checkpoint import flatten

TINY = ModelConfig(
    "tiny",
    num_layers=2,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    d_ff=24,
    vocab_size=32,
    max_len=32,
    qkv_bias=True,
)


class Converter:
    """Random parameters that count how often they are asked for."""

    def __init__(self, dtype=jnp.bfloat16, seed=0):
        rng, self.calls = np.random.default_rng(seed), 0
        self.abstract = abstract_params(TINY, dtype)
        self.params = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), self.abstract)

    def __call__(self):
        self.calls += 1
        return self.params

    def load(self, cache_dir, *files):
        return cache.load_or_convert(cache_dir, files, self.abstract, self)


def weight_file(tmp_path, content=b"weights"):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return path


def assert_equal(params, expected):
    flat = flatten(expected)
    assert flatten(params).keys() == flat.keys()
    for name, leaf in flatten(params).items():
        assert leaf.dtype == flat[name].dtype
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), np.asarray(flat[name], np.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_second_load_restores_the_same_bits_on_the_default_device(tmp_path, dtype):
    converter, file = Converter(dtype), weight_file(tmp_path)
    assert_equal(converter.load(tmp_path / "new" / "cache", file), converter.params)
    restored = converter.load(tmp_path / "new" / "cache", file)
    assert converter.calls == 1
    assert_equal(restored, converter.params)
    assert jax.tree.structure(restored) == jax.tree.structure(converter.params)
    for leaf in jax.tree.leaves(restored):
        assert isinstance(leaf, jax.Array)
        assert leaf.devices() == jnp.zeros(()).devices()


def test_content_and_tree_are_the_key(tmp_path):
    first, file = Converter(), weight_file(tmp_path)
    first.load(tmp_path / "cache", file)
    os.utime(file, (0, 0))
    first.load(tmp_path / "cache", file)
    assert first.calls == 1
    Converter(jnp.float32).load(tmp_path / "cache", file)
    other = Converter(seed=1)
    assert_equal(other.load(tmp_path / "cache", weight_file(tmp_path, b"other")), other.params)
    assert other.calls == 1
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_key_of_several_files_covers_each_name_and_content(tmp_path):
    keys = set()
    for names in (("a", "b"), ("a", "c")):
        for contents in ((b"1", b"23"), (b"12", b"3"), (b"23", b"1")):
            files = [tmp_path / name for name in names]
            for file, content in zip(files, contents, strict=True):
                file.write_bytes(content)
            keys.add(cache.cache_key(files, {}))
    assert len(keys) == 6


def entry_files(cache_dir):
    return sorted(path for path in cache_dir.rglob("*") if path.is_file())


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, os.unlink])
def test_any_damage_is_noticed_said_and_mended(tmp_path, harm):
    converter, file, cache_dir = Converter(), weight_file(tmp_path), tmp_path / "cache"
    converter.load(cache_dir, file)
    largest = max(entry_files(cache_dir), key=lambda path: path.stat().st_size)
    for victim in (largest, next(path for path in entry_files(cache_dir) if path.name == "digest")):
        calls = converter.calls
        harm(victim)
        with pytest.warns(RuntimeWarning, match=f"{cache_dir.name}/[0-9a-f-]+-v1: damaged cache entry"):
            assert_equal(converter.load(cache_dir, file), converter.params)
        assert converter.calls == calls + 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            converter.load(cache_dir, file)
        assert converter.calls == calls + 1
        largest = max(entry_files(cache_dir), key=lambda path: path.stat().st_size)


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    converter, file, cache_dir = Converter(), weight_file(tmp_path), tmp_path / "cache"

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_checkpoint_digest", fail)
        with pytest.raises(OSError, match="disk full"):
            converter.load(cache_dir, file)
    assert list(cache_dir.iterdir()) == []
    assert_equal(converter.load(cache_dir, file), converter.params)


def test_another_process_may_finish_the_entry_first(tmp_path):
    converter, file, cache_dir = Converter(), weight_file(tmp_path), tmp_path / "cache"

    def overtaken():
        Converter().load(cache_dir, file)
        return converter()

    assert_equal(cache.load_or_convert(cache_dir, (file,), converter.abstract, overtaken), converter.params)
    assert len(list(cache_dir.iterdir())) == 1
