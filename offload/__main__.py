"""`python -m offload` is the `offload` command."""

from offload.terminal.main import main

if __name__ == "__main__":
    main()
