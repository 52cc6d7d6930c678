"""Where do parameters, tokenizers and chat templates come from?  Real files on disk; nothing is ever downloaded."""

from nanojax.weights.chat import ChatTemplate, Message
from nanojax.weights.load import LoadedModel, load_model, load_params, open_checkpoint, smollm2_path
from nanojax.weights.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "ChatTemplate",
    "LoadedModel",
    "Message",
    "StreamDecoder",
    "Tokenizer",
    "load_model",
    "load_params",
    "open_checkpoint",
    "smollm2_path",
]
