"""All experts of a layer on an accelerator in two launches."""
