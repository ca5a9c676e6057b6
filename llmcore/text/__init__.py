"""Text to token ids and back, and conversations to token ids."""

from llmcore.text.chat import RoleChat, TemplateChat, chat_of
from llmcore.text.tokenizer import TextStream, Tokenizer
from llmcore.text.word_pieces import WordPieces

__all__ = ["RoleChat", "TemplateChat", "TextStream", "Tokenizer", "WordPieces", "chat_of"]
