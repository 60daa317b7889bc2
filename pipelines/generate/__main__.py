"""`accelerate launch -m blockcache.pipelines.generate` is the command `blockcache generate`."""

from blockcache.pipelines.cli import main

if __name__ == "__main__":
    import sys

    main(["generate", *sys.argv[1:]])
