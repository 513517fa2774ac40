"""The command line: the only folder that imports typer or prints tables."""
