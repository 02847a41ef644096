"""The subcommands of ``helix``."""
