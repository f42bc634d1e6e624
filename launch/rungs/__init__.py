"""What a ladder (`launch.ladder`) is made of: its configuration, its runs, and the table of what each step adds."""
