"""Relaxed Recursive Transformers: fold a pretrained LLM into one looped block, relax and uptrain it."""

import importlib
from typing import TYPE_CHECKING, Any

from rrt.errors import UserError
from rrt.version import __version__

if TYPE_CHECKING:
    from rrt.checkpoint.source import load_model, open_source
    from rrt.data.tokenizer import load_tokenizer
    from rrt.decode.decoder import Decoder
    from rrt.decode.kv_cache import PagedCache
    from rrt.model.config import LoraRanks, ModelConfig, RecursiveConfig
    from rrt.model.transformer import RecursiveTransformer
    from rrt.ops import build_info
    from rrt.serve.llm import LLM
    from rrt.serve.requests import SamplingParams

__all__ = [
    "LLM",
    "Decoder",
    "LoraRanks",
    "ModelConfig",
    "PagedCache",
    "RecursiveConfig",
    "RecursiveTransformer",
    "SamplingParams",
    "UserError",
    "__version__",
    "build_info",
    "load_model",
    "load_tokenizer",
    "open_source",
]

_MODULES = {
    "Decoder": "decode.decoder",
    "LLM": "serve.llm",
    "LoraRanks": "model.config",
    "ModelConfig": "model.config",
    "PagedCache": "decode.kv_cache",
    "RecursiveConfig": "model.config",
    "RecursiveTransformer": "model.transformer",
    "SamplingParams": "serve.requests",
    "build_info": "ops",
    "load_model": "checkpoint.source",
    "load_tokenizer": "data.tokenizer",
    "open_source": "checkpoint.source",
}


def __getattr__(name: str) -> Any:
    """Import on first use: commands that work on text alone start without torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'rrt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rrt.{_MODULES[name]}"), name)
