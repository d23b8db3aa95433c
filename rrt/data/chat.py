"""Chat templates: the Jinja programs with which instruction-tuned models write a conversation as one text.

They come from the Hub with the model, so they run in a sandbox, in the environment that transformers gives them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from rrt.data.tokenizer_files import TokenizerFiles
from rrt.errors import UserError

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a directory.

    Attributes:
        source: the file that it comes from, for messages.
        text: the program in Jinja.
        names: special tokens by name (``bos_token``), which the template may use.
    """

    source: Path
    text: str
    names: Mapping[str, str]

    def render(self, messages: Sequence[Message], add_generation_prompt: bool, **variables: Any) -> str:
        """Write `messages` as one text; `variables` are for templates that know them, such as ``tools``.

        Raises:
            UserError: no messages, or a template that cannot be read or raises.
        """
        if not messages or not all(isinstance(message, Mapping) for message in messages):
            raise UserError("messages: expected one or more objects with a role and a content")
        given = {"tools": None, "documents": None, **self.names, **variables}
        # Null stands for a field that is not there: templates would write "None".
        given["messages"] = [{k: v for k, v in message.items() if v is not None} for message in messages]
        given["add_generation_prompt"] = add_generation_prompt
        try:
            text: str = self._compiled.render(**given)
        except Exception as error:  # a template is a program of others: it may raise anything
            raise self._refusal(error) from None
        return text

    @cached_property
    def _compiled(self) -> Any:
        # Imported here: commands without a chat start faster.
        import jinja2
        from jinja2 import nodes, parser
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """The tags ``{% generation %}`` and ``{% endgeneration %}``, which mark what an assistant wrote."""

            tags = {"generation"}  # noqa: RUF012 - as the base class declares it

            def parse(self, parser: parser.Parser) -> nodes.Node:
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                # A call, as variables set within the tags are not seen after them.
                return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

            def _write(self, caller: Callable[[], str]) -> str:
                return caller()

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(self.text)

    def _refusal(self, error: Exception) -> UserError:
        line = getattr(error, "lineno", None)
        where = f"{self.source}:{line}" if line is not None and self.source.suffix == ".jinja" else str(self.source)
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return UserError(f"{where}: the chat template cannot write these messages: {reason}")


def find_chat_template(files: TokenizerFiles, names: Mapping[str, str]) -> ChatTemplate | None:
    """Return the template of a directory: `chat_template.jinja`, else in `tokenizer_config.json` (of several named ones
    the default), else `chat_template.json`; None if there is none.

    Raises:
        UserError: a file that is not text, or a field that is no template.
    """
    path = files.directory / "chat_template.jinja"
    if path.name in files:
        try:
            return ChatTemplate(path, files.content(path.name).decode("utf-8"), names)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error})") from None
    for name, content in (
        ("tokenizer_config.json", files.tokenizer_config),
        ("chat_template.json", files.read("chat_template.json")),
    ):
        template = content.get("chat_template")
        if template is not None:
            return ChatTemplate(files.directory / name, _default(files.directory / name, template), names)
    return None


def _default(path: Path, template: object) -> str:
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
        if template is None:
            found = ", ".join(sorted(str(name) for name in named)) or "none"
            raise UserError(f"{path}: field 'chat_template': found the templates {found}; expected one named default")
    if not isinstance(template, str):
        raise UserError(f"{path}: field 'chat_template': found {template!r}; expected a string")
    return template


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as it is: Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
