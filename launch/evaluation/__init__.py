"""How well an agent acts on tasks that it has not learned from. The command is `launch/evaluate.py`."""
