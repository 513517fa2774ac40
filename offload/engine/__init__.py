"""Plans carried out: the hook that transformers calls, the runtime behind it, transfers and their threads.

Nothing here decides; `offload/decide/` does.
"""
