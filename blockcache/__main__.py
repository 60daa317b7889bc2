"""`python -m blockcache` is the command `blockcache`."""

from blockcache.pipelines.cli import main

if __name__ == "__main__":
    main()
