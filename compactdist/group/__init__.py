"""The wrapped group: a ProcessGroup whose calls become exchanges, its keys and its life."""
