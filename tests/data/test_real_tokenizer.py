"""The tokenizer of a pretrained model (SmolLM2) against transformers."""

import pytest

from rrt.data.tokenizer import load_tokenizer
from tests.util.real import real_model_directory
from tests.util.tokenizers import TEXTS, training_texts

CHATS = (
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": '  2 < 3 & "é" 日本 🎉\n'}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
)


@pytest.mark.real
def test_ids_text_and_chats_of_a_real_tokenizer_are_those_of_transformers() -> None:
    from transformers import AutoTokenizer

    directory = real_model_directory()
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    assert ours.encode("Hello world") == [19556, 905]  # no BOS, though it is a Llama
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.stop_ids) == (1, 2, 2, (2,))
    specials = ["<|im_start|>user\nx<|im_end|>\n", "a <|im_end|> b", "<|endoftext|><repo_name>y", "<|im_start"]
    for text in (*TEXTS, *training_texts(), *specials):
        assert ours.encode(text) == theirs(text, split_special_tokens=True).input_ids
        ids = theirs(text).input_ids
        assert ours.encode(text, parse_special=True) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    for chat in CHATS:
        for prompt in (True, False):
            text = ours.apply_chat_template(chat, add_generation_prompt=prompt)
            assert text == theirs.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False)
            ids = theirs.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
            assert ours.encode(text, bos=False, parse_special=True) == ids
