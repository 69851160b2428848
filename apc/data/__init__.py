"""Texts and models: token windows, FFNs and hooks, GGUF files, what is bundled."""
