"""The command `mopo` and its subcommands."""
