"""The ``shira`` command: a file per subcommand. ``arguments.py`` parses without loading torch."""
