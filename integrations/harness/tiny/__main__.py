"""Write a tiny random checkpoint folder: `python -m compactdist_harness.tiny FOLDER --model flux`."""

from __future__ import annotations

import argparse
from pathlib import Path

from compactdist_harness.tiny import SAVABLE, save


def main() -> None:
    parser = argparse.ArgumentParser("compactdist_harness.tiny", description="Write a tiny random checkpoint folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=SAVABLE, required=True)
    args = parser.parse_args()
    save(args.model, args.folder)


if __name__ == "__main__":
    main()
