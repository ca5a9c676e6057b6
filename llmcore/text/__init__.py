"""Text to token ids and back, and conversations to token ids."""

from llmcore.text.chat import RoleChat, TemplateChat
from llmcore.text.tokenizer import TextStream, Tokenizer

__all__ = ["RoleChat", "TemplateChat", "TextStream", "Tokenizer"]
