"""Subcommands of ``lightning-moe`` that train nothing; :mod:`lightning_moe.cli` passes them their arguments."""
