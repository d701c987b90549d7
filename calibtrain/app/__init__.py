"""A certified model behind a page for people and an OpenAI-compatible API for programs."""
