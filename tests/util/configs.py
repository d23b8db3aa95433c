"""Small configurations of the three families, in the form of a config.json."""

from rrt.checkpoint.presets import PRESETS

SMALL = dict(vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=4, max_position_embeddings=64)
CONFIGS = {
    "gemma": {**PRESETS["gemma-2b"], **SMALL, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16},
    "llama": {**PRESETS["tinyllama-1.1b"], **SMALL, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt_neox": {**PRESETS["pythia-1b"], **SMALL, "num_attention_heads": 4, "rotary_pct": 0.5},
}
