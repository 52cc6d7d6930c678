"""Where are converted parameters kept between runs?  An Orbax checkpoint per content of the source files.

An entry is a folder, named after the source's contents, the parameter tree (names, shapes, dtypes) and a version:

    {cache_dir}/{key}/checkpoint/    Orbax, one flat dict {"layers.0.qkv.kernel": array}
    {cache_dir}/{key}/digest         content digest of `checkpoint/`: an entry is whole or it is not used
"""

import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from nanojax.array_types import Params
from nanojax.weights.checkpoint import flatten, unflatten

FORMAT_VERSION = 1
"""Raise it whenever conversion gives other numbers in the same tree: old entries are then never found again."""


def load_or_convert(cache_dir: Path, files: Sequence[Path], abstract: Params, convert: Callable[[], Params]) -> Params:
    """Parameters from the cache, else from `convert()`, which are then saved.  Ready on the default device.

    files: what the parameters depend on; only their names within the model's folder and their contents count.
    abstract: tree of `jax.ShapeDtypeStruct` that the parameters must match.
    A damaged entry causes a RuntimeWarning that names it, and is written anew.  Raises what `convert` raises, and
    OSError if `cache_dir` cannot be written.
    """
    entry = Path(cache_dir).resolve() / cache_key(files, abstract)
    if entry.exists():
        try:
            return _restore(entry, abstract)
        except Exception as error:  # whatever Orbax makes of a damaged folder
            warnings.warn(f"{entry}: damaged cache entry ({error}); converting anew", RuntimeWarning, stacklevel=2)
            shutil.rmtree(entry, ignore_errors=True)
    params = jax.block_until_ready(convert())
    _save(entry, params)
    return params


def cache_key(files: Sequence[Path], abstract: Params) -> str:
    """Name of the entry for these files' contents as parameters of this tree."""
    tree = sorted((name, leaf.shape, jnp.dtype(leaf.dtype).name) for name, leaf in flatten(abstract).items())
    return f"{content_digest(files)[:32]}-{hashlib.sha256(repr(tree).encode()).hexdigest()[:8]}-v{FORMAT_VERSION}"


def content_digest(files: Sequence[Path]) -> str:
    """SHA-256 over the names and contents of `files`, hexadecimal.  About 1.7 GB/s per core with SHA instructions."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            total.update(path.name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _save(entry: Path, params: Params) -> None:
    """Writes the entry beside its place and renames it, so that a reader sees all of it or nothing."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=entry.parent) as scratch:
        partial = Path(scratch) / "entry"
        with _checkpointer() as checkpointer:
            checkpointer.save(partial / "checkpoint", flatten(params))
        (partial / "digest").write_text(_checkpoint_digest(partial))
        try:
            os.rename(partial, entry)
        except OSError:
            if not entry.exists():  # else another process finished the same entry first
                raise


def _restore(entry: Path, abstract: Params) -> Params:
    recorded, found = (entry / "digest").read_text(), _checkpoint_digest(entry)
    if recorded != found:
        raise ValueError(f"content digest {found[:12]}..., recorded {recorded[:12]}...")
    sharding = jnp.zeros(()).sharding
    targets = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for name, leaf in flatten(abstract).items()
    }
    restore_args = ocp.checkpoint_utils.construct_restore_args(targets)
    with _checkpointer() as checkpointer:
        flat = checkpointer.restore(entry / "checkpoint", item=targets, restore_args=restore_args)
    return jax.block_until_ready(unflatten(flat))


def _checkpoint_digest(entry: Path) -> str:
    return content_digest(sorted(path for path in (entry / "checkpoint").rglob("*") if path.is_file()))


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, use_compression=False))
