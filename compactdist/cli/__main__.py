"""``python -m compactdist.cli`` is the ``compactdist`` command."""

from compactdist.cli import main

main()
