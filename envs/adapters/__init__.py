"""The envs in other people's words, one module a library; each is imported only by who uses that library.

gymnasium_adapter   gymnasium.make("envs.adapters.gymnasium_adapter:apprentice/Code-v0", tasks=[...])
smolagents_adapter  a distilled student, or any model, as a smolagents CodeAgent on our tools in our sandbox
trl_adapter         environment_factory= and reward_funcs= of TRL's GRPOTrainer
http_server         sessions behind HTTP and WebSocket in OpenEnv's protocol: python -m envs.adapters serve
http_client         HttpEnv: an env of such a server, in another process or on another machine
"""
