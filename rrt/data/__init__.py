"""From text to tokens: corpora, tokenizers, token shards."""
