"""``mia-audit`` and ``python -m mia_utils.audit``: which of the commands is meant."""

import sys

from mia_utils.audit import cli


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["views"], ["outputs"], ["canaries"]):
        from mia_utils.audit import commands  # torch takes seconds, and an audit's --help needs none

        return commands.main(argv)
    return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main())
