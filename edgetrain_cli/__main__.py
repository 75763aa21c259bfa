"""`python -m edgetrain_cli` (and so `torchrun -m edgetrain_cli`) is the command `edgetrain`."""

from edgetrain_cli.app import main

if __name__ == "__main__":
    main()
