"""`python -m reroute_kernels`: the command line."""

from reroute_kernels.cli import main

if __name__ == "__main__":
    main()
