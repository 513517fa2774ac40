"""Where a model's files are: a folder of this disk, or a repository at the hub and the cache its files arrive in.

What the files say is read elsewhere, but for shards' headers, which alone are asked of a repository before a plan.
"""
