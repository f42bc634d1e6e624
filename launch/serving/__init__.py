"""An agent behind HTTP: what `launch/serve.py` and `launch/ask.py` are made of."""
