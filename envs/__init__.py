"""What an agent acts on: tasks, tools, sandbox, retrieval, grading, and the env contract (`envs.base`)."""
