"""The ways a call's parts travel, each a list of outgoing and incoming parts and one inner call; the engine drives all.

To add a collective: a file here with a class that says what its plan is (``Pattern.plan``) and how its frames travel
(``Pattern.transfer``), and its ProcessGroup method in ``group/process_group.py``.
"""
