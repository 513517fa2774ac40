"""Prompts, conversations and replies; no terminal, no web."""
