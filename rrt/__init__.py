"""Relaxed Recursive Transformers: fold a pretrained LLM into one looped block, relax it, uptrain it, serve it."""

from rrt.config import LoraRanks, ModelConfig, RecursiveConfig
from rrt.errors import UserError
from rrt.loaders import load_model, open_source
from rrt.model import RecursiveTransformer
from rrt.ops import build_info
from rrt.tokenizer import load_tokenizer
from rrt.version import __version__

__all__ = [
    "LoraRanks",
    "ModelConfig",
    "RecursiveConfig",
    "RecursiveTransformer",
    "UserError",
    "__version__",
    "build_info",
    "load_model",
    "load_tokenizer",
    "open_source",
]
