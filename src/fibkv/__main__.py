"""``python -m fibkv`` is the command ``fibkv``."""

from fibkv.cli import main

main()
