"""Chat templates, rendered as transformers renders them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from tests.util.tokenizers import set_config, write_hf_config

# In the manner of published templates: ChatML with a default system message, Llama 3's, Gemma's refusals, Qwen's tools.
TEMPLATES = {
    "chatml": """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system
You help.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "llama": """{% set loop_messages = messages %}
{% for message in loop_messages %}
    {% set content = '<|' + message['role'] + '|>\n\n' + message['content'] | trim + eos_token %}
    {% if loop.index0 == 0 %}
        {% set content = bos_token + content %}
    {% endif %}
    {{- content }}
{% endfor %}""",
    "gemma": """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate') }}{% endif %}
<{{ message['role'] }}>{{ message['content'] | trim }}{% endfor %}""",
    "qwen": """{%- if tools %}{%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'stop' %}{%- break %}{%- endif %}
    {%- set ns.last = loop.index %}
    {%- if message.tool_calls is defined %}{{- message.tool_calls | tojson(indent=2) }}{%- endif %}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think></think>' }}{%- endif %}
    {{- message.role ~ message.content ~ pad_token }}
{%- endfor %}{{ ns.last }}""",
    "generation": """{% set n = 1 %}{% for message in messages %}{% if message.role == 'assistant' %}
{% generation %}{% set n = 2 %}{{ message.content }}{{ n }}{% endgeneration %}
{% else %}{{ message.content }}{% endif %}{% endfor %}{{ n }}{{ strftime_now('%Y') }}""",
}
CHATS: list[list[dict[str, object]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": 'Be <b>brief</b> & "kind".'}, {"role": "user", "content": "  é 日本 🎉\n"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    [{"role": "user", "content": "a", "tool_calls": None}, {"role": "stop", "content": "b"}],
    [{"role": "user", "content": "a", "tool_calls": [{"name": "f", "arguments": {"x": "ü<"}}]}],
]
VARIABLES: list[dict[str, object]] = [{}, {"tools": [{"type": "function", "name": "é"}], "enable_thinking": False}]


@pytest.fixture
def directory(copy_of: Callable[[str], Path]) -> Path:
    directory = copy_of("json-llama")
    set_config(directory, pad_token="<unk>")
    return directory


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(directory: Path, name: str) -> None:
    from transformers import AutoTokenizer

    (directory / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    assert ours.chat_template == theirs.chat_template
    rendered = 0
    for chat in CHATS:
        for variables in VARIABLES:
            for prompt in (True, False):
                try:
                    expected = theirs.apply_chat_template(
                        chat, add_generation_prompt=prompt, tokenize=False, **variables
                    )
                except Exception as error:
                    with pytest.raises(UserError, match=str(error)):
                        ours.apply_chat_template(chat, add_generation_prompt=prompt, **variables)
                else:
                    rendered += 1
                    assert ours.apply_chat_template(chat, add_generation_prompt=prompt, **variables) == expected
    assert rendered >= 8


def test_a_template_is_found_in_every_file_and_the_jinja_file_first(directory: Path) -> None:
    def text() -> str:
        return load_tokenizer(directory).apply_chat_template([{"role": "user", "content": "x"}])

    (directory / "chat_template.json").write_text(json.dumps({"chat_template": "json {{ messages[0].content }}"}))
    assert text() == "json x"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default {{ bos_token }}"}]
    set_config(directory, chat_template=named)
    assert text() == "default <s>"
    set_config(directory, chat_template="config {{ eos_token }}")
    assert text() == "config </s>"
    (directory / "chat_template.jinja").write_text("jinja {{ add_generation_prompt }}")
    assert text() == "jinja True"


def test_special_tokens_of_a_sentencepiece_model_alone_have_names(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("sp-gemma")
    (directory / "tokenizer_config.json").unlink()
    (directory / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}{{ unk_token }}")
    assert load_tokenizer(directory).apply_chat_template([{"role": "user", "content": "x"}]) == "<bos><eos>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "chat_template.jinja:1: the chat template cannot write these messages: Expected an expression"),
        ("{{ raise_exception('No\nsuch role') }}", "chat_template.jinja: .* messages: No such role"),
        ("{{ messages[0].nothing.more }}", "has no attribute 'nothing'"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
    ],
)
def test_a_template_that_fails_is_named_in_one_line(directory: Path, template: str, message: str) -> None:
    (directory / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(directory)
    with pytest.raises(UserError, match=message) as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(directory))


def test_no_template_and_no_message_are_refused_in_one_line(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    assert tokenizer.chat_template is None
    with pytest.raises(UserError, match=rf"^{directory}: no chat template; looked for chat_template.jinja, and .*$"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    set_config(directory, chat_template="x")
    with pytest.raises(UserError, match=r"^messages: expected one or more"):
        load_tokenizer(directory).apply_chat_template([])


def test_a_field_that_is_no_template_is_refused(directory: Path) -> None:
    set_config(directory, chat_template=[{"name": "rag", "template": "x"}])
    with pytest.raises(
        UserError, match=r"tokenizer_config.json: field 'chat_template': found the templates rag; expected"
    ):
        load_tokenizer(directory)
    set_config(directory, chat_template=7)
    with pytest.raises(UserError, match=r"tokenizer_config.json: field 'chat_template': found 7; expected a string"):
        load_tokenizer(directory)


def test_the_files_of_a_chat_come_along_with_a_copy(directory: Path, tmp_path: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    write_hf_config(directory, "llama", eos_token_id=2)
    (tmp_path / "copy").mkdir()
    load_tokenizer(directory).save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert copy.apply_chat_template([{"role": "user", "content": "x"}]) == "x</s>"
    assert copy.stop_ids == (2, 5)
