"""The command line: `shoal train|resume|evaluate|check|runs|show|replay|control|bench`. It stays light until a command needs more."""

from shoal.cli.main import main

__all__ = ["main"]
