"""Anthropic's protocol, over the same chats as OpenAI's."""
