"""Conversations to token ids: the model's own template, or llmcore's role markers.

A conversation is a list of {"role": "system" | "user" | "assistant", "content": text}. Role markers
and ends of turns are special token ids that only the template writes. What a message contains stays
text: a user who types `<|im_start|>system` or `<EOS>` gets the tokens of those characters, so that
nobody can end a turn, or speak for another role, from inside a message.
"""

import re
from collections.abc import Mapping, Sequence

from llmcore.text.tokenizer import Tokenizer

Message = Mapping[str, str]

ROLE_MARKERS = {"system": "<SYSTEM>", "user": "<USER>", "assistant": "<ASSISTANT>"}
END_MARKER = "<EOS>"


class RoleChat:
    """llmcore's own form: `<USER>` text `<EOS>` `<ASSISTANT>` text `<EOS>` ..., markers being ids.

    For models trained here. `mark(tokenizer)` gives a tokenizer the markers it lacks; the model
    then needs `model.resize_vocab(len(tokenizer))`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """ValueError when the tokenizer lacks a marker."""
        markers = [*ROLE_MARKERS.values(), END_MARKER]
        lacking = [marker for marker in markers if marker not in tokenizer.special]
        if lacking:
            raise ValueError(
                f"the tokenizer has no {', '.join(lacking)}: call RoleChat.mark(tokenizer), "
                "then model.resize_vocab(len(tokenizer))"
            )
        self._tokenizer = tokenizer
        self._marker = {role: tokenizer.special[text] for role, text in ROLE_MARKERS.items()}
        self.stop_ids = (tokenizer.special[END_MARKER],)

    @classmethod
    def mark(cls, tokenizer: Tokenizer) -> "RoleChat":
        """The chat for this tokenizer, which gets the markers that it lacks."""
        tokenizer.add_special(*ROLE_MARKERS.values(), END_MARKER)
        return cls(tokenizer)

    def encode(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> list[int]:
        """The ids of a conversation; `generation_prompt` opens the assistant's next turn."""
        _check(messages)
        ids: list[int] = []
        for message in messages:
            ids.append(self._marker[message["role"]])
            ids += self._tokenizer.encode(message["content"])
            ids += self.stop_ids
        return [*ids, self._marker["assistant"]] if generation_prompt else ids


class TemplateChat:
    """The Jinja template that came with the model, run in a sandbox."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """ValueError when the tokenizer has no template, or one that isn't Jinja."""
        if tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template: use RoleChat")
        import jinja2
        import jinja2.ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(tokenizer.chat_template)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid Jinja: {error}") from error
        self._error = jinja2.TemplateError
        self._tokenizer = tokenizer
        self.stop_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)

    def encode(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> list[int]:
        """The ids of a conversation; `generation_prompt` opens the assistant's next turn.

        The same ids as encoding the rendered text whole, but that special tokens are only looked
        for in what the template wrote. ValueError when the template refuses the conversation, or
        changes the messages other than by stripping them, so that the two can't be told apart.
        """
        _check(messages)
        ids: list[int] = []
        text = ""
        for part in self._parts(messages, generation_prompt):
            if isinstance(part, str):
                # Neighbouring texts are joined first: merges may reach from one into the other.
                text += part
                continue
            ids += [*self._tokenizer.encode(text), part]
            text = ""
        return ids + self._tokenizer.encode(text)

    def _parts(self, messages: Sequence[Message], generation_prompt: bool) -> list[int | str]:
        """Special ids and texts of the rendered conversation, in order."""
        contents = [message["content"] for message in messages]
        sentinels = _sentinels(contents)
        bare = [
            {**message, "content": sentinel}
            for message, sentinel in zip(messages, sentinels, strict=True)
        ]
        whole = self._render(messages, generation_prompt)
        frame = re.split(f"({'|'.join(sentinels)})", self._render(bare, generation_prompt))
        for written in (contents, [content.strip() for content in contents]):
            text_of = dict(zip(sentinels, written, strict=True))
            if "".join(text_of.get(part, part) for part in frame) == whole:
                break
        else:
            raise ValueError(
                "the chat template changes the messages' texts: its special tokens can't be told "
                "from those that a message contains"
            )
        parts: list[int | str] = []
        for part in frame:
            parts += [text_of[part]] if part in text_of else self._tokenizer.split_special(part)
        return parts

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=generation_prompt,
                bos_token=self._tokenizer.bos or "",
                eos_token=self._tokenizer.eos or "",
            )
        except self._error as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error


def chat_of(tokenizer: Tokenizer) -> TemplateChat | RoleChat:
    """The way to talk to a tokenizer's model: its own template, else by role markers.

    ValueError when it has neither.
    """
    return RoleChat(tokenizer) if tokenizer.chat_template is None else TemplateChat(tokenizer)


def _check(messages: Sequence[Message]) -> None:
    if isinstance(messages, (str, bytes, Mapping)) or not messages:
        raise ValueError('a conversation is a list of {"role": ..., "content": ...}, not empty')
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise ValueError(f"message {i} must have a role and a content, got {message!r}")
        if message["role"] not in ROLE_MARKERS:
            raise ValueError(
                f"message {i} has the role {message['role']!r}; "
                f"accepted are {', '.join(ROLE_MARKERS)}"
            )
        if not isinstance(message["content"], str):
            raise TypeError(f"message {i} must contain text, got {message['content']!r}")


def _refuse(reason: str) -> None:
    import jinja2

    raise jinja2.TemplateError(reason)


def _sentinels(contents: Sequence[str]) -> list[str]:
    """One text per message that stands in no message, nor inside another sentinel."""
    everything = "".join(contents)
    salt = 0
    while f"\ue000{salt}:" in everything:
        salt += 1
    return [f"\ue000{salt}:{i}\ue001" for i in range(len(contents))]
