"""What a person sees while a job runs, and what machines are told of it; `launch.live.view` has both."""
