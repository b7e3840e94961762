"""One file per communication pattern: how frames of a call travel on the inner group."""
