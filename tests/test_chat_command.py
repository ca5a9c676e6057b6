"""A conversation: what it remembers, what it reads again, and what Ctrl-C ends."""

import signal
import subprocess
import sys
import threading

import pytest
import torch

from llmcore import chat_command, cli, generate, model_arguments
from llmcore.chat_command import Conversation
from llmcore.models import save
from llmcore.text import RoleChat, TemplateChat, Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pair(tiny_decoder, tiny_tokenizer, monkeypatch):
    model = tiny_decoder(vocab_size=len(tiny_tokenizer), context_length=400, eos_ids=(0,))
    monkeypatch.setattr(model_arguments, "load", lambda name, weights: (model, tiny_tokenizer))
    return model, tiny_tokenizer


def typed(monkeypatch, *lines):
    """The user types these; an exception is raised where its line would be read."""
    left = iter([*lines, EOFError()])

    def read(prompt):
        line = next(left)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)


def turn(role, content):
    return {"role": role, "content": content}


def expected_answer(model, tokenizer, messages, count):
    ids = torch.tensor([TemplateChat(tokenizer).encode(messages)])
    new = generate(model, ids, max_new_tokens=count)[0, ids.shape[1] :].tolist()
    return tokenizer.decode(token for token in new if token != 0)


def test_chat_remembers_the_conversation(pair, monkeypatch, capsys):
    typed(monkeypatch, "hi", "", "  the hat ", "/reset", "hi", "/what", "/exit", "never read")
    arguments = ["chat", "somewhere", "--max-new-tokens", "12", "--system", "a hat"]
    assert cli.main(arguments) == 0
    messages = [turn("system", "a hat"), turn("user", "hi")]
    first = expected_answer(*pair, messages, 12)
    messages += [turn("assistant", first), turn("user", "the hat")]
    second = expected_answer(*pair, messages, 12)
    help_line = f"{chat_command.HELP}\n"
    expected = f"{help_line}{first}\n{second}\n(forgotten)\n{first}\n{help_line}"
    assert capsys.readouterr().out == expected


def test_chat_reads_only_what_is_new(pair, monkeypatch):
    model, tokenizer = pair
    conversation = Conversation(model, tokenizer, "a hat", 6)
    reads, forward = [], type(model).forward

    def counted(self, ids, *args, **options):
        reads.append(ids.shape[1])
        return forward(self, ids, *args, **options)

    monkeypatch.setattr(type(model), "forward", counted)
    list(conversation.say("hi"))
    length = len(TemplateChat(tokenizer).encode([*conversation.system, turn("user", "hi")]))
    assert reads[0] == length and set(reads[1:]) == {1}
    # What the cache holds of the first turn, in its own tokens, is not read again.
    held = max(conversation.prefixes._texts, key=len)
    reads.clear()
    list(conversation.say("the"))
    ids = TemplateChat(tokenizer).encode([*conversation.system, *conversation.turns[:-1]])
    common = next((i for i, (a, b) in enumerate(zip(held, ids)) if a != b), len(held))  # noqa: B905
    assert common >= length and reads[0] == len(ids) - common


def test_chat_ctrl_c_stops_the_answer(pair, monkeypatch, capsys):
    """What was shown is remembered; a second one at the prompt gives up a line, nothing more."""
    stream = chat_command.stream

    def interrupted(*args, **options):
        for count, piece in enumerate(stream(*args, **options)):
            if count == 2:
                raise KeyboardInterrupt
            yield piece

    conversations = []
    real = chat_command.Conversation

    def made(*args, **options):
        conversations.append(real(*args, **options))
        monkeypatch.setattr(chat_command, "stream", interrupted)
        return conversations[0]

    monkeypatch.setattr(chat_command, "Conversation", made)
    typed(monkeypatch, "hi", KeyboardInterrupt(), "the")
    assert cli.main(["chat", "somewhere", "--max-new-tokens", "50"]) == 0
    _, first, _, second = capsys.readouterr().out.rstrip("\n").split("\n")
    assert first.endswith(" (stopped)") and second.endswith(" (stopped)")
    turns = conversations[0].turns
    assert [t["role"] for t in turns] == ["user", "assistant"] * 2
    assert turns[1]["content"] == first.removesuffix(" (stopped)") != ""


def test_chat_forgets_the_oldest_turns_when_the_context_is_full(pair):
    model, tokenizer = pair
    conversation = Conversation(model, tokenizer, "a hat", 40)
    for number in range(8):
        list(conversation.say(f"{number} " + "the hat " * 5))
    contents = [t["content"] for t in conversation.turns]
    assert contents[-2].startswith("7 ") and not contents[0].startswith("0 ")
    assert len(TemplateChat(tokenizer).encode(conversation.system + conversation.turns)) <= 400
    with pytest.raises(ValueError, match="tokens exceed the context of 400"):
        list(conversation.say("hat" * 400))
    assert [t["content"] for t in conversation.turns] == contents


def test_chat_goes_on_after_a_message_it_cannot_take(pair, monkeypatch, capsys):
    typed(monkeypatch, "hat" * 400, "hi")
    assert cli.main(["chat", "somewhere", "--max-new-tokens", "5"]) == 0
    _, refused, answer = capsys.readouterr().out.splitlines()
    assert refused.startswith("(") and refused.endswith("tokens exceed the context of 400)")
    assert answer == expected_answer(*pair, [turn("user", "hi")], 5)


def test_chat_with_role_markers(pair, tiny_tokenizer):
    model, _ = pair
    tokenizer = Tokenizer(tiny_tokenizer._inner, eos="<|end|>")
    with pytest.raises(ValueError, match=r"call RoleChat\.mark"):
        Conversation(model, tokenizer, None, 5)
    marked = RoleChat.mark(tokenizer)
    model.resize_vocab(len(tokenizer))
    answer = "".join(Conversation(model, tokenizer, None, 5).say("hi"))
    ids = torch.tensor([marked.encode([turn("user", "hi")])])
    new = generate(model, ids, max_new_tokens=5, stop=[0, *marked.stop_ids])[0, ids.shape[1] :]
    ends = (0, *marked.stop_ids)
    assert answer == tokenizer.decode(t for t in new.tolist() if t not in ends)


def test_chat_refuses(pair, capsys):
    assert cli.main(["chat", "somewhere", "--top-p", "0.5"]) == 1
    assert "llmcore chat: top_p chooses nothing at temperature 0" in capsys.readouterr().err


def test_chat_process(tiny_decoder, tiny_tokenizer, tmp_path):
    """SIGINT amid a real answer, another question, and the end of the input."""
    model = tiny_decoder(vocab_size=len(tiny_tokenizer), context_length=60_000, eos_ids=())
    save(model, tiny_tokenizer, tmp_path / "model")
    # A process that was started in the background ignores SIGINT, and so would its children.
    code = (
        "import signal, sys; from llmcore import cli; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "chat", str(tmp_path / "model"), "--threads", "1",
         "--max-new-tokens", "20000", "--temperature", "1.5"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, errors="replace",
    )  # fmt: skip
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    process.stdout.readline()
    for _ in range(2):
        process.stdin.write("hi\n")
        process.stdin.flush()
        assert process.stdout.read(20)  # the answer has begun
        process.send_signal(signal.SIGINT)
        text = ""
        while "(stopped)" not in text:
            piece = process.stdout.read(1)
            assert piece, f"the output ends after {text!r}"
            text += piece
    process.stdin.close()
    assert process.wait(600) == 0
    watchdog.cancel()
    process.stdout.close()
