"""Where the parts of a model are put together: nothing here decides, stores or computes."""
