"""OpenAI's Responses protocol, over the same chats: each request says its whole conversation, and nothing is stored."""
