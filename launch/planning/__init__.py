"""What a job would take, told before anything starts: places, memory, time, cost. The command is `launch/plan.py`."""
